"""One question to a running endpoint, over plain HTTP. Needs neither Ray nor torch."""

from typing import Any

import httpx

from app.config import AskConfig
from app.data.prompts import Template, template_from_json
from app.errors import UserError


def ask(config: AskConfig) -> dict[str, Any]:
    """The answer: `text`, `model`, `usage`, and with `rag` also `sources` and `timings`.

    Raises:
        UserError: the endpoint cannot be reached, or refuses the question.
    """
    common = {"model": config.model, "max_tokens": config.max_tokens, "temperature": config.temperature}
    if config.rag:
        answer = _call(config, "/v1/rag", {"question": config.question, **common})
        return {"text": answer["answer"], **{key: answer[key] for key in ("model", "usage", "sources", "timings")}}
    prompt = _template(config).prompt(config.question)
    answer = _call(config, "/v1/completions", {"prompt": prompt, **common})
    return {"text": answer["choices"][0]["text"].strip(), "model": answer["model"], "usage": answer["usage"]}


def _template(config: AskConfig) -> Template:
    """That of the model, which the endpoint tells."""
    models = {model["id"]: model for model in _call(config, "/v1/models")["data"]}
    if config.model not in models:
        raise UserError(f"model={config.model!r} does not exist; {config.url} has {', '.join(models)}")
    return template_from_json(models[config.model]["template"])


def _call(config: AskConfig, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """POST where there is a body, else GET."""
    url = config.url.rstrip("/") + path
    try:
        method = "GET" if body is None else "POST"
        response = httpx.request(method, url, json=body, timeout=config.timeout_s, trust_env=False)
    except httpx.TimeoutException:
        raise UserError(
            f"{url} did not answer within timeout_s={config.timeout_s:g}; raise it, or ask for less"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"url={config.url!r} cannot be reached ({error}); start an endpoint with `pacos serve`"
        ) from None
    try:
        values = response.json()
        if response.is_success:
            return values
        message = values["error"]["message"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{url} answered {response.status_code} and not as a Pacos endpoint does; is url={config.url!r} right?"
        ) from None
    raise UserError(f"{url} answered {response.status_code}: {message}")
