"""`pacos quantize`: the folder, the table, and what it refuses."""

from pathlib import Path

import pytest

from app.cli import main
from app.config import load_config
from app.config.transfer import QuantizeConfig
from app.errors import UserError
from app.models.checkpoints import load_decoder, read_provenance, weights_hash
from app.models.quantization import quantized_bytes
from app.training.quantizing import run


@pytest.mark.parametrize("scheme", ["int8_static", "nf4"])
def test_the_folder_loads_and_both_models_are_measured(
    scheme: str, tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(model=str(tiny_model), scheme=scheme, data=str(tiny_shards), output=str(tmp_path / "small"))
    result = run(config)
    assert quantized_bytes(load_decoder(tmp_path / "small")) == result.layers
    assert result.layers.quantized < 0.4 * result.layers.fp32
    assert result.after.file_bytes < result.before.file_bytes
    assert result.after.perplexity == pytest.approx(result.before.perplexity, rel=0.05)
    assert result.after.perplexity != result.before.perplexity
    for figures in (result.before, result.after):
        assert min(figures.first_token_s, figures.token_s, figures.tokens_per_s, figures.peak_bytes) > 0
    assert read_provenance(tmp_path / "small")["quantized_hash"] == weights_hash(tiny_model)
    with pytest.raises(UserError, match="the model is quantized already"):
        run(config.model_copy(update={"model": str(tmp_path / "small"), "output": str(tmp_path / "smaller")}))


def test_the_command_prints_a_table(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"model={tiny_model}", "scheme=int8_weight", f"output={tmp_path}/small"]
    monkeypatch.setattr("sys.argv", ["pacos", "quantize", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    for line in ("layers quantized", "file", "peak memory", "first token", "each token", "tokens/s"):
        assert line in out
    assert "perplexity" not in out  # without data there is none


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["scheme=int8_static"], "needs data to calibrate on"),
        (["scheme=int9"], "scheme='int9': input should be 'int8_dynamic'"),
        (["scheme=nf4", "targets=[]"], "targets="),
        (["scheme=nf4", "calibration_records=9"], "calibration_records is for int8_static"),
        (["scheme=nf4", "max_records=9"], "max_records limits the records of data"),
    ],
)
def test_settings_that_cannot_work_are_told(overrides: list[str], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        load_config(QuantizeConfig, overrides=[f"output={tmp_path}/small", *overrides])


def test_the_model_itself_is_not_overwritten(tiny_model: Path) -> None:
    before = weights_hash(tiny_model)
    with pytest.raises(UserError, match="is what is read from"):
        run(QuantizeConfig(model=str(tiny_model), scheme="nf4", output=str(tiny_model)))
    assert weights_hash(tiny_model) == before


def test_a_target_that_matches_nothing_leaves_no_folder(tiny_model: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(model=str(tiny_model), scheme="nf4", output=str(tmp_path / "small"), targets=("q_proj",))
    with pytest.raises(UserError, match="'q_proj' matches no layer"):
        run(config)
    assert not (tmp_path / "small").exists()
