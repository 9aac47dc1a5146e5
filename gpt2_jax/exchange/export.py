"""Exporting: files in another program's format, read back and compared before they get their name."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.gguf_file import GGUF_TYPES, read_gguf, write_gguf
from gpt2_jax.exchange.huggingface import load_huggingface
from gpt2_jax.exchange.huggingface_write import DTYPES as HUGGINGFACE_DTYPES
from gpt2_jax.exchange.huggingface_write import write_huggingface
from gpt2_jax.exchange.model_card import model_card
from gpt2_jax.exchange.nanogpt import DTYPES as NANOGPT_DTYPES
from gpt2_jax.exchange.nanogpt import read_nanogpt, write_nanogpt
from gpt2_jax.exchange.npz import DTYPES as NPZ_DTYPES
from gpt2_jax.exchange.npz import read_npz, write_npz
from gpt2_jax.exchange.stablehlo import DTYPES as STABLEHLO_DTYPES
from gpt2_jax.exchange.stablehlo import read_stablehlo, write_stablehlo
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.user_paths import expand_user

# How far a logit may be from the model's, as a share of the largest: what rounding each weight does.
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
      what: in words, for the help.
      dtypes: types that the weights may have, the default first.
      write: writes a bundle into a folder, with weights of the given type.
      logits: of the files in a folder, `[T, V]`, for T ids.
      order: share of the largest logit by which they may differ besides the rounding of the weights.
    """

    what: str
    dtypes: tuple[str, ...]
    write: Callable[[pathlib.Path, Bundle, str], None]
    logits: Callable[[pathlib.Path, list[int]], np.ndarray]
    order: float = 0.0

    def tolerance(self, dtype: str) -> float:
        """The most by which a logit may differ, as a share of the largest."""
        return self.order + _ROUNDING[dtype]


