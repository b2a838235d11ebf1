"""Every failure as OpenAI's error object. Knows HTTP and FastAPI, not what failed."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.messages import INTERNAL_ERROR, Refusal
from app.serving.openai_schema import COMBINATION, UNSUPPORTED, error_response
from app.serving.request_log import note


class ApiError(Exception):
    """Ends a request with `refusal` as its answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refuse(refusal: Refusal) -> JSONResponse:
    note(error=refusal.code)
    headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_response(refusal).model_dump(), status_code=refusal.status, headers=headers)


def add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return refuse(error.refusal)

    @api.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(_invalid(error.errors()))

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code, "http_error")
        message = error.detail
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path}: {error.detail.lower()}; /docs lists what there is"
        response = refuse(Refusal(error.status_code, message, code=code))
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of the path's first route alone
            response.headers["Allow"] = ", ".join(sorted(_methods(api, request.scope)))
        return response

    @api.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return refuse(INTERNAL_ERROR)  # the framework logs the traceback


def _methods(api: FastAPI, scope: Scope) -> set[str]:
    """That some route takes at this path."""
    fitting = (route for route in api.routes if isinstance(route, Route | APIRoute))
    return {method for route in fitting if route.matches(scope)[0] != Match.NONE for method in route.methods or ()}


class BodyLimit:
    """ASGI middleware: a request body over `max_bytes` gets a 413, before the rest of it is read. Below the path of
    `uploads` its own limit counts."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, uploads: tuple[str, int]) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._uploads_path, self._uploads_max_bytes = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        max_bytes, setting = self._max_bytes, "max_body_bytes"
        if scope["path"].startswith(self._uploads_path):
            max_bytes, setting = self._uploads_max_bytes, "retriever.uploads.max_bytes"
        message = f"the request body is larger than {max_bytes} bytes, this server's {setting}"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > max_bytes:
            return await refuse(Refusal(413, message, code="body_too_large"))(scope, receive, send)
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > max_bytes:
                raise HTTPException(413, message)
            return part

        await self.app(scope, limited_receive, send)


def _invalid(errors: Any) -> Refusal:
    """What is wrong with a body, field by field: 400 for parameters that are not supported, or not together, else 422,
    for what /openapi.json does not allow."""
    for error in errors:
        if error["type"] in (UNSUPPORTED, COMBINATION):
            return Refusal(400, error["msg"], code=error["type"], param=error["ctx"]["param"])
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(422, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if isinstance(first.get("input"), bytes):
        return Refusal(422, "send JSON with the header Content-Type: application/json", code="invalid_json")
    messages = dict.fromkeys(f"{_field(error) or 'body'}: {error['msg']}" for error in errors)
    return Refusal(422, "; ".join(messages), code="invalid_value", param=_field(first))


def _field(error: Mapping[str, Any]) -> str | None:
    """The parameter; what follows in the location is pydantic's way through its union."""
    location = [part for part in error["loc"] if part != "body"]
    return str(location[0]) if location else None
