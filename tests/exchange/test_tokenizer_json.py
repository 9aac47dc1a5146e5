"""tokenizer.json as the library tokenizers reads it: its ids are those of the tokenizer that was written."""

import dataclasses
import json
import pathlib
import random
import shutil
import time
import unicodedata

import pytest
import tokenizers

from gpt2_jax.exchange.huggingface_tokenizer import read_tokenizer
from gpt2_jax.exchange.tokenizer_json import write_tokenizer
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_merges

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 32
# Unicode's, and the separators \x1c to \x1f, which only Python counts to it.
WHITE_SPACE = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
TEXTS = [
    *("", " ", "\r", "\ra\r\r\nb\n\r", "\x1c\x1d\x1e\x1f", "a\x1cb\x1d \x1e\x1fc"),
    "I'm sure they'll say we've said he'd've, it's John's; YOU'RE 'tis'n't ''s '",
    "  two  spaces\n\n\tand\ttabs   \n a\n",
    " ".join(f"a{space}b{space}{space}c" for space in WHITE_SPACE),
    WHITE_SPACE + WHITE_SPACE[::-1] + "x" + WHITE_SPACE,
    "\x00\x01\x07\x08\x1b\x7f\x80\x9f\ufeff\ufffe\uffff\U0010ffff\ue000\ufffd",
    "1234567890 1,000.50 ²³¼ \u0661\u0662 Ⅷⅻ ①〇 \u0f33 \U0001d7d8 3½4 a1b2",
    "e\u0301 \u00e9 E\u0301\u0323 \u1e69 s\u0323\u0307 s\u0307\u0323 \u0301x n\u0303o \u0344 \u212b \u2126 \u0340",
    "\ufb01n \ufdfa \u3392 \uff21\uff22\uff43 \uff76\uff9e \u1100\u1161\u11a8 \u0958 \u0928\u093c \u05e9\u05bc\u05c1",
    # Sigmas: final after a cased letter and before none, whatever case-ignorable characters are between.
    *("ΟΔΟΣ ΔΑΣ. Σ", "AΣ'A AΣ' AΣ.A AΣ. AΣ:", "Σ\u0301 AΣ\u0301 AΣ\u0301A A\u0301Σ", "ΣΣΣ AΣΣ' Σ'Σ 1Σ aΣ1 AΣ\nA"),
    *("\u02b0Σ a\u02b0Σ aΣ\u02b0", "ς Σς AΣ\u00ad AΣ\u200dA AΣ\U0001f44dA \U0001d400Σ ǅΣ AΣ_Σ", "'Σ .Σ. (ΣA)"),
    "AΣ" + "'" * 50 + "A AΣ" + "'" * 50,
    "\u0130stanbul I\u0307 \u0131I \u1e9eß ǅ ǅǈ \u212a Ω \u03f4 \u13a0\uab70 \u10a0 \u2c00 \U00010400",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u2764\ufe0f 1\ufe0f\u20e3",
    "東京は日本の首都。한국어 ภาษาไทย हिन्दी नमस्ते العربية עִבְרִית Ελληνικά Русский",
    "<|endoftext <|end|> |> <| endoftext|> <|ENDOFTEXT|> \uff1c|endoftext|> <\u200d|endoftext|>",
    "def f(x):\n    return {'k': x ** 2}  # they've\n\n\n" * 3,
]
CORPUS = ["the cat sat on the mat, the cat ate the rat's hat " * 3, "東京 und Grüße  und\n\nGrüße " * 4, *TEXTS]
PIECES = [
    *WHITE_SPACE,
    *"abcstmdrlveABCSZ019.,:;!?()'\"-_·\u2019\u00ad\u200d\u00b4^`\x00\x7f\ufeff\U0010ffff",
    *("'s", "'ll", "'re", "  ", "\r\n", "<|", "|>", "\U0001f469", "\U0001f44d\U0001f3fd", "\ufe0f", "\u20e3"),
    *"ΣΣΣΣς\u0391\u03b1ΔǅǄ\u0130\u0131ßéüÅ\u0301\u0323\u0307\u0308\u0345\u0327\u02b0\u02bc\u1d2c\U0001d400\U00010400",
    *"²½Ⅷ①\u0661\ufb01\u212b\u2126\ufdfa東京한\u1100\u1161\u11a8\u0928\u093c\u05bc\u05c1ไท\u3099か",
]
CASES = [
    ("gpt2", "none", False),
    ("bpe:60", "none", False),
    ("bpe:60", "nfc", True),
    ("bpe:60", "nfkc", False),
    ("bpe:60", "none", True),
    ("bytes", "none", False),
    ("bytes", "nfc", False),
    ("bytes", "nfkc", True),
    ("chars", "none", False),
    ("chars", "nfc", False),
    ("chars", "nfkc", True),
]


