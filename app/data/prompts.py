"""Templates: how a record, or a question at serving time, becomes text.

A template renders a record into segments, each wholly in the loss or wholly out of it, and a question into the prompt
that the record would have had. It travels as JSON in the manifest of the shards and in every delta trained on them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from app.config.data import ChatTemplateConfig, TemplateConfig
from app.data.records import Instruction, Message, Record, Text
from app.errors import UserError
from app.foreign_json import read_json


class Segment(NamedTuple):
    text: str
    in_loss: bool
    ends: bool = False
    """Whether an end of text, in the loss too, belongs behind it."""


class Template(Protocol):
    def prompt(self, instruction: str, input: str = "") -> str:
        """What the model reads before it answers."""
        ...

    def conversation(self, messages: Sequence[Message], input: str = "") -> list[Segment]:
        """What the model reads before it answers the last of `messages`: what training put before that answer.

        `input` is that message's, as an instruction has one.

        Raises:
            UserError: the template has no place for such messages.
        """
        ...

    def segments(self, record: Record) -> list[Segment]:
        """A record as the model is to see it. Tokenized one by one: BPE would merge across the seams."""
        ...

    def to_json(self) -> dict[str, Any]:
        """For `template_from_json`."""
        ...


class _Plain:
    """A template that is a frame around each instruction, and the responses with an end of text."""

    type: str
    before_response = ""
    is_verbatim = False
    """Whether white space around prompts and responses stays as the author wrote it."""

    def prompt(self, instruction: str, input: str = "") -> str:
        raise NotImplementedError

    def conversation(self, messages: Sequence[Message], input: str = "") -> list[Segment]:
        roles = [message.role for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise UserError(
                f"messages of {', '.join(roles)}: the template {self.type!r} has a place for one system message, then "
                "user and assistant in turn, the user last"
            )
        *before, _ = self._segments_of((*messages, Message("assistant", "")), last_input=input)
        return before

    def segments(self, record: Record) -> list[Segment]:
        if isinstance(record, Text):
            return [Segment(record.text, in_loss=True, ends=True)]
        if isinstance(record, Instruction):
            clean = str if self.is_verbatim else str.strip
            return self._turn(self.prompt(clean(record.instruction), record.input), clean(record.output))
        return self._segments_of(record.messages)

    def _segments_of(self, messages: Sequence[Message], *, last_input: str = "") -> list[Segment]:
        system, turns = _without_system(messages)
        segments = []
        for index in range(0, len(turns), 2):
            input = last_input if index + 2 == len(turns) else ""
            content = turns[index].content
            prompt = self._later(_join(content, input)) if index else system + self.prompt(content, input)
            segments += self._turn(prompt, turns[index + 1].content)
        return segments

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type}

    def _turn(self, prompt: str, response: str) -> list[Segment]:
        return [Segment(prompt, in_loss=False), Segment(self.before_response + response, in_loss=True, ends=True)]

    def _later(self, instruction: str) -> str:
        """The prompt of a turn that is not the first."""
        return self.prompt(instruction)


@dataclass(frozen=True)
class PacosTemplate(_Plain):
    type = "pacos"
    before_response = " "  # it belongs to the response's first word, as byte-level BPE has it

    def prompt(self, instruction: str, input: str = "") -> str:
        return f"Instruction: {instruction}\nInput: {input}\nResponse:"


@dataclass(frozen=True)
class AlpacaTemplate(_Plain):
    """Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, train.py."""

    type = "alpaca"

    def prompt(self, instruction: str, input: str = "") -> str:
        task = "Below is an instruction that describes a task"
        request = "Write a response that appropriately completes the request."
        if not input:
            return f"{task}. {request}{self._later(instruction)}"
        return (
            f"{task}, paired with an input that provides further context. {request}"
            f"\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )

    def _later(self, instruction: str) -> str:
        return f"\n\n### Instruction:\n{instruction}\n\n### Response:"


@dataclass(frozen=True)
class RawTemplate(_Plain):
    type = "raw"
    is_verbatim = True

    def prompt(self, instruction: str, input: str = "") -> str:
        return _join(instruction, input)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template over `messages`, in a sandbox: it comes with a model, from elsewhere."""

    jinja: str
    variables: Mapping[str, str] = field(default_factory=dict)
    """The tokenizer's special tokens by name (`bos_token`, `eos_token`), which templates use."""
    type = "chat"

    def prompt(self, instruction: str, input: str = "") -> str:
        return self._render([Message("user", _join(instruction, input))], add_generation_prompt=True)

    def conversation(self, messages: Sequence[Message], input: str = "") -> list[Segment]:
        *before, last = messages
        asked = [*before, Message(last.role, _join(last.content, input))]
        return [Segment(self._render(asked, add_generation_prompt=True), in_loss=False)]

    def segments(self, record: Record) -> list[Segment]:
        if isinstance(record, Text):
            return [Segment(record.text, in_loss=True, ends=True)]
        messages: Sequence[Message]
        if isinstance(record, Instruction):
            user = Message("user", _join(record.instruction, record.input))
            messages = [user, Message("assistant", record.output)]
        else:
            messages = record.messages
        segments: list[Segment] = []
        done = ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            after = self._render(messages[: index + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(
                    "template.type='chat': the template writes a conversation's beginning differently once it goes on, "
                    "so no one can tell which part is the answer; give another with template.file"
                )
            if not after[len(before) :].strip():
                raise UserError("template.type='chat': the template leaves the answer out; give another")
            segments += [Segment(before[len(done) :], in_loss=False), *self._response(after[len(before) :])]
            done = after
        return segments

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "jinja": self.jinja, "variables": dict(self.variables)}

    def _response(self, text: str) -> list[Segment]:
        """Line breaks that the template puts behind an answer are not part of it."""
        answer = text.rstrip()
        is_ended = any(token and answer.endswith(token) for token in self._ends)
        behind = [Segment(text[len(answer) :], in_loss=False)] if is_ended and len(answer) < len(text) else []
        return [Segment(answer, in_loss=True, ends=not is_ended), *behind]

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """What the template may end an answer with: the tokenizer's end of text, and the marks of chat formats."""
        marks = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
        return (self.variables.get("eos_token", ""), *(mark for mark in marks if mark in self.jinja))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except TemplateError as error:
            raise UserError(f"template.type='chat': the template refuses this conversation: {error}") from None

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        # The options, functions and tags that `transformers` gives such templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(self.jinja)
        except TemplateError as error:
            raise UserError(f"template.type='chat': the template is not valid Jinja: {error}") from None


def resolve_template(config: TemplateConfig, *, tokenizer_folder: Path) -> Template:
    """The template that a configuration means.

    Raises:
        UserError: a chat template is asked for and none is there, or it is damaged.
    """
    if not isinstance(config, ChatTemplateConfig):
        return template_from_json(config.model_dump())
    settings = _read_tokenizer_config(tokenizer_folder)
    if config.file:
        try:
            jinja = Path(config.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"template.file={config.file!r} cannot be read: {error}") from None
    else:
        beside = tokenizer_folder / "chat_template.jinja"
        jinja = beside.read_text(encoding="utf-8") if beside.is_file() else settings.get("chat_template", "")
    if not isinstance(jinja, str) or not jinja:
        raise UserError(
            f"template.type='chat': the tokenizer in {tokenizer_folder} has no chat_template; give one in template.file"
        )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: _token_text(settings[name]) for name in names if settings.get(name)}
    template = ChatTemplate(jinja, tokens)
    template.prompt("?")  # a template that does not even render is told here
    return template


def template_from_json(values: Mapping[str, Any]) -> Template:
    """What `Template.to_json` gave.

    Raises:
        UserError: it is of a kind that this version does not know.
    """
    kinds: dict[str, Template] = {kind.type: kind() for kind in (PacosTemplate, AlpacaTemplate, RawTemplate)}
    if values["type"] == "chat":
        return ChatTemplate(values["jinja"], values["variables"])
    if values["type"] not in kinds:
        raise UserError(f"the template {values['type']!r} is not known; one of {', '.join(kinds)}, chat")
    return kinds[values["type"]]


def _without_system(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    first, *rest = messages
    if first.role != "system":
        return "", messages
    return f"{first.content}\n\n" if first.content else "", rest


def _join(instruction: str, input: str) -> str:
    return f"{instruction}\n\n{input}" if input else instruction


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    try:
        return read_json(file) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _token_text(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)


def _generation_tag() -> type:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}` … `{% endgeneration %}`, which marks an answer; we find it by rendering twice."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation
