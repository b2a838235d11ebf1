"""The HTTP surface: routes, and the deployment that carries them."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from app import __version__
from app.config import ApplicationConfig
from app.data.records import Message
from app.serving.access import KeyRing, RequireKey
from app.serving.answering import Answering, Stopwatch
from app.serving.api_errors import ApiError, BodyLimit, add_error_handlers
from app.serving.chat_schema import ChatChunk, ChatRequest, ChatResponse, ChatStream, chat_response
from app.serving.document_routes import PATH as DOCUMENTS_PATH
from app.serving.document_routes import add_document_routes
from app.serving.draining import Doorkeeper, RefuseWhenEnding
from app.serving.embedding_schema import EmbeddingRequest, EmbeddingResponse, embedder_name, embedding_response
from app.serving.limiter import LimiterClient
from app.serving.messages import INTERNAL_ERROR, CacheResult, ChatPrompt, GenerateRequest, Piece, Refusal, Started
from app.serving.openai_schema import (
    CompletionRequest,
    CompletionResponse,
    CompletionStream,
    ErrorResponse,
    Greeting,
    Model,
    ModelList,
    completion_response,
    error_response,
    new_id,
    now,
    usage,
)
from app.serving.plain_schema import PlainRequest, PlainResponse, plain_response
from app.serving.playground import content_security_policy, page
from app.serving.request_log import LogRequests, note
from app.serving.retrieval_schema import RagRequest, RagResponse, SearchRequest, SearchResponse, Timings, sources

CACHE_HEADER = "x-pacos-cache"
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""JSON may hold these as they are, and an event too; but many clients end lines there, as Python does."""
_ERRORS: dict[int | str, dict] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A parameter is not supported, or the prompt does not fit into the context",
        401: "The server asks for an API key",
        403: "A page of another site may not upload",
        404: "No such model or document",
        409: "A document of this name is there already",
        413: "The body is too large",
        415: "A body of a kind that is not taken",
        422: "The body is not JSON, or a value has the wrong type or range",
        429: "The queue is full, or the key's limit used up; see Retry-After",
        503: "The server cannot answer just now",
        504: "The answer took longer than request_timeout_s",
        507: "The documents' disk is full",
    }.items()
}
_ASKED: dict[int | str, dict] = {status: _ERRORS[status] for status in (401, 429, 503, 504)}
"""Of routes without a body."""
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["data"],
}
_STREAMING: dict[int | str, dict] = {
    **_ERRORS,
    200: {
        "description": "The whole answer; with `stream: true` server-sent events: chunks, perhaps an error, `[DONE]`",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    },
}


