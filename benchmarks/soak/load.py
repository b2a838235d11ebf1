"""What is asked of the endpoint during a soak, and the training job beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.chaos.cluster import Cluster, wait_for
from tests.chaos.endpoint import Endpoint
from tests.chaos.hosts import REPOSITORY
from tests.chaos.traffic import Request, Traffic

NUM_DOCUMENTS, NUM_QUESTIONS = 40, 50
WITHOUT_END = 10**7
CHAT, QUESTIONS = "/v1/chat/completions", ("How much hay does an alpaca eat?", "Who shears it?", "Where does it live?")


def train(cluster: Cluster) -> Path:
    """A LoRA run on one worker that is still there when all else is over, and ends with the cluster; its folder."""
    data, output = cluster.shared / "data", cluster.shared / "run"
    cluster.submit("jobs/prepare_data.py", f"source={REPOSITORY / 'examples/instructions.jsonl'}", f"output={data}")
    cluster.submitted(
        "jobs/train.py", f"data={data}", f"output={output}", f"epochs={WITHOUT_END}", f"max_steps={WITHOUT_END}",
        "batch_size=4", "save_every=100", "eval_every=200", "workers.count=1", "workers.cpus=1", "workers.threads=1",
        f"tracking.uri=sqlite:///{cluster.shared}/training.db", log="train.log",
    )  # fmt: skip
    wait_for((output / "metrics.jsonl").exists, what="the training job", within_s=300)
    return output


def documents_in(endpoint: Endpoint) -> list[str]:
    """Their ids, once they are there."""
    ids = []
    for number in range(NUM_DOCUMENTS):
        response = httpx.post(f"{endpoint.urls[0]}/v1/documents", json=_document(number, version=0), timeout=60)
        ids.append(response.raise_for_status().json()["data"][0]["id"])
    return ids


@contextmanager
def load(endpoint: Endpoint, ids: Sequence[str]) -> Iterator[dict[str, Traffic]]:
    """The kinds of requests, on their way within the block. Half of the chats are among `NUM_QUESTIONS` that come
    again, and so are mostly in the cache."""

    def chat(number: int, **more: object) -> Request:
        question = f"What is {number if number % 2 else number % (2 * NUM_QUESTIONS)}?"
        messages = [{"role": "user", "content": question}]
        return Request(
            {"model": "pacos:live", "messages": messages, "max_tokens": 24, "temperature": 0, **more}, path=CHAT
        )

    def replaced(number: int) -> Request:
        which = number % NUM_DOCUMENTS
        return Request(_document(which, version=number), path=f"/v1/documents/{ids[which]}", method="PUT")

    def question(number: int) -> str:
        return f"{QUESTIONS[number % len(QUESTIONS)]} ({number % NUM_QUESTIONS})"

    kinds: dict[str, tuple[Callable[[int], Request], int, float]] = {
        "chat": (chat, 2, 0.5),
        "streamed chat": (lambda number: chat(number, stream=True), 1, 0.5),
        "search": (lambda number: Request({"query": question(number), "top_k": 5}, path="/v1/search"), 1, 0.5),
        "rag": (lambda number: Request({"question": question(number), "max_tokens": 16}, path="/v1/rag"), 1, 1.0),
        "document changes": (replaced, 1, 2.0),
    }
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(Traffic(endpoint.urls, request, clients=clients, pause_s=pause_s))
            for kind, (request, clients, pause_s) in kinds.items()
        }


def _document(number: int, *, version: int) -> dict[str, str]:
    text = f"Document {number}, version {version}. " + "An adult alpaca eats two kilograms of hay each day. " * 30
    return {"name": f"{number}.txt", "text": text}
