"""The state a run starts with: its newest save, else the parameters of `init_from`, else random ones."""

from collections.abc import Collection, Mapping

from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.run.checkpoint import Checkpoints, Gather
from gpt2_jax.run.load import load
from gpt2_jax.run.run_data import check_same_model
from gpt2_jax.training.steps import StepSettings
from gpt2_jax.training.train_state import TrainState, abstract_state, sharded_init, sharded_state


def first_state(
    config: RunConfig,
    settings: StepSettings,
    mesh: Mesh,
    checkpoints: Checkpoints,
    fingerprints: dict[str, str],
    left: Mapping[str, Collection[str]],
    gather: Gather = lambda told: [told],
) -> TrainState:
    """The state before the first step of this process.

    Args:
      config: with the vocabulary filled in.
      settings: model and optimizer.
      mesh: devices.
      checkpoints: of the run folder.
      fingerprints: of data and tokenizer, as the saves carry them.
      left: those that the run had before, and was allowed to leave; a save may carry one of them.
      gather: tells all processes of the run what each of them says.

    Raises:
      DataError: a save is damaged or was made with other data.
      UsageError: the model or tokenizer of `init_from` is another one.
    """
    ema = config.optimizer.ema_decay > 0
    if checkpoints.steps():
        abstract = abstract_state(settings.model, settings.optimizer, mesh, ema=ema)
        state, meta = checkpoints.restore_newest(abstract, gather)
        for name, here in fingerprints.items():
            if meta[name] != here and meta[name] not in left[name]:
                raise DataError(
                    f"step {int(state.step)} was saved with {name} {meta[name][:12]}, the run now has {here[:12]}; "
                    "use another --workdir"
                )
        return state
    if config.init_from:
        params = _source_params(config, fingerprints["tokenizer_fingerprint"])
        return sharded_state(settings.model, settings.optimizer, params, mesh, ema=ema)
    return sharded_init(settings.model, settings.optimizer, config.seed, mesh, ema=ema)


def _source_params(config: RunConfig, tokenizer_fingerprint: str) -> Params:
    source, params, tokenizer = load(config.init_from)
    check_same_model(config, source)
    if tokenizer.fingerprint != tokenizer_fingerprint:
        raise UsageError(
            f"tokenizer.name={config.tokenizer.name} gives other ids than the tokenizer of "
            f"init_from={config.init_from} ({tokenizer.name}); prepare the data with that one"
        )
    return params
