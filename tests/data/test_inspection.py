import re
from pathlib import Path

import pytest

from app.config import InspectConfig, PrepareConfig
from app.data.inspection import inspect
from app.data.report import write_report
from app.data.shards import read_manifest
from app.errors import UserError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def packed(ray_cluster: None, tiny_model: Path, small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from app.data.prepare import prepare

    output = tmp_path_factory.mktemp("inspected") / "data"
    values = {"source": str(small_source), "output": str(output), "model": str(tiny_model), "max_length": 96}
    prepare(PrepareConfig.model_validate({**values, "layout": {"type": "packed", "length": 256}}))
    return output


def test_figures_are_those_of_the_manifest(packed: Path) -> None:
    inspection = inspect(InspectConfig(data=str(packed), samples=5))
    split = read_manifest(str(packed)).values["splits"]["train"]
    assert inspection.lengths.sum() == inspection.row_lengths.sum() == split["tokens"]
    assert (len(inspection.lengths), len(inspection.row_lengths)) == (split["records"], split["rows"])
    assert inspection.loss_lengths.sum() == split["loss_tokens"]
    assert inspection.fill == pytest.approx(split["tokens"] / (256 * split["rows"]))
    assert sum(count for _, count in inspection.length_bars()) == split["records"]


def test_samples_show_the_template_with_the_response_in_the_loss(packed: Path) -> None:
    samples = inspect(InspectConfig(data=str(packed), samples=5)).samples
    assert len(samples) == 5
    for sample in samples:
        prompt, response = sample.parts
        assert re.fullmatch(r"Instruction: .*\nInput: .*\nResponse:", prompt.text, re.DOTALL) and not prompt.in_loss
        assert response.text.startswith(" ") and response.text.endswith("<|endoftext|>") and response.in_loss
        assert sample.round_trips and sample.num_tokens > sample.loss_tokens > 0
    assert samples == inspect(InspectConfig(data=str(packed), samples=5)).samples
    assert samples != inspect(InspectConfig(data=str(packed), samples=5, seed=1)).samples


def test_the_report_is_one_page_that_needs_nothing_else_and_shows_text_as_text(packed: Path) -> None:
    config = InspectConfig(data=str(packed))
    path = write_report(inspect(config), config)
    page = path.read_text()
    assert path == packed / "report.html"
    assert page.count("<img src='data:image/png;base64,") == 3
    assert not re.search(r"(src|href)='?(http|/)|<script", page)
    assert "&lt;|endoftext|&gt;" in page and "<|endoftext|>" not in page
    # the report belongs to the folder: data with one can be prepared anew
    assert read_manifest(str(packed)).num_rows("train")


def test_data_without_that_split_and_a_changed_tokenizer_are_told(
    packed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    with pytest.raises(UserError, match="has no test records"):
        inspect(InspectConfig(data=str(packed), split="test"))
    copy = shutil.copytree(packed, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["model"] = "embedded"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not the one it was prepared with"):
        inspect(InspectConfig(data=str(copy)))
