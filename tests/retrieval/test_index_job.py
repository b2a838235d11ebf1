"""The index job on a real local Ray."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from app import commands
from app.config.documents import ReadingConfig
from app.config.schema import IndexConfig, WorkersConfig
from app.errors import UserError
from app.retrieval.search import Searcher
from app.serving.index_job import build_index


@pytest.fixture
def documents(tmp_path: Path, texts: dict[str, str]) -> Path:
    folder = tmp_path / "documents"
    for name, text in (texts | {"empty.md": "", "headings.md": "# Only\n\n## Headings\n"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.ray
def test_an_index_is_built_by_workers_and_searched_without_them(
    ray_cluster: object, documents: Path, tmp_path: Path, tiny_embedder: Path
) -> None:
    config = IndexConfig(
        documents=str(documents),
        output=str(tmp_path / "index"),
        embedder=str(tiny_embedder),
        chunk_words=12,
        overlap_words=4,
        batch_size=2,
        workers=WorkersConfig(count=2, cpus=0.5),
    )
    seen: list[tuple[int, int]] = []
    summary = build_index(config, progress=lambda done, total: seen.append((done, total)))
    assert (summary["documents"], summary["width"]) == (3, 64)
    assert summary["skipped"] == ["empty.md: holds no text", "headings.md: no text below its headings"]
    total = summary["chunks"]
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted({done for done, _ in seen})
    searcher = Searcher(tmp_path / "index")
    assert (searcher.manifest.documents, searcher.manifest.chunks) == (3, total)
    # each vector stands by its own chunk, in whatever order the batches came back
    for passage in searcher.search("llamas", top_k=total):
        best = searcher.search(f"{passage.title}\n\n{passage.text}", top_k=1)[0]
        assert best.chunk == passage.chunk and best.score == pytest.approx(1, abs=1e-3)


def test_mistakes_are_reported_before_any_worker_starts(documents: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "index")
    with pytest.raises(UserError, match="no such folder or file"):
        build_index(IndexConfig(documents=str(tmp_path / "absent"), output=output))
    with pytest.raises(UserError, match="which is not ours"):
        build_index(IndexConfig(documents=str(documents), output=str(documents)))
    with pytest.raises(UserError, match=r"absent': no such folder"):
        build_index(IndexConfig(documents=str(documents), output=output, embedder="./absent"))
    with pytest.raises(UserError, match="no file has text; headings.md: no text below its headings"):
        build_index(IndexConfig(documents=str(documents / "headings.md"), output=output))
    assert not Path(output).exists()


def test_before_ray_starts_the_command_looks_for_files_and_leaves_their_content_to_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which knows the limits that were set."""
    asked: list[IndexConfig] = []
    monkeypatch.setattr(commands, "on_ray", lambda *arguments, **settings: nullcontext(True))
    monkeypatch.setattr(commands, "run_index", asked.append)
    (tmp_path / "long.txt").write_text("hay " * 1_300_000)
    config = IndexConfig(
        documents=str(tmp_path / "long.txt"),
        output=str(tmp_path / "index"),
        reading=ReadingConfig(max_characters=6_000_000),
    )
    assert len((tmp_path / "long.txt").read_text()) > ReadingConfig().max_characters
    commands.index(config, address=None)
    assert asked == [config]
    with pytest.raises(UserError, match="no such folder or file"):
        commands.index(config.model_copy(update={"documents": str(tmp_path / "absent")}), address=None)
