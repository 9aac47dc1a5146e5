"""GPT-2 of Hugging Face transformers on torch, with given weights.

Shapes: B rows, P prompt length, N new tokens, V vocabulary.
"""

import numpy as np
import torch
import transformers

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.gpt2 import Params


class TransformersGPT2:
    """The same model there, float32, for greedy decoding with its key-value cache.

    Attributes:
      ATTENTION: names that `use_attention` takes.
    """

    ATTENTION = ("eager", "sdpa")

    def __init__(self, config: ModelConfig, params: Params, threads: int) -> None:
        """Copies `params` of our model of shape `config`."""
        torch.set_num_threads(threads)
        # No end-of-text: it would not stop the texts at equal length, and banning it costs time at each token.
        shape = transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            layer_norm_epsilon=config.layer_norm_epsilon,
            bos_token_id=None,
            eos_token_id=None,
        )
        self._model = transformers.GPT2LMHeadModel(shape).eval()
        missing, unexpected = self._model.load_state_dict(_state_dict(config, params), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # tied to wte
            raise ValueError(f"transformers names its weights otherwise: {missing} missing, {unexpected} unexpected")

    def use_attention(self, name: str) -> None:
        """Computes attention that way from now on."""
        self._model.set_attn_implementation(name)

    @torch.inference_mode()
    def first_token(self, prompts_BP: np.ndarray) -> np.ndarray:
        """Reads the prompts into a cache; the most likely next ids `[B]`."""
        out = self._model(torch.from_numpy(prompts_BP), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1).numpy()

    @torch.inference_mode()
    def generate(self, prompts_BP: np.ndarray, new: int) -> np.ndarray:
        """The text after the prompts, `[B, N]`."""
        ids = torch.from_numpy(prompts_BP)
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, max_new_tokens=new
        )
        return out[:, ids.shape[1] :].numpy()

    @torch.inference_mode()
    def next_logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits of the token that follows, `[B, V]`."""
        return self._model(torch.from_numpy(tokens_BT), logits_to_keep=1).logits[:, -1].numpy()


def _state_dict(config: ModelConfig, params: Params) -> dict[str, torch.Tensor]:
    layers, tensors = params["h"], {}
    arrays = {"wte.weight": params["wte"]["embedding"][: config.vocab_size], "wpe.weight": params["wpe"]["embedding"]}
    names = {"scale": "weight", "bias": "bias"}
    arrays |= {f"ln_f.{names[name]}": array for name, array in params["ln_f"].items()}
    for layer in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            for name, array in layers[norm].items():
                arrays[f"h.{layer}.{norm}.{names[name]}"] = array[layer]
        for part in ("attn", "mlp"):
            for projection, weights in layers[part].items():
                # Both keep kernels as [in, out]; ours has queries, keys and values on an axis of their own.
                kernel, bias = weights["kernel"][layer], weights["bias"][layer]
                arrays[f"h.{layer}.{part}.{projection}.weight"] = kernel.reshape(len(kernel), -1)
                arrays[f"h.{layer}.{part}.{projection}.bias"] = bias.reshape(-1)
    for name, array in arrays.items():
        tensors[f"transformer.{name}"] = torch.from_numpy(np.array(array))
    return tensors
