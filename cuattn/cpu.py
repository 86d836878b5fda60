"""The NumPy backend: exact attention on BLAS in O(N) memory, for machines without a GPU and for arrays that live on the CPU.

Keys stream past a block of query rows in blocks, with the running maximum and sum of the softmax (Milakov and Gimelshein,
"Online normalizer calculation for softmax", algorithm 3). The query heads of one KV head are stacked into the rows of one
matrix product. Blocks of keys that the mask hides from the whole block of rows are not computed.

The backward goes through the same blocks in the same order. It computes a block of P again from lse, as no P was kept (Dao et
al., "FlashAttention", algorithm 4), and adds the block's part to dq of its rows, to dk and dv of its keys and to the gradients
of the modifications' arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuattn import dropout as dropout_bits
from cuattn.masks import BoolArray, Mask, Tile
from cuattn.reference import Gradients, spans, weighted_sum
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
            sequence(span.batch, q_b, k_b, v_b, sinks, options, out[span.q], lse[span.lse])
    return out, lse


def sequence(b: int, q: Array, k: Array, v: Array, sinks: Array, options: Options, out: Array, lse: Array) -> None:
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


def backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
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
    dlse: Array | None = None,
) -> Gradients:
    """Gradients of `forward` on the CPU, from what it returned.

    dout and out (B, Sq, Hq, Dv), lse and dlse (B, Hq, Sq); packed, with cu_seqlens, (Tq, Hq, Dv) and (Hq, Tq); dlse None means
    zeros. The other arguments are those of `forward`. dq, dk and dv have the dtype of q, the gradients of the modifications
    and sinks that of the array they belong to; all are summed in float32, for float64 inputs in float64. Padding rows, tokens
    past the last sequence and rows that see no key get gradients 0. Arguments are taken as valid: problem.py has checked them.
    """
    wide = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    dmods = tuple(tuple(np.zeros(np.shape(mod.arrays[n]), wide) for n in mod.differentiable) for mod in mods)
    sink_logits = np.full(q.shape[-2], -np.inf, wide) if sinks is None else np.asarray(sinks).astype(wide)
    totals = Totals(dmods, np.zeros_like(sink_logits))
    options = Options(mask, tuple(mods), dropout, seed)
    lengths = {"q_lens": q_lens, "kv_lens": kv_lens, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    with np.errstate(all="ignore"):
        for span in spans(q, k, **lengths):
            dout_b, lse_b = dout[span.q].astype(wide, copy=False), lse[span.lse].astype(wide, copy=False)
            delta = np.einsum("ihd,ihd->hi", dout_b, out[span.q].astype(wide, copy=False))
            if dlse is not None:
                delta -= dlse[span.lse].astype(wide, copy=False)
            q_b = np.multiply(q[span.q], float(scale), dtype=wide, casting="unsafe")
            k_b, v_b = k[span.k].astype(wide, copy=False), v[span.k].astype(wide, copy=False)
            rows = Rows(q_b, dout_b, lse_b, delta, sink_logits)
            dq_b, dk[span.k], dv[span.k] = _sequence_backward(span.batch, rows, k_b, v_b, options, totals)
            np.multiply(dq_b, float(scale), out=dq[span.q], casting="unsafe")
        own = tuple(
            tuple(x.astype(mod.arrays[n].dtype) for n, x in zip(mod.differentiable, parts, strict=True))
            for mod, parts in zip(mods, dmods, strict=True)
        )
        dsinks = None if sinks is None else totals.dsinks.astype(sinks.dtype)
    return Gradients(dq, dk, dv, own, dsinks)


class Totals(NamedTuple):
    """Gradients that every sequence of a call adds to."""

    dmods: tuple[tuple[Array, ...], ...]
    """For every modification, its differentiable arrays' gradients"""
    dsinks: Array
    """(num_heads,)"""


class Rows(NamedTuple):
    """What the backward reads of the query rows of one sequence."""

    q: Array
    """(seqlen_q, num_heads, head_dim), scaled"""
    dout: Array
    """(seqlen_q, num_heads, head_dim_v)"""
    lse: Array
    """(num_heads, seqlen_q)"""
    delta: Array
    """(num_heads, seqlen_q): rowsum(dout * out) - dlse"""
    sinks: Array
    """(num_heads,)"""


