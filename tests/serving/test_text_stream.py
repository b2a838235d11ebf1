import random

import pytest

from app.serving.text_stream import TextStream


def stream(tokenizer, ids, stop=()):
    """What comes out after each token, until a stop string."""
    text, parts = TextStream(tokenizer, stop=stop), []
    for token in ids:
        parts.append(text.push(token))
        if text.stopped:
            return parts, True
    parts.append(text.finish())
    return parts, text.stopped


@pytest.mark.parametrize("text", ["An adult alpaca eats hay.", "ñandú 🦙🦙 — альпака", "日本語 and é", ""])
def test_streamed_text_is_the_text_and_never_holds_half_a_character(tokenizer, text):
    parts, stopped = stream(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text and not stopped
    assert not any("\ufffd" in part for part in parts)


def test_bytes_that_are_no_characters_come_out_as_the_tokenizer_decodes_them(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        parts, _ = stream(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["two kilo"], "An adult alpaca eats "),
        (["hay", "eats"], "An adult alpaca "),
        (["a", "alpaca"], "An "),
        (["nothing of the kind"], "An adult alpaca eats two kilograms of hay each day"),
        (["day!", "dayy"], "An adult alpaca eats two kilograms of hay each day"),
    ],
)
def test_a_stop_string_ends_the_text_before_itself_also_across_tokens(tokenizer, stop, expected):
    text = "An adult alpaca eats two kilograms of hay each day"
    parts, stopped = stream(tokenizer, tokenizer.encode(text), stop=stop)
    assert "".join(parts) == expected
    assert stopped == (expected != text)


def test_nothing_comes_after_a_stop_string_whatever_is_pushed(tokenizer):
    text = TextStream(tokenizer, stop=["hay"])
    shown = "".join(text.push(token) for token in tokenizer.encode("An alpaca eats hay each day")) + text.finish()
    assert shown == "An alpaca eats " and text.stopped


def test_text_that_could_begin_a_stop_string_is_held_back(tokenizer):
    text = TextStream(tokenizer, stop=["hay each day"])
    shown = "".join(text.push(token) for token in tokenizer.encode("two kilograms of hay each"))
    assert shown == "two kilograms of "
    assert text.finish() == "hay each"
