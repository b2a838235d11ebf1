"""The book as a site: `mkdocs build --strict`, to which a link or a heading that leads nowhere is an error."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation.reading import REPOSITORY

MKDOCS = shutil.which("mkdocs", path=str(Path(sys.executable).parent))

pytestmark = pytest.mark.skipif(MKDOCS is None, reason="mkdocs is not installed: pip install 'pacos[docs]'")


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [str(MKDOCS), "build", "--strict", "--config-file", project / "mkdocs.yml", "--site-dir", site]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # Material's, on its end of life
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, env=quiet)


def test_the_site_has_every_page_and_what_the_pages_link(tmp_path: Path) -> None:
    built = build(REPOSITORY, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = [file.stem for file in (REPOSITORY / "docs").glob("*.md")] + ["ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"]
    for page in pages:
        assert (tmp_path / "site" / page / "index.html").is_file(), page
    index = (tmp_path / "site/index.html").read_text()
    assert "Fine-tune and serve instruction-following language models" in index
    contents = re.findall(r'<a href="([^"]+)/" class="md-nav__link">', index)
    assert contents[:3] == ["first-run", "data", "training"] and {"benchmarks/REPORT", "ARCHITECTURE"} <= set(contents)
    assert (tmp_path / "site/images/overview.svg").is_file()
    assert (tmp_path / "site/benchmarks/results/generation.png").is_file()
    assert "images/overview.svg" in index and "docs/images/overview.svg" not in index
    assert 'href="../../engine/#speed-on-a-cpu"' in (tmp_path / "site/benchmarks/REPORT/index.html").read_text()


@pytest.mark.slow
def test_a_link_to_a_heading_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for name in ("docs", "benchmarks", "app/assets", "examples"):
        shutil.copytree(
            REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    with (tmp_path / "docs/engine.md").open("a") as page:
        page.write("\n[nowhere](data.md#absent)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0 and "absent" in built.stderr
