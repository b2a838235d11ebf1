from app.retrieval.chunking import Chunk, Document, chunk_document


def chunks_of(text: str, *, name: str = "a.md", chunk_words: int = 10, overlap_words: int = 3) -> list[Chunk]:
    document = Document(name, text)
    chunks = list(chunk_document(document, chunk_words=chunk_words, overlap_words=overlap_words))
    assert all(document.text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert all(len(chunk.text.split()) <= chunk_words for chunk in chunks)
    return chunks


def words(first: int, last: int) -> str:
    return " ".join(f"w{number}" for number in range(first, last))


def test_windows_overlap_and_cover_every_word() -> None:
    chunks = chunks_of(words(0, 24), name="a.txt")
    assert [chunk.text for chunk in chunks] == [words(0, 10), words(7, 17), words(14, 24)]


def test_a_text_of_exactly_one_window_is_one_chunk() -> None:
    assert [chunk.text for chunk in chunks_of(words(0, 10))] == [words(0, 10)]


def test_no_overlap_repeats_nothing() -> None:
    assert [chunk.text for chunk in chunks_of(words(0, 20), overlap_words=0)] == [words(0, 10), words(10, 20)]


def test_the_largest_overlap_still_moves_on() -> None:
    text = "\n\n".join(words(number, number + 1) for number in range(30))  # a paragraph ends after every word
    chunks = chunks_of(text, overlap_words=9)
    assert chunks[-1].text.endswith("w29")
    assert len(chunks) == 21


def test_a_window_ends_with_a_paragraph_where_it_can() -> None:
    chunks = chunks_of(f"{words(0, 7)}\n\n{words(7, 20)}")
    assert chunks[0].text == words(0, 7)
    assert chunks[1].text == f"{words(4, 7)}\n\n{words(7, 14)}"


def test_no_chunk_reaches_across_a_heading_and_each_names_its_section() -> None:
    chunks = chunks_of("before\n\n# Alpacas\n\nan animal\n\n## Food\n\nhay and\n\ngrass\n\n### Empty\n\n## End\nlast")
    assert [(chunk.title, chunk.text) for chunk in chunks] == [
        ("Alpacas", "before"),
        ("Alpacas", "an animal"),
        ("Alpacas: Food", "hay and\n\ngrass"),
        ("Alpacas: End", "last"),
    ]


def test_a_hash_sign_in_a_code_block_is_no_heading() -> None:
    chunks = chunks_of("# Title\n\n```\n# comment\n```\n\nrest")
    assert [(chunk.title, chunk.text) for chunk in chunks] == [("Title", "```\n# comment\n```\n\nrest")]


def test_plain_text_is_titled_by_its_file_and_keeps_hash_signs() -> None:
    chunks = chunks_of("# not a heading\nbut text", name="notes/plain.txt")
    assert [(chunk.title, chunk.text) for chunk in chunks] == [("plain.txt", "# not a heading\nbut text")]


def test_offsets_count_characters_not_bytes() -> None:
    (chunk,) = chunks_of("# Größe\n\nein 🦙 in Größe drei")
    assert chunk.text == "ein 🦙 in Größe drei"


def test_headings_alone_and_blank_text_give_no_chunk() -> None:
    assert chunks_of("# One\n\n## Two\n") == []
    assert chunks_of(" \n\t\n") == []
