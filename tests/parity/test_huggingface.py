"""Logits, ids and greedy texts of transformers' GPT-2, from folders that transformers itself wrote."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import workshop

import gpt2_jax
from gpt2_jax.config import MeshConfig
from gpt2_jax.decoding.batch import Batch, Limits
from gpt2_jax.decoding.layout import Decoder, decoding_mesh, make_decoder
from gpt2_jax.decoding.settings import Sampling
from gpt2_jax.exchange.names import tensors

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[parity]'")

# A difference of the two best logits below which either may be chosen.
UNDECIDED = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def their_model(scale: float, seed: int = 0, **shape: Any) -> transformers.GPT2LMHeadModel:
    """Random weights of this spread everywhere, biases included."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm_scale = ".ln_" in name and name.endswith("weight")
            parameter.copy_(float(norm_scale) + scale * torch.randn_like(parameter))
    return model


SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 96, "vocab_size": 50257}
WIDE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


def saved(
    model: transformers.GPT2LMHeadModel, folder: pathlib.Path, data_dir: pathlib.Path, **how: Any
) -> pathlib.Path:
    files = data_dir / "gpt2-bpe"
    tokenizer = transformers.GPT2TokenizerFast(vocab=str(files / "encoder.json"), merges=str(files / "vocab.bpe"))
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
def test_logits(shape: dict[str, int], tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
    model = their_model(0.15 if shape is SMALL else 0.05, **shape)
    folder = saved(model, tmp_path, data_dir, max_shard_size="10MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config, params, _ = gpt2_jax.load(folder)
    tokens = np.random.default_rng(0).integers(0, 50257, (2, shape["n_positions"]))
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    got = jax.jit(gpt2_jax.GPT2(config.model).apply)({"params": params}, tokens.astype(np.int32))
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-4 * np.abs(want).max())


def test_ids(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
    folder = saved(their_model(0.1, **SMALL), tmp_path, data_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = gpt2_jax.load(folder)[2]
    for line in (data_dir / "bpe_golden.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        if "<|endoftext|>" not in text:  # which transformers takes for the token, and we for text
            assert ours.encode(text).tolist() == theirs.encode(text)


def their_greedy(model: transformers.GPT2LMHeadModel, prompt: list[int], new: int, **asked: Any) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **asked,
        )
    return out[0, len(prompt) :].tolist()


def assert_greedy(
    model: transformers.GPT2LMHeadModel, decoder: Decoder, prompts: list[list[int]], new: int, distinct: int
) -> None:
    """Our batch of texts, each token for token the reference's, up to a choice that the reference leaves open."""
    rows: list[list[int]] = [[] for _ in prompts]
    for token in Batch(decoder, prompts, sampling=Sampling(temperature=0), limits=Limits(new)):
        rows[token.row].append(token.id)
    compared = set()
    for prompt, row in zip(prompts, rows, strict=True):
        want = their_greedy(model, prompt, new)
        assert len(row) == new
        for place, (ours, theirs) in enumerate(zip(row, want, strict=True)):
            if ours != theirs:
                with torch.inference_mode():
                    logits = model(torch.tensor([[*prompt, *want[:place]]])).logits[0, -1]
                assert logits[theirs] - logits[ours] < UNDECIDED
                break
            compared.add(ours)
    assert len(compared) >= distinct


@pytest.mark.parametrize("scale", [0.1, 0.15, 0.2])
@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=["one device", "data 2, tensor 4"])
def test_greedy_texts_of_random_weights(
    scale: float, mesh: tuple[int, int] | None, tmp_path: pathlib.Path, data_dir: pathlib.Path
) -> None:
    model = their_model(scale, **SMALL)
    config, params, _ = gpt2_jax.load(saved(model, tmp_path, data_dir))
    devices = mesh and decoding_mesh(MeshConfig(data=mesh[0], tensor=mesh[1]), jax.devices())
    decoder = make_decoder(config.model, params, 50257, mesh=devices)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 50257, length).tolist() for length in (1, 5, 17, 40)]
    assert_greedy(model, decoder, prompts, 50, distinct=20)


def test_greedy_texts_of_trained_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A run of ours, with the same numbers in their model."""
    base = tmp_path_factory.getbasetemp()
    settings = {
        **{"tokenizer.name": "bpe:80", "model.n_positions": 64, "model.n_embd": 64, "train.steps": 300},
        **{"model.embd_pdrop": 0, "model.attn_pdrop": 0, "model.resid_pdrop": 0, "train.eval_every": 0},
        **{"optimizer.learning_rate": 3e-3, "checkpoint.every": 300},
    }
    done = workshop(base).run(base / "trained", settings)
    assert done.code == 0, done.err
    config, params, tokenizer = gpt2_jax.load(base / "trained")
    fields = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    model = their_model(0, **{name: getattr(config.model, name) for name in fields})
    state = {}
    for tensor in tensors(config.model):
        value: Any = params
        for name in tensor.path:
            value = value[name]
        value = np.asarray(value if tensor.layer is None else value[tensor.layer])
        value = value[: config.model.vocab_size] if tensor.name == "wte.weight" else value
        state[f"transformer.{tensor.name}"] = torch.tensor(value.reshape(tensor.shape))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    decoder = make_decoder(config.model, params, tokenizer.vocab_size)
    prompts = [tokenizer.encode(text).tolist() for text in ("12 plus", "37 plus", "150", "99 plus one is", "7")]
    assert_greedy(model, decoder, prompts, 50, distinct=20)


def test_penalties_are_theirs(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
    model = their_model(0.1, **SMALL)
    config, params, _ = gpt2_jax.load(saved(model, tmp_path, data_dir))
    decoder = make_decoder(config.model, params, 50257)
    prompt = np.random.default_rng(2).integers(0, 50257, 9).tolist()
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    batch = Batch(decoder, [prompt], sampling=sampling, limits=Limits(40))
    got = [token.id for token in batch]
    assert got == their_greedy(model, prompt, 40, repetition_penalty=1.5)
    free = dataclasses.replace(sampling, repetition_penalty=1)
    assert got != [token.id for token in Batch(decoder, [prompt], sampling=free, limits=Limits(40))]
