"""Files of other programs that are damaged or made to do harm.

Each case makes one change to a folder that is read without complaint, and must then be refused: one typed error of one
line that names the file and the field, no code run, nothing written, little memory and time taken.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import Finished, kept_settings

import gpt2_jax
from gpt2_jax.cli.main import main
from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.export import import_bundle
from gpt2_jax.exchange.huggingface_write import write_huggingface
from gpt2_jax.exchange.names import params_from_tensors, tensors
from gpt2_jax.exchange.npz import write_npz
from gpt2_jax.tokenizer import Tokenizer, tokenizer_from_characters, tokenizer_from_merges

MOST_CHARACTERS, MOST_SECONDS, MOST_BYTES = 500, 2, 100 * 2**20
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SETTINGS, TOKENIZER, VOCAB, MERGES = "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"
ARCHIVE = "model.npz"
SHARD = "two.safetensors"
ESCAPE = "a\n\x1b[2J\u202e"  # clears the screen, turns the line round
SHOWN_ESCAPE = r"a\n\x1b[2J\u202e"
DEEP = "[" * 200_000

Change = Callable[[pathlib.Path], Any]


def make_bundle(tokenizer: Tokenizer) -> Bundle:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=tokenizer.vocab_size + 3)
    rng = np.random.default_rng(0)
    values = {tensor.name: rng.normal(size=tensor.shape).astype(np.float32) for tensor in tensors(config)}
    return Bundle(config, params_from_tensors(config, values.__getitem__), tokenizer)


def write_single(folder: pathlib.Path) -> None:
    write_huggingface(folder, make_bundle(tokenizer_from_merges(["h e", "l l", "he ll"])))


def write_pair(folder: pathlib.Path) -> None:
    write_single(folder)
    (folder / TOKENIZER).unlink()


def write_characters(folder: pathlib.Path) -> None:
    write_huggingface(folder, make_bundle(tokenizer_from_characters("abc\u00e9")))


def write_shards(folder: pathlib.Path) -> None:
    write_single(folder)
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: ("one.safetensors", SHARD)[number % 2] for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name in places if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_archive(folder: pathlib.Path) -> None:
    write_npz(folder, make_bundle(tokenizer_from_merges(["h e", "l l", "he ll"])))


@dataclasses.dataclass(frozen=True)
class Original:
    """A folder that can be read: how it is made, and the two ways to read it, by function and by command."""

    write: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], Any] = gpt2_jax.load
    command: tuple[str, ...] = ("export",)


ORIGINALS = {
    "single": Original(write_single),
    "shards": Original(write_shards),
    "pair": Original(write_pair),
    "characters": Original(write_characters),
    "npz": Original(write_archive, functools.partial(import_bundle, "npz"), ("import", "--from=npz")),
}


# Changes


def content(file: str, data: bytes | str) -> Change:
    data = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / file).write_bytes(data)


def edited(file: str, change: Callable[[Any], Any]) -> Change:
    """The JSON in `file` after `change`, which works in place."""

    def edit(folder: pathlib.Path) -> None:
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found))

    return edit


def literal(file: str, text: str, *path: str) -> Change:
    """In the JSON of `file`, at `path`, the given characters, whatever they are."""

    def place(folder: pathlib.Path) -> None:
        def set_mark(found: Any) -> None:
            for key in path[:-1]:
                found = found[key]
            found[path[-1]] = "MARK"

        edited(file, set_mark)(folder)
        (folder / file).write_text((folder / file).read_text().replace('"MARK"', text))

    return place


def config(name: str, value: Any) -> Change:
    return literal(CONFIG, json.dumps(value), name)


def twice(file: str, text: str) -> Change:
    """A key of `file`'s JSON twice: `text` before what is there."""
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace("{", "{" + text + ",", 1))


def sparse(file: str, size: int = 10**9, start: bytes = b"{") -> Change:
    """A file of `size` bytes that takes no room on the disk."""

    def write(folder: pathlib.Path) -> None:
        with (folder / file).open("wb") as stream:
            stream.write(start)
            stream.truncate(size)

    return write


def cut(file: str, size: int) -> Change:
    """The first `size` bytes; negative: all but so many."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def replaced(file: str, make: Callable[[pathlib.Path], Any]) -> Change:
    return lambda folder: ((folder / file).unlink(), make(folder / file))


def linked(target: str) -> Change:
    return lambda file: file.symlink_to(target)


class Command:
    """Its pickle runs a command where it is loaded."""

    def __init__(self, canary: pathlib.Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickled(file: str) -> Change:
    return lambda folder: (folder / file).write_bytes(pickle.dumps(Command(folder.parent / "canary")))


def weights(change: Callable[[dict[str, np.ndarray]], Any], file: str = WEIGHTS) -> Change:
    """Tensors after `change`, saved by the library."""

    def write(folder: pathlib.Path) -> None:
        named = load_file(folder / file)
        change(named)
        save_file(named, folder / file)

    return write


def header(change: Callable[[Any], Any], mark: bytes = b"", instead: bytes = b"") -> Change:
    """The header of the weights after `change`, and with `instead` for `mark`; the values stay."""

    def write(folder: pathlib.Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + size])
        change(found)
        text = json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogatepass").replace(mark, instead, 1)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return write


LN_F, WTE = "transformer.ln_f.weight", "transformer.wte.weight"


def field(name: str, value: Any) -> Change:
    """Another value in the header, of the final norm's scale."""
    return header(lambda found: found[LN_F].update({name: value}))


