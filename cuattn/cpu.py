"""The NumPy backend: exact attention on BLAS in O(N) memory, for machines without a GPU and for arrays that live on the CPU.

Keys stream past a block of query rows in blocks, with the running maximum and sum of the softmax (Milakov and Gimelshein,
"Online normalizer calculation for softmax", algorithm 3). The query heads of one KV head are stacked into the rows of one
matrix product. Blocks of keys that the mask hides from the whole block of rows are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn import dropout as dropout_bits
from cuattn.masks import Mask, Tile
from cuattn.reference import spans, weighted_sum
from cuattn.score_mods import ScoreMod

Array = npt.NDArray[Any]

BLOCK_K = 512
"""Keys in a block: long enough for BLAS to reach its speed."""
BLOCK_SCORES = 1 << 18
"""Scores in a block: 1 MiB in float32, so that the passes over a block run inside the L2 cache."""
MIN_ROWS = 64
"""Rows of the products in a block, as long as the queries have that many: below, BLAS slows down."""


@dataclass(frozen=True)
class Options:
    """What a block of scores needs to know about its call."""

    mask: Mask
    mods: tuple[ScoreMod, ...]
    dropout: float
    seed: int


def forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    mask: Mask,
    mods: Sequence[ScoreMod] = (),
    sinks: Array | None = None,
    q_lens: Array | None = None,
    kv_lens: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Attention on the CPU: (out, lse).

    Dense q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) -> out (B, Sq, Hq, Dv), lse (B, Hq, Sq); packed, with
    cu_seqlens, (T, H, D) -> out (Tq, Hq, Dv), lse (Hq, Tq). out has the dtype of q and may be given (any strides); lse is
    float32, float64 for float64 inputs. 16-bit inputs are computed in float32. Rows past a length and tokens past the
    last sequence get out 0 and lse -inf. Arguments are taken as valid: problem.py has checked them.
    """
    wide = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype) if out is None else out
    lse = np.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -np.inf, wide)
    out[...] = 0
    options = Options(mask, tuple(mods), dropout, seed)
    sinks = np.full(q.shape[-2], -np.inf, wide) if sinks is None else np.asarray(sinks).astype(wide)
    lengths = {"q_lens": q_lens, "kv_lens": kv_lens, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    with np.errstate(all="ignore"):
        for span in spans(q, k, **lengths):
            q_b = np.multiply(q[span.q], float(scale), dtype=wide, casting="unsafe")
            k_b, v_b = k[span.k].astype(wide, copy=False), v[span.k].astype(wide, copy=False)
            _sequence(span.batch, q_b, k_b, v_b, sinks, options, out[span.q], lse[span.lse])
    return out, lse


def _sequence(b: int, q: Array, k: Array, v: Array, sinks: Array, options: Options, out: Array, lse: Array) -> None:
    """One sequence: scaled q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv), sinks (Hq,) -> out (Sq, Hq, Dv), lse (Hq, Sq)."""
    group = max(1, q.shape[1] // max(1, k.shape[1]))
    k, v = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    for heads, rows in blocks(len(q), q.shape[1], group, k.shape[1]):
        head, row = slice(heads.start, heads.stop), slice(rows.start, rows.stop)
        head_kv = slice(heads.start // group, heads.stop // group)
        state = SoftmaxState(sinks[head], len(rows), v.shape[-1])
        q_block = np.ascontiguousarray(q[row, head].transpose(1, 0, 2)).reshape(-1, len(rows) * group, q.shape[-1])
        keys = options.mask.kv_range(rows, len(q), k.shape[1])
        for start in range(keys.start, keys.stop, BLOCK_K):
            cols = range(start, min(start + BLOCK_K, keys.stop))
            tile = Tile.of(b, heads, rows, cols, len(q), k.shape[1])
            _visit(state, q_block, k[head_kv, start : cols.stop], v[head_kv, start : cols.stop], tile, options)
        o, lse[head, row] = state.result()
        out[row, head] = o.transpose(1, 0, 2)


def blocks(seqlen_q: int, num_heads: int, group: int, seqlen_k: int) -> Iterator[tuple[range, range]]:
    """(query heads, query rows) of each block of work: all heads of a KV head together, several KV heads when rows are few."""
    columns = max(1, min(seqlen_k, BLOCK_K))
    rows = max(1, min(seqlen_q, max(BLOCK_SCORES // (columns * group), -(-MIN_ROWS // group))))
    heads = group * max(1, BLOCK_SCORES // (rows * columns * group))
    for h in range(0, num_heads, heads):
        for i in range(0, seqlen_q, rows):
            yield range(h, min(h + heads, num_heads)), range(i, min(i + rows, seqlen_q))


def _visit(state: SoftmaxState, q: Array, k: Array, v: Array, tile: Tile, options: Options) -> None:
    """Add one block of keys: q (KV heads, group * rows, D), k (KV heads, columns, D), v (KV heads, columns, Dv)."""
    visible = options.mask.keep(tile)
    everything = bool(visible.all())
    if not everything and not visible.any():
        return
    s = (q @ k.transpose(0, 2, 1)).reshape(tile.head.size, tile.row.size, tile.col.size)
    for mod in options.mods:
        s = np.broadcast_to(mod.apply(s, tile), s.shape)
    if not everything:
        s = np.where(visible, s, -np.inf)
    p = state.rescale(s)
    if options.dropout > 0:
        p *= dropout_bits.keep(options.seed, options.dropout, tile)
        p *= 1 / (1 - options.dropout)
    stacked = (len(v), -1, p.shape[-1])
    seen = np.broadcast_to(visible, p.shape).reshape(stacked) if not everything else np.ones((1, 1, 1), np.bool_)
    state.out += weighted_sum(p.reshape(stacked), v, seen).reshape(state.out.shape)


class SoftmaxState:
    """Running softmax of a block of rows: maximum and sum (heads, rows, 1) and the unnormalised output (heads, rows, Dv)."""

    def __init__(self, sinks: Array, rows: int, head_dim_v: int) -> None:
        """Start from the sink logits (heads,); -inf means none."""
        self.row_max = np.repeat(sinks[:, None, None], rows, axis=1)
        self.row_sum = np.exp(self.row_max - self._shift(self.row_max))
        self.out = np.zeros((len(sinks), rows, head_dim_v), sinks.dtype)

    @staticmethod
    def _shift(row_max: Array) -> Array:
        """What to subtract before exp: 0 while a row has seen nothing, as -inf - -inf would be NaN."""
        return np.where(row_max == -np.inf, 0.0, row_max)

    def rescale(self, s: Array) -> Array:
        """Take in scores (heads, rows, columns): rescale the sums to the new maximum; unnormalised P, a new array."""
        row_max = np.maximum(self.row_max, s.max(axis=-1, keepdims=True))
        shift = self._shift(row_max)
        p = np.subtract(s, shift)
        np.exp(p, out=p)
        correction = np.exp(self.row_max - shift)
        self.row_sum *= correction
        self.row_sum += p.sum(axis=-1, keepdims=True)
        self.out *= correction
        self.row_max = row_max
        return p

    def result(self) -> tuple[Array, Array]:
        """(out (heads, rows, Dv), lse (heads, rows)); a row that saw nothing has out 0, lse -inf."""
        empty = self.row_sum == 0
        lse = self._shift(self.row_max) + np.log(self.row_sum)
        return self.out / np.where(empty, 1.0, self.row_sum), lse[:, :, 0]
