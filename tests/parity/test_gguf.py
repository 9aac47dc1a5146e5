"""GGUF files as transformers reads them: its logits and its ids are ours."""

import os
import pathlib

import jax
import numpy as np
import pytest
from reference import numpy_gpt2

import gpt2_jax
from gpt2_jax.config import ModelConfig
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.gguf_file import write_gguf
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_merges

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[parity]'")
pytest.importorskip("gguf", reason="needs gguf: pip install -e '.[gguf]'")
pytest.importorskip("accelerate", reason="needs accelerate, as transformers does for GGUF: pip install accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FILE = "model.gguf"
TEXTS = [
    "Hello, world! It's 1999; they'll see.",
    "  two  spaces\n\n\tand\ttabs   ",
    "Grüße aus 東京 😀 \u00a0\u3000x",
    "def f(x):\n    return x ** 2  # they've",
]


def small_bundle(tokenizer: Tokenizer) -> Bundle:
    # transformers 5 takes no n_positions from GGUF: it has always 1024.
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=1024, vocab_size=tokenizer.vocab_size)
    drawn = numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // 128) * 128,
    )
    rng = np.random.default_rng(1)

    def at_scale(path: tuple[jax.tree_util.DictKey, ...], leaf: np.ndarray) -> np.ndarray:
        value = 0.1 * rng.standard_normal(leaf.shape) if path[-1].key == "kernel" else leaf
        return value.astype(np.float32)

    return Bundle(config, jax.tree_util.tree_map_with_path(at_scale, drawn), tokenizer)


# float32 differs by the order of sums; the others by the rounding of weights, for logits of up to 11.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("float16", 2e-2), ("q8_0", 2e-1)])
def test_logits(tmp_path: pathlib.Path, dtype: str, tolerance: float) -> None:
    bundle = small_bundle(tokenizer_from_merges(["h e", "l l", "he ll"]))
    write_gguf(tmp_path / FILE, bundle, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32).eval()
    tokens = np.random.default_rng(2).integers(0, bundle.config.vocab_size, (2, 48))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(gpt2_jax.GPT2(bundle.config).apply({"params": bundle.params}, tokens.astype(np.int32)))
    assert theirs.shape == ours.shape
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance)


def test_ids(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
    ours = make_tokenizer("gpt2", path=str(data_dir / "gpt2-bpe"))
    write_gguf(tmp_path / FILE, small_bundle(ours))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text
