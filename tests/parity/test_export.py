"""Exported folders as transformers reads them, and transformers' own after a way through this package and back."""

import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from reference import numpy_gpt2
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpt2_jax
from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.export import export
from gpt2_jax.exchange.huggingface_write import write_huggingface
from gpt2_jax.exchange.tokenizer_json import write_tokenizer
from gpt2_jax.run.bundle import load_bundle
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[parity]'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CORPUS = [
    "the cat sat on the mat, the cat ate the rat's hat " * 9,
    "Grüße aus 東京! ΟΔΟΣ  \n\n" * 3,
    "0123456789 \ufb01n",
]
TEXTS = [
    "the cat sat",
    "  Grüße \n\n aus\t東京 ",
    "ΟΔΟΣ. the RAT's 2000",
    "",
    "\ufb01n \u00a0 x\r\n",
    "they'll  😀 see",
]
CONTEXT = 48
# By the order of sums; the logits are up to 7.
TOLERANCE = 2e-4


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What transformers warns of."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def make_bundle(tokenizer: Tokenizer, **fields: Any) -> Bundle:
    """Random weights, no bias zero and no scale one, in a vocabulary that is padded on our side."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": CONTEXT, "vocab_size": tokenizer.vocab_size}
    config = ModelConfig(**{**shape, **fields})
    padded = -(-config.vocab_size // 128) * 128
    assert padded != config.vocab_size
    params = numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        padded_vocab_size=padded,
    )
    params["wpe"]["embedding"] *= 3  # so that greedy texts do not repeat one token
    flat = {name: leaf.astype(np.float32) for name, leaf in numpy_gpt2.leaves(params).items()}
    kept = {name: leaf for name, leaf in flat.items() if config.bias or not name.endswith(".bias")}
    return Bundle(config, numpy_gpt2.from_leaves(kept), tokenizer)


def our_logits(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(gpt2_jax.GPT2(config).apply)({"params": params}, tokens.astype(np.int32)))


def their_logits(model: transformers.GPT2LMHeadModel, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def some_tokens(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(2).integers(0, config.vocab_size, (2, config.n_positions))


def tensors_in(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Of all files, without the prefix that some have."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update({name.removeprefix("transformer."): value for name, value in load_file(file).items()})
    return found


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
        assert value.tobytes() == other[name].tobytes(), name


# From us to transformers


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits(dtype: str, tmp_path: pathlib.Path, warned: list[str]) -> None:
    bundle = make_bundle(make_tokenizer("bytes"), layer_norm_epsilon=1e-3)
    parity = export(bundle, "huggingface", tmp_path / "x", dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, loading = load(tmp_path / "x", dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert not any(loading.values()), loading
    assert load(tmp_path / "x").dtype == getattr(torch, dtype)  # what config.json says
    assert warned == []

    def rounded(leaf: np.ndarray) -> np.ndarray:
        return torch.tensor(leaf).to(getattr(torch, dtype)).float().numpy()

    tokens = some_tokens(bundle.config)
    theirs = their_logits(model, tokens)
    assert theirs.shape == (2, CONTEXT, 257)
    assert np.abs(theirs).max() > 3
    # The rounding of the weights is all that the type changes.
    ours = our_logits(bundle.config, jax.tree.map(rounded, bundle.params), tokens)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE)
    off = np.abs(theirs - our_logits(bundle.config, bundle.params, tokens)).max()
    assert off < {"float32": TOLERANCE, "float16": 0.02, "bfloat16": 0.2}[dtype]
    assert off > {"float32": -1, "float16": 1e-4, "bfloat16": 1e-3}[dtype]
    assert parity.difference == 0 if dtype == "float32" else 0 < parity.difference <= parity.allowed


def test_shapes_are_exact(tmp_path: pathlib.Path) -> None:
    bundle = make_bundle(make_tokenizer("bytes"))
    write_huggingface(tmp_path, bundle)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(tmp_path))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()} == state
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}  # without which older versions refuse it


def test_gelu_by_erf_and_no_biases(tmp_path: pathlib.Path) -> None:
    bundle = make_bundle(make_tokenizer("bytes"), activation="gelu_erf", bias=False, layer_norm_epsilon=1e-6)
    export(bundle, "huggingface", tmp_path / "x")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(loading.values()), loading  # their zeros are in the file
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(value.any() for value in biases)
    tokens = some_tokens(bundle.config)
    theirs = their_logits(model, tokens)
    np.testing.assert_allclose(theirs, our_logits(bundle.config, bundle.params, tokens), rtol=0, atol=TOLERANCE)
    tanh = dataclasses.replace(bundle.config, activation="gelu_tanh")
    assert np.abs(theirs - our_logits(tanh, bundle.params, tokens)).max() > 2 * TOLERANCE
    back = load_bundle(tmp_path / "x")
    assert (back.config.bias, back.config.activation) == (False, "gelu_erf")
    assert jax.tree.structure(back.params) == jax.tree.structure(bundle.params)


@pytest.mark.parametrize(
    ("name", "normalization", "lowercase"),
    [
        ("gpt2", "none", False),
        ("bpe:30", "none", False),
        ("bpe:30", "nfkc", True),
        ("bytes", "none", False),
        ("bytes", "nfc", True),
        ("chars", "none", False),
        ("chars", "nfkc", True),
    ],
)
def test_ids(
    name: str,
    normalization: str,
    lowercase: bool,
    tmp_path: pathlib.Path,
    request: pytest.FixtureRequest,
    warned: list[str],
) -> None:
    path = str(request.getfixturevalue("data_dir") / "gpt2-bpe") if name == "gpt2" else ""
    corpus = [*CORPUS, *TEXTS]
    ours = make_tokenizer(name, path=path, normalization=normalization, lowercase=lowercase, texts=lambda: corpus)
    write_huggingface(tmp_path, make_bundle(ours))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert warned == []
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == CONTEXT
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    # As transformers itself writes it, it is read back.
    theirs.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "again" / file).write_bytes((tmp_path / file).read_bytes())
    assert gpt2_jax.load(tmp_path / "again")[2].fingerprint == ours.fingerprint


@pytest.mark.parametrize("name", ["bytes", "bpe:30"])
def test_greedy_texts(name: str, tmp_path: pathlib.Path, warned: list[str]) -> None:
    bundle = make_bundle(make_tokenizer(name, texts=lambda: CORPUS))
    write_huggingface(tmp_path, bundle)
    prompts, new = ["the cat", "Grüße aus", "2"], 24
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path))
    theirs = [
        pipeline(prompt, do_sample=False, max_new_tokens=new, return_full_text=False)[0]["generated_text"]
        for prompt in prompts
    ]
    generator = gpt2_jax.Generator(bundle.config, jax.device_put(bundle.params), bundle.tokenizer)
    greedy, stopping = gpt2_jax.Sampling(temperature=0), gpt2_jax.Stopping(max_new_tokens=new)
    ours = generator.generate(prompts, sampling=greedy, stopping=stopping)
    assert [completion.text for completion in ours] == theirs
    assert len({token for completion in ours for token in completion.ids}) > 10
    assert warned == []


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_generating_needs_no_settings(tmp_path: pathlib.Path) -> None:
    bundle = make_bundle(make_tokenizer("bytes"))
    write_huggingface(tmp_path, bundle)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert settings.bos_token_id == settings.eos_token_id == settings.pad_token_id == 256
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == model.config.bos_token_id == 256
    out = model.generate()  # from end-of-text on
    assert out.shape[0] == 1
    assert out.shape[1] > 1
    assert out[0, 0] == 256


def blocks_of(card: pathlib.Path) -> list[str]:
    text = card.read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```") // 2
    return [block.replace("THIS_FOLDER", str(card.parent)) for block in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_card_tells_how_to_load_it(dtype: str, tmp_path: pathlib.Path) -> None:
    bundle = make_bundle(make_tokenizer("bpe:30", texts=lambda: CORPUS))
    export(bundle, "huggingface", tmp_path / "x", dtype)
    names: list[dict[str, Any]] = []
    for block in blocks_of(tmp_path / "x" / "README.md"):
        names.append({})
        exec(block, names[-1])
    theirs, ours, arrays = names
    assert theirs["tokenizer"].encode(TEXTS[0]) == bundle.tokenizer.encode(TEXTS[0]).tolist()
    assert theirs["model"].config.n_layer == ours["config"].model.n_layer == 2
    assert ours["tokenizer"].fingerprint == bundle.tokenizer.fingerprint
    kernel = arrays["tensors"]["transformer.h.1.mlp.c_fc.weight"]
    assert (kernel.shape, str(kernel.dtype)) == ((32, 128), dtype)
    table = arrays["tensors"]["transformer.wte.weight"]
    assert not any("lm_head" in name for name in arrays["tensors"])
    loaded = theirs["model"].state_dict()
    for values in (loaded["transformer.wte.weight"], loaded["lm_head.weight"]):
        np.testing.assert_array_equal(values.float().numpy(), table.astype(np.float32))
    np.testing.assert_array_equal(loaded["transformer.h.1.mlp.c_fc.weight"].float(), kernel.astype(np.float32))
    np.testing.assert_array_equal(ours["params"]["h"]["mlp"]["c_fc"]["kernel"][1], kernel.astype(np.float32))


# From us to us


@pytest.mark.parametrize("bias", [True, False])
def test_back_to_us(bias: bool, tmp_path: pathlib.Path) -> None:
    # Each a number that is not the default.
    fields = {"embd_pdrop": 0.0, "attn_pdrop": 0.25, "resid_pdrop": 0.5, "initializer_range": 0.03}
    bundle = make_bundle(make_tokenizer("bytes", lowercase=True), bias=bias, layer_norm_epsilon=3e-6, **fields)
    export(bundle, "huggingface", tmp_path / "x")
    back = load_bundle(tmp_path / "x")
    assert back.config == bundle.config
    assert back.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    one, other = numpy_gpt2.leaves(bundle.params), numpy_gpt2.leaves(back.params)
    assert_same_bits(one, {name: np.asarray(leaf) for name, leaf in other.items()})


# From transformers to us and back


def their_model(cls: Any, **fields: Any) -> Any:
    """Random weights everywhere, biases and norms included."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": CONTEXT, "vocab_size": 300}
    model = cls(transformers.GPT2Config(**{**shape, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm_scale = ".ln_" in f".{name}" and name.endswith("weight")
            parameter.copy_(float(norm_scale) + 0.15 * torch.randn_like(parameter))
    return model


def save(model: Any, folder: pathlib.Path, **how: Any) -> pathlib.Path:
    model.save_pretrained(folder, **how)
    write_tokenizer(folder, make_tokenizer("bytes"), CONTEXT)
    return folder


def with_head(folder: pathlib.Path) -> None:
    save(their_model(transformers.GPT2LMHeadModel, layer_norm_epsilon=1e-6, n_inner=128), folder)
    assert all(name.startswith("transformer.") for name in load_file(folder / "model.safetensors"))


def without_head(folder: pathlib.Path) -> None:
    save(their_model(transformers.GPT2Model, activation_function="gelu"), folder)
    assert not any(name.startswith("transformer.") for name in load_file(folder / "model.safetensors"))


def in_shards(folder: pathlib.Path) -> None:
    save(their_model(transformers.GPT2LMHeadModel, resid_pdrop=0, attn_pdrop=0.3), folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("*.safetensors"))) > 2


def in_half_precision(folder: pathlib.Path) -> None:
    save(their_model(transformers.GPT2LMHeadModel).half(), folder)


def as_distilgpt2_was_saved(folder: pathlib.Path) -> None:
    """Six layers, many more fields, the causal masks among the tensors, and the head besides the table."""
    save(their_model(transformers.GPT2Model, n_layer=6), folder)
    fields = json.loads((folder / "config.json").read_text())
    del fields["dtype"], fields["transformers_version"]
    fields |= {
        "_num_labels": 1,
        "architectures": ["GPT2LMHeadModel"],
        "finetuning_task": None,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "n_ctx": CONTEXT,
        "num_labels": 1,
        "output_attentions": False,
        "output_past": True,
        "pruned_heads": {},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "torchscript": False,
        "use_bfloat16": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(6):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), np.bool_))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    prefixed = {f"transformer.{name}": value for name, value in tensors.items()}
    save_file({**prefixed, "lm_head.weight": tensors["wte.weight"].copy()}, folder / "model.safetensors")