def renamed(name: str) -> Change:
    return header(lambda found: found.update({name: found.pop(LN_F)}))


def npy(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def raw_npy(text: str, values: bytes = b"", version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + values


def archive(
    change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED, again: tuple[str, ...] = ()
) -> Change:
    """The members of the archive after `change`, those named in `again` twice."""

    def write(folder: pathlib.Path) -> None:
        with zipfile.ZipFile(folder / ARCHIVE) as old:
            members = {name: old.read(name) for name in old.namelist()}
        change(members)
        with zipfile.ZipFile(folder / ARCHIVE, "w", compression, compresslevel=1) as new, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a name is there twice
            for name in (*members, *again):
                new.writestr(name, members[name])

    return write


LN_F_NPY, WTE_NPY = "ln_f.weight.npy", "wte.weight.npy"


def array(data: bytes | np.ndarray, compression: int = zipfile.ZIP_STORED) -> Change:
    """Other content for the final norm's scale in the archive."""
    return archive(
        lambda members: members.update({LN_F_NPY: data if isinstance(data, bytes) else npy(data)}), compression
    )


def array_header(text: str) -> Change:
    return array(raw_npy(text, bytes(64)))


def object_array(folder: pathlib.Path) -> None:
    command = np.array([Command(folder.parent / "canary")] * 16, dtype=object)
    array(npy(command, allow_pickle=True))(folder)


def flipped(file: str, place: Callable[[bytes], int], bits: int = 0xFF) -> Change:
    """One byte of `file` changed."""

    def write(folder: pathlib.Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[place(bytes(data))] ^= bits
        (folder / file).write_bytes(data)

    return write


def deflated_nonsense(folder: pathlib.Path) -> None:
    """The values start with a kind of block that deflate does not have."""
    array(np.ones(16, np.float32), zipfile.ZIP_DEFLATED)(folder)
    data = bytearray((folder / ARCHIVE).read_bytes())
    data[data.index(LN_F_NPY.encode()) + len(LN_F_NPY)] = 0xFF
    (folder / ARCHIVE).write_bytes(data)


def with_value(name: str, value: float, dtype: Any = np.float32) -> Callable[[dict[str, np.ndarray]], None]:
    def change(named: dict[str, np.ndarray]) -> None:
        named[name] = named[name].astype(dtype)
        named[name].flat[3] = value

    return change


def pickle_only(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()
    pickled("pytorch_model.bin")(folder)


def without_biases(folder: pathlib.Path) -> None:
    config("gpt2_jax_bias", False)(folder)


def place_of(name: str) -> Change:
    return edited(INDEX, lambda found: found["weight_map"].update({WTE: name}))


def in_both_shards(folder: pathlib.Path) -> None:
    first = load_file(folder / "one.safetensors")
    name = min(first)
    weights(lambda named: named.update({name: first[name]}), SHARD)(folder)


def set_merges(merges: Any) -> Change:
    return edited(TOKENIZER, lambda found: found["model"].update(merges=merges))


def set_vocab(**ids: Any) -> Change:
    return edited(TOKENIZER, lambda found: found["model"]["vocab"].update(ids))


def add_token(token: Any) -> Change:
    return edited(TOKENIZER, lambda found: found["added_tokens"].append(token))


def half_a_character(found: dict[str, Any]) -> None:
    """The last merge is of half a surrogate pair; the vocabulary has that token."""
    found["model"]["merges"][2] = ["\ud800", "e"]
    found["model"]["vocab"]["\ud800e"] = found["model"]["vocab"].pop("hell")


def extra_symbols(found: dict[str, Any]) -> None:
    """More merges, and their tokens, than the model has ids."""
    for number, pair in enumerate((["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"])):
        found["model"]["merges"].append(pair)
        found["model"]["vocab"]["".join(pair)] = 259 + number
    found["added_tokens"][0]["id"] = 263


# Name: (original, change, words of the message).
CASES: dict[str, tuple[str, Change, list[str]]] = {
    # config.json: values
    "n_layer as text": ("single", config("n_layer", "12"), [CONFIG, "n_layer='12'", "number"]),
    "n_layer true": ("single", config("n_layer", True), [CONFIG, "n_layer=True"]),
    "n_head null": ("single", config("n_head", None), [CONFIG, "n_head=None"]),
    "n_embd in a list": ("single", config("n_embd", [16]), [CONFIG, "n_embd=[16]"]),
    "n_positions an object": ("single", config("n_positions", {"a": 1}), [CONFIG, "n_positions={'a': 1}"]),
    "n_embd a long list": ("single", config("n_embd", [ESCAPE] * 10_000), [CONFIG, "n_embd=", SHOWN_ESCAPE]),
    "n_layer a float": ("single", literal(CONFIG, "1e9", "n_layer"), [CONFIG, "n_layer=1000000000.0"]),
    "n_layer a million": ("single", config("n_layer", 10**6), [CONFIG, "n_layer=1000000", "10000"]),
    "n_layer the most": ("single", config("n_layer", 10_000), ["28 tensors", "too few for n_layer=10000"]),
    "n_layer negative": ("single", config("n_layer", -1), [CONFIG, "n_layer=-1"]),
    "n_embd a million": ("single", config("n_embd", 10**6), ["(48,)", "(3000000,)", "by config.json"]),
    "n_positions ten million": ("single", config("n_positions", 10**7), ["wpe.weight", "(8, 16)", "(10000000, 16)"]),
    "vocab_size a billion": ("single", config("vocab_size", 10**9), ["wte.weight", "(263, 16)", "(1000000000, 16)"]),
    "vocab_size 2**63": ("single", config("vocab_size", 2**63), ["wte.weight", "9223372036854775808"]),
    "vocab_size of 99 digits": ("single", config("vocab_size", 10**98), ["wte.weight", "1000000"]),
    "vocab_size negative": ("single", config("vocab_size", -1), [CONFIG, "vocab_size=-1"]),
    "a number of 400 digits": ("single", literal(CONFIG, "9" * 400, "attn_pdrop"), [CONFIG, "400 digits"]),
    "a number of 5000 digits": ("single", literal(CONFIG, "9" * 5000, "n_layer"), [CONFIG, "5000 digits"]),
    "1e400": ("single", literal(CONFIG, "1e400", "layer_norm_epsilon"), [CONFIG, "1e400"]),
    "NaN": ("single", literal(CONFIG, "NaN", "layer_norm_epsilon"), [CONFIG, "NaN"]),
    "Infinity": ("single", literal(CONFIG, "-Infinity", "initializer_range"), [CONFIG, "-Infinity"]),
    "epsilon 0": ("single", config("layer_norm_epsilon", 0), [CONFIG, "layer_norm_epsilon=0"]),
    "model_type of 3 MB": ("single", config("model_type", "x" * 3_000_000), [CONFIG, "model_type", "xxx"]),
    "activation with escapes": ("single", config("activation_function", ESCAPE), [CONFIG, "activation_", SHOWN_ESCAPE]),
    "activation a list": ("single", config("activation_function", [["gelu"]]), [CONFIG, "activation_function"]),
    "scale_attn_weights an object": ("single", config("scale_attn_weights", {ESCAPE: 1}), [CONFIG, SHOWN_ESCAPE]),
    "n_inner deep": ("single", literal(CONFIG, "[" * 300 + "]" * 300, "n_inner"), [CONFIG, "n_inner", "[[[...]]]"]),
    "gpt2_jax_bias as text": ("single", config("gpt2_jax_bias", "false"), [CONFIG, "gpt2_jax_bias", "'false'"]),
    "gpt2_jax_bias untrue": ("single", without_biases, ["bias is not zero", "no biases"]),
    # config.json: the file
    "a key twice": ("single", twice(CONFIG, '"n_layer": 2'), [CONFIG, "'n_layer' is there twice"]),
    "config.json too deep": ("single", literal(CONFIG, DEEP, "n_ctx"), [CONFIG, "nested too deeply"]),
    "config.json only brackets": ("single", content(CONFIG, DEEP), [CONFIG, "nested too deeply"]),
    "config.json cut": ("single", cut(CONFIG, 40), [CONFIG, "not JSON"]),
    "config.json empty": ("single", content(CONFIG, ""), [CONFIG, "not JSON"]),
    "config.json not UTF-8": ("single", content(CONFIG, b'{"model_type": "\xff"}'), [CONFIG, "not JSON", "utf-8"]),
    "config.json a list": ("single", content(CONFIG, "[1]"), [CONFIG, "not a JSON object"]),
    "config.json of a gigabyte": ("single", sparse(CONFIG), [CONFIG, "4,194,304 bytes"]),
    "config.json of 10 MB": ("single", config("x", "x" * 10**7), [CONFIG, "4,194,304 bytes"]),
    "config.json a pipe": ("single", replaced(CONFIG, os.mkfifo), [CONFIG, "not a file"]),
    "config.json a folder": ("single", replaced(CONFIG, pathlib.Path.mkdir), [CONFIG, "not a file"]),
    "config.json without end": (
        "single",
        replaced(CONFIG, linked("/dev/zero")),
        [CONFIG, "not a file"],
    ),
    "config.json links to itself": ("single", replaced(CONFIG, linked(CONFIG)), [CONFIG, "symbolic links"]),
    # model.safetensors
    "weights cut": ("single", cut(WEIGHTS, -4), [WEIGHTS, "not a whole safetensors file"]),
    "weights cut in the header": ("single", cut(WEIGHTS, 300), [WEIGHTS, "not a whole safetensors file"]),
    "weights empty": ("single", content(WEIGHTS, b""), [WEIGHTS, "not a whole safetensors file"]),
    "weights with more": (
        "single",
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more"),
        [WEIGHTS, "not a whole safetensors file"],
    ),
    "weights that are a pickle": ("single", pickled(WEIGHTS), [WEIGHTS, "not a whole safetensors file"]),
    "only a pickle": ("single", pickle_only, ["pytorch_model.bin", "pickle", "save_pretrained"]),
    "weights a zip": ("single", content(WEIGHTS, b"PK\x03\x04" + bytes(100)), [WEIGHTS, "not a whole"]),
    "weights a pipe": ("single", replaced(WEIGHTS, os.mkfifo), ["no model.safetensors"]),
    "weights without end": ("single", replaced(WEIGHTS, linked("/dev/zero")), ["no model.safetensors"]),
    "header of 2**63 bytes": (
        "single",
        content(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
        [WEIGHTS, "header of 9,223"],
    ),
    "header of 50 MB": (
        "single",
        sparse(WEIGHTS, 50_000_008, struct.pack("<Q", 50_000_000) + b'{"__metadata__": {"a": "'),
        [WEIGHTS, "header of 50,000,000"],
    ),
    "header too deep": ("single", content(WEIGHTS, struct.pack("<Q", 100_000) + b"[" * 100_000), [WEIGHTS, "deeply"]),
    "header a list": ("single", content(WEIGHTS, struct.pack("<Q", 2) + b"[]"), [WEIGHTS, "header", "JSON object"]),
    "header not UTF-8": (
        "single",
        header(lambda found: found, b"transformer.ln_f.weight", b"transformer.ln_f.weigh\xff"),
        [WEIGHTS, "header", "utf-8"],
    ),
    "a tensor twice": (
        "single",
        header(
            lambda found: found,
            b"{",
            b'{"%s": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},' % LN_F.encode(),
        ),
        [WEIGHTS, LN_F, "twice"],
    ),
    "a tensor with and without prefix": (
        "single",
        weights(lambda named: named.update({"ln_f.weight": named[LN_F]})),
        ["'ln_f.weight' is there twice"],
    ),
    "a tensor less": ("single", weights(lambda named: named.pop(LN_F)), ["ln_f.weight missing"]),
    "a tensor more": (
        "single",
        weights(lambda named: named.update({"h.0.extra": np.ones(3, np.float32)})),
        ["'h.0.extra'", "does not have"],
    ),
    "a name with escapes": ("single", renamed(ESCAPE), ["ln_f.weight missing"]),
    "one more name with escapes": (
        "single",
        weights(lambda named: named.update({ESCAPE: np.ones(3, np.float32)})),
        [SHOWN_ESCAPE, "does not have"],
    ),
    "a name of 1 MB": (
        "single",
        weights(lambda named: named.update({"x" * 10**6: np.ones(3, np.float32)})),
        ["xxx", "does not have"],
    ),
    "a name that leads out": (
        "single",
        weights(lambda named: named.update({"../../x": np.ones(3, np.float32)})),
        ["'../../x'", "does not have"],
    ),
    "an absolute name": (
        "single",
        weights(lambda named: named.update({"/tmp/x": np.ones(3, np.float32)})),
        ["'/tmp/x'", "does not have"],
    ),
    "a name that is half a character": ("single", renamed("\ud800"), [WEIGHTS, "header"]),
    "a type with escapes": ("single", field("dtype", ESCAPE), [WEIGHTS, r"a\n\x1b[2J"]),
    "a type that is a list": ("single", field("dtype", ["F32"]), [WEIGHTS, "not a whole"]),
    "values that overlap": ("single", field("data_offsets", [0, 64]), [WEIGHTS, "not a whole", "offset"]),
    "values beyond the end": ("single", field("data_offsets", [10**9, 10**9 + 64]), [WEIGHTS, "not a whole", "offset"]),
    "a shape of 2**124": ("single", field("shape", [2**62, 2**62]), [WEIGHTS, "not a whole"]),
    "a shape of 2**64": ("single", field("shape", [2**64]), [WEIGHTS, "not a whole"]),
    "a negative shape": ("single", field("shape", [-16]), [WEIGHTS, "not a whole"]),
    "another shape": ("single", field("shape", [4, 4]), ["ln_f.weight", "(4, 4)", "(16,)"]),
    "a shape of 300,000 axes": ("single", field("shape", [1] * 300_000 + [16]), ["ln_f.weight", "...", "(16,)"]),
    "an output head of another shape": (
        "single",
        weights(lambda named: named.update({"lm_head.weight": np.ones((263, 17), np.float32)})),
        ["lm_head.weight", "(263, 17)", "(263, 16)"],
    ),
    "another output head": (
        "single",
        weights(lambda named: named.update({"lm_head.weight": named[WTE] + 1})),
        ["lm_head.weight differs"],
    ),
    "a NaN": ("single", weights(with_value(WTE, np.nan)), [WEIGHTS, "wte.weight", "not finite"]),
    "an infinity": ("single", weights(with_value(LN_F, -np.inf)), [WEIGHTS, "ln_f.weight", "not finite"]),
    "a float64 beyond float32": (
        "single",
        weights(with_value(LN_F, 1e300, np.float64)),
        [WEIGHTS, "ln_f.weight", "not finite"],
    ),
    "integers": ("single", weights(with_value(LN_F, 1, np.int32)), [WEIGHTS, "ln_f.weight", "I32", "F32"]),
    # model.safetensors.index.json
    "a shard less": ("shards", lambda folder: (folder / SHARD).unlink(), [SHARD, "missing", INDEX]),
    "a shard that leads out": ("shards", place_of("../model.safetensors"), [INDEX, "'../model.safetensors'"]),
    "an absolute shard": ("shards", place_of("/etc/passwd"), [INDEX, "'/etc/passwd'", "same folder"]),
    "a shard that is the parent": ("shards", place_of(".."), [INDEX, "'..'", "same folder"]),
    "a shard without name": ("shards", place_of(""), [INDEX, "''", "same folder"]),
    "a shard that is a pickle by name": ("shards", place_of("pytorch_model.bin"), [INDEX, "'pytorch_model.bin'"]),
    "a shard that is a pickle": ("shards", pickled(SHARD), [SHARD, "not a whole safetensors file"]),
    "a shard with escapes": ("shards", place_of(ESCAPE + ".safetensors"), [INDEX, SHOWN_ESCAPE]),
    "a shard with a zero byte": ("shards", place_of("a\0.safetensors"), [INDEX, r"a\x00.safetensors"]),
    "a shard whose name is too long": ("shards", place_of("x" * 10**6 + ".safetensors"), [INDEX, "xxx"]),
    "a shard that is a number": ("shards", place_of(7), [INDEX, "weight_map"]),  # type: ignore[arg-type]
    "a weight_map that is a list": (
        "shards",
        literal(INDEX, '["a"]', "weight_map"),
        [INDEX, "weight_map"],
    ),
    "a weight_map of nothing": ("shards", literal(INDEX, "{}", "weight_map"), [INDEX, "weight_map"]),
    "a weight_map twice": ("shards", twice(INDEX, '"weight_map": {}'), [INDEX, "'weight_map' is there twice"]),
    "a tensor in two shards": ("shards", in_both_shards, ["'h.0.attn.c_attn.bias' is there twice"]),
    "an index too deep": ("shards", literal(INDEX, DEEP, "metadata"), [INDEX, "nested too deeply"]),
    "an index of a gigabyte": ("shards", sparse(INDEX), [INDEX, "16,777,216 bytes"]),
    # tokenizer.json
    "tokenizer cut": ("single", cut(TOKENIZER, -20), [TOKENIZER, "not JSON"]),
    "tokenizer too deep": ("single", literal(TOKENIZER, DEEP, "normalizer"), [TOKENIZER, "nested too deeply"]),
    "tokenizer of a gigabyte": ("single", sparse(TOKENIZER), [TOKENIZER, "33,554,432 bytes"]),
    "no model in it": ("single", edited(TOKENIZER, lambda f: f.update(model=None)), [TOKENIZER, "model"]),
    "a model of another type": ("single", literal(TOKENIZER, '["BPE"]', "model", "type"), [TOKENIZER, "type BPE"]),
    "merges a number": ("single", set_merges(7), [TOKENIZER, "merges"]),
    "merges an object": ("single", set_merges({"h e": 1, "l l": 2, "he ll": 3}), [TOKENIZER, "merges"]),
    "merges of numbers": ("single", set_merges([[1, 2]]), [TOKENIZER, "merges"]),
    "merges of half characters": (
        "single",
        edited(TOKENIZER, half_a_character),
        [TOKENIZER, "surrogates"],
    ),
    "more merges than can be": ("single", set_merges(["a b"] * 50_001), [TOKENIZER, "50,001 merges", "50,000"]),
    "a vocabulary that is a list": ("single", literal(TOKENIZER, '["a"]', "model", "vocab"), [TOKENIZER, "vocab"]),
    "an id as text": ("single", set_vocab(a="64"), [TOKENIZER, "vocab"]),
    "an id that is true": ("single", set_vocab(**{'"': True}), [TOKENIZER, "vocab"]),
    "an id of 90 digits": ("single", set_vocab(a=10**90), [TOKENIZER, "token 'a' has id 1000000"]),
    "a token twice": (
        "single",
        lambda folder: (folder / TOKENIZER).write_text((folder / TOKENIZER).read_text().replace('"#":', '"!":')),
        [TOKENIZER, "'!' is there twice"],
    ),
    "a token of 10 MB": ("single", set_vocab(**{"y" * 10**7: 300}), [TOKENIZER, "token 'yyy"]),
    "a token with escapes": ("single", add_token({"id": 260, "content": ESCAPE}), [TOKENIZER, SHOWN_ESCAPE]),
    "a token that is half a character": ("single", add_token({"id": 260, "content": "\ud800"}), [TOKENIZER, r"\ud800"]),
    "a token that is a list": ("single", add_token({"id": 260, "content": ["a"]}), [TOKENIZER, "added_tokens"]),
    "a token without content": ("single", add_token({"id": 260}), [TOKENIZER, "added_tokens"]),
    "added tokens that are a number": ("single", literal(TOKENIZER, "5", "added_tokens"), [TOKENIZER, "added_tokens"]),
    "a cutter that is a list": ("single", literal(TOKENIZER, "[[]]", "pre_tokenizer"), [TOKENIZER, "pre_tokenizer"]),
    "a normalizer with escapes": (
        "single",
        edited(TOKENIZER, lambda f: f.update(normalizer={"normalizers": [ESCAPE]})),
        [TOKENIZER, "normalizer", SHOWN_ESCAPE],
    ),
    "a tokenizer that is larger than the model": ("single", edited(TOKENIZER, extra_symbols), ["264 ids", "263"]),
    "a character that is half of one": (
        "characters",
        edited(TOKENIZER, lambda f: f["model"].update(vocab={"a": 0, "b": 1, "c": 2, "\ud800": 3})),
        [TOKENIZER, "surrogates"],
    ),
    "characters that are not in order": (
        "characters",
        edited(TOKENIZER, lambda f: f["model"].update(vocab={"b": 0, "a": 1})),
        [TOKENIZER, "sorted"],
    ),
    "characters by true and false": (
        "characters",
        edited(TOKENIZER, lambda f: f["model"].update(vocab={"a": False, "b": True})),
        [TOKENIZER, "vocab"],
    ),
    # vocab.json, merges.txt and tokenizer_config.json
    "a vocabulary too deep": ("pair", content(VOCAB, '{"a":' * 200_000), [VOCAB, "nested too deeply"]),
    "a vocabulary with a token less": ("pair", edited(VOCAB, lambda f: f.pop("a")), [VOCAB, "token 'a' has id None"]),
    "a vocabulary of lists": ("pair", edited(VOCAB, lambda f: f.update(a=[64])), [VOCAB, "number"]),
    "a vocabulary of a gigabyte": ("pair", sparse(VOCAB), [VOCAB, "33,554,432 bytes"]),
    "merges not UTF-8": ("pair", content(MERGES, b"#version: 0.2\nh \xff\n"), [MERGES, "not UTF-8"]),
    "merges of a gigabyte": ("pair", sparse(MERGES), [MERGES, "33,554,432 bytes"]),
    "a merge of 10 MB": ("pair", content(MERGES, "h e\n" + "l" * 10**7 + " l\n"), [VOCAB, "token"]),
    "merges a folder": (
        "pair",
        replaced(MERGES, pathlib.Path.mkdir),
        ["no tokenizer.json, and no vocab.json with merges.txt"],
    ),
    "add_prefix_space with escapes": (
        "pair",
        edited(SETTINGS, lambda f: f.update(add_prefix_space=ESCAPE)),
        [SETTINGS, "add_prefix_space", SHOWN_ESCAPE],
    ),
    "settings too deep": ("pair", literal(SETTINGS, DEEP, "x"), [SETTINGS, "nested too deeply"]),
    "settings of a gigabyte": ("pair", sparse(SETTINGS), [SETTINGS, "4,194,304 bytes"]),
    # model.npz
    "archive cut": ("npz", cut(ARCHIVE, -30), [ARCHIVE, "not a whole NumPy archive"]),
    "archive empty": ("npz", content(ARCHIVE, b""), [ARCHIVE, "not a whole NumPy archive"]),
    "archive missing": ("npz", lambda folder: (folder / ARCHIVE).unlink(), [ARCHIVE, "missing"]),
    "archive a pipe": ("npz", replaced(ARCHIVE, os.mkfifo), [ARCHIVE, "missing"]),
    "archive a pickle": ("npz", pickled(ARCHIVE), [ARCHIVE, "not a whole NumPy archive"]),
    "archive a single array": ("npz", content(ARCHIVE, npy(np.ones(3))), [ARCHIVE, "not a whole NumPy archive"]),
    "archive of many layers": ("npz", config("n_layer", 10_000), [ARCHIVE, "28 arrays", "n_layer=10000"]),
    "archive of a billion tokens": ("npz", config("vocab_size", 10**9), [ARCHIVE, "wte.weight", "(1000000000, 16)"]),
    "archive with a larger tokenizer": ("npz", edited(TOKENIZER, extra_symbols), ["264 ids", "263"]),
    "objects that run a command": ("npz", object_array, [ARCHIVE, "ln_f.weight", "|O", "float32"]),
    "an array less": ("npz", archive(lambda members: members.pop(LN_F_NPY)), [ARCHIVE, "ln_f.weight is missing"]),
    "an array more": ("npz", archive(lambda members: members.update({"x.npy": b""})), [ARCHIVE, "'x.npy'"]),
    "an array twice": (
        "npz",
        archive(lambda members: None, again=(LN_F_NPY,)),
        [ARCHIVE, "'ln_f.weight.npy'", "twice"],
    ),
    "an array without suffix": (
        "npz",
        archive(lambda members: members.update({"ln_f.weight": members.pop(LN_F_NPY)})),
        [ARCHIVE, "'ln_f.weight'"],
    ),
    "an array that leads out": (
        "npz",
        archive(lambda members: members.update({"../../canary.npy": npy(np.ones(3))})),
        [ARCHIVE, "'../../canary.npy'"],
    ),
    "an absolute array": ("npz", archive(lambda m: m.update({"/tmp/canary.npy": b""})), [ARCHIVE, "'/tmp/canary.npy'"]),
    "an array with escapes": ("npz", archive(lambda m: m.update({ESCAPE: b""})), [ARCHIVE, SHOWN_ESCAPE]),
    "an array of another shape": (
        "npz",
        array(np.ones((4, 4), np.float32)),
        [ARCHIVE, "ln_f.weight", "(4, 4)", "(16,)"],
    ),
    "a NaN in an array": ("npz", array(np.full(16, np.nan)), [ARCHIVE, "ln_f.weight", "not finite"]),
    "an array beyond float32": ("npz", array(np.full(16, 1e300)), [ARCHIVE, "ln_f.weight", "not finite"]),
    "an array of integers": ("npz", array(np.ones(16, np.int32)), [ARCHIVE, "ln_f.weight", "<i4", "float32"]),
    "an array of fields": ("npz", array(np.ones(16, [("a\n", "<f4")])), [ARCHIVE, "ln_f.weight", "float32"]),
    "an array with fewer values": (
        "npz",
        array(npy(np.ones(16, np.float32))[:-4]),
        [ARCHIVE, "ln_f.weight", "64 bytes of its shape"],
    ),
    "an array with 200 MB of zeros more": (
        "npz",
        array(npy(np.ones(16, np.float32)) + bytes(200_000_000), zipfile.ZIP_DEFLATED),
        [ARCHIVE, "ln_f.weight", "64 bytes of its shape"],
    ),
    "an array that says it is large": (
        "npz",
        array_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
        [ARCHIVE, "ln_f.weight", "(1000000000000,)"],
    ),
    "an array of 99 digits": (
        "npz",
        array_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 99 + "), }"),
        [ARCHIVE, "ln_f.weight", "99999"],
    ),
    "an array of 5000 digits": (
        "npz",
        array_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + "), }"),
        [ARCHIVE, "ln_f.weight"],
    ),
    "a shape of two numbers in one": (
        "npz",
        array_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1 6,), }"),
        [ARCHIVE, "not a whole NumPy archive"],
    ),
    "an array header with code": (
        "npz",
        array_header("{'descr': __import__('os').system('touch canary'), 'fortran_order': False, 'shape': (16,), }"),
        [ARCHIVE, "ln_f.weight", "__import__"],
    ),
    "an array header too deep": ("npz", array_header("(" * 60_000), [ARCHIVE, "ln_f.weight", "(((("]),
    "an array header of 100 MB": (
        "npz",
        array(raw_npy(" " * 100_000_000, version=2), zipfile.ZIP_DEFLATED),
        [ARCHIVE, "ln_f.weight", "NUMPY"],
    ),
    "an array header with escapes": ("npz", array_header(ESCAPE), [ARCHIVE, "ln_f.weight", r"\n\x1b[2J"]),
    "an array that is empty": ("npz", array(b""), [ARCHIVE, "ln_f.weight", "float32"]),
    "an array in bzip2": ("npz", array(np.ones(16, np.float32), zipfile.ZIP_BZIP2), [ARCHIVE, "deflate"]),
    "an encrypted array": ("npz", flipped(ARCHIVE, lambda d: d.rindex(b"PK\x01\x02") + 8, 1), [ARCHIVE, "encrypted"]),
    "an array with a changed value": (
        "npz",
        flipped(ARCHIVE, lambda d: d.index(b"\x93NUMPY") + 128 + 4, 1),
        [ARCHIVE, "not a whole NumPy archive", "CRC"],
    ),
    "two names for an array": (
        "npz",
        flipped(ARCHIVE, lambda d: d.index(b"wte.weight.npy"), 1),
        [ARCHIVE, "not a whole NumPy archive"],
    ),
    "an array somewhere else": (
        "npz",
        flipped(ARCHIVE, lambda d: d.rindex(b"PK\x01\x02") + 44),
        [ARCHIVE, "not a whole NumPy archive"],
    ),
    "deflated nonsense": (
        "npz",
        deflated_nonsense,
        [ARCHIVE, "not a whole NumPy archive", "invalid block type"],
    ),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The folders that the cases change, each of which can be read."""
    folders = {}
    for name, original in ORIGINALS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        original.write(folders[name])
        original.read(folders[name])
    return folders


@pytest.fixture
def hostile(originals: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str) -> pathlib.Path:
    """The folder of a case, within one that nothing else is in."""
    original, change, _ = CASES[name]
    folder = tmp_path / "in" / "model"
    shutil.copytree(originals[original], folder)
    change(folder)
    return folder


def listing(folder: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
    """Size and time of everything below a folder, and of itself."""
    stats = {file: file.lstat() for file in (folder, *folder.rglob("*"))}
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def check_message(message: str, words: list[str]) -> None:
    assert all(word in message for word in words), message
    assert len(message) < MOST_CHARACTERS
    assert message.isprintable(), message  # on one line, and no escape sequence


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused(hostile: pathlib.Path, name: str) -> None:
    original, _, words = CASES[name]
    before = listing(hostile.parent)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(DataError) as caught:
            ORIGINALS[original].read(hostile)
        seconds, (_, most) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    check_message(str(caught.value), [str(hostile), *words])
    assert seconds < MOST_SECONDS
    assert most < MOST_BYTES
    assert listing(hostile.parent) == before


def command(*arguments: object) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_settings():
        code = main([*map(str, arguments)])
    return Finished(code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_by_command(hostile: pathlib.Path, name: str) -> None:
    original, _, words = CASES[name]
    before = listing(hostile.parent)
    done = command(*ORIGINALS[original].command, "--model", hostile, "--out", hostile.parent / "out")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("gpt2-jax: error: ")
    assert done.err.count("\n") == 1
    check_message(done.err.removesuffix("\n"), [str(hostile), *words])
    assert listing(hostile.parent) == before


MEASURED = """
import sys
import gpt2_jax
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.export import import_bundle

def most_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))

