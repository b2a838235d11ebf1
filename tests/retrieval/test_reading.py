import functools
import time
import zlib

import pytest
from hand_made_pdf import make_pdf

from app.config.documents import ReadingConfig
from app.retrieval.chunking import Document, chunk_document
from app.retrieval.reading import File, Kind, Unreadable, kind_of, read_file

LIMITS = ReadingConfig(max_characters=100_000, max_pages=20, max_memory_bytes=600 * 2**20, timeout_s=20)


def read(content: bytes, kind: Kind, *, limits: ReadingConfig = LIMITS, title: str = "") -> Document:
    return read_file(File(f"file.{kind}", content, kind, title), limits)


@pytest.mark.parametrize(
    ("name", "media_type", "kind"),
    [
        ("a.md", "application/octet-stream", "markdown"),
        ("A.PDF", None, "pdf"),
        ("a.htm", "text/plain", "html"),
        ("notes", "text/html; charset=utf-8", "html"),
        ("notes", "TEXT/PLAIN", "text"),
        ("a.docx", "application/octet-stream", None),
        ("a", None, None),
    ],
)
def test_what_a_file_is_follows_from_its_name_else_from_its_media_type(
    name: str, media_type: str | None, kind: Kind | None
) -> None:
    assert kind_of(name, media_type) == kind


def test_text_is_kept_as_it_is_but_for_line_ends() -> None:
    document = read(b"\xef\xbb\xbf# One\r\ntwo \xf0\x9f\xa6\x99\rthree\0", "text")
    assert document.text == "# One\ntwo 🦙\nthree" and document.title == "file.text"
    document = read("# Größe\n\ntext".encode(), "markdown")
    assert (document.title, read(b"# A\n\nb", "markdown", title="Mine").title) == ("Größe", "Mine")


def test_html_becomes_markdown_without_what_is_no_text() -> None:
    page = """<!doctype html><html><head><title>Hay &amp; straw</title><style>p { color: red }</style></head>
    <body><nav><a href="/">Home</a></nav><script>alert("no")</script><h1>Hay</h1><p>An <b>adult</b> alpaca eats
    <a href="https://example.org/?secret">hay</a>.</p><noscript>no</noscript><h2>When</h2><ul><li>each day</li></ul>
    <img src=x alt="a picture"><p>snake_case * 2</p></body></html>"""
    document = read(page.encode(), "html")
    assert document.title == "Hay & straw"
    assert [chunk.title for chunk in chunk_document(document, chunk_words=20, overlap_words=2)] == [
        "Hay & straw: Hay", "Hay & straw: When",
    ]  # fmt: skip
    assert "**adult** alpaca eats\nhay." in document.text and "* each day" in document.text
    assert "snake_case * 2" in document.text
    for absent in ("alert", "color", "Home", "secret", "no\n", "<"):
        assert absent not in document.text


def test_a_page_without_an_end_of_its_head_is_read() -> None:
    page = """<!doctype html><html><head><meta charset="utf-8"><title>Hay</title><style>p { color: red }</style>
    <body><h1>Feeding</h1><p>It is dry.</p></body></html>"""
    document = read(page.encode(), "html")
    assert (document.title, document.text) == ("Hay", "# Feeding\n\nIt is dry.")


def test_a_page_that_stands_in_a_form_is_read_without_its_controls() -> None:
    page = """<html><head><title>Hay</title></head><body>Before<form method="post"><input value="no"><h1>Feeding</h1>
    <p>It is dry.</p><select><option>no</option></select><textarea>no</textarea><button>no</button></form>after
    <h2><button>When</button></h2></body></html>"""
    assert read(page.encode(), "html").text == "Before\n\n# Feeding\n\nIt is dry.\n\nafter\n\n## When"


def test_htmls_own_encoding_is_honoured() -> None:
    page = '<meta charset="iso-8859-1"><p>Größe</p>'.encode("latin-1")
    assert read(page, "html").text == "Größe"