def _sequence_backward(b: int, rows: Rows, k: Array, v: Array, options: Options, totals: Totals) -> tuple[Array, Array, Array]:
    """One sequence: k (Sk, Hkv, D), v (Sk, Hkv, Dv) -> dq of the scaled q (Sq, Hq, D), dk, dv; the rest goes to `totals`."""
    (seqlen_q, num_heads, _), (seqlen_k, num_heads_kv, _) = rows.q.shape, k.shape
    group = max(1, num_heads // max(1, num_heads_kv))
    k, v, dq = k.transpose(1, 0, 2), v.transpose(1, 0, 2), np.empty_like(rows.q)
    dk, dv = np.zeros(k.shape, k.dtype), np.zeros(v.shape, v.dtype)
    for heads, block in blocks(seqlen_q, num_heads, group, seqlen_k):
        head, row = slice(heads.start, heads.stop), slice(block.start, block.stop)
        head_kv = slice(heads.start // group, heads.stop // group)
        state = RowsBackward.of(rows, head, row, group)
        totals.dsinks[head] += state.dsinks(rows.sinks[head])
        keys = options.mask.kv_range(block, seqlen_q, seqlen_k)
        for start in range(keys.start, keys.stop, BLOCK_K):
            cols = range(start, min(start + BLOCK_K, keys.stop))
            tile = Tile.of(b, heads, block, cols, seqlen_q, seqlen_k)
            at = (head_kv, slice(start, cols.stop))
            _visit_backward(state, k[at], v[at], dk[at], dv[at], tile, options, totals.dmods)
        dq[row, head] = state.dq.reshape(len(heads), len(block), -1).transpose(1, 0, 2)
    return dq, dk.transpose(1, 0, 2), dv.transpose(1, 0, 2)


@dataclass(frozen=True)
class RowsBackward:
    """A block of rows: q, dq (KV heads, group * rows, D), dout (KV heads, group * rows, Dv), the rest (heads, rows, 1).

    A row that has no key, nor a sink, has lse -inf; here its lse and delta are 0.
    """

    q: Array
    dout: Array
    dq: Array
    lse: Array
    delta: Array
    alive: BoolArray
    """Whether lse is above -inf"""

    @staticmethod
    def of(rows: Rows, head: slice, row: slice, group: int) -> RowsBackward:
        """The block of some heads and rows of a sequence, the query heads of each KV head stacked."""
        q, dout = (
            np.ascontiguousarray(x[row, head].transpose(1, 0, 2)).reshape(-1, group * (row.stop - row.start), x.shape[-1])
            for x in (rows.q, rows.dout)
        )
        lse, delta = rows.lse[head, row, None], rows.delta[head, row, None]
        alive = ~np.isneginf(lse)
        return RowsBackward(q, dout, np.zeros_like(q), np.where(alive, lse, 0), np.where(alive, delta, 0), alive)

    def dsinks(self, sinks: Array) -> Array:
        """Part of the gradient of the sinks (heads,): a sink is a key whose value is 0."""
        return np.asarray(-(np.exp(sinks[:, None, None] - self.lse) * self.delta).sum(axis=(1, 2)))


def _visit_backward(
    state: RowsBackward,
    k: Array,
    v: Array,
    dk: Array,
    dv: Array,
    tile: Tile,
    options: Options,
    dmods: tuple[tuple[Array, ...], ...],
) -> None:
    """Add one block of keys: k, dk (KV heads, columns, D), v, dv (KV heads, columns, Dv)."""
    visible = options.mask.keep(tile)
    if not state.alive.all():
        visible = visible & state.alive
    everything = bool(visible.all())
    if not everything and not visible.any():
        return
    shape, stacked = (tile.head.size, tile.row.size, tile.col.size), (len(v), -1, tile.col.size)
    chain = [(state.q @ k.transpose(0, 2, 1)).reshape(shape)]
    for mod in options.mods:
        chain.append(np.broadcast_to(mod.apply(chain[-1], tile), shape))
    p = np.exp(chain.pop() - state.lse)
    dp = (state.dout @ v.transpose(0, 2, 1)).reshape(shape)
    p_kept = p if everything else np.where(visible, p, 0)
    if options.dropout > 0:
        kept = dropout_bits.keep(options.seed, options.dropout, tile) * p.dtype.type(1 / (1 - options.dropout))
        p_kept, dp = p_kept * kept, dp * kept
    dp -= state.delta
    ds = np.multiply(p, dp, out=dp)
    if not everything:
        ds = np.where(visible, ds, 0)
    for mod, s, parts in zip(reversed(options.mods), reversed(chain), reversed(dmods), strict=True):
        mod.accumulate(s, ds, tile, parts)
        ds = ds * mod.grad(s, tile)
        if not everything:  # the derivative of an invisible score may be anything
            ds = np.where(visible, ds, 0)
    seen = np.ones((1, 1, 1), np.bool_) if everything else np.broadcast_to(visible, shape).reshape(stacked)
    ds, p_kept, seen_by = ds.reshape(stacked), p_kept.reshape(stacked), seen.transpose(0, 2, 1)
    state.dq[...] += weighted_sum(ds, k, seen)
    dk += weighted_sum(ds.transpose(0, 2, 1), state.q, seen_by)
    dv += weighted_sum(p_kept.transpose(0, 2, 1), state.dout, seen_by)
