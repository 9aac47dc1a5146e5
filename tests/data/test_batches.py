"""Batches: pure functions of the step, whole epochs, rows of several hosts, and the last batch's fill."""

import numpy as np
import pytest

from gpt2_jax.data.batches import Batch, EvaluationBatches, TrainBatches
from gpt2_jax.data.skipped import Skip
from gpt2_jax.data.windows import Window
from gpt2_jax.errors import UsageError

T = 8


class CountingWindows:
    """Window i has the inputs i*T to i*T + T - 1, so that every cell tells where it comes from."""

    context_length = T

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < self._length:
            raise IndexError(index)
        tokens = np.arange(index * T, index * T + T, dtype=np.int32)
        return tokens, tokens + 1, np.ones(T, np.float32)


def same(left: Batch, right: Batch) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def window_numbers(batch: Batch) -> list[int]:
    return (batch["tokens"][:, 0] // T).tolist()


def test_shapes_and_types() -> None:
    batch = TrainBatches(CountingWindows(10), batch_size=3, seed=0).batch(0)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((3, T), np.int32),
        "targets": ((3, T), np.int32),
        "weights": ((3, T), np.float32),
    }
    assert np.array_equal(batch["targets"], batch["tokens"] + 1)


@pytest.mark.parametrize("count, batch_size", [(10, 3), (7, 7), (5, 8), (1, 2)])
def test_each_epoch_is_a_new_permutation(count: int, batch_size: int) -> None:
    batches = TrainBatches(CountingWindows(count), batch_size=batch_size, seed=1)
    steps = -(-6 * count // batch_size)
    order = [number for step in range(steps) for number in window_numbers(batches.batch(step))]
    epochs = [tuple(order[start : start + count]) for start in range(0, 6 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 7:
        assert len(set(epochs)) == 6
        assert tuple(range(count)) not in epochs


def test_a_batch_is_the_same_however_it_is_reached() -> None:
    def make() -> TrainBatches:
        return TrainBatches(CountingWindows(50), batch_size=4, seed=3, context_lengths=(4, 8))

    forward = [make().batch(step) for step in range(30)]
    batches = make()
    assert all(same(batches.batch(step), forward[step]) for step in reversed(range(30)))
    iterated = list(make().iterate(11, 30))
    assert [step for step, _ in iterated] == list(range(11, 30))
    assert all(type(step) is int and same(batch, forward[step]) for step, batch in iterated)


def test_iteration_may_stop_early_and_be_empty() -> None:
    batches = TrainBatches(CountingWindows(50), batch_size=4, seed=3)
    ahead = batches.iterate(5, 10**9)
    assert next(ahead)[0] == 5
    ahead.close()
    assert list(batches.iterate(5, 5)) == []


def test_errors_come_through_the_threads() -> None:
    class Broken(CountingWindows):
        def __getitem__(self, index: int) -> Window:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(TrainBatches(Broken(10), batch_size=2, seed=0).iterate(0, 5))


def test_seeds_differ() -> None:
    numbers = {
        tuple(window_numbers(TrainBatches(CountingWindows(50), batch_size=8, seed=seed).batch(0)))
        for seed in (0, 1, 2, 2**31 - 1)
    }
    assert len(numbers) == 4


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("context_lengths", [(), (2, 8)])
def test_rows_of_all_hosts_are_the_batch(hosts: int, context_lengths: tuple[int, ...]) -> None:
    settings = {"batch_size": 8, "seed": 5, "context_lengths": context_lengths}
    whole = TrainBatches(CountingWindows(30), **settings)
    share = 8 // hosts
    parts = [
        TrainBatches(CountingWindows(30), **settings, rows=range(host * share, host * share + share))
        for host in range(hosts)
    ]
    for step in (0, 3, 17):
        local = [part.batch(step) for part in parts]
        joined = {name: np.concatenate([batch[name] for batch in local]) for name in local[0]}
        assert same(joined, whole.batch(step))


def test_context_lengths_cut_the_same_windows() -> None:
    full = TrainBatches(CountingWindows(40), batch_size=6, seed=9)
    varied = TrainBatches(CountingWindows(40), batch_size=6, seed=9, context_lengths=(2, 4, 8))
    seen = []
    for step in range(40):
        batch, whole = varied.batch(step), full.batch(step)
        length = batch["tokens"].shape[1]
        seen.append(length)
        for name in ("tokens", "targets", "weights"):
            assert batch[name].shape == (6 * T // length, length)
            assert np.array_equal(batch[name].ravel(), whole[name].ravel())
    assert all(5 <= seen.count(length) <= 25 for length in (2, 4, 8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"context_lengths": (3,)}, "3 does not divide the context length 8"),
        ({"context_lengths": (0,)}, "0 does not divide"),
        ({"rows": range(4, 8)}, "allowed are some of 0 to 3"),
        ({"rows": []}, "allowed are some of 0 to 3"),
    ],
)
def test_refused_arguments(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainBatches(CountingWindows(10), **{"batch_size": 4, "seed": 0, **settings})


@pytest.mark.parametrize("count, batch_size, max_windows", [(10, 4, 0), (8, 4, 0), (3, 8, 0), (10, 4, 6), (10, 4, 20)])
def test_evaluation_covers_all_windows_once(count: int, batch_size: int, max_windows: int) -> None:
    batches = EvaluationBatches(CountingWindows(count), batch_size, max_windows=max_windows)
    used = min(count, max_windows or count)
    numbers = []
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, T)
        assert batch["weights"].dtype == np.float32
        real = batch["weights"].any(axis=1)
        assert (batch["weights"][real] == 1).all()
        numbers += (batch["tokens"][real][:, 0] // T).tolist()
    assert numbers == list(range(used))
    assert len(batches) == len(list(batches)) == -(-used // batch_size)
    with pytest.raises(IndexError):
        batches.batch(len(batches))


def test_evaluation_rows_of_all_hosts() -> None:
    whole = list(EvaluationBatches(CountingWindows(9), 4))
    halves = [list(EvaluationBatches(CountingWindows(9), 4, rows=range(n, n + 2))) for n in (0, 2)]
    assert [len(half) for half in halves] == [3, 3]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert same(batch, {name: np.concatenate([first[name], second[name]]) for name in batch})


def test_skipped_batches_are_left_out_with_their_lengths() -> None:
    settings = {"batch_size": 4, "seed": 3, "context_lengths": (2, 4, 8)}
    whole = TrainBatches(CountingWindows(50), **settings)
    order = [n for n in range(40) if n not in (5, 6, 7, 20)]  # three at step 5, one at step 17
    batches = TrainBatches(CountingWindows(50), **settings, skips=[Skip(5, 3), Skip(17, 1)])
    rows = TrainBatches(CountingWindows(50), **settings, skips=[Skip(5, 3), Skip(17, 1)], rows=[2])
    assert len({whole.batch(number)["tokens"].shape for number in order}) == 3
    for step, number in enumerate(order):
        assert batches.batch_number(step) == number
        assert same(batches.batch(step), whole.batch(number))
        assert batches.window_indices(step) == whole.window_indices(number)
        assert rows.window_indices(step) == whole.window_indices(number)[2:3]
        assert rows.all_window_indices(step) == whole.window_indices(number)
    assert [step for step, batch in batches.iterate(3, 9) if not same(batch, whole.batch(order[step]))] == []