def random_texts() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 40))) for _ in range(400)]


@dataclasses.dataclass(frozen=True)
class Written:
    """A tokenizer of ours, the folder it was written to, and what the library reads there."""

    ours: Tokenizer
    folder: pathlib.Path
    theirs: tokenizers.Tokenizer

    @property
    def changes_text(self) -> bool:
        return self.ours.normalization != "none" or self.ours.lowercase


def write(ours: Tokenizer, folder: pathlib.Path) -> Written:
    write_tokenizer(folder, ours, CONTEXT)
    return Written(ours, folder, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name, normalization, lowercase = request.param
    path = str(request.getfixturevalue("data_dir") / "gpt2-bpe") if name == "gpt2" else ""
    texts = [*CORPUS, *random_texts()] if name == "chars" else CORPUS
    ours = make_tokenizer(name, path=path, normalization=normalization, lowercase=lowercase, texts=lambda: texts)
    return write(ours, tmp_path_factory.mktemp("tokenizer"))


def test_ids_and_texts(written: Written) -> None:
    ours, theirs = written.ours, written.theirs
    assert theirs.get_vocab_size() == ours.vocab_size
    assert theirs.token_to_id(END_OF_TEXT) == ours.end_of_text
    texts = [*TEXTS, *random_texts()]
    assert not any(END_OF_TEXT in text for text in texts)
    for text, encoding in zip(texts, theirs.encode_batch(texts), strict=True):
        ids = ours.encode(text).tolist()
        assert encoding.ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
        if not written.changes_text:
            assert theirs.decode(ids) == text


def test_texts_of_any_ids(written: Written) -> None:
    """Of bytes that are not UTF-8, too, and with end-of-text among them."""
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(written.ours.vocab_size) for _ in range(rng.randint(1, 12))]
        assert written.theirs.decode(ids, skip_special_tokens=False) == written.ours.decode(ids)


def test_end_of_text_in_a_text_is_the_token_there(written: Written) -> None:
    ours, theirs = written.ours, written.theirs
    if ours.end_of_text is None:
        assert END_OF_TEXT not in theirs.get_vocab()
        return
    before, after = ours.encode("a ").tolist(), ours.encode(" b").tolist()
    assert theirs.encode(f"a {END_OF_TEXT} b").ids == [*before, ours.end_of_text, *after]
    assert theirs.decode([*before, ours.end_of_text]) == "a "


def test_reading_back(written: Written, tmp_path: pathlib.Path) -> None:
    ours = written.ours
    back = read_tokenizer(written.folder, ours.vocab_size)
    assert (back.name, back.normalization, back.lowercase) == (ours.name, ours.normalization, ours.lowercase)
    assert back.fingerprint == ours.fingerprint
    # The pair of files has no place for normal forms.
    pair = [written.folder / name for name in ("vocab.json", "merges.txt")]
    expected = bool(ours.merges) and not written.changes_text
    assert [file.is_file() for file in pair] == [expected, expected]
    if expected:
        theirs = tokenizers.ByteLevelBPETokenizer.from_file(*map(str, pair))
        assert [theirs.encode(text).ids for text in TEXTS] == [ours.encode(text).tolist() for text in TEXTS]
        for file in pair:
            shutil.copy(file, tmp_path)
        assert read_tokenizer(tmp_path, ours.vocab_size).fingerprint == ours.fingerprint


