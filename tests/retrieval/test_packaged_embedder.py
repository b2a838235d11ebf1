"""How well the embedder in app/assets/embedder finds things: the figures of its model card, with some room."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from app.assets import EMBEDDED_EMBEDDER
from app.retrieval.chunking import Chunk, Document, chunk_document
from app.retrieval.documents import read_documents
from app.retrieval.embedding import Embedder, embedder_hash
from app.retrieval.folder import Manifest, write_index
from app.retrieval.index import VectorIndex, write_vectors
from app.retrieval.search import Searcher

EXAMPLES = Path(__file__).parents[2] / "examples" / "documents"

# a question, and words of the titles of the sections that answer it
QUESTIONS = {
    "How did the Incas keep records?": "The Incas",
    "Which wild animal is the ancestor of the alpaca?": "Wild ancestors",
    "When did the Spanish arrive and what happened to the herds?": "Conquest",
    "Who built Saltaire?": "modern trade",
    "How tall is an adult alpaca?": "Size and build",
    "How long do alpacas live?": "Size and build",
    "What colours can an alpaca have?": "Colours",
    "Is a llama heavier than an alpaca?": "llama",
    "How many animals can graze on one acre?": "How much land",
    "Is barbed wire safe for alpacas?": "Fencing",
    "How do I cool an alpaca in hot weather?": "Heat and cold",
    "What is the normal body temperature?": "Normal values",
    "How often should animals be weighed?": "Weighing",
    "What injections do alpacas need?": "Vaccination",
    "What is mange?": "Parasites",
    "When do I have to call a vet?": "call the vet",
    "How do I dry a wet fleece?": "Washing",
    "What is the difference between carding and combing?": "Carding",
    "Should alpaca be mixed with sheep's wool for spinning?": "Spinning",
    "How do I wash an alpaca jumper?": "garments",
    "Why do alpacas hum?": "Sounds",
    "Can an alpaca be kept alone?": "Living in a herd|How much land",
    "Where do alpacas leave their dung?": "dung pile",
    "How long does pregnancy last?": "Pregnancy",
    "How much does a newborn cria weigh?": "first days",
    "At what age are crias weaned?": "Weaning",
    "Can alpacas be ridden?": "Walking",
    "How long are newcomers kept in quarantine?": "New arrivals|Words for health",
    "Should I brush an alpaca before a show?": "Shows",
    "How long does it take to shear one animal?": "The work",
    "How much fibre does an alpaca give each year?": "How much fibre",
    "How thick is a human hair?": "Comparisons",
    "What is orgling?": "Words for behaviour|Sounds",
    "What minerals do they need?": "Minerals",
    "Can a female be bred at one year of age?": "Mating",
    "What month should shearing be done?": "When to shear",
}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def test_it_is_small_and_matches_by_meaning(embedder: Embedder) -> None:
    assert sum(file.stat().st_size for file in EMBEDDED_EMBEDDER.rglob("*")) < 5_000_000
    question, near, far = embedder.embed(
        [
            "How can I lose weight?",
            "A healthy diet and regular exercise help to burn calories.",
            "The stock market fell after the bank raised its interest rate.",
        ]
    )
    assert question @ near > question @ far + 0.1


def test_it_finds_the_section_that_answers_a_question_on_the_example_documents(
    embedder: Embedder, tmp_path: Path
) -> None:
    documents, _ = read_documents(str(EXAMPLES))
    chunks = [chunk for document in documents for chunk in chunk_document(document, chunk_words=90, overlap_words=20)]
    write_vectors(tmp_path / "vectors.faiss", embedder.embed([chunk.content for chunk in chunks]))
    index = VectorIndex(tmp_path / "vectors.faiss")
    ranks = [rank(question, title, embedder, index, chunks) for question, title in QUESTIONS.items()]
    first, among_three = sum(rank == 1 for rank in ranks), sum(rank <= 3 for rank in ranks)
    print(f"right section first {first}, among the first three {among_three}, of {len(ranks)}")
    assert first >= 22 and among_three >= 30


def test_cranfield_ndcg_is_well_above_untrained_vectors(embedder: Embedder, shared_data: Path, tmp_path: Path) -> None:
    documents = cranfield_texts(shared_data / "cranfield" / "cran.all.1400")
    queries = cranfield_texts(shared_data / "cranfield" / "cran.qry")
    relevant = cranfield_judgements(shared_data / "cranfield" / "cranqrel")
    write_vectors(tmp_path / "vectors.faiss", embedder.embed(documents))
    index = VectorIndex(tmp_path / "vectors.faiss")
    vectors = embedder.embed(queries)
    gains = [
        ndcg([number for number, _ in index.search(vectors[query], top_k=10)], wanted)
        for query, wanted in relevant.items()
    ]
    print(f"Cranfield nDCG@10 {np.mean(gains):.3f} over {len(gains)} queries")
    assert len(gains) == 225 and np.mean(gains) > 0.28


def test_on_cranfield_both_ways_together_find_more_than_either(
    embedder: Embedder, shared_data: Path, tmp_path: Path
) -> None:
    """nDCG@10 and recall@100 of the whole search, each abstract a chunk, as in docs/retrieval.md."""
    texts = cranfield_texts(shared_data / "cranfield" / "cran.all.1400")
    queries = cranfield_texts(shared_data / "cranfield" / "cran.qry")
    relevant = cranfield_judgements(shared_data / "cranfield" / "cranqrel")
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    chunks = [Chunk(document.name, "", 0, len(document.text), document.text) for document in documents]
    manifest = Manifest(
        embedder="embedded", embedder_sha256=embedder_hash(embedder.folder), width=embedder.width,
        documents=len(documents), chunks=len(chunks), chunk_words=90, overlap_words=20,
    )  # fmt: skip
    vectors = embedder.embed(texts)
    write_index(tmp_path / "index", documents=documents, chunks=chunks, vectors=vectors, manifest=manifest)
    searcher = Searcher(tmp_path / "index")
    gains: dict[str, float] = {}
    recalls: dict[str, float] = {}
    for mode in ("dense", "words", "hybrid"):
        found = {
            query: [passage.chunk for passage in searcher.search(queries[query], top_k=100, mode=mode)]
            for query in relevant
        }
        gains[mode] = float(np.mean([ndcg(found[query], wanted) for query, wanted in relevant.items()]))
        recalls[mode] = float(
            np.mean([len({*found[query]} & wanted) / len(wanted) for query, wanted in relevant.items()])
        )
        print(f"Cranfield, {mode}: nDCG@10 {gains[mode]:.3f}, recall@100 {recalls[mode]:.3f}")
    assert gains["hybrid"] > gains["words"] + 0.01 > gains["dense"] + 0.05
    assert recalls["hybrid"] > recalls["words"] + 0.01 > recalls["dense"] + 0.05


def rank(question: str, title: str, embedder: Embedder, index: VectorIndex, chunks: list[Chunk]) -> int:
    hits = index.search(embedder.embed([question])[0], top_k=len(chunks))
    return next(
        place
        for place, (number, _) in enumerate(hits, start=1)
        if any(words in chunks[number].title for words in title.split("|"))
    )


def cranfield_texts(file: Path) -> list[str]:
    """The .W fields of a SMART file."""
    records = re.split(r"^\.I ", file.read_text(errors="replace"), flags=re.MULTILINE)[1:]
    return [" ".join(re.split(r"^\.W\s*$", record, flags=re.MULTILINE)[1].split()) for record in records]


def cranfield_judgements(file: Path) -> dict[int, set[int]]:
    """Relevant documents by query, both counted from 0; grades 1 to 4 count alike."""
    relevant: dict[int, set[int]] = {}
    for line in file.read_text().splitlines():
        query, document, grade = map(int, line.split()[:3])
        if 1 <= grade <= 4:
            relevant.setdefault(query - 1, set()).add(document - 1)
    return relevant


def ndcg(found: list[int], wanted: set[int], *, depth: int = 10) -> float:
    gain = sum(1 / math.log2(place + 2) for place, number in enumerate(found[:depth]) if number in wanted)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(depth, len(wanted))))
