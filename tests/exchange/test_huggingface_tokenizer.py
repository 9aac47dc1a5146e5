"""Tokenizers in Hugging Face's files, against the library that writes them."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers

from gpt2_jax.errors import DataError
from gpt2_jax.exchange.huggingface_tokenizer import read_tokenizer

CORPUS = ["the cat sat on the mat, the cat ate the rat's hat " * 3, "東京 und Grüße  und\n\nGrüße"]
TEXTS = [
    "the cat",
    "  the   rat's  ",
    "Grüße aus 東京\n\n\n x",
    "\t12345 \u2019 \u00a0\u3000!",
    "",
    "😀 the<|endoftext|>",
]


def learned(merges: int = 60) -> tokenizers.Tokenizer:
    """A byte-level BPE in GPT-2's alphabet and order."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet(), show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    # The library numbers the bytes by their characters, GPT-2 by its own order.
    content = json.loads(made.to_str())
    pairs = [tuple(pair) for pair in content["model"]["merges"]]
    vocab = {token: number for number, token in enumerate([*alphabet(), *("".join(pair) for pair in pairs)])}
    made.model = tokenizers.models.BPE(vocab=vocab, merges=pairs)
    made.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    return made


def alphabet() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    learned().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_those_of_the_library(folder: pathlib.Path) -> None:
    theirs, ours = learned(), read_tokenizer(folder, 1000)
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.end_of_text == theirs.token_to_id("<|endoftext|>")
    for text in TEXTS[:-1]:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text).ids
        assert ours.decode(ids) == text
    assert len(ours.encode("the cat")) < 5  # merges are used


def test_a_file_from_before_models_had_types(folder: pathlib.Path) -> None:
    """As OpenAI's folder on the hub has: no type, no newer fields, merges as strings."""
    want = read_tokenizer(folder, 1000).fingerprint

    def older(content: dict[str, Any]) -> None:
        for field in ("type", "byte_fallback", "ignore_merges"):
            content["model"].pop(field, None)
        content["pre_tokenizer"].pop("use_regex", None)
        content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]])
        content["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
        content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}

    edit(older)(folder)
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the cat").ids
    assert read_tokenizer(folder, 1000).fingerprint == want


def test_special_tokens_that_were_added(folder: pathlib.Path) -> None:
    """Such as padding: no text becomes one here, so the other ids are as they were."""
    want = read_tokenizer(folder, 1000)
    edit(lambda content: content["added_tokens"].append(ADDED))(folder)
    got = read_tokenizer(folder, 1000)
    assert got.fingerprint == want.fingerprint
    assert got.encode("the <pad>").tolist() == want.encode("the <pad>").tolist()


def test_merges_that_do_not_make_their_tokens(tmp_path: pathlib.Path) -> None:
    """The library never joins "ab" and "c", since "bc" comes first; whoever looks up "abc" as a token would."""
    merges = ["b c", "a b", "ab c"]
    symbols = [*alphabet(), "bc", "ab", "abc", "<|endoftext|>"]
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [tuple(merge.split()) for merge in merges]))
    assert len(library.encode("abc").ids) == 2
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    with pytest.raises(DataError, match="do not make the token 'abc'"):
        read_tokenizer(tmp_path, 1000)


def test_merges_as_strings(folder: pathlib.Path) -> None:
    ids = read_tokenizer(folder, 1000).encode(TEXTS[0]).tolist()
    edit(lambda content: content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]]))(
        folder
    )
    assert read_tokenizer(folder, 1000).encode(TEXTS[0]).tolist() == ids


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocab_and_merges(folder: pathlib.Path, names: tuple[str, str]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    want = read_tokenizer(folder, 1000)
    (folder / "tokenizer.json").unlink()
    vocab = {**content["model"]["vocab"], "<|endoftext|>": want.end_of_text}
    (folder / names[0]).write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    assert read_tokenizer(folder, 1000).fingerprint == want.fingerprint
    for field in ("add_prefix_space", "add_bos_token"):
        (folder / "tokenizer_config.json").write_text(json.dumps({field: True}))
        with pytest.raises(DataError, match=field):
            read_tokenizer(folder, 1000)


def test_gpt2s_own_files(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(data_dir / "gpt2-bpe" / name, tmp_path)
    tokenizer = read_tokenizer(tmp_path, 50257)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("gpt2", 50257, 50256)
    for line in (data_dir / "bpe_golden.jsonl").read_text(encoding="utf-8").splitlines():
        golden = json.loads(line)
        assert tokenizer.encode(golden["text"]).tolist() == golden["ids"]


def test_no_files_mean_gpt2s(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
    assert read_tokenizer(tmp_path, 50257).name == "gpt2"
    assert read_tokenizer(tmp_path, 50304).name == "gpt2"
    for size in (50256, 50305, 1000):
        with pytest.raises(DataError, match=f"no tokenizer.json.*{size}"):
            read_tokenizer(tmp_path, size)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


def swap_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]


END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}


def template(*before: dict[str, Any]) -> dict[str, Any]:
    """As transformers writes it for `add_bos_token`; without `before` it adds nothing."""
    return {"type": "TemplateProcessing", "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}]}


@pytest.mark.parametrize(
    "harmless",
    [None, {"type": "ByteLevel"}, template(), {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template()]}],
)
def test_post_processors_that_add_nothing(folder: pathlib.Path, harmless: dict[str, Any] | None) -> None:
    want = read_tokenizer(folder, 1000).fingerprint
    edit(lambda content: content.update(post_processor=harmless))(folder)
    assert read_tokenizer(folder, 1000).fingerprint == want


ADDED = {"id": 317, "content": "<pad>", "special": True}


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda c: c["model"].update(type="Unigram"), ["BPE"]),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer", "ByteLevel"]),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), ["add_prefix_space"]),
        (lambda c: c.update(normalizer={"type": "NFC"}), ["normalizer"]),
        (lambda c: c.update(post_processor=template(END)), ["post_processor adds"]),
        (lambda c: c.update(post_processor={"type": "Sequence", "processors": [template(END)]}), ["post_processor"]),
        (lambda c: c.update(post_processor={"type": "BertProcessing"}), ["post_processor"]),
        (lambda c: c["model"].update(dropout=0.1), ["dropout"]),
        (lambda c: c["model"].update(ignore_merges=True), ["ignore_merges"]),
        (lambda c: c["added_tokens"].append({**ADDED, "special": False}), ["'<pad>'"]),
        (lambda c: c["added_tokens"].append({**ADDED, "id": 5}), ["'<pad>'"]),
        (swap_ids, ["token '!' has id 1", "it is 0"]),
        (lambda c: c["model"]["merges"].pop(), ["token", "neither a byte"]),
        (lambda c: c["model"]["merges"].reverse(), ["token"]),
        (lambda c: c["model"].update(merges=7), ["not as they should be"]),
        (lambda c: c["model"].pop("vocab"), ["not as they should be"]),
    ],
)
def test_other_tokenizers_are_refused(
    folder: pathlib.Path, change: Callable[[dict[str, Any]], Any], fragments: list[str]
) -> None:
    edit(change)(folder)
    with pytest.raises(DataError) as caught:
        read_tokenizer(folder, 1000)
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in ("tokenizer.json", *fragments)), caught.value
