import json
from pathlib import Path

import pytest

from app.config.data import ChatTemplateConfig, PacosTemplateConfig
from app.data.prompts import (
    AlpacaTemplate,
    ChatTemplate,
    PacosTemplate,
    RawTemplate,
    Segment,
    resolve_template,
    template_from_json,
)
from app.data.records import Conversation, Instruction, Message, Text
from app.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = [PacosTemplate(), AlpacaTemplate(), RawTemplate(), ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})]
TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
        Message("assistant", "So long"),
    )
)


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def test_the_projects_template() -> None:
    prompt, response = PacosTemplate().segments(Instruction("Add.", "2 and 3", "5"))
    assert prompt == Segment("Instruction: Add.\nInput: 2 and 3\nResponse:", in_loss=False)
    assert response == Segment(" 5", in_loss=True, ends=True)


def test_stanfords_two_prompts_word_for_word() -> None:
    assert AlpacaTemplate().prompt("Add.", "2 and 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:"
    )
    assert AlpacaTemplate().prompt("Add.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )


def test_raw_text_stays_as_it_is_written() -> None:
    segments = RawTemplate().segments(Instruction("Q: a\nA:", "", " b\n"))
    assert segments == [Segment("Q: a\nA:", in_loss=False), Segment(" b\n", in_loss=True, ends=True)]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.type)
def test_a_question_at_serving_time_has_the_prompt_of_its_record(template) -> None:
    for input in ("", "x"):
        assert template.segments(Instruction("a", input, "b"))[0].text == template.prompt("a", input)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.type)
def test_every_assistants_turn_is_in_the_loss_and_nothing_else(template) -> None:
    learned = [segment.text.strip() for segment in template.segments(TALK) if segment.in_loss]
    assert [turn.removesuffix("<|im_end|>") for turn in learned] == ["Hello", "So long"]
    assert text(template.segments(TALK)).index("Be brief.") < text(template.segments(TALK)).index("Hi")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.type)
def test_plain_text_is_learned_whole_in_any_template(template) -> None:
    assert template.segments(Text("All of it. ")) == [Segment("All of it. ", in_loss=True, ends=True)]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.type)
def test_a_template_travels_as_json(template) -> None:
    copy = template_from_json(json.loads(json.dumps(template.to_json())))
    assert copy == template and copy.segments(TALK) == template.segments(TALK)


def test_a_chats_own_end_is_learned_and_the_line_break_behind_it_is_not() -> None:
    assert ChatTemplate(CHATML).segments(Instruction("a", "", "b")) == [
        Segment("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", in_loss=False),
        Segment("b<|im_end|>", in_loss=True),
        Segment("\n", in_loss=False),
    ]


def test_a_chat_template_that_never_ends_an_answer_gets_an_end_of_text() -> None:
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    assert ChatTemplate(jinja).segments(Instruction("a", "", "b"))[1] == Segment("b", in_loss=True, ends=True)


def test_it_renders_as_transformers_does(tmp_path: Path, tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    # tags and options that templates in the wild rely on
    tokenizer.chat_template = (
        "{%- for message in messages %}\n"
        "    {%- if message['role'] == 'assistant' %}\n"
        "        {% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}\n"
        "    {%- else %}{{ '<' ~ message.role ~ '>' ~ message.content | tojson }}{%- endif %}\n"
        "{%- endfor %}{%- if add_generation_prompt %}{{ '<assistant>' }}{%- endif %}"
    )
    jinja = tokenizer.chat_template.replace("{% generation %}", "{% generation %}<assistant>")
    tokenizer.chat_template = jinja
    messages = [{"role": m.role, "content": m.content} for m in TALK.messages]
    template = ChatTemplate(jinja, {"eos_token": "<|endoftext|>"})
    assert text(template.segments(TALK)) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    with pytest.raises(UserError, match="writes a conversation's beginning differently"):
        ChatTemplate("{{ messages | length }}: {{ messages[-1].content }}").segments(TALK)


def test_a_template_that_leaves_the_answer_out_is_refused() -> None:
    with pytest.raises(UserError, match="leaves the answer out"):
        ChatTemplate("{{ messages[0].content }}").segments(Instruction("a", "", "b"))


def test_a_template_from_elsewhere_runs_in_a_sandbox() -> None:
    with pytest.raises(UserError, match="refuses this conversation.*unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").prompt("?")
    with pytest.raises(UserError, match="refuses this conversation.*(unsafe|not safely callable)"):
        ChatTemplate("{{ messages.append(messages[0]) }}{{ messages | length }}").prompt("?")


def test_a_damaged_template_and_one_that_objects_are_told() -> None:
    with pytest.raises(UserError, match="not valid Jinja"):
        ChatTemplate("{% for %}").prompt("?")
    with pytest.raises(UserError, match="no system message, please"):
        ChatTemplate("{{ raise_exception('no system message, please') }}").prompt("?")


def test_a_chat_template_comes_from_the_tokenizer_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "T {{ eos_token }}", "eos_token": {"content": "</s>"}})
    )
    assert resolve_template(ChatTemplateConfig(), tokenizer_folder=tmp_path).prompt("?") == "T </s>"
    (tmp_path / "chat_template.jinja").write_text("beside it")
    assert resolve_template(ChatTemplateConfig(), tokenizer_folder=tmp_path).prompt("?") == "beside it"
    (tmp_path / "mine.jinja").write_text("mine")
    config = ChatTemplateConfig(file=str(tmp_path / "mine.jinja"))
    assert resolve_template(config, tokenizer_folder=tmp_path).prompt("?") == "mine"
    assert resolve_template(PacosTemplateConfig(), tokenizer_folder=tmp_path) == PacosTemplate()


def test_a_chat_template_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat_template; give one in template.file"):
        resolve_template(ChatTemplateConfig(), tokenizer_folder=tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        resolve_template(ChatTemplateConfig(file=str(tmp_path / "absent")), tokenizer_folder=tmp_path)
    with pytest.raises(UserError, match="'martian' is not known"):
        template_from_json({"type": "martian"})
