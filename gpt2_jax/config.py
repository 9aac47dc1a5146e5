"""The schema of a run: frozen dataclasses with defaults, units, ranges and one meaning per key.

Making a section checks it: a value that cannot be used is a `UsageError` of one line that names the key, the value
and what is allowed. Nothing here imports JAX, so a mistake costs no start-up time.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

from gpt2_jax.errors import UsageError

MAX_MERGES = 50_000
SOURCE_KINDS = ("text", "jsonl", "parquet", "tfds", "nanogpt", "tokens")


def _key(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field with its meaning and the values it may take: `low` <= value <= `high`, value < `below`."""
    metadata = {"meaning": meaning, "low": low, "high": high, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


class _Section:
    """Checks each key of a section against its declared type and range when the section is made."""

    section = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check(f"{self.section}{field.name}", getattr(self, field.name), field)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """GPT-2's shape and arithmetic, under GPT-2's own names."""

    section = "model."

    n_layer: int = _key(12, "transformer blocks", low=1, high=10_000)
    n_head: int = _key(12, "attention heads; must divide n_embd", low=1, high=10_000)
    n_embd: int = _key(768, "width of the residual stream", low=1, high=1_000_000)
    n_positions: int = _key(1024, "rows of the position table: the longest context, in tokens", low=1, high=10_000_000)
    vocab_size: int = _key(0, "token ids; 0: as many as the tokenizer has", low=0)
    embd_pdrop: float = _key(0.1, "dropout rate on the embeddings", low=0, below=1)
    attn_pdrop: float = _key(0.1, "dropout rate on the attention weights", low=0, below=1)
    resid_pdrop: float = _key(0.1, "dropout rate on the output of each residual branch", low=0, below=1)
    layer_norm_epsilon: float = _key(1e-5, "added to the variance in each LayerNorm", low=1e-12, high=1)
    activation: str = _key(
        "gelu_tanh", "GELU of the MLP: GPT-2's tanh approximation, or exact by erf", choices=("gelu_tanh", "gelu_erf")
    )
    bias: bool = _key(True, "whether projections and LayerNorms have biases, as GPT-2's do")
    initializer_range: float = _key(0.02, "standard deviation of the initial weights", low=0)
    dtype: str = _key(
        "float32",
        "type of the matrix products; parameters stay float32 (float64 wants JAX_ENABLE_X64)",
        choices=("float32", "bfloat16", "float16", "float64"),
    )
    attention: str = _key(
        "auto",
        "how training computes attention: cuDNN (NVIDIA) or splash attention (TPU), fused kernels, or XLA; auto: the "
        "kernel where it can run (16 bits, no attn_pdrop)",
        choices=("auto", "xla", "cudnn", "splash"),
    )
    remat: str = _key(
        "auto",
        "what the backward pass recomputes: nothing, all but matrix products, each block; auto: as little as lets the "
        "compiled step fit the device's memory",
        choices=("auto", "none", "dots", "full"),
    )
    scan_unroll: int = _key(
        0,
        "blocks per iteration of the scan over layers; from n_layer on no scan: one block after another; 0: no scan on "
        "a CPU with fewer than 24 layers, else 1",
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            near = min(_divisors(self.n_embd), key=lambda heads: abs(heads - self.n_head))
            raise UsageError(
                f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}; "
                f"the nearest number of heads that divides it is {near}"
            )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(_Section):
    """How text becomes token ids."""

    section = "tokenizer."

    name: str = _key("gpt2", "gpt2, bytes, chars, or bpe:N (N merges learned from the corpus, 1 to 50000)")
    path: str = _key("", "folder of a saved tokenizer, such as a run's; for gpt2 one with vocab.bpe or merges.txt")
    normalization: str = _key("none", "Unicode normal form applied first", choices=("none", "nfc", "nfkc"))
    lowercase: bool = _key(False, "lower-case the text first")

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, _, merges = self.name.partition(":")
        learned = kind == "bpe" and re.fullmatch("[0-9]{1,5}", merges) and 1 <= int(merges) <= MAX_MERGES
        if self.name not in ("gpt2", "bytes", "chars") and not learned:
            near = difflib.get_close_matches(kind, ("gpt2", "bytes", "chars"), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(
                f"tokenizer.name={self.name!r} is not a tokenizer; allowed: gpt2, bytes, chars, "
                f"bpe:N with N from 1 to {MAX_MERGES}{hint}"
            )
        if self.name == "gpt2" and (self.normalization != "none" or self.lowercase):
            raise UsageError(
                "tokenizer.name='gpt2' takes text as it is: set tokenizer.normalization=none and "
                "tokenizer.lowercase=false, or choose bpe:N, bytes or chars"
            )
        if self.path and self.name == "bytes":
            raise UsageError(f"tokenizer.path={self.path!r}: tokenizer.name=bytes needs no files; leave it empty")


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """Where text comes from and how it fills a window."""

    section = "data."

    source: str = _key(
        "stdlib",
        "stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME, nanogpt:DIR (train.bin, val.bin), "
        "tokens:DIR (of gpt2-jax prepare)",
    )
    text_field: str = _key("text", "field that holds a document's text in jsonl, parquet and tfds")
    held_out: float = _key(
        0.1, "share of the documents (of a single document: its tail) kept for evaluation", low=1e-6, below=1
    )
    windows: str = _key(
        "packed", "packed: documents one after another; padded: each document by itself", choices=("packed", "padded")
    )
    cache_dir: str = _key(
        "", "folder for the token shards that train.py prepares; empty: in XDG_CACHE_HOME, by default ~/.cache"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, colon, name = self.source.partition(":")
        if self.source != "stdlib" and not (kind in SOURCE_KINDS and colon and name):
            near = difflib.get_close_matches(kind, ("stdlib", *SOURCE_KINDS), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            allowed = ", ".join(f"{known}:..." for known in SOURCE_KINDS)
            raise UsageError(f"data.source={self.source!r} is no source; allowed: stdlib, {allowed}{hint}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
    """AdamW or Muon and the learning rate, under Optax's names."""

    section = "optimizer."

    name: str = _key(
        "adamw",
        "AdamW for all parameters, or Muon for the kernels of the layers and AdamW for the others",
        choices=("adamw", "muon"),
    )
    learning_rate: float = _key(6e-4, "peak of the learning rate, whatever the schedule", low=0)
    schedule: str = _key(
        "cosine",
        "course of the rate after the warm-up (wsd: flat, at the end linear over decay_steps)",
        choices=("cosine", "linear", "inverse_sqrt", "constant", "wsd"),
    )
    warmup_steps: int = _key(100, "steps of linear warm-up", low=0)
    decay_steps: int = _key(0, "steps at the end in which wsd decays; 0 for the other schedules", low=0)
    end_fraction: float = _key(0.1, "rate at the last step, as a share of the peak", low=0, high=1)
    b1: float = _key(0.9, "decay of the first moment, Adam's and Muon's", low=0, below=1)
    b2: float = _key(0.95, "decay of Adam's second moment", low=0, below=1)
    mu_dtype: str = _key(
        "float32", "type in which Adam's first moment, or Muon's, is kept", choices=("float32", "bfloat16")
    )
    eps: float = _key(1e-8, "added to the root of Adam's second moment", low=0)
    weight_decay: float = _key(0.1, "decoupled decay of matrices and embeddings; never of biases and norms", low=0)
    clip_norm: float = _key(1.0, "largest global gradient norm; 0: no clipping", low=0)
    ema_decay: float = _key(0.0, "decay of the moving average of the parameters; 0: none is kept", low=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise UsageError(
                f"optimizer.decay_steps={self.decay_steps} with optimizer.schedule={self.schedule}: "
                "wsd needs decay_steps of 1 or more, the other schedules 0"
            )
        if self.schedule == "inverse_sqrt" and self.warmup_steps < 1:
            raise UsageError("optimizer.warmup_steps=0: optimizer.schedule=inverse_sqrt needs 1 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """Length, batch and rhythm of training."""

    section = "train."

    steps: int = _key(1000, "optimizer updates in all", low=1)
    batch_size: int = _key(32, "windows per step, over all devices and microbatches", low=1)
    context_length: int = _key(0, "tokens per window; 0: model.n_positions", low=0)
    context_lengths: tuple[int, ...] = _key(
        (), "lengths to draw from per step, each a divisor of the context length; empty: always the full one", low=1
    )
    microbatches: int = _key(1, "parts of a batch whose gradients are accumulated one after another", low=1)
    loss_chunk: int = _key(
        0,
        "positions whose logits exist at a time; 0: all if the compiled step then fits the device or they are under "
        "512 MiB on each, else the most that are",
        low=0,
    )
    max_skipped_steps: int = _key(
        0, "steps with a loss or gradient that is not finite which are left out; with one more the run stops", low=0
    )
    log_every: int = _key(10, "steps between lines of metrics", low=1)
    eval_every: int = _key(250, "steps between evaluations; 0: only at the end", low=0)
    eval_windows: int = _key(0, "held-out windows per evaluation; 0: all", low=0)
    sample_every: int = _key(0, "steps between text samples; 0: only at the end", low=0)
    spike_sigmas: float = _key(
        6.0,
        "standard deviations above the mean of the last 128 steps from which a step's loss is noted as a spike, in "
        "events.jsonl; 0: never",
        low=0,
        high=1000,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When the state is saved and which saves are kept."""

    section = "checkpoint."

    every: int = _key(250, "steps between saves; the last step is always saved", low=1)
    keep_last: int = _key(2, "newest saves kept", low=1)
    keep_best: int = _key(1, "saves of lowest held-out loss kept besides, of those whose step was evaluated", low=0)
    export_best: bool = _key(
        True, "at the end, write the best parameters as a Hugging Face folder, huggingface/, into the run folder"
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Section):
    """Devices per axis; their product, with dcn_data, is the number of devices."""

    section = "mesh."

    data: int = _key(-1, "devices that split the batch; -1: all that the other axes leave", low=-1)
    fsdp: int = _key(1, "devices that split the batch, the parameters and the optimizer state", low=-1)
    tensor: int = _key(1, "devices that split heads, MLP, vocabulary, and activations along the context", low=-1)
    dcn_data: int = _key(
        1, "slices (TPU pods joined by a slower network) that split the batch; the other axes count within one", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            if size == 0:
                raise UsageError(f"mesh.{name}=0; allowed: 1 or more, or -1 for one of the axes")
        if list(sizes.values()).count(-1) > 1:
            raise UsageError(f"mesh {sizes}: at most one axis may be -1")


@dataclasses.dataclass(frozen=True)
class RunConfig(_Section):
    """Everything that decides what a run computes."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = _key(0, "seed of initialisation, data order and dropout", low=0, high=2**31 - 1)
    init_from: str = _key(
        "", "run folder, or Hugging Face GPT-2 folder, whose parameters training starts from; empty: random ones"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        train, context = self.train, self.context_length
        if context > self.model.n_positions:
            raise UsageError(
                f"train.context_length={context} is beyond model.n_positions={self.model.n_positions}; "
                "lower the first or raise the second"
            )
        for length in train.context_lengths:
            if context % length:
                raise UsageError(
                    f"train.context_lengths={train.context_lengths}: {length} does not divide the context length "
                    f"{context}; the nearest that does is {min(_divisors(context), key=lambda d: abs(d - length))}"
                )
        if train.batch_size % train.microbatches:
            raise UsageError(
                f"train.batch_size={train.batch_size} is not divisible by train.microbatches={train.microbatches}"
            )
        for length in train.context_lengths or (context,):
            if train.loss_chunk and length % train.loss_chunk:
                raise UsageError(
                    f"train.loss_chunk={train.loss_chunk} does not divide the context length {length}; allowed: 0 "
                    f"or a divisor, the nearest is {min(_divisors(length), key=lambda d: abs(d - train.loss_chunk))}"
                )
        if self.optimizer.warmup_steps + self.optimizer.decay_steps > train.steps:
            raise UsageError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} and decay_steps={self.optimizer.decay_steps} "
                f"are together more than train.steps={train.steps}"
            )
        if self.data.windows == "padded" and self.tokenizer.name == "chars":
            raise UsageError(
                "data.windows=padded pads with end-of-text, which tokenizer.name=chars has not; "
                "use packed windows, or the tokenizer bytes, bpe:N or gpt2"
            )

    @property
    def context_length(self) -> int:
        """Tokens per training window."""
        return self.train.context_length or self.model.n_positions


def _check(key: str, value: Any, field: dataclasses.Field) -> None:
    metadata = field.metadata
    if not metadata:  # a section
        return
    items: tuple[Any, ...] = (value,)
    if field.type == tuple[int, ...]:
        right = isinstance(value, tuple) and all(type(item) is int for item in value)
        items = value if right else ()
    elif field.type is float:
        right = type(value) in (int, float) and math.isfinite(value)
    else:
        right = type(value) is field.type
    low, high, below, choices = (metadata[name] for name in ("low", "high", "below", "choices"))
    right = right and all(
        (low is None or item >= low)
        and (high is None or item <= high)
        and (below is None or item < below)
        and (not choices or item in choices)
        for item in items
    )
    if not right:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{key}={value!r}: {metadata['meaning']}; allowed: {allowed_values(field)}{hint}")


def allowed_values(field: dataclasses.Field) -> str:
    """What a field may hold, in words."""
    metadata = field.metadata
    if metadata["choices"]:
        return ", ".join(metadata["choices"])
    kinds = {int: "integer", float: "number", str: "text", bool: "true or false"}
    kind = kinds.get(field.type, "integers like 64,128")  # type: ignore[arg-type]
    bounds = [
        f"{word} {metadata[name]:g}" if metadata[name] < 1e6 else f"{word} {metadata[name]}"
        for name, word in (("low", "from"), ("high", "to"), ("below", "below"))
        if metadata[name] is not None
    ]
    return " ".join([kind, *bounds])


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
