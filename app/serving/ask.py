"""One question to a running endpoint, over HTTP. Needs neither Ray nor torch."""

import os
import ssl
from typing import Any

import httpx

from app.config import AskConfig
from app.errors import UserError


def ask(config: AskConfig) -> dict[str, Any]:
    """The answer: `text`, `model`, `usage`, and with `rag` also `sources`.

    Raises:
        UserError: the endpoint cannot be reached, or refuses the question.
    """
    body = {
        "model": config.model,
        "messages": [{"role": "user", "content": config.question}],
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "rag": config.rag,
    }
    return _call(config, "/v1/chat/completions", body)


def _call(config: AskConfig, path: str, body: dict[str, Any]) -> dict[str, Any]:
    key = os.environ.get("PACOS_API_KEY") if config.api_key is None else config.api_key.get_secret_value()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = config.url.rstrip("/") + path
    try:
        verify = True if config.ca_file is None else ssl.create_default_context(cafile=config.ca_file)
        response = httpx.post(url, json=body, headers=headers, timeout=config.timeout_s, trust_env=False, verify=verify)
    except httpx.TimeoutException:
        raise UserError(
            f"{url} did not answer within timeout_s={config.timeout_s:g}; raise it, or ask for less"
        ) from None
    except OSError as error:
        raise UserError(f"ca_file={config.ca_file!r} cannot be used ({error}); give a PEM file") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"url={config.url!r} cannot be reached ({error}); start an endpoint with `pacos serve`"
        ) from None
    try:
        values = response.json()
        if response.is_success:
            return _answer(values, rag=config.rag)
        message = values["error"]["message"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{url} answered {response.status_code} and not as a Pacos endpoint does; is url={config.url!r} right?"
        ) from None
    raise UserError(f"{url} answered {response.status_code}: {message}")


def _answer(values: Any, *, rag: bool) -> dict[str, Any]:
    text = values["choices"][0]["message"]["content"].strip()
    sources = {"sources": values["citations"]} if rag else {}
    return {"text": text, "model": values["model"], "usage": values["usage"], **sources}
