"""Windows against windows cut by hand."""

import itertools
import pathlib
import pickle

import numpy as np
import pytest

from gpt2_jax.data.token_store import Shard, TokenStream
from gpt2_jax.data.windows import PackedWindows, PaddedWindows, Window
from gpt2_jax.errors import DataError, UsageError

END = 99


def make_stream(folder: pathlib.Path, documents: list[list[int]], shards: int = 1) -> TokenStream:
    """A stream of the given documents; each of the shards but the last has one document."""
    parts = [documents[n : n + 1] for n in range(shards - 1)] + [documents[shards - 1 :]]
    listed = []
    for number, part in enumerate(parts):
        tokens = [token for document in part for token in document]
        (folder / f"{number}.bin").write_bytes(np.array(tokens, "<u2").tobytes())
        np.save(folder / f"{number}.npy", np.array([len(document) for document in part], np.int64))
        listed.append(Shard(f"{number}.bin", len(tokens), max(tokens), "", len(part), f"{number}.npy", ""))
    return TokenStream("train", folder, tuple(listed), np.dtype("<u2"))


def as_lists(windows: PackedWindows | PaddedWindows) -> list[tuple[list, list, list]]:
    return [tuple(part.tolist() for part in windows[index]) for index in range(len(windows))]


def check_types(window: Window, context_length: int) -> None:
    assert [part.dtype for part in window] == [np.int32, np.int32, np.float32]
    assert all(part.shape == (context_length,) for part in window)


def test_packed_windows(tmp_path: pathlib.Path) -> None:
    windows = PackedWindows(make_stream(tmp_path, [[1, 2, 3], [4, 5, 6], [7, 8]], shards=3), 3)
    check_types(windows[0], 3)
    assert as_lists(windows) == [([1, 2, 3], [2, 3, 4], [1, 1, 1]), ([4, 5, 6], [5, 6, 7], [1, 1, 1])]


def test_packed_tail(tmp_path: pathlib.Path) -> None:
    windows = PackedWindows(make_stream(tmp_path, [[1, 2, 3, 4, 5, 6]]), 3, include_tail=True)
    check_types(windows[1], 3)
    assert as_lists(windows) == [([1, 2, 3], [2, 3, 4], [1, 1, 1]), ([4, 5, 0], [5, 6, 0], [1, 1, 0])]


@pytest.mark.parametrize("tokens", range(2, 20))
@pytest.mark.parametrize("context_length", [1, 3, 4, 7, 30])
def test_packed_tail_covers_each_target_once(tmp_path: pathlib.Path, tokens: int, context_length: int) -> None:
    windows = PackedWindows(make_stream(tmp_path, [list(range(tokens))]), context_length, include_tail=True)
    covered = []
    for inputs, targets, weights in as_lists(windows):
        pairs = [(i, t) for i, t, w in zip(inputs, targets, weights, strict=True) if w]
        assert all(t == i + 1 for i, t in pairs)
        covered += [t for _, t in pairs]
    assert covered == list(range(1, tokens))


def test_packed_windows_without_tail_count(tmp_path: pathlib.Path) -> None:
    stream = make_stream(tmp_path, [list(range(13))])
    assert [len(PackedWindows(stream, t)) for t in (1, 3, 4, 6, 12)] == [12, 4, 3, 2, 1]


@pytest.mark.parametrize("include_tail, tokens, needed", [(False, 3, 4), (True, 1, 2)])
def test_too_short_for_a_window(tmp_path: pathlib.Path, include_tail: bool, tokens: int, needed: int) -> None:
    stream = make_stream(tmp_path, [list(range(1, tokens + 1))])
    message = f"the train split of {tokens} tokens .*context length 3 takes {needed} tokens; make train.context_length"
    with pytest.raises(DataError, match=message):
        PackedWindows(stream, 3, include_tail=include_tail)


def test_padded_windows(tmp_path: pathlib.Path) -> None:
    stream = make_stream(tmp_path, [[1, 2, END], [3, 4, 5, 6, END], [7, END, 8, END]], shards=2)
    windows = PaddedWindows(stream, 3, END)
    check_types(windows[2], 3)
    assert as_lists(windows) == [
        ([END, 1, 2], [1, 2, END], [1, 1, 1]),
        ([END, 3, 4], [3, 4, 5], [1, 1, 1]),
        ([5, 6, END], [6, END, END], [1, 1, 0]),
        ([END, 7, END], [7, END, 8], [1, 1, 1]),  # an end-of-text within a document is no padding
        ([8, END, END], [END, END, END], [1, 0, 0]),
    ]


def test_padded_windows_cover_each_token_of_each_document_once(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(0, 100, rng.integers(0, 20)).tolist(), END] for _ in range(50)]
    windows = PaddedWindows(make_stream(tmp_path, documents, shards=4), 5, END)
    expected = []
    for document in documents:
        sequence = [END, *document]
        expected += itertools.pairwise(sequence)
    found = [(i, t) for window in as_lists(windows) for i, t, w in zip(*window, strict=True) if w]
    assert found == expected


def test_padded_windows_need_an_end_of_text(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="pads with end-of-text"):
        PaddedWindows(make_stream(tmp_path, [[1, 2]]), 3, None)


def test_padded_windows_need_document_lengths(tmp_path: pathlib.Path) -> None:
    make_stream(tmp_path, [[1, 2]])
    stream = TokenStream("train", tmp_path, (Shard("0.bin", 2, 2, ""),), np.dtype("<u2"))
    with pytest.raises(DataError, match="where its documents end is not recorded"):
        PaddedWindows(stream, 3, END)


def test_windows_outside(tmp_path: pathlib.Path) -> None:
    stream = make_stream(tmp_path, [[1, 2, 3, END]])
    for windows in (PackedWindows(stream, 3), PaddedWindows(stream, 3, END)):
        for index in (-1, len(windows)):
            with pytest.raises(IndexError):
                windows[index]
    with pytest.raises(UsageError, match="context_length=0"):
        PackedWindows(stream, 0)


def test_windows_are_picklable(tmp_path: pathlib.Path) -> None:
    stream = make_stream(tmp_path, [[1, 2, 3, END]])
    for windows in (PackedWindows(stream, 2), PaddedWindows(stream, 2, END)):
        windows[0]
        assert as_lists(pickle.loads(pickle.dumps(windows))) == as_lists(windows)
