"""The loop around real steps: when metrics are read, when actions run, and what stops it."""

import functools
import math
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from gpt2_jax.errors import DivergedError, PreemptedError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run import loop
from gpt2_jax.run.hosts import Hosts
from gpt2_jax.run.leaving import leaving
from gpt2_jax.run.loop import Action, Interval
from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
from gpt2_jax.training.loss_scale import LossScale
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings, train_step
from gpt2_jax.training.train_state import TrainState, sharded_init

B, T, V = 4, 8, 31


@functools.cache
def settings(dtype: str = "float32") -> StepSettings:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, n_positions=T, vocab_size=V, dtype=dtype)
    optimizer = OptimizerConfig(warmup_steps=2)
    return StepSettings(
        model=GPT2(config),
        optimizer=make_optimizer(optimizer, 100),
        schedule=learning_rate_schedule(optimizer, 100),
    )


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def initial_state(dtype: str) -> TrainState:
    return sharded_init(settings(dtype).model, settings(dtype).optimizer, 0, mesh())


def first_state(dtype: str = "float32") -> TrainState:
    """A copy, since the loop donates it."""
    return jax.tree.map(jnp.copy, initial_state(dtype))


def batch(index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    weights = (rng.random((B, T)) < 0.7).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def run(state: TrainState, steps: int, dtype: str = "float32", start: int = 0, **options: Any) -> TrainState:
    defaults: dict[str, Any] = {
        "log_every": 1,
        "report": lambda step, metrics, interval: None,
        "advance": lambda step: None,
        "actions": (),
    }
    with use_mesh(mesh()):
        return loop.train(
            state,
            ((index, batch(index)) for index in range(start, steps)),
            settings=settings(dtype),
            mesh=mesh(),
            last_step=steps,
            **{**defaults, **options},
        )


def with_nan(state: TrainState) -> TrainState:
    return state.replace(params=jax.tree.map(lambda leaf: leaf * math.nan, state.params))


# Order


def test_metrics_are_read_one_step_late_and_actions_wait_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def sent(state: TrainState, placed: Any, **options: Any) -> Any:
        events.append(f"send {len([e for e in events if e.startswith('send')]) + 1}")
        return train_step(state, placed, **options)

    def action(name: str) -> Any:
        def act(step: int, state: TrainState) -> None:
            assert int(state.step) == step
            events.append(f"{name} {step}")

        return act

    monkeypatch.setattr(loop, "train_step", sent)
    run(
        first_state(),
        7,
        log_every=2,
        report=lambda step, metrics, interval: events.append(f"report {step}"),
        advance=lambda step: events.append(f"read {step}"),
        actions=(
            Action(4, action("evaluate")),
            Action(4, action("save")),
            Action(0, action("sample")),
            Action(5, action("peek"), at_end=False),
        ),
    )
    assert events == [
        *("send 1", "send 2", "read 1", "send 3", "read 2", "report 2"),
        *("send 4", "read 3", "read 4", "report 4", "evaluate 4", "save 4"),
        *("send 5", "read 5", "peek 5"),  # due: not left for later
        *("send 6", "send 7", "read 6", "report 6", "read 7", "report 7", "evaluate 7", "save 7", "sample 7"),
    ]


def test_intervals_are_the_sums_of_their_steps() -> None:
    state, sums = first_state(), []
    with use_mesh(mesh()):
        for index in range(7):
            state, metrics = train_step(state, place_batch(batch(index), mesh()), settings=settings())
            sums.append((float(metrics["loss_sum"]), float(batch(index)["weights"].sum())))
    seen: dict[int, Interval] = {}
    again = run(first_state(), 7, log_every=3, report=lambda step, _, interval: seen.setdefault(step, interval))
    assert list(seen) == [3, 6, 7]
    for step, interval in seen.items():
        part = sums[(step - 1) // 3 * 3 : step]
        assert interval.steps == len(part)
        assert interval.tokens == len(part) * B * T
        assert interval.loss_sum == pytest.approx(sum(loss for loss, _ in part), rel=1e-6)
        assert interval.weight_sum == sum(weight for _, weight in part)
        assert interval.seconds > 0
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_clock_of_an_interval_stops_during_actions() -> None:
    run(first_state(), 1)  # compiles
    seconds: list[float] = []
    run(
        first_state(),
        2,
        log_every=2,
        report=lambda step, _, interval: seconds.append(interval.seconds),
        actions=(Action(1, lambda step, state: time.sleep(1.0), at_end=False),),
    )
    assert 0 < seconds[0] < 0.9


def test_each_step_is_observed_once_finite_or_not() -> None:
    reported: dict[int, Interval] = {}
    seen: list[tuple[int, float]] = []
    run(
        first_state(),
        5,
        report=lambda step, _, interval: reported.setdefault(step, interval),
        observe=lambda step, values: seen.append((step, values["loss_sum"])),
    )
    assert seen == [(step, reported[step].loss_sum) for step in range(1, 6)]
    with pytest.raises(DivergedError):
        run(with_nan(first_state()), 1, observe=lambda step, values: seen.append((step, values["nonfinite_steps"])))
    assert seen[5:] == [(1, 1.0)]


@pytest.mark.parametrize(
    ("every", "at_end", "due"),
    [(3, True, [3, 6, 7]), (3, False, [3, 6]), (0, True, [7]), (0, False, []), (7, True, [7])],
)
def test_when_an_action_is_due(every: int, at_end: bool, due: list[int]) -> None:
    action = Action(every, lambda step, state: None, at_end)
    assert [step for step in range(1, 8) if action.due(step, 7)] == due


# What stops it


def test_a_copy_that_nobody_asked_for_is_an_error() -> None:
    """A NumPy array among the parameters would be sent to the device anew in every step."""
    state = first_state()
    smuggled = state.replace(params={**state.params, "ln_f": jax.tree.map(np.asarray, state.params["ln_f"])})
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run(smuggled, 1)
    run(first_state(), 1)


def test_divergence_stops_before_the_actions_of_its_step() -> None:
    saved: list[int] = []
    with pytest.raises(DivergedError, match=r"step 1: loss nan, gradient norm nan: not finite") as raised:
        run(with_nan(first_state()), 3, actions=(Action(1, lambda step, state: saved.append(step)),))
    assert saved == []
    assert raised.value.exit_code == 4
    assert "\n" not in str(raised.value)


def test_divergence_is_seen_without_actions_too() -> None:
    with pytest.raises(DivergedError, match="step 1"):
        run(with_nan(first_state()), 1)


def test_float16_skips_until_there_is_nothing_left_to_halve() -> None:
    state = with_nan(first_state("float16"))
    scale = jax.device_put(np.float32(4), state.loss_scale.scale.sharding)
    state = state.replace(loss_scale=LossScale(scale=scale, good_steps=state.loss_scale.good_steps))
    seen: list[tuple[int, float, Interval]] = []
    with pytest.raises(DivergedError, match="step 3"):
        run(
            state,
            9,
            "float16",
            report=lambda step, metrics, interval: seen.append((step, metrics["loss_scale"], interval)),
        )
    assert [(step, scale) for step, scale, _ in seen] == [(1, 4.0), (2, 2.0)]
    for _, _, interval in seen:
        assert (interval.skipped, interval.weight_sum, interval.loss_sum) == (1, 0, 0)


# SIGTERM


def test_asked_for_room_the_loop_saves_its_step_and_leaves() -> None:
    done: list[str] = []
    asked: list[int] = []

    def leave(step: int) -> PreemptedError | None:
        asked.append(step)
        return PreemptedError(f"step {step}") if step == 2 else None

    with pytest.raises(PreemptedError, match="step 2") as raised:
        run(
            first_state(),
            4,
            advance=lambda step: done.append(f"read {step}"),
            actions=(Action(2, lambda step, state: done.append(f"evaluate {step}")),),
            leave=leave,
            save=lambda step, state: done.append(f"save {step} {int(state.step)}"),
        )
    assert raised.value.exit_code == 75
    assert asked == [1, 2]
    assert done == ["read 1", "read 2", "evaluate 2", "save 2 2"]


def test_the_last_step_is_no_place_to_leave() -> None:
    state = run(
        first_state(),
        2,
        leave=lambda step: PreemptedError() if step == 2 else None,
        save=lambda step, state: pytest.fail("saved"),
    )
    assert int(state.step) == 2


# Ctrl-C


def test_an_interrupt_waits_for_a_moment_that_suits() -> None:
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    reached: list[str] = []
    with leaving(Hosts(0, 1)) as leave:
        assert leave(1) is None
        signal.raise_signal(signal.SIGTERM)
        assert (leave(2).exit_code, "step 2 is saved" in str(leave(2))) == (75, True)
    with pytest.raises(KeyboardInterrupt), leaving(Hosts(0, 1)) as leave:
        signal.raise_signal(signal.SIGINT)
        assert (leave(3).exit_code, "step 3 is saved" in str(leave(3))) == (130, True)
        reached.append("end of the block")
    with pytest.raises(KeyboardInterrupt), leaving(Hosts(0, 1)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append("never")
    assert reached == ["end of the block"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
