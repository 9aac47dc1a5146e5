"""Exporting: files in another program's format, read back and compared before they get their name."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.gguf_file import GGUF_TYPES, read_gguf, read_merges, write_gguf
from gpt2_jax.exchange.huggingface import load_huggingface
from gpt2_jax.exchange.huggingface_write import DTYPES as HUGGINGFACE_DTYPES
from gpt2_jax.exchange.huggingface_write import write_huggingface
from gpt2_jax.exchange.model_card import model_card
from gpt2_jax.exchange.nanogpt import DTYPES as NANOGPT_DTYPES
from gpt2_jax.exchange.nanogpt import read_nanogpt, write_nanogpt
from gpt2_jax.exchange.npz import DTYPES as NPZ_DTYPES
from gpt2_jax.exchange.npz import read_npz, write_npz
from gpt2_jax.exchange.stablehlo import DTYPES as STABLEHLO_DTYPES
from gpt2_jax.exchange.stablehlo import read_stablehlo, read_tokens, tokenizer_content, write_stablehlo
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.user_paths import expand_user

# How far a logit may be from the model's, as a share of their spread: what rounding each weight does.
_ROUNDING = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.1}
_PROMPT = "numpy.random.default_rng(0).integers(0, vocab_size, n_positions)"
_DECIDING = (
    *("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"),
    *("layer_norm_epsilon", "activation", "bias"),
)
_OTHER_PROGRAM = 1e-4  # the same sums in another order


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
      dtypes: types that the weights may have, the default first.
      write: writes a bundle into a folder, with weights of the given type.
      logits: `[T, V]` of the files in a folder, for T ids; raises DataError if their tokenizer is not the bundle's.
      order: share of the spread of the logits by which they may differ besides the rounding of the weights.
    """

    dtypes: tuple[str, ...]
    write: Callable[[pathlib.Path, Bundle, str], None]
    logits: Callable[[pathlib.Path, Bundle, list[int]], np.ndarray]
    order: float = 0.0

    def tolerance(self, dtype: str) -> float:
        """The most by which a logit may differ, as a share of the spread of the logits."""
        return self.order + _ROUNDING[dtype]


def _huggingface_logits(folder: pathlib.Path, bundle: Bundle, ids: list[int]) -> np.ndarray:
    config, params, tokenizer = load_huggingface(folder)
    _check_same(tokenizer.fingerprint, bundle.tokenizer.fingerprint)
    return _logits(config, params, ids)


def _npz_logits(folder: pathlib.Path, bundle: Bundle, ids: list[int]) -> np.ndarray:
    found = read_npz(folder)
    _check_same(found.tokenizer.fingerprint, bundle.tokenizer.fingerprint)
    return _logits(found.config, found.params, ids)


def _nanogpt_logits(folder: pathlib.Path, bundle: Bundle, ids: list[int]) -> np.ndarray:
    # A file without meta.pkl has GPT-2's tokenizer, which would have to be found, perhaps downloaded.
    found = read_nanogpt(folder, gpt2=bundle.tokenizer)
    _check_same(found.tokenizer.fingerprint, bundle.tokenizer.fingerprint)
    return _logits(found.config, found.params, ids)


def _write_gguf(folder: pathlib.Path, bundle: Bundle, dtype: str) -> None:
    write_gguf(folder / _GGUF, bundle, dtype)


def _gguf_logits(folder: pathlib.Path, bundle: Bundle, ids: list[int]) -> np.ndarray:
    _check_same(read_merges(folder / _GGUF), list(bundle.tokenizer.merges))
    return _logits(*read_gguf(folder / _GGUF), ids)


def _stablehlo_logits(folder: pathlib.Path, bundle: Bundle, ids: list[int]) -> np.ndarray:
    _check_same(read_tokens(folder), tokenizer_content(bundle.tokenizer))
    return read_stablehlo(folder)(np.array([ids], np.int32))[0]


def _check_same(written: object, wanted: object) -> None:
    if written != wanted:
        raise DataError("the tokenizer among the exported files gives other ids; nothing was kept")


