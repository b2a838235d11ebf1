"""`/v1/documents` over HTTP, in this process: the routes, and what searches find after each change."""

import asyncio
import json
import time

import httpx
import pytest
from hand_made_pdf import make_pdf
from local_application import served_here

from app.config import ApplicationConfig, RetrieverConfig, validate
from app.errors import UserError
from app.retrieval import library as library_module
from app.retrieval.library import DiskFull
from app.retrieval.reading import File
from app.retrieval.search import Searcher
from app.serving import documents as documents_module
from app.serving.documents import DocumentsDeployment

MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


@pytest.fixture(scope="module")
def url(model_dir, index_dir, folder):
    retriever = {
        "index": str(index_dir), "documents": str(folder), "top_k": 2,
        "uploads": {"max_bytes": MAX_BYTES, "max_files": 3, "reading": {"max_characters": 20_000, "max_pages": 5}},
    }  # fmt: skip
    generator = {"model": str(model_dir), "threads": 1, "max_batch_size": 8}
    values = {"generator": generator, "retriever": retriever, "max_body_bytes": 10_000}
    with served_here(validate(ApplicationConfig, values)) as url:
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        before = {document["id"] for document in listed(client)}
        yield client
        for document in listed(client):
            if document["id"] not in before:
                client.delete(f"/v1/documents/{document['id']}")


def listed(client):
    return client.get("/v1/documents", params={"limit": 1000}).json()["data"]


def upload(client, *files, **fields):
    response = client.post("/v1/documents", files=[("file", file) for file in files], data=fields)
    assert response.status_code == 201, response.text
    return response.json()["data"]


def sources(client, query, **values):
    return client.post("/v1/search", json={"query": query, "top_k": 50} | values).json()["data"]


def soon(condition):
    """Its first true value, within the two seconds that are promised."""
    deadline = time.monotonic() + 2
    while not (value := condition()):
        assert time.monotonic() < deadline, "not within two seconds"
        time.sleep(0.02)
    return value


def test_an_index_is_taken_in_when_the_library_is_new(client):
    documents = listed(client)
    assert [document["name"] for document in documents] == ["guards.md", "shearing.md", "hay.md"]
    assert {document["content_type"] for document in documents} == {"text/markdown"}
    (best, *_) = sources(client, "How often does shearing take place?")
    assert best["document"] == "shearing.md" and best["document_id"] in {document["id"] for document in documents}