NOT_KEPT = re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")
FIELDS = (
    *("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function", "layer_norm_epsilon"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range", "scale_attn_weights", "tie_word_embeddings"),
    *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "use_cache", "model_type"),
)


@pytest.mark.parametrize(
    "make",
    [with_head, without_head, in_shards, in_half_precision, as_distilgpt2_was_saved],
    ids=lambda make: make.__name__,
)
def test_theirs_and_back_to_them(make: Any, tmp_path: pathlib.Path, warned: list[str]) -> None:
    make(tmp_path / "theirs")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    dtype = str(before.dtype).removeprefix("torch.")
    assert dtype == ("float16" if make is in_half_precision else "float32")
    bundle = load_bundle(tmp_path / "theirs")
    export(bundle, "huggingface", tmp_path / "ours", dtype)
    kept = {name: value for name, value in tensors_in(tmp_path / "theirs").items() if not NOT_KEPT.fullmatch(name)}
    assert_same_bits(tensors_in(tmp_path / "ours"), kept)
    warned.clear()
    after, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading
    assert warned == []
    assert {name: getattr(after.config, name) for name in FIELDS} == {
        name: getattr(before.config, name) for name in FIELDS
    }
    tokens = some_tokens(bundle.config)
    want = their_logits(before.float(), tokens)
    assert np.abs(want).max() > 1
    np.testing.assert_array_equal(their_logits(after.float(), tokens), want)
    np.testing.assert_allclose(our_logits(bundle.config, bundle.params, tokens), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "value"), [("reorder_and_upcast_attn", True), ("activation_function", "gelu_pytorch_tanh")]
)
def test_what_changes_no_number_is_taken(name: str, value: Any, tmp_path: pathlib.Path) -> None:
    # Only this implementation asks for the first.
    model = their_model(transformers.GPT2LMHeadModel, attn_implementation="eager", **{name: value})
    assert getattr(model.config, name) == value
    bundle = load_bundle(save(model, tmp_path))
    tokens = some_tokens(bundle.config)
    ours = our_logits(bundle.config, bundle.params, tokens)
    np.testing.assert_allclose(their_logits(model, tokens), ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("activation_function", "relu"),
        ("n_inner", 96),
    ],
)
def test_other_variants_are_refused(name: str, value: Any, tmp_path: pathlib.Path) -> None:
    save(their_model(transformers.GPT2LMHeadModel, **{name: value}), tmp_path)
    with pytest.raises(DataError) as caught:
        gpt2_jax.load(tmp_path)
    for fragment in ("config.json", name, repr(value)):
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(tmp_path: pathlib.Path) -> None:
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "vocab_size": 300,
        "attention_types": [[["global"], 2]],
    }
    save(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**shape)), tmp_path)
    with pytest.raises(DataError, match=r"config\.json.*model_type.*'gpt_neo'"):
        gpt2_jax.load(tmp_path)
