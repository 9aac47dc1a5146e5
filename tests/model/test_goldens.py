"""Logits, gradients and ten losses of training, against those that transformers and torch gave for the same weights.

tests/goldens/ has the cases, the file and how it is made. tests/parity/ compares all numbers, with both libraries
running.
"""

import numpy as np
import pytest
from goldens import stored
from goldens.cases import (
    GRADIENT,
    KEY_BIAS_GRADIENT,
    LOGITS,
    LOSS,
    LOSSES,
    REDUCED,
    STEPS,
    without_key_bias,
)
from goldens.ours import Ours
from goldens.stored import Golden

Pair = tuple[Ours, Golden]


SLOW = {"355M", "774M"}  # between the smallest and the largest


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in REDUCED]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Of one case: this package, and what transformers gave."""
    return Ours(REDUCED[request.param], tmp_path_factory.mktemp("tokens")), stored.read(request.param)


def test_logits(pair: Pair) -> None:
    ours, golden = pair
    logits_BTV = ours.logits
    assert 0.8 < logits_BTV.std() < 1.25
    np.testing.assert_allclose(stored.chosen(logits_BTV), golden.logits, rtol=0, atol=LOGITS)


def test_loss(pair: Pair) -> None:
    ours, golden = pair
    assert ours.losses[0] == pytest.approx(golden.losses[0], rel=0, abs=LOSS)


def test_gradients(pair: Pair) -> None:
    ours, golden = pair
    gradients, keys = without_key_bias(ours.gradients)
    assert gradients.keys() == golden.gradients.keys()
    off = {name: stored.distance(stored.sketch(name, g), golden.gradients[name]) for name, g in gradients.items()}
    assert {name: share for name, share in off.items() if not share <= GRADIENT} == {}
    assert all(np.abs(gradient).max() <= KEY_BIAS_GRADIENT for gradient in keys.values())
    assert len(keys) == ours.config.model.n_layer
    assert ours.padding_gradients.shape[0] > 0
    assert not ours.padding_gradients.any()


def test_ten_losses(pair: Pair) -> None:
    ours, golden = pair
    assert len(golden.losses) == STEPS
    np.testing.assert_allclose(ours.losses, golden.losses, rtol=0, atol=LOSSES)
