"""Masks: which key j a query i may see. One frozen dataclass here, one struct in kernels/attention/mask.cuh.

Coordinates i and j count from the start of their own sequence; seqlen_q and seqlen_k are that sequence's own lengths, so a
mask means the same in a dense, padded, packed or paged call. Masks compose with `&`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuattn.fields import CTYPES, Field, Operand

BoolArray = npt.NDArray[np.bool_]


class Tile(NamedTuple):
    """Coordinates of a block of scores of one sequence, as integer arrays that broadcast to (heads, rows, columns)."""

    batch: int
    head: npt.NDArray[np.intp]
    """(heads, 1, 1) query head indices"""
    row: npt.NDArray[np.intp]
    """(1, rows, 1) query indices i"""
    col: npt.NDArray[np.intp]
    """(1, 1, columns) key indices j"""
    seqlen_q: int
    seqlen_k: int

    @staticmethod
    def of(batch: int, heads: range, rows: range, cols: range, seqlen_q: int, seqlen_k: int) -> Tile:
        head, row, col = (np.arange(r.start, r.stop) for r in (heads, rows, cols))
        return Tile(batch, head[:, None, None], row[None, :, None], col[None, None, :], seqlen_q, seqlen_k)


class Mask:
    """Base of all masks. A subclass defines `keep`, and `cuda_type` with the members its struct has."""

    arrays: tuple[Any, ...] = ()
    """Arrays the mask reads, in the order in which `fields` receives them as operands."""

    def keep(self, tile: Tile) -> BoolArray:
        """True where key `tile.col` is visible to query `tile.row`; broadcastable to (heads, rows, columns)."""
        raise NotImplementedError

    def kv_range(self, rows: range, seqlen_q: int, seqlen_k: int) -> range:
        """Keys that some row of `rows` may see: never too few, exact for bands."""
        return range(seqlen_k)

    def bind(self, arrays: Sequence[Any]) -> Mask:
        """The same mask over other arrays (converted, moved to another device)."""
        return self

    def key(self) -> Hashable:
        """Everything about the mask except the contents of its arrays."""
        return self._key

    @functools.cached_property
    def _key(self) -> Hashable:
        # Its fields: a tuple's hash and comparison run in C, those of a dataclass in Python.
        return (type(self), *vars(self).values())

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        """C++ type; `dtypes` are those of `arrays`."""
        raise NotImplementedError

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        """Members of the C++ struct; a struct without members has one unused word."""
        return (Field("int", 0),)

    @property
    def tiled(self) -> bool:
        """Whether kernels need a tile map (built on the device) to know which tiles to visit."""
        return False

    def varies(self, operands: Sequence[Operand]) -> tuple[bool, bool]:
        """Whether the mask's arrays differ between batches, and between heads."""
        if not operands:
            return False, False
        strides = operands[0].broadcast_strides(4)
        return strides[0] != 0, strides[1] != 0

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return And.of((self, other))

    def materialize(self, seqlen_q: int, seqlen_k: int, num_heads: int = 1, batch: int = 0) -> BoolArray:
        """The whole mask of one sequence as a boolean array (num_heads, seqlen_q, seqlen_k).

        >>> Causal().materialize(2, 3)[0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 1]]
        """
        tile = Tile.of(batch, range(num_heads), range(seqlen_q), range(seqlen_k), seqlen_q, seqlen_k)
        return np.broadcast_to(self.keep(tile), (num_heads, seqlen_q, seqlen_k))

    def visible(self, seqlen_q: int, seqlen_k: int, num_heads: int = 1, batch: int = 0) -> int:
        """Number of visible (query, key) pairs of one sequence, over `num_heads` heads; computed without N^2 memory."""
        count, step = 0, max(1, (1 << 22) // max(1, seqlen_k * num_heads))
        for start in range(0, seqlen_q, step):
            rows = range(start, min(start + step, seqlen_q))
            tile = Tile.of(batch, range(num_heads), rows, range(seqlen_k), seqlen_q, seqlen_k)
            shape = (num_heads, len(rows), seqlen_k)
            count += int(np.count_nonzero(np.broadcast_to(self.keep(tile), shape)))
        return count


@dataclass(frozen=True)
class Full(Mask):
    """Every key is visible to every query."""

    def keep(self, tile: Tile) -> BoolArray:
        return np.ones((1, 1, 1), np.bool_)

    def visible(self, seqlen_q: int, seqlen_k: int, num_heads: int = 1, batch: int = 0) -> int:
        return num_heads * seqlen_q * seqlen_k

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return "FullMask"


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Keys i + shift - left ... i + shift + right, both inclusive; None leaves a side open.

    shift = seqlen_k - seqlen_q aligns the ends of both sequences (bottom-right); with `top_left` it is 0.

    >>> SlidingWindow(1, 0).materialize(3, 3)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    left: int | None
    right: int | None
    top_left: bool = False

    def _limits(self, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        """(lo, hi): query i sees keys i + lo <= j < i + hi."""
        shift = 0 if self.top_left else seqlen_k - seqlen_q
        lo = -seqlen_q if self.left is None else shift - self.left
        hi = seqlen_q + seqlen_k if self.right is None else shift + self.right + 1
        return lo, hi

    def keep(self, tile: Tile) -> BoolArray:
        lo, hi = self._limits(tile.seqlen_q, tile.seqlen_k)
        distance = tile.col - tile.row
        return np.asarray((distance >= lo) & (distance < hi), np.bool_)

    def kv_range(self, rows: range, seqlen_q: int, seqlen_k: int) -> range:
        lo, hi = self._limits(seqlen_q, seqlen_k)
        return range(max(0, rows.start + lo), max(0, min(seqlen_k, rows.stop - 1 + hi)))

    def visible(self, seqlen_q: int, seqlen_k: int, num_heads: int = 1, batch: int = 0) -> int:
        lo, hi = self._limits(seqlen_q, seqlen_k)
        i = np.arange(seqlen_q)
        return num_heads * int((np.clip(i + hi, 0, seqlen_k) - np.clip(i + lo, 0, seqlen_k)).clip(0).sum())

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        flags = (self.left is not None, self.right is not None, not self.top_left)
        return f"BandMask<{', '.join(str(f).lower() for f in flags)}>"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        return Field.ints((self.left or 0, self.right or 0))


def Causal(*, top_left: bool = False) -> SlidingWindow:
    """No key after the query: j <= i + seqlen_k - seqlen_q, or j <= i with `top_left`."""
    return SlidingWindow(None, 0, top_left)


@dataclass(frozen=True, eq=False)
class BooleanMask(Mask):
    """A boolean array, True = visible, broadcastable to (batch, num_heads, seqlen_q, seqlen_k)."""

    array: Any = field(repr=False)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.array,)

    def bind(self, arrays: Sequence[Any]) -> Mask:
        return BooleanMask(arrays[0])

    def key(self) -> Hashable:
        return BooleanMask

    def keep(self, tile: Tile) -> BoolArray:
        return np.asarray(gather(np.asarray(self.array), tile.batch, tile.head, tile.row, tile.col), np.bool_)

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return "BooleanMask"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        return (Field.ptr(operands[0]), *Field.ints(operands[0].broadcast_strides(4)))

    @property
    def tiled(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """A mask in blocks of block_q queries by block_k keys.

    `blocks`, an integer or boolean array that broadcasts to (batch, num_heads, ceil(seqlen_q / block_q), ceil(seqlen_k /
    block_k)), holds 0 for an invisible block, 1 for a visible one and 2 + n for one whose elements are `partial[n]`, a boolean
    array (count, block_q, block_k).
    """

    blocks: Any = field(repr=False)
    block_q: int
    block_k: int
    partial: Any = field(default=None, repr=False)

    @staticmethod
    def from_bsr(matrix: Any) -> BlockSparse:
        """From a scipy.sparse BSR matrix of shape (seqlen_q, seqlen_k): a query sees the keys of its nonzero elements."""
        block_q, block_k = matrix.blocksize
        matrix = matrix.copy()
        matrix.sum_duplicates()
        data = np.asarray(matrix.data) != 0
        rows = np.repeat(np.arange(matrix.shape[0] // block_q), np.diff(matrix.indptr))
        full, empty = data.all((1, 2)), ~data.any((1, 2))
        code = np.where(full, 1, np.where(empty, 0, 2 + np.cumsum(~full & ~empty) - 1)).astype(np.int32)
        blocks = np.zeros((matrix.shape[0] // block_q, matrix.shape[1] // block_k), np.int32)
        blocks[rows, matrix.indices] = code
        partial = data[~full & ~empty]
        return BlockSparse(blocks, block_q, block_k, np.ascontiguousarray(partial) if len(partial) else None)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.blocks,) if self.partial is None else (self.blocks, self.partial)

    def bind(self, arrays: Sequence[Any]) -> Mask:
        return BlockSparse(arrays[0], self.block_q, self.block_k, *arrays[1:])

    def key(self) -> Hashable:
        return (BlockSparse, self.block_q, self.block_k, self.partial is None)

    def keep(self, tile: Tile) -> BoolArray:
        code = gather(np.asarray(self.blocks), tile.batch, tile.head, tile.row // self.block_q, tile.col // self.block_k)
        if self.partial is None:
            return np.asarray(code != 0, np.bool_)
        inside = np.asarray(self.partial)[np.maximum(code, 2) - 2, tile.row % self.block_q, tile.col % self.block_k]
        return np.asarray(np.where(code >= 2, inside != 0, code != 0), np.bool_)

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return f"BlockSparse<{CTYPES[dtypes[0]]}, {str(self.partial is not None).lower()}>"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        partial = Field.ptr(operands[1]) if self.partial is not None else Field("int", 0)
        sizes = Field.ints((*operands[0].broadcast_strides(4), self.block_q, self.block_k))
        return (Field.ptr(operands[0]), partial, *sizes)

    @property
    def tiled(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class TreeMask(Mask):
    """The last keys by a boolean array, every key before them visible: drafts that branch, in speculative decoding.

    `array` broadcasts to (batch, num_heads, seqlen_q, n): query i sees key seqlen_k - n + m iff array[b, h, i, m].

    >>> TreeMask(np.eye(2, dtype=np.bool_)).materialize(2, 3)[0].astype(int).tolist()
    [[1, 1, 0], [1, 0, 1]]
    """

    array: Any = field(repr=False)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.array,)

    def bind(self, arrays: Sequence[Any]) -> Mask:
        return TreeMask(arrays[0])

    def key(self) -> Hashable:
        return TreeMask

    def keep(self, tile: Tile) -> BoolArray:
        array = np.asarray(self.array)
        column = tile.col - (tile.seqlen_k - array.shape[-1])
        return np.asarray((column < 0) | gather(array, tile.batch, tile.head, tile.row, np.maximum(column, 0)), np.bool_)

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return "TreeMask"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        return (Field.ptr(operands[0]), *Field.ints((*operands[0].broadcast_strides(4), operands[0].shape[-1])))

    @property
    def tiled(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class And(Mask):
    """Keys visible under every one of `masks`."""

    masks: tuple[Mask, ...]

    @staticmethod
    def of(masks: Sequence[Mask]) -> Mask:
        """The canonical conjunction: flattened, `Full` dropped, a single mask left as it is."""
        flat = [m for mask in masks for m in (mask.masks if isinstance(mask, And) else (mask,))]
        flat = [m for m in flat if not isinstance(m, Full)]
        return Full() if not flat else flat[0] if len(flat) == 1 else And(tuple(flat))

    def _split(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        """Hand each mask its share of `items`, which has one entry for each array."""
        stops = np.cumsum([len(m.arrays) for m in self.masks]).tolist()
        return [items[stop - len(m.arrays) : stop] for m, stop in zip(self.masks, stops, strict=True)]

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(a for m in self.masks for a in m.arrays)

    def bind(self, arrays: Sequence[Any]) -> Mask:
        return And(tuple(m.bind(part) for m, part in zip(self.masks, self._split(arrays), strict=True)))

    def key(self) -> Hashable:
        return tuple(m.key() for m in self.masks)

    def keep(self, tile: Tile) -> BoolArray:
        return functools.reduce(operator.and_, (m.keep(tile) for m in self.masks))

    def kv_range(self, rows: range, seqlen_q: int, seqlen_k: int) -> range:
        ranges = [m.kv_range(rows, seqlen_q, seqlen_k) for m in self.masks]
        return range(max(r.start for r in ranges), min(r.stop for r in ranges))

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        types = [m.cuda_type(part) for m, part in zip(self.masks, self._split(dtypes), strict=True)]
        return functools.reduce(lambda rest, first: f"And<{first}, {rest}>", reversed(types))

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        parts = zip(self.masks, self._split(operands), strict=True)
        return tuple(f for m, part in parts for f in m.fields(part))

    @property
    def tiled(self) -> bool:
        return any(m.tiled for m in self.masks)

    def varies(self, operands: Sequence[Operand]) -> tuple[bool, bool]:
        each = [m.varies(part) for m, part in zip(self.masks, self._split(operands), strict=True)]
        return any(b for b, _ in each), any(h for _, h in each)


def gather(array: npt.NDArray[Any], batch: int, head: Any, row: Any, col: Any) -> npt.NDArray[Any]:
    """Elements of an array that broadcasts over (batch, heads, rows, columns), at integer coordinate arrays."""
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    index = [np.asarray(x) if n > 1 else np.zeros_like(x) for x, n in zip((batch, head, row, col), array.shape, strict=True)]
    return np.asarray(array[tuple(index)])