_GGUF = "model.gguf"
FORMATS = {
    "huggingface": Format(tuple(HUGGINGFACE_DTYPES), write_huggingface, _huggingface_logits),
    "npz": Format(NPZ_DTYPES, write_npz, _npz_logits),
    "nanogpt": Format(NANOGPT_DTYPES, write_nanogpt, _nanogpt_logits),
    "gguf": Format(GGUF_TYPES, _write_gguf, _gguf_logits),
    "stablehlo": Format(STABLEHLO_DTYPES, write_stablehlo, _stablehlo_logits, _OTHER_PROGRAM),
}
# Formats that are read into a Hugging Face folder.
IMPORTS: dict[str, Callable[[pathlib.Path], Bundle]] = {"npz": read_npz, "nanogpt": read_nanogpt}


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far the exported files are from the model, on a fixed prompt.

    Attributes:
      difference: largest absolute difference of a logit.
      allowed: the most that it may be.
      spread: the largest distance of a logit from the mean of its position.
      erf_difference: where GELU by erf was accepted in place of tanh: how far that moves a logit, at most. The other
        numbers are then of the model with erf.
    """

    difference: float
    allowed: float
    spread: float
    erf_difference: float | None = None

    def __str__(self) -> str:
        text = (
            f"read back, its logits differ by at most {self.difference:.3g} (allowed {self.allowed:.3g}, "
            f"they spread over {self.spread:.3g})"
        )
        if self.erf_difference is None:
            return text
        return f"{text}; GELU by erf in place of tanh moves them by up to {self.erf_difference:.3g}"


def check_request(form: str, out: str | pathlib.Path, dtype: str) -> None:
    """Raises UsageError for an unknown format or type, or an `out` that holds something."""
    if form not in FORMATS:
        raise UsageError(f"--format={form}; allowed: {', '.join(FORMATS)}")
    if dtype not in FORMATS[form].dtypes:
        raise UsageError(f"--dtype={dtype}; allowed for {form}: {', '.join(FORMATS[form].dtypes)}")
    folder = expand_user(out)
    try:
        here = folder.resolve() == pathlib.Path.cwd()
        taken = here or folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as error:
        raise UsageError(f"--out={out}: {error.strerror}; choose another folder") from None
    if taken:
        found = "the folder that you are in" if here else "there is something already"
        raise UsageError(f"--out={out}: {found}; name a new folder, or an empty one")


def import_bundle(form: str, path: str | pathlib.Path) -> Bundle:
    """A model in format `form`. Raises UsageError for an unknown format, DataError for what cannot be read."""
    if form not in IMPORTS:
        raise UsageError(f"--from={form}; allowed: {', '.join(IMPORTS)}")
    return IMPORTS[form](expand_user(path))


def export(
    bundle: Bundle, form: str, out: str | pathlib.Path, dtype: str = "float32", *, accept_erf: bool = False
) -> Parity:
    """Writes the folder `out`: the model in format `form`, a card, and `export.json` with the parity.

    The files are written under a temporary name, read back, compared and renamed; `out` is whole or not there.

    Args:
      bundle: the model.
      form: one of `FORMATS`.
      out: a folder that is not there yet, or empty.
      dtype: type of the weights, one of the format's.
      accept_erf: for nanogpt, which has no other: write GELU by erf where the model has GPT-2's tanh approximation.

    Raises:
      UsageError: an unknown format or type, a model that the format cannot express, or `out` is there already or
        cannot be made.
      DataError: the files read back give other logits, by more than the format's tolerance.
    """
    check_request(form, out, dtype)
    if accept_erf and form != "nanogpt":
        raise UsageError(f"--accept_erf is for --format=nanogpt; {form} has GPT-2's tanh GELU")
    folder = expand_user(out)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    other = accept_erf and bundle.config.activation != "gelu_erf"
    written = bundle
    if other:
        config = dataclasses.replace(bundle.config, activation="gelu_erf")
        written = dataclasses.replace(bundle, config=config, facts={**bundle.facts, "trained with GELU": "by tanh"})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        FORMATS[form].write(temporary, written, dtype)
        parity = _parity(written, form, temporary, dtype)
        if other:
            parity = dataclasses.replace(parity, erf_difference=_largest_difference(bundle, written))
        if not parity.difference <= parity.allowed:
            raise DataError(
                f"the exported files give logits that are off by {parity.difference:.3g} where {parity.allowed:.3g} "
                f"is allowed for {dtype}; nothing was kept; choose float32"
            )
        report = {"format": form, "dtype": dtype, "prompt": _PROMPT, **dataclasses.asdict(parity)}
        report["facts"] = dict(bundle.facts)
        (temporary / "export.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        card = model_card(written, form, dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8", newline="\n")
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, folder)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.filename else str(error)
        raise UsageError(f"--out={out}: {reason}; make room, or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parity


def _parity(bundle: Bundle, form: str, folder: pathlib.Path, dtype: str) -> Parity:
    """The parity of what was written into `folder`."""
    ids = _prompt(bundle.config)
    with jax.default_device(_host()):
        ours_TV = _logits(bundle.config, bundle.params, ids)
        theirs_TV = FORMATS[form].logits(folder, bundle, ids)
    # Of the logits less their mean, since adding a number to all of a position says nothing.
    spread = float(np.abs(ours_TV - ours_TV.mean(axis=-1, keepdims=True)).max())
    difference = float(np.abs(ours_TV - theirs_TV).max())
    return Parity(difference, FORMATS[form].tolerance(dtype) * spread, spread)


def _largest_difference(one: Bundle, other: Bundle) -> float:
    one_TV, other_TV = (_logits(bundle.config, bundle.params, _prompt(bundle.config)) for bundle in (one, other))
    return float(np.abs(one_TV - other_TV).max())


def _host() -> jax.Device:
    """The CPU, where float32 is float32; another device if `JAX_PLATFORMS` leaves that out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _prompt(config: ModelConfig) -> list[int]:
    """Ids from all over the vocabulary, as many as there are positions, the same each time."""
    return np.random.default_rng(0).integers(0, config.vocab_size, config.n_positions).tolist()


def _logits(config: ModelConfig, params: Params, ids: list[int]) -> np.ndarray:
    """`[T, V]`, in float32 whatever the run computed in."""
    # What makes no difference here is as in a fresh config, so that one program serves for both sides.
    same = {name: getattr(config, name) for name in _DECIDING}
    config = ModelConfig(**same, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    logits_1TV = _forward(config, jax.device_put(params, _host()), jnp.array([ids], jnp.int32))
    return np.asarray(logits_1TV)[0, :, : config.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Params, tokens_1T: jax.Array) -> jax.Array:
    logits_1TV: Any = GPT2(config).apply({"params": params}, tokens_1T)
    return logits_1TV
