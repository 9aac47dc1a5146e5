"""The detector of loss spikes, on losses whose outcome is known."""

import dataclasses

import numpy as np
import pytest

from gpt2_jax.run.spikes import LEAST, Spike, Spikes

pytestmark = pytest.mark.smoke


def found(spikes: Spikes, losses: list[float] | np.ndarray) -> list[int]:
    """Places of the losses that are spikes."""
    return [step for step, loss in enumerate(losses) if spikes.observe(step, float(loss)) is not None]


def test_one_spike_in_noise() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.1, 500)
    losses[200] = 3.0 + 0.8
    losses[400] = 3.0 - 2.0  # a fall is none
    spikes = Spikes(6.0)
    assert found(spikes, losses) == [200]


def test_the_threshold_is_that_many_deviations_above_the_last_ones() -> None:
    rng = np.random.default_rng(1)
    before = rng.uniform(1.5, 2.5, 300)  # at most 1.8 deviations from the mean
    mean, deviation = float(np.mean(before[-64:])), float(np.std(before[-64:]))
    for sigmas in (4.0, 6.0):
        for excess, is_spike in ((-1e-9, False), (1e-9, True)):
            spikes = Spikes(sigmas, window=64)
            found(spikes, before)
            loss = mean + sigmas * deviation + excess
            spike = spikes.observe(300, loss)
            assert (spike is not None) == is_spike
            if spike is not None:
                assert dataclasses.astuple(spike) == pytest.approx((300, loss, mean, deviation), rel=1e-12)


def test_what_is_usual_has_to_be_seen_first() -> None:
    assert found(Spikes(3.0), [2.0] * (LEAST - 1) + [9.0]) == []
    assert found(Spikes(3.0), [2.0] * LEAST + [9.0]) == [LEAST]


def test_spikes_do_not_count_as_usual() -> None:
    losses = np.random.default_rng(2).normal(3.0, 0.05, 400)
    places = list(range(100, 400, 3))
    losses[places] = 4.0
    assert found(Spikes(6.0), losses) == places


def test_what_stood_out_early_hides_nothing_later() -> None:
    """Of the first 32 losses none can be a spike, and so all count as usual."""
    losses = np.random.default_rng(5).normal(3.0, 0.05, 100)
    losses[[3, 11, 20]] = 9.0, 6.0, 5.0
    losses[60] = 3.6
    assert found(Spikes(6.0), losses) == [60]


def test_constant_losses_have_a_floor() -> None:
    spikes = Spikes(6.0)
    assert found(spikes, [2.0] * 200 + [2.0000001, 2.11]) == []
    assert spikes.observe(202, 2.13) == Spike(202, 2.13, pytest.approx(2.0, abs=0.01), pytest.approx(0.02, abs=1e-3))
    assert found(Spikes(6.0), [0.0] * 200 + [0.0059]) == []
    assert found(Spikes(6.0), [0.0] * 200 + [0.0061]) == [200]


def test_a_falling_loss_and_a_slow_rise_are_none() -> None:
    noise = np.random.default_rng(3).normal(0, 0.05, 1000)
    assert found(Spikes(6.0), 2 + 8 * np.exp(-np.arange(1000) / 100) + noise) == []
    assert found(Spikes(6.0), 2 + np.arange(1000) / 500 + noise) == []


def test_a_new_level_is_told_for_a_while_and_then_usual() -> None:
    rng = np.random.default_rng(4)
    losses = np.concatenate([rng.normal(2, 0.05, 200), rng.normal(5, 0.05, 300)])
    losses[450] = 6.0
    assert found(Spikes(6.0), losses) == [*range(200, 200 + LEAST), 450]


def test_off_and_out_of_range() -> None:
    assert found(Spikes(0.0), [1.0] * 200 + [100.0]) == []
    for arguments in ((-1.0,), (6.0, LEAST - 1)):
        with pytest.raises(ValueError, match="allowed"):
            Spikes(*arguments)
