"""Mask laws, checked by brute force: ranges and counts agree with `keep`, and compositions with their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from cuattn.fields import Operand
from cuattn.masks import And, BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow, Tile, TreeMask, gather

LENGTHS = [(1, 1), (1, 9), (9, 1), (5, 7), (7, 5), (6, 6), (0, 4), (4, 0)]
BANDS = [
    Full(),
    Causal(),
    Causal(top_left=True),
    SlidingWindow(None, None),
    SlidingWindow(2, None),
    SlidingWindow(None, 3),
    SlidingWindow(1, 1),
    SlidingWindow(0, 0),
    SlidingWindow(2, 0, top_left=True),
    SlidingWindow(-2, 4),
    SlidingWindow(4, -2),
    SlidingWindow(-3, 1),
    SlidingWindow(100, 100),
    SlidingWindow(100, -50),
]

lengths = st.tuples(st.integers(0, 12), st.integers(0, 12))
sides = st.none() | st.integers(-6, 14)
bands = st.builds(SlidingWindow, sides, sides, st.booleans())


def brute_force(mask: SlidingWindow, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """The documented inequality, one element at a time."""
    keep = np.zeros((seqlen_q, seqlen_k), np.bool_)
    for i, j in np.ndindex(seqlen_q, seqlen_k):
        centre = i if mask.top_left else i + seqlen_k - seqlen_q
        keep[i, j] = (mask.left is None or j >= centre - mask.left) and (mask.right is None or j <= centre + mask.right)
    return keep


def samples(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Iterator[Mask]:
    """One mask of every class and composition."""
    rng = np.random.default_rng(seqlen_q * 100 + seqlen_k)
    boolean = BooleanMask(rng.random((batch, heads, seqlen_q, seqlen_k)) < 0.5)
    grid = (batch, heads, -(-seqlen_q // 2), -(-seqlen_k // 3))
    coded = BlockSparse(rng.integers(0, 4, grid).astype(np.int32), 2, 3, rng.random((2, 2, 3)) < 0.5)
    plain = BlockSparse(rng.random(grid) < 0.5, 2, 3)
    tree = TreeMask(rng.random((batch, heads, seqlen_q, 3)) < 0.5)
    yield from (*BANDS, boolean, coded, plain, tree)
    yield from (SlidingWindow(2, 1) & boolean, boolean & coded & Causal(), plain & (Causal(top_left=True) & boolean))


@pytest.mark.parametrize("seqlens", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", [m for m in BANDS if isinstance(m, SlidingWindow)], ids=str)
def test_band_is_its_inequality(mask: SlidingWindow, seqlens: tuple[int, int]) -> None:
    assert np.array_equal(mask.materialize(*seqlens)[0], brute_force(mask, *seqlens))


@given(bands, lengths, st.data())
def test_kv_range_of_a_band_is_its_support(mask: SlidingWindow, seqlens: tuple[int, int], data: st.DataObject) -> None:
    """Exact for a block whose every row sees something, never too few otherwise."""
    seqlen_q, seqlen_k = seqlens
    if not seqlen_q:
        return
    start = data.draw(st.integers(0, seqlen_q - 1))
    rows = range(start, data.draw(st.integers(start + 1, seqlen_q)))
    keep = mask.materialize(seqlen_q, seqlen_k)[0][rows.start : rows.stop]
    found = mask.kv_range(rows, seqlen_q, seqlen_k)
    assert found.start >= 0 and found.stop <= seqlen_k
    support = np.flatnonzero(keep.any(0))
    if keep.any(1).all():
        assert (found.start, found.stop) == (support[0], support[-1] + 1)
    assert set(support) <= set(found)


@pytest.mark.parametrize("seqlens", LENGTHS, ids=str)
def test_kv_range_never_loses_a_key(seqlens: tuple[int, int]) -> None:
    for mask in samples(1, 2, *seqlens):
        keep = mask.materialize(*seqlens, num_heads=2)
        for start in range(seqlens[0]):
            for stop in range(start + 1, seqlens[0] + 1):
                seen = np.flatnonzero(keep[:, start:stop].any((0, 1)))
                assert set(seen) <= set(mask.kv_range(range(start, stop), *seqlens)), mask


@pytest.mark.parametrize("seqlens", LENGTHS, ids=str)
def test_visible_counts_the_mask(seqlens: tuple[int, int]) -> None:
    for mask in samples(2, 3, *seqlens):
        for batch in range(2):
            assert mask.visible(*seqlens, num_heads=3, batch=batch) == mask.materialize(*seqlens, 3, batch).sum(), mask


@given(bands, lengths, st.integers(1, 3))
def test_visible_of_a_band(mask: SlidingWindow, seqlens: tuple[int, int], heads: int) -> None:
    assert mask.visible(*seqlens, num_heads=heads) == mask.materialize(*seqlens, num_heads=heads).sum()


def test_visible_counts_in_blocks() -> None:
    """Lengths beyond the block of rows in which elements are counted."""
    keep = np.random.default_rng(0).random((1, 1, 1, 1 << 20)) < 0.5
    assert BooleanMask(keep).visible(9, 1 << 20) == 9 * keep.sum()


@pytest.mark.parametrize("seqlens", LENGTHS, ids=str)
def test_keep_of_a_tile_is_that_part_of_the_whole(seqlens: tuple[int, int]) -> None:
    for mask in samples(2, 4, *seqlens):
        whole = mask.materialize(*seqlens, num_heads=4, batch=1)
        heads, rows, cols = range(1, 3), range(seqlens[0] // 2, seqlens[0]), range(seqlens[1] // 3, seqlens[1])
        keep = mask.keep(Tile.of(1, heads, rows, cols, *seqlens))
        part = whole[1:3, rows.start :, cols.start :]
        assert keep.dtype == np.bool_, mask
        assert np.array_equal(np.broadcast_to(keep, part.shape), part), mask


@pytest.mark.parametrize("seqlens", LENGTHS, ids=str)
def test_and_is_the_conjunction(seqlens: tuple[int, int]) -> None:
    masks = list(samples(1, 2, *seqlens))
    for one in masks:
        for two in masks:
            both = (one & two).materialize(*seqlens, num_heads=2)
            parts = [m.materialize(*seqlens, num_heads=2) for m in (one, two)]
            assert np.array_equal(both, parts[0] & parts[1]), (one, two)


def test_and_is_canonical() -> None:
    boolean = BooleanMask(np.ones((2, 2), np.bool_))
    assert Full() & Full() == Full()
    assert (Full() & Causal()) == Causal() == (Causal() & Full())
    nested = Causal() & (boolean & SlidingWindow(1, 1))
    assert isinstance(nested, And) and nested.masks == (Causal(), boolean, SlidingWindow(1, 1))
    assert nested.key() == (Causal() & BooleanMask(np.zeros((3, 3), np.bool_)) & SlidingWindow(1, 1)).key()
    assert nested.key() != (boolean & Causal() & SlidingWindow(1, 1)).key()
    with pytest.raises(TypeError):
        Causal() & np.ones((2, 2), np.bool_)  # type: ignore[operator]


def test_kv_range_of_and_is_the_intersection() -> None:
    left, right = SlidingWindow(3, None), SlidingWindow(None, 1)
    assert (left & right).kv_range(range(4, 6), 10, 10) == SlidingWindow(3, 1).kv_range(range(4, 6), 10, 10)
    assert len((SlidingWindow(None, -5) & SlidingWindow(-5, None)).kv_range(range(4, 5), 10, 10)) == 0


@pytest.mark.parametrize(
    "shape", [(), (7,), (5, 1), (3, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 3, 1, 1), (2, 1, 5, 1)], ids=str
)
def test_boolean_mask_broadcasts_as_numpy_does(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).random(shape) < 0.5
    expected = np.broadcast_to(array, (2, 3, 5, 7))
    for batch in range(2):
        assert np.array_equal(BooleanMask(array).materialize(5, 7, 3, batch), expected[batch])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8])
def test_boolean_mask_of_a_view(dtype: Any) -> None:
    """Strides and repeated axes are read as they are."""
    base = (np.random.default_rng(2).random((14, 10)) < 0.5).astype(dtype)
    view = np.broadcast_to(base.T[::2, ::2], (2, 3, 5, 7))
    assert np.array_equal(BooleanMask(view).materialize(5, 7, 3, 1), view[1] != 0)


def test_masks_follow_the_batch_index() -> None:
    blocks = np.array([0, 1, 2]).reshape(3, 1, 1, 1)
    mask = BlockSparse(blocks, 2, 2, np.array([[[True, False], [False, True]]]))
    assert [mask.visible(2, 2, batch=b) for b in range(3)] == [0, 4, 2]


def block_sparse_by_hand(mask: BlockSparse, seqlen_q: int, seqlen_k: int, head: int, batch: int) -> np.ndarray:
    blocks = np.broadcast_to(mask.blocks, (2, 3, *np.shape(mask.blocks)[-2:]))
    keep = np.zeros((seqlen_q, seqlen_k), np.bool_)
    for i, j in np.ndindex(seqlen_q, seqlen_k):
        code = int(blocks[batch, head, i // mask.block_q, j // mask.block_k])
        keep[i, j] = mask.partial[code - 2, i % mask.block_q, j % mask.block_k] if code >= 2 else code == 1
    return keep


@pytest.mark.parametrize("lead", [(), (1, 1), (1, 3), (3,), (2, 1), (2, 3)], ids=str)
def test_block_sparse_codes(lead: tuple[int, ...]) -> None:
    """Lengths that end inside a block; every broadcast of the leading axes."""
    rng = np.random.default_rng(3)
    mask = BlockSparse(rng.integers(0, 5, (*lead, 3, 4)).astype(np.int32), 4, 3, rng.random((3, 4, 3)) < 0.5)
    for batch in range(2):
        keep = mask.materialize(10, 11, 3, batch)
        for head in range(3):
            assert np.array_equal(keep[head], block_sparse_by_hand(mask, 10, 11, head, batch))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_from_bsr_shows_the_nonzero_elements(block_q: int, block_k: int, rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-1, 2, (rows * block_q, cols * block_k))
    dense *= np.kron(rng.random((rows, cols)) < 0.5, np.ones((block_q, block_k), np.intp))
    matrix = sparse.bsr_matrix(dense.astype(np.float64), blocksize=(block_q, block_k))
    assert np.array_equal(BlockSparse.from_bsr(matrix).materialize(*dense.shape)[0], matrix.toarray() != 0)


@pytest.mark.parametrize("kind", [sparse.bsr_matrix, sparse.bsr_array], ids=["matrix", "array"])
def test_from_bsr_of_unusual_matrices(kind: Any) -> None:
    """Stored zeros, full blocks, unsorted and repeated blocks, and nothing at all."""
    data = np.array([[[1, 0], [0, 0]], [[2, 3], [4, 5]], [[0, 0], [0, 0]], [[-1, 0], [0, 0]], [[1, 1], [1, 1]]], np.float64)
    matrix = kind((data, np.array([2, 0, 1, 2, 1]), np.array([0, 4, 5])), shape=(4, 6))
    before = matrix.toarray()
    mask = BlockSparse.from_bsr(matrix)
    assert np.array_equal(mask.materialize(4, 6)[0], before != 0)
    assert np.array_equal(matrix.toarray(), before)
    assert mask.blocks.dtype == np.int32
    empty = BlockSparse.from_bsr(kind((4, 6), blocksize=(2, 3)))
    assert empty.partial is None and not empty.materialize(4, 6).any()
    full = BlockSparse.from_bsr(kind(np.ones((4, 6)), blocksize=(2, 3)))
    assert full.partial is None and full.materialize(4, 6).all()


@pytest.mark.parametrize("seqlens", [(5, 7), (0, 4)], ids=str)
def test_bind_keeps_the_meaning_and_the_key(seqlens: tuple[int, int]) -> None:
    for mask in samples(2, 2, *seqlens):
        again = mask.bind([a.copy() for a in mask.arrays])
        assert type(again) is type(mask) and again.key() == mask.key() and hash(again.key()) == hash(mask.key())
        assert len(again.arrays) == len(mask.arrays)
        assert np.array_equal(again.materialize(*seqlens, 2, 1), mask.materialize(*seqlens, 2, 1))


def test_device_struct_names_every_array() -> None:
    """Each array is pointed at once, in order, and `cuda_type` and the fields exist for every class."""
    for mask in samples(1, 1, 6, 6):
        operands = [Operand(n, a.shape, (0,) * a.ndim, str(a.dtype)) for n, a in enumerate(mask.arrays)]
        fields = mask.fields(operands)
        assert [f.value for f in fields if f.kind == "ptr"] == list(range(len(operands)))
        assert fields and mask.cuda_type([op.dtype for op in operands])
        assert mask.tiled == bool(mask.arrays)


def test_tree_mask_hides_last_keys_alone() -> None:
    """Fewer keys than columns: those of the last keys count."""
    array = np.random.default_rng(4).random((2, 1, 3, 4)) < 0.5
    for seqlen_k in (2, 4, 7):
        expected = np.ones((3, seqlen_k), np.bool_)
        expected[:, max(0, seqlen_k - 4) :] = array[1, 0, :, max(0, 4 - seqlen_k) :]
        assert np.array_equal(TreeMask(array).materialize(3, seqlen_k, batch=1)[0], expected)


def test_gather_reads_missing_axes_as_repeated() -> None:
    array = np.arange(6).reshape(3, 1, 2)
    tile = Tile.of(4, range(1, 3), range(5), range(2), 5, 2)
    found = gather(array, tile.batch, tile.head, tile.row, tile.col)
    assert np.array_equal(np.broadcast_to(found, (2, 5, 2)), np.broadcast_to(array[1:3], (2, 5, 2)))