def test_settings(written: Written) -> None:
    settings = json.loads((written.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["model_max_length"] == CONTEXT
    assert settings["clean_up_tokenization_spaces"] is False
    assert settings.get("eos_token") == (None if written.ours.end_of_text is None else END_OF_TEXT)


# Characters that the library's normal forms, of Unicode 9.0, do not know: marks, whose order they leave, and
# compatibility forms.
NEWER_MARKS = """07FD 0898-089F 08CA-08D3 09FE 0C3C 0D3B-0D3C 0EBA 1715 1ABF-1ACE 1DF6-1DFA A82C 10D24-10D27 10EAB-10EAC
10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 1145E 11839-1183A 1193D-1193E 11943 119E0 11A34 11A47 11A99 11D42
11D44-11D45 11D97 11F41-11F42 16FF0-16FF1 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF"""
NEWER_FORMS = "32FF A7F2-A7F4 AB69 10781-10785 10787-107B0 107B2-107BA 1E030-1E06D 1F16C 1FBF0-1FBF9"
# Case-ignorable until Unicode 16.
AHOM_MEDIAL_RA = "1171E"


def listed(ranges: str) -> set[str]:
    ends = [[int(end, 16) for end in part.split("-")] for part in ranges.split()]
    return {chr(number) for pair in ends for number in range(pair[0], pair[-1] + 1)}


def assigned() -> list[str]:
    """The characters that Python knows, but for line feed."""
    everything = map(chr, range(0x110000))
    return [one for one in everything if unicodedata.category(one) not in ("Cn", "Co", "Cs") and one != "\n"]


@pytest.mark.parametrize(
    ("normalization", "lowercase", "lines", "newer"),
    [
        ("nfc", False, ["{}", "a\u0301{}\u0327"], NEWER_MARKS),
        ("nfkc", False, ["{}", "b{}b"], NEWER_FORMS),
        ("none", True, ["{}", "A{}Σ", "AΣ{}A"], AHOM_MEDIAL_RA),
    ],
    ids=["nfc", "nfkc", "lowercase"],
)
def test_every_character(
    normalization: str, lowercase: bool, lines: list[str], newer: str, tmp_path: pathlib.Path
) -> None:
    tokenizer = make_tokenizer("bytes", normalization=normalization, lowercase=lowercase)
    normalizer = write(tokenizer, tmp_path).theirs.normalizer
    characters = assigned()
    for line in lines:
        text = "\n".join(line.format(character) for character in characters)
        want = tokenizer.decode(tokenizer.encode(text))  # the ids of "bytes" are the bytes of the changed text
        pairs = zip(characters, want.split("\n"), normalizer.normalize_str(text).split("\n"), strict=True)
        assert {character for character, ours, theirs in pairs if ours != theirs} <= listed(newer)


def test_how_every_kind_of_character_is_cut(tmp_path: pathlib.Path) -> None:
    """Merges of a character with the first byte of the next apply only where both are in one piece."""
    symbols = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def first_symbol(text: str) -> str:
        return symbols.pre_tokenize_str(text)[0][0][0]

    # All but large blocks of ideographs and syllables.
    characters = [one for one in assigned() if one < "\u3400" or unicodedata.category(one) != "Lo"]
    befores = "a1 !"
    firsts = sorted({first_symbol(one) for one in characters})
    ours = tokenizer_from_merges([f"{first_symbol(before)} {first}" for before in befores for first in firsts])
    text = "\n".join(before + one for one in characters for before in befores)
    ids = ours.encode(text).tolist()
    assert write(ours, tmp_path).theirs.encode(text).ids == ids
    merged = sum(token >= 256 for token in ids)
    assert 0.1 < merged / (len(characters) * len(befores)) < 0.9


def test_lower_case_takes_time_by_the_length_of_a_text(tmp_path: pathlib.Path) -> None:
    normalizer = write(make_tokenizer("bytes", lowercase=True), tmp_path).theirs.normalizer
    text = " Σ" * 40_000 + "A" + "'" * 100_000 + "Σ"
    start = time.perf_counter()
    lowered = normalizer.normalize_str(text)
    assert time.perf_counter() - start < 5  # by its square it would be half a minute
    assert lowered == text.lower()
