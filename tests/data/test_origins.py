"""Windows, rows and documents traced back, against streams whose every id tells where it stands."""

import pathlib

import numpy as np
import pytest

from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.origins import Documents, Piece, rows_of_batch
from gpt2_jax.data.token_store import Shard, TokenStream
from gpt2_jax.data.windows import PackedWindows, PaddedWindows
from gpt2_jax.errors import DataError

END = 60_000
LENGTHS = [5, 1, 12, 3, 3, 40, 1, 1, 9, 2, 17, 6]


def make_stream(folder: pathlib.Path) -> TokenStream:
    """Documents of ids 100 * number + place in the document, in three shards."""
    shards = []
    for number, part in enumerate((range(4), range(4, 6), range(6, len(LENGTHS)))):
        ids = [100 * document + place for document in part for place in range(LENGTHS[document])]
        (folder / f"{number}.bin").write_bytes(np.array(ids, "<u2").tobytes())
        np.save(folder / f"{number}.npy", np.array([LENGTHS[document] for document in part], np.int64))
        shards.append(Shard(f"{number}.bin", len(ids), max(ids), "", len(part), f"{number}.npy", ""))
    return TokenStream("train", folder, tuple(shards), np.dtype("<u2"))


def pieces_of(ids: list[int]) -> tuple[Piece, ...]:
    """Where ids of `make_stream` are from, read off the ids."""
    inside = [divmod(one, 100) for one in ids if one != END]
    documents = sorted({document for document, _ in inside})
    return tuple(
        Piece(document, min(place for d, place in inside if d == document), sum(d == document for d, _ in inside))
        for document in documents
    )


@pytest.mark.parametrize("kind", ["packed", "packed with tail", "padded"])
@pytest.mark.parametrize("length", [1, 4, 7, 64])
def test_positions_are_where_the_ids_are(tmp_path: pathlib.Path, kind: str, length: int) -> None:
    stream = make_stream(tmp_path)
    whole = stream.read(0, len(stream))
    windows = (
        PaddedWindows(stream, length, END)
        if kind == "padded"
        else PackedWindows(stream, length, include_tail=kind == "packed with tail")
    )
    for index in range(len(windows)):
        tokens, targets, weights = windows[index]
        positions = windows.positions(index)
        assert (positions.shape, positions.dtype) == ((length + 1,), np.int64)
        inside = positions >= 0
        # All that is weighed is in the stream, and the input before it but for the end-of-text ahead of a document.
        assert (inside[1:] == (weights > 0)).all()
        assert inside[0] == (tokens[0] != END)
        ids = np.concatenate([tokens[:1], targets])
        assert (whole[positions[inside]] == ids[inside]).all()
    with pytest.raises(IndexError):
        windows.positions(len(windows))


@pytest.mark.parametrize("kind", [PackedWindows, PaddedWindows])
@pytest.mark.parametrize("context_lengths", [(), (2, 4, 8)])
def test_rows_are_those_of_the_batch_and_know_their_documents(
    tmp_path: pathlib.Path, kind: type, context_lengths: tuple[int, ...]
) -> None:
    stream = make_stream(tmp_path)
    windows = PackedWindows(stream, 8) if kind is PackedWindows else PaddedWindows(stream, 8, END)
    batches = TrainBatches(windows, batch_size=4, seed=2, context_lengths=context_lengths)
    documents = Documents(stream)
    several = padding = 0
    for step in range(12):
        batch, rows = batches.batch(step), rows_of_batch(batches, step, documents)
        assert len(rows) == len(batch["tokens"])
        for row, tokens, targets, weights in zip(rows, *(batch[name].tolist() for name in batch), strict=True):
            seen = [token for token, weight in zip(tokens, weights, strict=True) if weight]
            last = [target for target, weight in zip(targets, weights, strict=True) if weight][-1:]
            assert row.ids.tolist() == seen + last
            assert row.pieces == pieces_of(seen + last)
            window = windows[row.window]
            assert set(seen) <= set(window[0].tolist())
            several += len(row.pieces) > 1
            padding += not seen
        touched = documents.touched(windows, batches.all_window_indices(step))
        assert touched == sorted({piece.document for row in rows for piece in row.pieces})
    assert (several > 0) == (kind is PackedWindows)
    assert (padding > 0) == (kind is PaddedWindows and bool(context_lengths))


def test_a_store_that_does_not_know_its_documents(tmp_path: pathlib.Path) -> None:
    make_stream(tmp_path)
    stream = TokenStream("train", tmp_path, (Shard("0.bin", 21, 302, ""),), np.dtype("<u2"))
    rows = rows_of_batch(TrainBatches(PackedWindows(stream, 5), batch_size=2, seed=0), 0, None)
    assert [row.pieces for row in rows] == [None, None]
    assert [len(row.ids) for row in rows] == [6, 6]
    with pytest.raises(DataError, match="where its documents end is not recorded"):
        Documents(stream)


def test_empty_documents_are_passed_over(tmp_path: pathlib.Path) -> None:
    (tmp_path / "0.bin").write_bytes(bytes(2 * 6))
    np.save(tmp_path / "0.npy", np.array([0, 2, 0, 0, 4], np.int64))
    stream = TokenStream("train", tmp_path, (Shard("0.bin", 6, 0, "", 5, "0.npy", ""),), np.dtype("<u2"))
    assert Documents(stream).pieces(np.arange(1, 4)) == [Piece(1, 1, 1), Piece(4, 0, 2)]