def test_a_pdf_gives_its_pages_text_and_title() -> None:
    document = read(make_pdf(["An adult alpaca\neats hay.", "Second page."], title="Feeding"), "pdf")
    assert document.title == "Feeding"
    assert document.text == "An adult alpaca\neats hay.\n\nSecond page."


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (b"", "text", "holds no text"),
        (b" \n\t", "markdown", "holds no text"),
        (b"\xff\xfe", "text", "byte 0 is not UTF-8"),
        (b"word " * 30_000, "text", "more than 100000 characters"),
        (b"<p>" + b"word " * 30_000, "html", "more than 100000 characters"),
        (b"<script>only()</script>", "html", "holds no text"),
        (b"", "pdf", "is damaged"),
        (b"%PDF-1.7\n" + bytes(range(256)) * 50, "pdf", "is damaged"),
        (make_pdf(["x"])[:-200], "pdf", "damaged|no text"),
        (make_pdf(["one page"] * 21), "pdf", "has 21 pages, more than 20"),
        (make_pdf(["word " * 2000] * 15), "pdf", "more than 100000 characters"),
        (make_pdf([""]), "pdf", "holds no text; a scan has to go through OCR"),
        (make_pdf([], streams=[b"not compressed at all"]), "pdf", "damaged|no text"),
    ],
)
def test_a_file_without_a_document_in_it_says_why(content: bytes, kind: Kind, told: str) -> None:
    with pytest.raises(Unreadable, match=told):
        read(content, kind)


def test_a_compressed_bomb_is_refused_within_its_memory() -> None:
    """Two gigabytes of content in two megabytes of file, in some kilobytes by a stream in a stream, and by many pages
    that are each small enough."""
    assert zlib.decompress(repeated(b"alpaca", times=3)) == 3 * b"alpaca"
    bomb = repeated(b"(x) Tj " * 150_000, times=2000)
    assert len(bomb) < 10_000_000
    page = zlib.compress(b"BT /F1 1 Tf " + b"(alpaca) Tj " * 500_000 + b"ET")
    twice = zlib.compress(bomb, 9)
    assert len(twice) < 200_000
    soon = LIMITS.model_copy(update={"timeout_s": 4.0})
    for file, limits in (
        (make_pdf([], streams=[bomb]), LIMITS),
        (make_pdf([], streams=[twice], compressed=2), LIMITS),
        (make_pdf([], streams=[page] * 20), soon),
    ):
        started = time.monotonic()
        with pytest.raises(Unreadable) as refused:
            read(file, "pdf", limits=limits)
        assert limits is soon or "takes more than" not in str(refused.value), "its size is known before its time is up"
        assert time.monotonic() - started < 10


def repeated(block: bytes, *, times: int) -> bytes:
    """`zlib.compress(block * times)`, of which the block is compressed once."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    part = compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    checksum = functools.reduce(lambda before, _: zlib.adler32(block, before), range(times), 1)
    return b"\x78\xda" + part * times + compressor.flush() + checksum.to_bytes(4, "big")


@pytest.mark.parametrize("tag", [b"<div>", b"<b>", b"<ul><li>", b"<table><tr><td>", b"<blockquote>"])
def test_html_that_is_nested_without_end_is_refused_or_read(tag: bytes) -> None:
    started = time.monotonic()
    try:
        assert "alpaca" in read(tag * 20_000 + b"alpaca", "html").text
    except Unreadable as error:
        assert any(word in str(error) for word in ("nested", "takes more", "cannot be read", "memory"))
    assert time.monotonic() - started < LIMITS.timeout_s + 10


def test_a_file_that_takes_too_long_is_given_up() -> None:
    slow = make_pdf([], streams=[zlib.compress(b"BT /F1 1 Tf " + b"(alpaca) Tj 0 -1 Td " * 3_000_000 + b"ET")])
    started = time.monotonic()
    with pytest.raises(Unreadable, match="takes more than 1 s"):
        read(slow, "pdf", limits=ReadingConfig(timeout_s=1))
    assert time.monotonic() - started < 10


def test_a_pdf_of_a_loop_of_pages_ends() -> None:
    loop = make_pdf(["text"]).replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]")
    with pytest.raises(Unreadable):
        read(loop, "pdf")


@pytest.mark.parametrize(
    "text",
    [
        "# " + " " * 200_000 + "x",
        "#" + "\t#" * 100_000,
        "```\n#\n" * 40_000,
        "```\n# heading\n" * 20_000,
        "# a\n" * 50_000,
        " \n" * 100_000 + "x",
        "x" * 200_000,
        ("\n" + " " * 1000) * 200 + "x",
    ],
)
def test_markdown_made_to_be_slow_is_cut_soon(text: str) -> None:
    started = time.monotonic()
    chunks = list(chunk_document(Document("a.md", text), chunk_words=90, overlap_words=20))
    assert time.monotonic() - started < 5
    assert all(len(chunk.text) < 100_000 or len(chunk.text.split()) > 1 for chunk in chunks)
