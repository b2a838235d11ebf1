import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from app.config import AskConfig
from app.errors import UserError
from app.serving.ask import ask


@pytest.fixture
def endpoint():
    """A server that answers each request with the (status, text) in `replies`, and keeps what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null")
            server.received.append((self.path, body, self.headers.get("authorization")))
            status, text = server.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.received, server.replies = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_question_goes_out_as_a_chat_and_the_answer_comes_back(endpoint, monkeypatch):
    reply = {"choices": [{"message": {"content": "Once a year. "}}], "model": "pacos", "usage": {"total_tokens": 9}}
    endpoint.replies += [(200, json.dumps(reply)), (200, json.dumps(reply | {"citations": [{"document": "a.md"}]}))]
    answer = ask(AskConfig(question="How often?", url=endpoint.url, max_tokens=7))
    assert answer == {"text": "Once a year.", "model": "pacos", "usage": {"total_tokens": 9}}
    path, body, authorization = endpoint.received[0]
    assert path == "/v1/chat/completions" and authorization is None
    message = {"role": "user", "content": "How often?"}
    assert body == {"model": "pacos", "messages": [message], "max_tokens": 7, "temperature": 0.0, "rag": False}
    monkeypatch.setenv("PACOS_API_KEY", "pacos-secret")
    answer = ask(AskConfig(question="How often?", url=endpoint.url, rag=True))
    assert answer["sources"] == [{"document": "a.md"}]
    assert endpoint.received[1][1]["rag"] and endpoint.received[1][2] == "Bearer pacos-secret"


def test_a_key_is_not_shown_with_the_settings():
    assert "pacos-secret" not in repr(AskConfig(question="?", api_key="pacos-secret"))


def test_an_error_answer_is_told_in_its_own_words(endpoint):
    endpoint.replies.append((429, json.dumps({"error": {"message": "the queue is full"}})))
    with pytest.raises(UserError, match="429: the queue is full"):
        ask(AskConfig(question="?", url=endpoint.url))


@pytest.mark.parametrize("text", ["<html>", "[]", '{"error": "no"}'])
def test_an_answer_that_is_not_ours_is_told(endpoint, text):
    endpoint.replies.append((502, text))
    with pytest.raises(UserError, match="502 and not as a Pacos endpoint"):
        ask(AskConfig(question="?", url=endpoint.url))


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}'])
@pytest.mark.parametrize("rag", [False, True])
def test_so_is_one_of_something_else_that_takes_any_question(endpoint, text, rag):
    endpoint.replies.append((200, text))
    with pytest.raises(UserError, match="200 and not as a Pacos endpoint does; is url=.* right"):
        ask(AskConfig(question="?", url=endpoint.url, rag=rag))


def test_an_endpoint_that_is_not_there_is_told_with_a_remedy():
    with pytest.raises(UserError, match="cannot be reached.*pacos serve"):
        ask(AskConfig(question="?", url="http://127.0.0.1:9"))


def test_asking_imports_neither_ray_nor_torch():
    code = (
        "import sys, app.serving.ask; sys.exit(any(name in sys.modules for name in ('ray', 'torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