def test_the_vectors_are_written_to_a_file_in_the_background(client, folder):
    deadline = time.monotonic() + 30
    while not list(folder.glob("vectors-*.faiss")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_files_of_every_kind_are_found_with_their_place_in_the_stored_text(client):
    documents = upload(
        client,
        ("winter.pdf", make_pdf(["Alpacas and snow", "A cold winter on the field"], title="Snow"), "application/pdf"),
        ("dog.html", "<title>Dogs</title><h1>Stray</h1><p>A stray dog in spring.</p><script>x()</script>", "text/html"),
        ("clippers.txt", "Größe of the clippers: 🦙 electric", "text/plain"),
    )
    assert [document["title"] for document in documents] == ["Snow", "Dogs", "clippers.txt"]
    assert [document["object"] for document in documents] == ["document"] * 3
    for document, query in zip(documents, ("cold winter field", "stray dog", "electric clippers"), strict=True):
        hits = soon(lambda d=document, q=query: [s for s in sources(client, q) if s["document_id"] == d["id"]])
        text = client.get(f"/v1/documents/{document['id']}/content")
        assert text.headers["content-type"].startswith("text/plain") and len(text.text) == document["characters"]
        assert text.text[hits[0]["start"] : hits[0]["end"]] == hits[0]["text"] and isinstance(hits[0]["chunk"], int)
        assert client.get(f"/v1/documents/{document['id']}").json() == document


def test_json_adds_a_document_too_and_put_replaces_it_under_its_id(client):
    body = {"name": "notes/spring", "text": "# Spring\n\nElectric clippers.", "content_type": "text/markdown"}
    (document,) = client.post("/v1/documents", json=body).json()["data"]
    assert document["title"] == "Spring" and document["content_type"] == "text/markdown"
    version = soon(
        lambda: (
            [s["document_id"] for s in sources(client, "electric clippers")].count(document["id"])
            and client.post("/v1/search", json={"query": "x"}).json()["version"]
        )
    )
    path = f"/v1/documents/{document['id']}"
    replaced = client.put(path, json={"name": "notes/spring", "text": "Foxes in winter.", "title": "Mine"}).json()
    assert replaced["id"] == document["id"] and replaced["title"] == "Mine" and replaced["content_type"] == "text/plain"
    assert replaced["version"] > document["version"] and replaced["created_at"] == document["created_at"]
    soon(lambda: document["id"] not in [s["document_id"] for s in sources(client, "electric clippers", mode="words")])
    assert document["id"] in [s["document_id"] for s in sources(client, "foxes winter")]
    assert client.post("/v1/search", json={"query": "x"}).json()["version"] != version
    as_file = client.put(path, files={"file": ("spring.md", "A table.", "text/markdown")}).json()
    assert (as_file["id"], as_file["name"]) == (document["id"], "spring.md")
    assert client.get(f"{path}/content").text == "A table."


def test_a_removed_document_is_found_no_more(client):
    (document,) = upload(client, ("gone.txt", "kilograms of hay on the table"))
    soon(lambda: document["id"] in [s["document_id"] for s in sources(client, "kilograms table")])
    path = f"/v1/documents/{document['id']}"
    assert client.delete(path).json() == {"id": document["id"], "object": "document", "deleted": True}
    soon(lambda: document["id"] not in [s["document_id"] for s in sources(client, "kilograms table")])
    for answer in (client.get(path), client.delete(path), client.get(f"{path}/content"), client.put(path, json={
        "name": "x", "text": "x"})):  # fmt: skip
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "document_not_found"


def test_answers_cite_uploaded_documents_streamed_or_not(client):
    (document,) = upload(client, ("alpaca-dentist.txt", "The alpaca dentist visits the herd on the stray field."))
    question = "When does the alpaca dentist visit the herd?"
    soon(lambda: sources(client, question)[0]["document_id"] == document["id"])
    text = client.get(f"/v1/documents/{document['id']}/content").text

    def check(source):
        assert source["document_id"] == document["id"] and source["title"] == "alpaca-dentist.txt"
        assert text[source["start"] : source["end"]] == source["text"] and isinstance(source["chunk"], int)

    check(client.post("/v1/rag", json={"question": question, "max_tokens": 4}).json()["sources"][0])
    chat = {"model": "pacos", "messages": [{"role": "user", "content": question}], "rag": True, "max_tokens": 4}
    check(client.post("/v1/chat/completions", json=chat).json()["citations"][0])
    events = client.post("/v1/chat/completions", json=chat | {"stream": True}).text.split("\n\n")
    check(json.loads(events[0].removeprefix("data: "))["citations"][0])


def test_pages_of_the_list_join(client):
    upload(client, *((f"{number}.txt", f"hay {number}") for number in range(3)))
    seen, after, more = [], {}, True
    while more:
        page = client.get("/v1/documents", params={"limit": 2} | after).json()
        seen += [document["name"] for document in page["data"]]
        after, more = {"after": page["data"][-1]["id"]}, page["has_more"]
    assert seen == ["2.txt", "1.txt", "0.txt", "guards.md", "shearing.md", "hay.md"]
    refused = client.get("/v1/documents", params={"after": "doc-none"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "after"
    assert client.get("/v1/documents", params={"limit": 0}).status_code == 422


@pytest.mark.parametrize(
    ("files", "status", "code", "told"),
    [
        ([("a.pdf", b"%PDF-1.7 broken", "application/pdf")], 400, "invalid_document", "a.pdf: is damaged"),
        ([("a.pdf", make_pdf(["x"] * 6), "application/pdf")], 400, "invalid_document", "6 pages, more than 5"),
        ([("a.txt", b"\xff\xfe\x00")], 400, "invalid_document", "a.txt: byte 0 is not UTF-8"),
        ([("a.txt", b"hay " * 6000)], 400, "invalid_document", "more than 20000 characters"),
        ([("a.md", b"# Only a heading\n")], 400, "invalid_document", "no text below its headings"),
        ([("a.docx", b"PK", "application/x-docx")], 400, "unsupported_file", "application/x-docx is not read"),
        ([("hay.md", b"hay")], 409, "document_exists", "there is a document 'hay.md' already: doc-"),
        ([("a.txt", b"hay"), ("a.txt", b"hay")], 409, "document_exists", "PUT /v1/documents/ID"),
        ([("a.txt", b"x" * (MAX_BYTES + 1))], 413, "body_too_large", "retriever.uploads.max_bytes"),
        ([(f"{number}.txt", b"hay") for number in range(4)], 400, "http_error", "Too many files"),
        ([("n" * 300, b"hay", "text/plain")], 422, "invalid_value", "name"),
    ],
)
def test_a_file_that_is_no_document_is_refused_and_nothing_is_kept(client, files, status, code, told):
    before = listed(client)
    good = [("good.txt", b"hay")] if len(files) == 1 else []
    response = client.post("/v1/documents", files=[("file", file) for file in [*good, *files]])
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert told in response.json()["error"]["message"]
    assert listed(client) == before


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"text": "hay"}, 422, "name"),
        ({"name": "a", "text": 3}, 422, "text"),
        ({"name": "", "text": "hay"}, 422, "name"),
        ({"name": "a\n", "text": "hay"}, 422, "name"),
        ({"name": "a", "text": "hay", "content_type": "application/pdf"}, 422, "content_type"),
        ({"name": "a", "text": "hay", "colour": "red"}, 400, "colour"),
        ({"name": "a", "text": "\ud83d"}, 422, None),
        ({"name": "a", "text": " "}, 400, "file"),
        ([], 422, None),
    ],
)
def test_a_mistake_in_json_is_told_by_its_field(client, body, status, param):
    content = json.dumps(body).encode()
    response = client.post("/v1/documents", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_bodies_of_another_form_are_refused(client):
    json_type, form = {"content-type": "application/json"}, {"content-type": "multipart/form-data; boundary=x"}
    for content, headers, status in (
        (b"{", json_type, 422), (b"\xff", json_type, 422), (b"hay", {"content-type": "text/plain"}, 415),
        (b"hay", {}, 422), (b"--x\r\nnonsense", form, 422), (b"--x--\r\n", form, 422),
    ):  # fmt: skip
        response = client.post("/v1/documents", content=content, headers=headers)
        assert response.status_code == status and response.json()["error"]["message"], (content, response.text)
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    chunked = client.post("/v1/documents", content=iter([head] + [b"y" * 50_000] * 5), headers=form)
    assert chunked.status_code == 413
    assert client.post("/v1/documents", files=[("file", ("a.txt", b"hay"))] * 2, data={"title": "T"}).status_code == 400
    assert client.post("/v1/documents", files={"file": ("a.txt", b"x")}, data={"colour": "red"}).status_code == 400
    (titled,) = upload(client, ("a.txt", b"hay"), title="Of the form")
    assert titled["title"] == "Of the form"
    two = client.put(f"/v1/documents/{titled['id']}", files=[("file", ("b.txt", b"hay"))] * 2)
    assert two.status_code == 400


def test_a_page_of_another_site_cannot_upload_through_its_visitors_browser(client):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 201)):
        headers = {"sec-fetch-site": site}
        response = client.post("/v1/documents", files={"file": ("site.txt", b"hay")}, headers=headers)
        assert response.status_code == status, response.text


