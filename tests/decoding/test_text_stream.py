"""Streams of text, against decoding all ids at once."""

import pathlib
import random

import pytest

from gpt2_jax.decoding.text_stream import TextStream
from gpt2_jax.errors import UsageError
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer

TEXT = "Grüße, 東京 und 👩‍🚀! aab ab aaab\n\nnaïve café — end of it."


def tokenizer(name: str, data_dir: pathlib.Path) -> Tokenizer:
    path = str(data_dir / "gpt2-bpe") if name == "gpt2" else ""
    return make_tokenizer(name, path=path, texts=lambda: [TEXT])


def streamed(of: Tokenizer, ids: list[int], *stops: str) -> tuple[list[str], TextStream, int]:
    """The pieces, the stream, and the number of ids that it took."""
    stream, pieces = TextStream(of, stops), []
    for used, token in enumerate(ids, 1):
        pieces.append(stream.push(token))
        if stream.stopped_by is not None:
            return pieces, stream, used
    pieces.append(stream.finish())
    return pieces, stream, len(ids)


@pytest.mark.parametrize("name", ["gpt2", "bytes", "chars"])
def test_all_pieces_are_the_text(name: str, data_dir: pathlib.Path) -> None:
    of, rng = tokenizer(name, data_dir), random.Random(0)
    texts = [of.encode(TEXT).tolist()]
    letters = min(of.vocab_size, of.end_of_text or of.vocab_size)
    texts += [[rng.randrange(letters) for _ in range(rng.randrange(40))] for _ in range(300)]
    for ids in texts:
        pieces, stream, _ = streamed(of, ids)
        assert "".join(pieces) == stream.text == of.decode(ids)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_characters_are_whole(name: str, data_dir: pathlib.Path) -> None:
    of = tokenizer(name, data_dir)
    ids = of.encode(TEXT).tolist()
    assert "�" in "".join(of.decode([token]) for token in ids)  # some tokens are parts of characters
    pieces, _, _ = streamed(of, ids)
    assert not any("�" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    stream = TextStream(make_tokenizer("bytes"), ["stop", "ö!"])
    assert [stream.push(byte) for byte in b"a st x"] == ["a", " ", "", "", "st ", "x"]
    assert [stream.push(byte) for byte in "éö?".encode()] == ["", "é", "", "", "ö?"]
    assert [stream.push(byte) for byte in b"sst"] == ["", "s", ""]
    assert stream.finish() == "st"


def test_what_a_cut_character_becomes() -> None:
    stream = TextStream(make_tokenizer("bytes"), [])
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "�"


@pytest.mark.parametrize("name", ["gpt2", "bytes", "chars"])
def test_the_text_ends_before_the_first_stop_string(name: str, data_dir: pathlib.Path) -> None:
    of, rng = tokenizer(name, data_dir), random.Random(1)
    ids = of.encode(TEXT).tolist()
    for _ in range(500):
        stops = []
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(TEXT) - 1)
            stop = TEXT[start : start + rng.randrange(1, 6)]
            stops.append(rng.choice([stop, stop + "#", stop * 2]))
        pieces, stream, used = streamed(of, ids, *stops)
        found = [TEXT.find(stop) for stop in stops if stop in TEXT]
        assert (stream.stopped_by is not None) == bool(found)
        assert "".join(pieces) == stream.text
        if not found:
            assert stream.text == TEXT
            continue
        # The first to end, and of those the longest, as if characters came one by one.
        end = next(end for end in range(len(TEXT) + 1) if TEXT[:end].endswith(tuple(stops)))
        longest = max((stop for stop in stops if TEXT[:end].endswith(stop)), key=len)
        assert (stream.text, stream.stopped_by) == (TEXT[: end - len(longest)], longest)
        assert not any(stop in of.decode(ids[: used - 1]) for stop in stops)


def test_a_stop_string_over_tokens_and_within_one(data_dir: pathlib.Path) -> None:
    of = tokenizer("gpt2", data_dir)
    ids = of.encode("Hello world, goodbye").tolist()
    assert streamed(of, ids, "lo wor")[1].text == "Hel"
    assert streamed(of, ids, "orl")[1].text == "Hello w"
    _, stream, used = streamed(of, ids, "world")
    assert (stream.text, used) == ("Hello ", 2)
    with pytest.raises(ValueError, match="ended"):
        stream.push(ids[0])


def test_nothing_comes_after_a_stop_string(data_dir: pathlib.Path) -> None:
    of = tokenizer("gpt2", data_dir)
    # A token that has the stop string and then the beginning of a character.
    cut = next(token for token in range(of.vocab_size) if of.decode_bytes([token]) == b" \xe2")
    stream = TextStream(of, [" "])
    assert stream.push(cut) == ""
    assert (stream.finish(), stream.text, stream.stopped_by) == ("", "", " ")


def test_an_empty_stop_string() -> None:
    with pytest.raises(UsageError, match="empty"):
        TextStream(make_tokenizer("bytes"), ["a", ""])


@pytest.mark.parametrize("name", ["gpt2", "bytes", "chars"])
def test_stop_strings_within_each_other(name: str, data_dir: pathlib.Path) -> None:
    of = tokenizer(name, data_dir)
    ids = of.encode("naab end").tolist()
    assert streamed(of, ids, "aab e", "ab")[1].text == "na"
    assert streamed(of, ids, "ab", "aab")[1].text == "n"
