"""Skipped batches: which batch a step reads, and the list in run.json."""

from typing import Any

import pytest

from gpt2_jax.data.skipped import Skip, batch_number, skips_from_json, skips_to_json
from gpt2_jax.errors import DataError

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    "skips", [[], [(0, 1)], [(4, 2)], [(4, 2), (4, 1)], [(3, 2), (7, 5)], [(7, 5), (3, 2)], [(6, 1), (2, 3), (10, 4)]]
)
def test_batches_are_those_of_an_order_from_which_the_skipped_are_struck(skips: list[tuple[int, int]]) -> None:
    """A list of all batches, from which each skip, in the order of time, strikes what the next steps would read."""
    order = list(range(60))
    for at, batches in sorted(skips):
        del order[at : at + batches]
    given = [Skip(*skip) for skip in skips]
    assert [batch_number(step, given) for step in range(30)] == order[:30]


def test_what_is_written_is_read() -> None:
    skips = (Skip(100, 20), Skip(0, 1))
    assert skips_to_json(skips) == [{"at": 100, "batches": 20}, {"at": 0, "batches": 1}]
    assert skips_from_json(skips_to_json(skips), "here") == skips
    assert skips_from_json([], "here") == ()


@pytest.mark.parametrize(
    "entry",
    [
        *({"at": -1, "batches": 1}, {"at": 0, "batches": 0}, {"at": 0, "batches": -3}, {"at": 0}, {"batches": 1}, {}),
        *({"at": 1.0, "batches": 1}, {"at": "1", "batches": 1}, {"at": True, "batches": 1}, {"at": 0, "batches": None}),
        *({"at": 0, "batches": 1, "why": ""}, [0, 1], "skip", None, {"at": 0, "batches": 2**62}),
    ],
)
def test_nonsense_is_named(entry: Any) -> None:
    with pytest.raises(DataError, match=r"^here: skipped\[1\]: not an object with the integers at .* and batches"):
        skips_from_json([{"at": 0, "batches": 1}, entry], "here: skipped")


@pytest.mark.parametrize("value", [None, {}, "", {"at": 0, "batches": 1}])
def test_no_list(value: Any) -> None:
    with pytest.raises(DataError, match="^here: not a list"):
        skips_from_json(value, "here")