def test_other_routes_keep_their_own_limit(client):
    response = client.post("/v1/search", json={"query": "hay " * 5000})
    assert response.status_code == 413 and "max_body_bytes" in response.json()["error"]["message"]


def test_the_routes_are_documented(client):
    assert client.patch("/v1/documents").headers["allow"] == "GET, POST"
    assert client.patch("/v1/documents/x").headers["allow"] == "DELETE, GET, PUT"
    paths = client.get("/openapi.json").json()["paths"]
    content = paths["/v1/documents"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert set(paths["/v1/documents/{id}"]) == {"get", "put", "delete"}


def test_a_server_without_a_folder_for_documents_says_how_to_give_it_one(model_dir):
    generator = {"model": str(model_dir), "threads": 1, "max_batch_size": 8}
    with served_here(validate(ApplicationConfig, {"generator": generator})) as url:
        path = f"{url}/v1/documents"
        assert httpx.get(path, trust_env=False).json() == {
            "object": "list", "data": [], "has_more": False, "takes_documents": False,
        }  # fmt: skip
        refused = httpx.post(path, json={"name": "a", "text": "hay"}, trust_env=False)
        assert refused.status_code == 404 and refused.json()["error"]["code"] == "documents_not_configured"
        assert "retriever.documents=FOLDER" in refused.json()["error"]["message"]
        search = httpx.post(f"{url}/v1/search", json={"query": "hay"}, trust_env=False)
        assert search.status_code == 404 and search.json()["error"]["code"] == "retrieval_not_configured"


def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path):
    documents = DocumentsDeployment(RetrieverConfig(documents=str(tmp_path)))

    def file(name, text):
        return File(name, text.encode(), "text", "")

    (first,) = asyncio.run(documents.add([file("first.txt", "A llama guards the herd.")]))
    writer = documents._library._writer
    writer.execute(f"PRAGMA max_page_count = {writer.execute('PRAGMA page_count').fetchone()[0]}")
    refused = asyncio.run(documents.add([file("second.txt", "An adult alpaca eats hay each day. " * 2000)]))
    assert (refused.status, refused.code) == (507, "disk_full")
    assert asyncio.run(documents.records(10, None)) == ([first], False)


