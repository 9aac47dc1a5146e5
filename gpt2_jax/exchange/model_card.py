"""The README.md of an exported model."""

from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.model.gpt2 import parameter_count

_LOADING = {
    "huggingface": """\
```python
# transformers (torch)
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

```python
# gpt2_jax (JAX)
import gpt2_jax

config, params, tokenizer = gpt2_jax.load("THIS_FOLDER")
```

```python
# NumPy, or anything else that reads safetensors; kernels are [in, out], the output head is wte
from safetensors.numpy import load_file

tensors = load_file("THIS_FOLDER/model.safetensors")
```""",
    "npz": """\
```python
import numpy as np

tensors = np.load("THIS_FOLDER/model.npz")  # Hugging Face's names; kernels are [in, out], the output head is wte
```

`gpt2-jax import --from npz --model THIS_FOLDER --out DIR` makes a Hugging Face folder of it again, which transformers,
gpt2_jax and all that read safetensors load.""",
    "nanogpt": """\
    python sample.py --out_dir=THIS_FOLDER --start='Once upon a time'

in a copy of nanoGPT; for a model of characters copy `meta.pkl` into its `data/gpt2_jax/` first. The file has no state
of an optimizer, so train.py's `init_from=resume` cannot go on from it.

```python
import torch

checkpoint = torch.load("THIS_FOLDER/ckpt.pt", weights_only=True)  # model_args, model; kernels are [out, in]
```

`gpt2-jax import --from nanogpt --model THIS_FOLDER --out DIR` makes a Hugging Face folder of it again.""",
    "gguf": """\
    llama-cli -m THIS_FOLDER/model.gguf -p 'Once upon a time'

```python
# transformers, with the package gguf; it takes every GPT-2 to have 1,024 positions
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", gguf_file="model.gguf")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", gguf_file="model.gguf")
```""",
    "stablehlo": """\
    pip install jax numpy flatbuffers
    python THIS_FOLDER/run.py --prompt 'Once upon a time'

`forward`, `prefill` and `decode` are StableHLO programs for any batch and length, on CPU, CUDA and TPU; `model.json`
says how they are called and which JAX wrote them, `run.py` shows it. JAX promises that its later versions read such
programs for half a year; `npz` or a Hugging Face folder last longer.""",
}


def model_card(bundle: Bundle, form: str, dtype: str) -> str:
    """What the model is, what it was trained on, how to load it. `form` is a format of export."""
    config, tokenizer = bundle.config, bundle.tokenizer
    rows = {
        "architecture": f"GPT-2, {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}",
        "parameters": f"{parameter_count(config):,}",
        "context": f"{config.n_positions:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "tokenizer": tokenizer.name,
        "weights": dtype,
        **bundle.facts,
    }
    if config.activation != "gelu_tanh":
        rows["activation"] = "GELU by erf"
    if not config.bias:
        rows["biases"] = "none (stored as zeros where the format has them)"
    if tokenizer.normalization != "none" or tokenizer.lowercase:
        steps = [tokenizer.normalization.upper()] if tokenizer.normalization != "none" else []
        rows["text is first"] = " and ".join(steps + ["lower-cased"] * tokenizer.lowercase)
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    notes = ["`export.json` says how far the logits of these files are from those of the model they were made of."]
    if tokenizer.normalization != "none":
        notes.append("Hugging Face's library normalizes characters up to Unicode 9; later ones stay as they are there.")
    if tokenizer.end_of_text is None:
        notes.append("The tokenizer knows its characters and no others: transformers leaves out what is unknown.")
    else:
        notes.append("transformers reads `<|endoftext|>` in a text as the token; gpt2_jax as plain text.")
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, jax]\n---\n\n"
    return (
        f"{head if form == 'huggingface' else ''}# A GPT-2\n\n| | |\n| --- | --- |\n{table}\n\n## How to load it\n\n"
        f"{_LOADING[form]}\n\n## Notes\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    )


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())