gpt2_jax.load(sys.argv[1])
import_bundle("npz", sys.argv[2])
before = most_memory()
for folder in sys.argv[3:]:
    try:
        import_bundle("npz", folder) if "npz" in folder else gpt2_jax.load(folder)
    except DataError as error:
        print("refused", folder)
print(most_memory() - before)
taken = b"1" * (300 * 2**20)
print(most_memory() - before)
"""
LARGE = [
    *("n_layer the most", "n_embd a million", "n_positions ten million", "vocab_size a billion"),
    *("config.json of a gigabyte", "config.json too deep", "header of 50 MB", "tokenizer of a gigabyte"),
    *("archive of a billion tokens", "an array with 200 MB of zeros more", "an array header of 100 MB"),
    "an array that says it is large",
]


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="no /proc here to ask for the memory used")
def test_memory_is_not_taken_for_what_files_say(originals: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """What a process takes at most, besides what two valid models took, in MB; and that this sees 300."""
    folders = []
    for number, name in enumerate(LARGE):
        original, change, _ = CASES[name]
        folders.append(tmp_path / f"{original}{number}")
        shutil.copytree(originals[original], folders[-1])
        change(folders[-1])
    arguments = [sys.executable, "-c", MEASURED, originals["single"], originals["npz"], *folders]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=120)
    *refused, taken, seen = done.stdout.splitlines()
    assert refused == [f"refused {folder}" for folder in folders], done.stderr
    assert int(taken) < 200
    assert int(seen) > 200


def test_links_are_followed(originals: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Hugging Face's cache has the files under their hashes, and links to them in the folder of a model."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(originals["single"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    config, _, tokenizer = gpt2_jax.load(folder)
    assert (config.model.n_layer, tokenizer.name) == (2, "bpe:3")


@pytest.mark.parametrize(
    ("original", "file"),
    [
        *(("single", file) for file in (CONFIG, WEIGHTS, TOKENIZER)),
        *(("pair", file) for file in (VOCAB, MERGES, SETTINGS)),
        *(("shards", INDEX), ("npz", ARCHIVE)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_changed_bytes_make_no_other_error(
    originals: dict[str, pathlib.Path], tmp_path: pathlib.Path, original: str, file: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(originals[original], folder)
    whole = (folder / file).read_bytes()
    rng = random.Random(file)
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        # Where the files say what is in them: the values of weights are as good as others.
        ends = (rng.randrange(min(len(data), 6000)), len(data) - 1 - rng.randrange(min(len(data), 3000)))
        data[rng.choice(ends)] = rng.randrange(256)
        (folder / file).write_bytes(data)
        try:
            ORIGINALS[original].read(folder)
        except DataError as error:
            check_message(str(error), [str(folder)])
            refused += 1
    assert refused > 10
