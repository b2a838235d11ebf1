"""`pacos generate`: a file of prompts to a file of answers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.config import GenerateConfig, load_config
from app.data.tokenization import load_tokenizer
from app.engine.engine import Engine
from app.engine.sampling import Sampling
from app.errors import UserError
from app.models.checkpoints import load_decoder
from app.serving.batch import Answerer, generate_answers, plan_answers, read_prompts

RECORDS = [
    {"id": "a", "instruction": "Name a colour.", "input": "of the sky"},
    {"id": "b", "prompt": "What is two and two?"},
    {"id": "c", "question": "Who are you?", "answer": "an old answer"},
    {"id": "d", "text": "word " * 300},
    {"id": "e", "instruction": "Sing."},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def config(prompts: Path, tiny_model: Path, *overrides: str) -> GenerateConfig:
    output = prompts.parent / "answers.jsonl"
    settings = [f"prompts={prompts}", f"output={output}", f"model={tiny_model}", "max_tokens=12", "precision=fp32"]
    return load_config(GenerateConfig, overrides=[*settings, "workers.cpus=1", *overrides])


def test_each_record_gets_the_models_answer_and_one_that_is_too_long_says_so(prompts: Path, tiny_model: Path) -> None:
    results = Answerer(config(prompts, tiny_model)).answer(RECORDS, first=0)
    assert [result["id"] for result in results] == list("abcde")
    assert "the prompt has" in results[3]["error"] and "answer" not in results[3]
    tokenizer = load_tokenizer(tiny_model)
    engine = Engine(load_decoder(tiny_model), max_batch_size=1)
    engine.add_request(
        tokenizer.encode("Instruction: Name a colour.\nInput: of the sky\nResponse:"),
        Sampling(max_tokens=12, stop_ids=frozenset({tokenizer.end_id})),
    )
    tokens = []
    while engine.has_work:
        tokens += [event.token for event in engine.step() if event.token is not None]
    assert results[0]["answer"] == tokenizer.decode(tokens).strip()
    assert results[0]["answer_tokens"] == len(tokens)
    assert results[2]["answer"] != "an old answer"


def test_drawn_answers_do_not_depend_on_how_prompts_are_divided(prompts: Path, tiny_model: Path) -> None:
    settings = config(prompts, tiny_model, "temperature=1.2", "seed=5")
    whole = Answerer(settings).answer(RECORDS, first=0)
    assert whole[3:] == Answerer(settings).answer(RECORDS[3:], first=3)
    assert whole[4] != Answerer(settings).answer(RECORDS[4:], first=0)[0]


def test_a_stop_text_ends_an_answer_and_is_not_in_it(prompts: Path, tiny_model: Path) -> None:
    free = Answerer(config(prompts, tiny_model)).answer(RECORDS[:1], first=0)[0]["answer"]
    stop = free[len(free) // 2]
    (result,) = Answerer(config(prompts, tiny_model, f"stop=['{stop}']")).answer(RECORDS[:1], first=0)
    assert result["answer"] == free[: free.index(stop)].strip() and result["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no list of prompts"),
        ("p.jsonl", "{not json\n", "cannot be read"),
        ("p.json", '{"prompt": "x"}', "holds no list of prompts"),
        ("p.json", '["x"]', "record 1 is no object"),
        ("p.jsonl", '{"prompt": "x"}\n{"other": 1}\n', "record 2 has no text in any of instruction, prompt"),
        ("p.jsonl", '{"prompt": " "}\n', "record 1 has no text"),
        ("p.txt", "\n \n", "holds no list of prompts"),
    ],
)
def test_files_without_prompts_are_told(tmp_path, tiny_model, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(config(tmp_path / name, tiny_model))


def test_prompts_stand_in_text_files_and_in_fields_of_any_name(tmp_path, tiny_model) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(config(tmp_path / "p.txt", tiny_model)) == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "p.json").write_text('[{"title": "three", "text": ""}]')
    assert read_prompts(config(tmp_path / "p.json", tiny_model, "field=title"))[0]["title"] == "three"
    strange = {"prompt": "one\u2028line, \x85 and \x0b too"}
    (tmp_path / "p.jsonl").write_text(json.dumps(strange, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(config(tmp_path / "p.jsonl", tiny_model)) == [strange]
    with pytest.raises(UserError, match="absent.jsonl.*No such file"):
        read_prompts(config(tmp_path / "absent.jsonl", tiny_model))


@pytest.mark.parametrize("line", [r'{"prompt": "one \ud83d two"}', r'{"prompt": "one", "of": [{"a\udc00": "\ud800"}]}'])
def test_half_a_surrogate_pair_is_replaced_as_in_training_data(tmp_path, tiny_model, line) -> None:
    """No tokenizer takes one, and no file of answers could hold it."""
    (tmp_path / "p.jsonl").write_text(line + "\n")
    settings = config(tmp_path / "p.jsonl", tiny_model)
    records = read_prompts(settings)
    assert records == [json.loads(re.sub(r"\\u[0-9a-f]{4}", "\ufffd", line))]
    results = Answerer(settings).answer(records, first=0)
    assert results[0]["answer_tokens"] > 0
    assert json.loads(json.dumps(results, ensure_ascii=False).encode()) == results


def test_settings_that_would_lose_something_are_refused(prompts: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="is the file of prompts"):
        config(prompts, tiny_model, f"output={prompts}")
    with pytest.raises(UserError, match="must end in .jsonl"):
        config(prompts, tiny_model, "output=answers.csv")
    settings = config(prompts, tiny_model)
    with (
        plan_answers(settings, resume=False),
        pytest.raises(UserError, match="in use by process"),
        plan_answers(settings, resume=True),
    ):
        pass
    with pytest.raises(UserError, match="answers of an earlier run; --resume"), plan_answers(settings, resume=False):
        pass
    other = config(prompts, tiny_model, "max_tokens=13")
    with pytest.raises(UserError, match="other settings"), plan_answers(other, resume=True):
        pass
    Path(settings.output).write_text("mine")
    with pytest.raises(UserError, match="is there already"), plan_answers(settings, resume=True):
        pass
    assert Path(settings.output).read_text() == "mine"


def test_a_delta_that_is_none_is_told_before_ray_starts(prompts: Path, tiny_model: Path) -> None:
    settings = config(prompts, tiny_model, "delta=absent/delta")
    with pytest.raises(UserError, match="absent/delta.* lacks delta.json"), plan_answers(settings, resume=False):
        pass
    assert not Path(f"{settings.output}.parts").exists(), "nothing is left behind"


@pytest.mark.ray
def test_a_job_answers_in_order_and_goes_on_with_the_parts_that_are_there(
    ray_cluster: None, prompts: Path, tiny_model: Path
) -> None:
    settings = config(prompts, tiny_model, "part_size=2")
    with plan_answers(settings, resume=False) as plan:
        kept = '{"id": "c", "answer": "kept"}\n{"id": "d", "answer": "too\u2028"}\n'
        (plan.folder / "00000001.jsonl").write_text(kept, encoding="utf-8")
    seen: list[tuple[int, int]] = []
    with plan_answers(settings, resume=True) as plan:
        assert plan.done == {1}
        summary = generate_answers(plan, progress=lambda *counts: seen.append(counts))
    results = [json.loads(line) for line in Path(settings.output).read_text("utf-8").strip().split("\n")]
    assert [result["id"] for result in results] == list("abcde")
    assert [result["answer"] for result in results[2:4]] == ["kept", "too\u2028"]
    alone = Answerer(settings).answer(RECORDS[:2], first=0)
    assert results[:2] == alone
    assert summary["kept from an earlier run"] == 2 and seen[0] == (2, 5) and seen[-1] == (5, 5)
    assert not plan.folder.exists()


@pytest.mark.ray
@pytest.mark.chaos
def test_a_killed_job_loses_no_part_that_was_written(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": number, "prompt": f"Say {number}."}) + "\n" for number in range(60))
    prompts.write_text(lines)
    output = tmp_path / "killed.jsonl"
    command = [
        sys.executable, "-m", "app.cli", "generate", str(prompts), f"output={output}", f"model={tiny_model}",
        "part_size=1", "max_tokens=80", "temperature=1", "max_batch_size=1", "workers.cpus=1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    parts = Path(f"{output}.parts")
    deadline = time.monotonic() + 240
    while len(list(parts.glob("0*.jsonl"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {file.name: file.read_text() for file in parts.glob("0*.jsonl")}
    assert 3 <= len(written) < 60 and not output.exists()
    assert all(json.loads(text)["answer"] is not None for text in written.values()), "no half-written part"
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["id"] for result in results] == list(range(60))
    assert all(json.loads(text) in results for text in written.values())