def _huggingface_logits(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
    config, params, _ = load_huggingface(folder)
    return _logits(config, params, ids)


def _npz_logits(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
    bundle = read_npz(folder)
    return _logits(bundle.config, bundle.params, ids)


def _nanogpt_logits(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
    bundle = read_nanogpt(folder)
    return _logits(bundle.config, bundle.params, ids)


def _write_gguf(folder: pathlib.Path, bundle: Bundle, dtype: str) -> None:
    write_gguf(folder / _GGUF, bundle, dtype)


def _gguf_logits(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
    return _logits(*read_gguf(folder / _GGUF), ids)


def _stablehlo_logits(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
    return read_stablehlo(folder)(np.array([ids], np.int32))[0]


_GGUF = "model.gguf"
FORMATS = {
    "huggingface": Format(
        "a Hugging Face GPT-2 folder, for transformers",
        tuple(HUGGINGFACE_DTYPES),
        write_huggingface,
        _huggingface_logits,
    ),
    "npz": Format("a NumPy archive with flat names", NPZ_DTYPES, write_npz, _npz_logits),
    "nanogpt": Format("nanoGPT's ckpt.pt", NANOGPT_DTYPES, write_nanogpt, _nanogpt_logits),
    "gguf": Format("one file with its tokenizer, for llama.cpp", GGUF_TYPES, _write_gguf, _gguf_logits),
    "stablehlo": Format(
        "compiled-once programs with a runner that needs only JAX",
        STABLEHLO_DTYPES,
        write_stablehlo,
        _stablehlo_logits,
        _OTHER_PROGRAM,
    ),
}
# Formats that are read into a Hugging Face folder.
IMPORTS: dict[str, Callable[[pathlib.Path], Bundle]] = {"npz": read_npz, "nanogpt": read_nanogpt}


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far the exported files are from the model, on a fixed prompt.

    Attributes:
      difference: largest absolute difference of a logit.
      allowed: the most that it may be.
      largest: the largest absolute logit of the model.
    """

    difference: float
    allowed: float
    largest: float

    def __str__(self) -> str:
        allowed = f"{self.allowed:.3g}" if math.isfinite(self.allowed) else "as erf in place of tanh was accepted"
        return (
            f"read back, its logits differ by at most {self.difference:.3g} (allowed {allowed}, "
            f"largest logit {self.largest:.3g})"
        )


def check_request(form: str, out: str | pathlib.Path, dtype: str) -> None:
    """Raises UsageError for an unknown format or type, or an `out` that holds something."""
    if form not in FORMATS:
        raise UsageError(f"--format={form}; allowed: {', '.join(FORMATS)}")
    if dtype not in FORMATS[form].dtypes:
        raise UsageError(f"--dtype={dtype}; allowed for {form}: {', '.join(FORMATS[form].dtypes)}")
    folder = expand_user(out)
    try:
        taken = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
    except OSError as error:
        raise UsageError(f"--out={out}: {error.strerror}; choose another folder") from None
    if taken:
        raise UsageError(f"--out={out}: there is something already; name a new folder, or an empty one")


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
      accept_erf: write GELU by erf where the model has GPT-2's tanh approximation and the format (nanoGPT's) has not;
        the parity then says what that changes, and allows it.

    Raises:
      UsageError: an unknown format or type, a model that the format cannot express, or `out` is there already or
        cannot be made.
      DataError: the files read back give other logits, by more than the format's tolerance.
    """
    check_request(form, out, dtype)
    folder = expand_user(out)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UsageError(f"--out={out}: {error.strerror} ({error.filename}); choose another folder") from None
    try:
        other = accept_erf and bundle.config.activation != "gelu_erf"
        config = dataclasses.replace(bundle.config, activation="gelu_erf") if other else bundle.config
        written = dataclasses.replace(bundle, config=config)
        FORMATS[form].write(temporary, written, dtype)
        parity = _parity(bundle, form, temporary, math.inf if other else FORMATS[form].tolerance(dtype))
        if not parity.difference <= parity.allowed:
            raise DataError(
                f"the exported files give logits that are off by {parity.difference:.3g} where {parity.allowed:.3g} "
                f"is allowed for {dtype}; nothing was kept; choose float32"
            )
        report = {"format": form, "dtype": dtype, "prompt": _PROMPT, **dataclasses.asdict(parity)}
        report["facts"] = dict(bundle.facts)
        if other:
            report["allowed"] = "any: GELU by erf was accepted in place of tanh"
        (temporary / "export.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        card = model_card(written, form, dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8", newline="\n")
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise UsageError(f"--out={out}: {error.strerror} ({error.filename}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parity


def _parity(bundle: Bundle, form: str, folder: pathlib.Path, tolerance: float) -> Parity:
    """The parity of what was written into `folder`."""
    ids = _prompt(bundle.config)
    ours_TV = _logits(bundle.config, bundle.params, ids)
    theirs_TV = FORMATS[form].logits(folder, ids)
    largest = float(np.abs(ours_TV).max())
    return Parity(float(np.abs(ours_TV - theirs_TV).max()), tolerance * largest, largest)


def _prompt(config: ModelConfig) -> list[int]:
    """Ids from all over the vocabulary, as many as there are positions, the same each time."""
    return np.random.default_rng(0).integers(0, config.vocab_size, config.n_positions).tolist()


def _logits(config: ModelConfig, params: Params, ids: list[int]) -> np.ndarray:
    """`[T, V]`, in float32 whatever the run computed in."""
    # What makes no difference here is as in a fresh config, so that one program serves for both sides.
    same = {name: getattr(config, name) for name in _DECIDING}
    config = ModelConfig(**same, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    logits_1TV = _forward(config, params, jnp.array([ids], jnp.int32))
    return np.asarray(logits_1TV)[0, :, : config.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Params, tokens_1T: jax.Array) -> jax.Array:
    logits_1TV: Any = GPT2(config).apply({"params": params}, tokens_1T)
    return logits_1TV
