"""One model that answers requests: text in, text out. Knows no Ray and no HTTP."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from app.data.prompts import Template
from app.data.records import Message
from app.data.tokenization import Tokenizer
from app.engine.events import ContextLengthExceeded, Event, InvalidRequest
from app.engine.front import EngineFront
from app.engine.sampling import Sampling
from app.errors import UserError
from app.serving.messages import (
    ChatPrompt,
    GenerateRequest,
    ModelInfo,
    Piece,
    Prompt,
    PromptInfo,
    TokenLogprob,
)
from app.serving.streams import merge
from app.serving.text_stream import TextStream


@dataclass
class _Answer:
    """One choice on its way."""

    text: TextStream
    num_tokens: int = 0
    """Whose text is still held back."""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class ServedModel:
    """A name's tokenizer and template over an engine, which other names may share; `delta` is the engine's name of its
    own part."""

    def __init__(
        self,
        info: ModelInfo,
        front: EngineFront,
        tokenizer: Tokenizer,
        token_bytes: Sequence[bytes],
        template: Template,
        *,
        delta: str | None = None,
    ) -> None:
        self.info = info
        self.front = front
        self.tokenizer = tokenizer
        self.template = template
        self.delta = delta
        self._token_bytes = token_bytes

    async def encode(self, request: GenerateRequest) -> list[tuple[list[int], PromptInfo]]:
        """Token ids of each prompt. Long texts take a while, so this is off the event loop.

        Raises:
            InvalidRequest: the template has no place for a conversation, or a question leaves no room.
        """
        return await asyncio.to_thread(lambda: [self._encode(prompt, request.max_tokens) for prompt in request.prompts])

    async def generate(
        self, request: GenerateRequest, prompts: Sequence[list[int]]
    ) -> AsyncGenerator[tuple[Piece, ...], None]:
        """Pieces of all prompts' answers as they come, at most one for each answer at once.

        Raises:
            InvalidRequest, UnknownDelta, QueueFull, GenerationFailed, EngineStopped: as `EngineFront.generate`; one
                prompt's exception ends all.
        """
        answers = [self._answers(index * request.n, ids, request) for index, ids in enumerate(prompts)]
        stream = answers[0] if len(answers) == 1 else merge(answers)
        async with aclosing(stream):
            async for pieces in stream:
                yield pieces

    def retry_after_s(self) -> int:
        """Seconds until a refused request has a chance: until those that wait now are done."""
        return max(1, min(60, math.ceil(self.front.stats().queued_s)))

    async def _answers(
        self, first: int, ids: list[int], request: GenerateRequest
    ) -> AsyncGenerator[tuple[Piece, ...], None]:
        """Of the `n` answers to one prompt, of which the first is choice `first`."""
        answers = [_Answer(TextStream(self.tokenizer, stop=request.stop)) for _ in range(request.n)]
        async with aclosing(self.front.batches(ids, self._sampling(request), self.delta)) as batches:
            async for batch in batches:
                if pieces := self._pieces(first, answers, batch):
                    yield pieces

    def _pieces(self, first: int, answers: Sequence[_Answer], batch: Sequence[Event]) -> tuple[Piece, ...]:
        """At most one for each answer."""
        pieces: dict[int, Piece] = {}
        for event in batch:
            piece = self._piece(first + event.index, answers[event.index], event)
            if piece.text or piece.finish_reason:
                earlier = pieces.get(event.index)
                pieces[event.index] = piece if earlier is None else earlier.followed_by(piece)
        return tuple(pieces.values())

    def _piece(self, index: int, answer: _Answer, event: Event) -> Piece:
        """What `event` makes certain of the answer; without text while that is held back."""
        new = ""
        if event.token is not None:
            answer.num_tokens += 1
            new = answer.text.push(event.token)
            if event.logprob is not None:
                answer.logprobs.append(self._logprob(event.token, event.logprob, event.top_logprobs))
        if event.finish_reason and not answer.text.stopped:
            new += answer.text.finish()
        reason = "stop" if event.finish_reason and answer.text.stopped else event.finish_reason
        if not (new or reason):
            return Piece(index, "", 0)
        piece = Piece(index, new, answer.num_tokens, reason, tuple(answer.logprobs), event.step)
        answer.num_tokens, answer.logprobs = 0, []
        return piece

    def _sampling(self, request: GenerateRequest) -> Sampling:
        """
        Raises:
            InvalidRequest: a bias of a token that only the model has, whose vocabulary may be filled up.
        """
        known = len(self._token_bytes)
        if (strange := next((token for token in request.logit_bias if token >= known), None)) is not None:
            message = f"logit_bias: token id {strange} is outside the vocabulary of {known}"
            raise InvalidRequest(message, param="logit_bias")
        return Sampling(
            max_tokens=request.max_tokens,
            n=request.n,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            seed=request.seed,
            end_id=self.tokenizer.end_id,
            ignore_eos=request.ignore_eos,
            stop=request.stop,
            logprobs=request.logprobs,
        )

    def _logprob(self, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
        content = self._token_bytes[token] if token < len(self._token_bytes) else b""
        text = content.decode(errors="replace") if content else self.tokenizer.decode([token], keep_special=True)
        return TokenLogprob(text, tuple(content), logprob, tuple(self._logprob(*likely) for likely in top))

    def _encode(self, prompt: Prompt, max_tokens: int) -> tuple[list[int], PromptInfo]:
        if isinstance(prompt, ChatPrompt):
            return self._encode_conversation(prompt, max_tokens)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return ids, PromptInfo(len(ids))

    def _encode_conversation(self, prompt: ChatPrompt, max_tokens: int) -> tuple[list[int], PromptInfo]:
        """The template with as many passages as leave room for the answer, which gets half the context at most.

        Raises:
            InvalidRequest: the template has no place for such a conversation.
            ContextLengthExceeded: the messages alone leave no room.
        """
        context_length = self.info.context_length
        room = min(max_tokens, context_length // 2)
        messages = [Message(message.role, self._without_marks(message.content)) for message in prompt.messages]
        ids = self._render(messages, ())
        if len(ids) >= context_length:
            raise ContextLengthExceeded(prompt_length=len(ids), context_length=context_length)
        num_passages = 0
        for count in range(1, len(prompt.passages) + 1):
            longer = self._render(messages, prompt.passages[:count])
            if len(longer) + room > context_length:
                break
            ids, num_passages = longer, count
        return ids, PromptInfo(len(ids), num_passages)

    def _render(self, messages: Sequence[Message], passages: Sequence[str]) -> list[int]:
        # On one line, as in the records that models are tuned on; so no passage can forge a line of the template.
        lines = (" ".join(self._without_marks(text).split()) for text in passages)
        try:
            segments = self.template.conversation(messages, " ".join(lines))
        except UserError as error:
            raise InvalidRequest(str(error)) from None
        ids: list[int] = []
        for segment in segments:  # one by one, as training encodes them: BPE would merge across the seams
            ids += self.tokenizer.encode(segment.text)
            if segment.ends:
                ids.append(self.tokenizer.end_id)
        return ids

    def _without_marks(self, text: str) -> str:
        """`text` without what the tokenizer takes for its own marks, such as the end of text."""
        for token in self.tokenizer.special_tokens:
            text = text.replace(token, " ")
        return text.strip()
