"""Logits, loss, gradients and ten steps of AdamW against transformers and torch, from the same random weights."""

import os
import pathlib

import numpy as np
import pytest
from goldens import stored
from goldens.cases import (
    FULL_124M,
    GRADIENT,
    KEY_BIAS_GRADIENT,
    LOGITS,
    LOSS,
    LOSSES,
    REDUCED,
    STEPS,
    Case,
    without_key_bias,
)
from goldens.ours import Ours

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("torch", reason="needs torch and transformers: pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[parity]'")

from goldens.theirs import Theirs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Sides:
    """Both implementations of one case."""

    def __init__(self, name: str, case: Case, folder: pathlib.Path) -> None:
        self.name = name
        self.ours = Ours(case, folder)
        self.theirs = {attention: Theirs(case, attention) for attention in ("eager", "sdpa")}


@pytest.fixture(scope="module", params=REDUCED)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(request.param, REDUCED[request.param], tmp_path_factory.mktemp("tokens"))


def assert_same_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    (ours, our_keys), (theirs, their_keys) = without_key_bias(ours), without_key_bias(theirs)
    off = {name: np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]) for name in theirs}
    assert {name: share for name, share in off.items() if not share <= GRADIENT} == {}
    assert our_keys
    for keys in (our_keys, their_keys):
        assert all(np.abs(gradient).max() <= KEY_BIAS_GRADIENT for gradient in keys.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits(sides: Sides, attention: str) -> None:
    theirs = sides.theirs[attention].logits
    assert 0.8 < theirs.std() < 1.25
    np.testing.assert_allclose(sides.ours.logits, theirs, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss(sides: Sides, attention: str) -> None:
    assert sides.ours.losses[0] == pytest.approx(sides.theirs[attention].loss, rel=0, abs=LOSS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients(sides: Sides, attention: str) -> None:
    assert_same_gradients(sides.ours.gradients, sides.theirs[attention].gradients)


def test_ten_losses(sides: Sides) -> None:
    theirs = sides.theirs["eager"].losses
    assert len(theirs) == STEPS
    np.testing.assert_allclose(sides.ours.losses, theirs, rtol=0, atol=LOSSES)


def test_goldens_are_theirs(sides: Sides) -> None:
    theirs, golden = sides.theirs["eager"].golden(), stored.read(sides.name)
    np.testing.assert_allclose(theirs.logits, golden.logits, rtol=0, atol=LOGITS / 10)
    np.testing.assert_allclose(theirs.losses, golden.losses, rtol=0, atol=LOSSES / 10)
    assert theirs.gradients.keys() == golden.gradients.keys()
    off = [stored.distance(sketch, golden.gradients[name]) for name, sketch in theirs.gradients.items()]
    assert max(off) <= GRADIENT / 10


def test_full_124m(tmp_path: pathlib.Path) -> None:
    """All of the published width, vocabulary and positions."""
    theirs = Theirs(FULL_124M)
    ours = Ours(FULL_124M, tmp_path)
    assert 0.8 < theirs.logits.std() < 1.25
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=LOGITS)
    assert ours.losses[0] == pytest.approx(theirs.loss, rel=0, abs=LOSS)
    assert_same_gradients(ours.gradients, theirs.gradients)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=LOSSES)