def test_a_snapshot_that_cannot_be_written_is_tried_again_after_ever_longer_pauses(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(documents_module, "_LOOK_EVERY_S", 1e6)  # its thread does not look by itself
    documents = DocumentsDeployment(RetrieverConfig(documents=str(tmp_path)))
    documents._pause_s = 1.0
    attempts = []

    def full():
        attempts.append(now)
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(documents._snapshots, "write_if_due", full)
    for now in range(2000):
        documents._look(float(now))
    assert attempts == [0, 2, 6, 14, 30, 62, 126, 254, 510, 1022, 1622]
    assert len(caplog.records) == len(attempts) and "trying again in 600 s" in caplog.records[-1].getMessage()
    monkeypatch.setattr(documents._snapshots, "write_if_due", lambda: attempts.append(now))
    for now in range(2222, 2225):
        documents._look(float(now))
    assert attempts[-3:] == [2222, 2223, 2224]


def test_an_index_is_taken_in_however_many_passages_a_document_has(index_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(library_module, "MOST_CHUNKS", 0)
    (tmp_path / "taken").mkdir()
    documents = DocumentsDeployment(RetrieverConfig(documents=str(tmp_path / "taken"), index=str(index_dir)))
    (records, _) = asyncio.run(documents.records(100, None))
    assert len(records) == Searcher(index_dir).num_documents
    refused = asyncio.run(documents.add([File("upload.txt", b"hay", "text", "")]))
    assert refused.code == "invalid_document" and "more than 0 passages" in refused.message


def test_a_disk_without_room_for_the_index_is_told_at_the_start(index_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(library_module.Library, "add", full_disk)
    with pytest.raises(UserError, match=r"retriever\.documents=.* the disk is full; make room"):
        DocumentsDeployment(RetrieverConfig(documents=str(tmp_path), index=str(index_dir)))


def full_disk(library, documents):
    raise DiskFull("database or disk is full")