@serve.ingress()
class IngressDeployment:
    def __init__(
        self,
        config: ApplicationConfig,
        generator: DeploymentHandle,
        retriever: DeploymentHandle,
        documents: DeploymentHandle | None,
        limiter: DeploymentHandle | None,
    ) -> None:
        self._limiter = None if limiter is None else LimiterClient(limiter)
        self._answering = Answering(
            config, generator=generator, retriever=retriever, documents=documents, limiter=self._limiter
        )

        self._door = Doorkeeper()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What is added last sees a request first."""
        api = create_api(self._answering)
        if self._limiter is not None:
            ring = KeyRing(self._answering.config.access)
            api.add_middleware(RequireKey, ring=ring, limiter=self._limiter)
        api.add_middleware(RefuseWhenEnding, door=self._door)
        api.add_middleware(LogRequests)
        return api

    async def close(self) -> None:
        """Take no more requests, and return once those that are here are answered."""
        await self._door.close()


def create_api(answering: Answering) -> FastAPI:
    """The routes over `answering`."""
    api = FastAPI(title="Pacos", version=__version__, description="Completions, and answers from your documents.")
    api.add_middleware(
        BodyLimit,
        max_bytes=answering.config.max_body_bytes,
        uploads=(DOCUMENTS_PATH, answering.config.retriever.uploads.max_bytes),
    )
    add_error_handlers(api)
    started_at = now()

    @api.post("/v1/completions", response_model=CompletionResponse, responses=_STREAMING)
    async def completions(body: CompletionRequest) -> Response:
        """Continue a raw prompt, as OpenAI's completions API does; `stream: true` sends server-sent events."""
        if body.stream:
            return await _streamed(answering, body.to_request(), CompletionStream(body))
        completion, cache = await answering.complete(body.to_request())
        return JSONResponse(completion_response(body, completion).model_dump(), headers={CACHE_HEADER: cache})

    @api.post("/v1/chat/completions", response_model=ChatResponse, responses=_STREAMING)
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a conversation, put into the model's own template; `stream: true` sends server-sent events."""
        found = None
        if body.rag:
            top_k = body.rag_top_k or answering.config.retriever.top_k
            found = await answering.search(body.messages[-1].content, top_k=top_k)
        passages = None if found is None else found.passages
        request = body.to_request(passages=() if found is None else found.texts)
        if body.stream:
            return await _streamed(answering, request, ChatStream(body, passages=passages))
        completion, cache = await answering.complete(request)
        citations = None if passages is None else sources(passages[: completion.prompts[0].num_passages])
        response = chat_response(body, completion, citations=citations)
        return JSONResponse(response.model_dump(), headers={CACHE_HEADER: cache})

    @api.post("/v1/search", response_model=SearchResponse, responses=_ERRORS)
    async def search(body: SearchRequest) -> Response:
        """The passages of the indexed documents that come nearest to a query."""
        found = await answering.search(body.query, top_k=body.top_k, mode=body.mode)
        return JSONResponse(SearchResponse(data=sources(found.passages), version=found.version).model_dump())

    @api.post("/v1/rag", response_model=RagResponse, responses=_ERRORS)
    async def rag(body: RagRequest) -> Response:
        """Answer a question from the indexed documents, with the passages that the answer was drawn from."""
        answer, cache = await answer_question(answering, body)
        return JSONResponse(answer.model_dump(), headers={CACHE_HEADER: cache})

    add_document_routes(api, answering, _ERRORS)

    @api.post("/v1/embeddings", response_model=EmbeddingResponse, responses=_ERRORS)
    async def embeddings(body: EmbeddingRequest) -> Response:
        """Vectors of texts, as OpenAI's embeddings API gives them."""
        if body.model != (known := embedder_name(answering.config.name)):
            message = f"no model {body.model!r} embeds here; there is {known!r}"
            raise ApiError(Refusal(404, message, code="model_not_found", param="model"))
        vectors = await answering.embed(body.texts, dimensions=body.dimensions)
        response = await asyncio.to_thread(embedding_response, body, vectors)  # a million numbers take a while
        return JSONResponse(response.model_dump())

    @api.post("/generate", response_model=PlainResponse, responses=_ERRORS)
    @api.post("/generate_text", response_model=PlainResponse, responses=_ERRORS)
    async def generate_text(body: PlainRequest) -> Response:
        """Answer an instruction, put into the model's own template."""
        return await _plain(answering, body, in_template=True)

    @api.post("/generate_text_without_prompt", response_model=PlainResponse, responses=_ERRORS)
    async def generate_text_without_prompt(body: PlainRequest) -> Response:
        """Go on with a text as it is, without a template."""
        return await _plain(answering, body, in_template=False)

    @api.get("/", response_model=Greeting, responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}})
    async def root(request: Request) -> Response:
        """The playground in a browser; elsewhere what this is."""
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(Greeting(name=answering.config.name).model_dump())
        headers = {"Content-Security-Policy": content_security_policy(), "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page(), headers=headers)

    @api.get("/v1/models", responses=_ASKED)
    async def models() -> ModelList:
        """The base model, its fine-tuned variants, and the embedder."""
        served = await answering.models()
        data = [
            Model(
                id=model.name,
                created=started_at,
                context_length=model.context_length,
                hash=model.hash,
                template=model.template,
            )
            for model in served
        ]
        return ModelList(data=[*data, Model(id=embedder_name(answering.config.name), created=started_at)])

    @api.get("/healthz", responses={503: _ERRORS[503], 504: _ERRORS[504]})
    async def health() -> dict[str, str]:
        """Whether requests can be answered: the generator is asked."""
        await answering.models()
        return {"status": "ok"}

    return api


async def _plain(answering: Answering, body: PlainRequest, *, in_template: bool) -> Response:
    model = body.model or answering.config.name
    request = body.to_request(model=model, in_template=in_template)
    completion, cache = await answering.complete(request)
    response = plain_response(model, completion, in_template=in_template)
    return JSONResponse(response.model_dump(), headers={CACHE_HEADER: cache})


async def answer_question(answering: Answering, body: RagRequest) -> tuple[RagResponse, CacheResult]:
    config, watch = answering.config, Stopwatch()
    found = await answering.search(body.question, top_k=body.top_k or config.retriever.top_k)
    retrieve_s = watch.lap()
    request = GenerateRequest(
        model=body.model or config.name,
        prompts=(ChatPrompt((Message("user", body.question),), found.texts),),
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=tuple(body.stop),
    )
    completion, cache = await answering.complete(request)
    (choice,) = completion.choices
    answer = RagResponse(
        id=new_id("rag"),
        created=now(),
        model=request.model,
        answer=choice.text.strip(),
        finish_reason=choice.finish_reason,
        sources=sources(found.passages[: completion.prompts[0].num_passages]),
        usage=usage(completion.prompt_tokens, completion.completion_tokens),
        timings=Timings(retrieve_s=retrieve_s, generate_s=watch.lap(), total_s=watch.total()),
    )
    return answer, cache


async def _streamed(
    answering: Answering, request: GenerateRequest, stream: CompletionStream | ChatStream
) -> StreamingResponse:
    """Waits for the first item, so that a refusal still has a status code of its own."""
    items = answering.stream(request)
    started = await anext(items)
    assert isinstance(started, Started)
    num_prompt_tokens = sum(prompt.num_tokens for prompt in started.prompts)
    note(model=request.model, cache=started.cache, prompt_tokens=num_prompt_tokens)
    # without these, a reverse proxy may gather the events before it sends them on
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", CACHE_HEADER: started.cache}
    return StreamingResponse(_events(stream, started, items), media_type="text/event-stream", headers=headers)


async def _events(
    stream: CompletionStream | ChatStream, started: Started, items: AsyncGenerator[Started | Piece, None]
) -> AsyncIterator[str]:
    num_tokens = 0
    try:
        if first := stream.first_chunk(started):
            yield _event(first)
        async with aclosing(items):
            async for item in items:
                assert isinstance(item, Piece)
                num_tokens += item.num_tokens
                note(completion_tokens=num_tokens)
                if chunk := stream.chunk(item):
                    yield _event(chunk)
    except Exception as error:  # the status is out already: say it in the stream, which then has no [DONE]
        refusal = error.refusal if isinstance(error, ApiError) else INTERNAL_ERROR
        note(error=refusal.code)
        yield _event(error_response(refusal))
        if not isinstance(error, ApiError):
            raise
        return
    ending = "data: [DONE]\n\n"
    if stream.request.includes_usage:
        prompt_tokens = sum(prompt.num_tokens for prompt in started.prompts)
        ending = _event(stream.usage_chunk(usage(prompt_tokens, num_tokens))) + ending
    yield ending


def _event(message: CompletionResponse | ChatChunk | ErrorResponse) -> str:
    return f"data: {json.dumps(message.model_dump(), ensure_ascii=False).translate(_LINE_ENDS)}\n\n"
