"""The oracle: attention as the textbook writes it, in NumPy, one head at a time, with all of S and P in memory.

Nothing here is clever, so that it can be checked by reading it against the formula. In float64 it is the reference of
every test; in a narrower dtype it is the naive implementation whose error is the yardstick of the tolerance rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuattn import dropout as dropout_bits
from cuattn.masks import BoolArray, Mask, Tile
from cuattn.score_mods import ScoreMod

Array = npt.NDArray[Any]
Index = tuple[int | slice, ...]


class Span(NamedTuple):
    """Where one sequence lives in the arrays of a call, padding left out."""

    batch: int
    q: Index
    """Index into q, out and their gradients: a view (seqlen_q, num_heads, ...)"""
    k: Index
    """Index into k, v and their gradients: a view (seqlen_k, num_heads_kv, ...)"""
    lse: Index
    """Index into lse: a view (num_heads, seqlen_q)"""


def spans(
    q: Array,
    k: Array,
    *,
    q_lens: Array | None = None,
    kv_lens: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> Iterator[Span]:
    """The sequences of a call: dense (B, S, H, D) with optional lengths, or packed (T, H, D) with cumulative lengths."""
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    for b in range(batch):
        at_q = _index(b, q.shape, q_lens, cu_seqlens_q)
        lse = (*at_q[:-1], slice(None), at_q[-1])
        yield Span(b, at_q, _index(b, k.shape, kv_lens, cu_seqlens_k), lse)


def _index(b: int, shape: tuple[int, ...], lens: Array | None, cu_seqlens: Array | None) -> Index:
    start, size = (0, shape[1]) if cu_seqlens is None else (int(cu_seqlens[b]), int(cu_seqlens[b + 1]) - int(cu_seqlens[b]))
    length = size if lens is None else min(size, int(lens[b]))
    tokens = slice(start, start + length)
    return (b, tokens) if cu_seqlens is None else (tokens,)


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
    dtype: npt.DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """Attention with every step done in `dtype`: (out, lse).

    Shapes as in a public call: dense q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) -> out (B, Sq, Hq, Dv), lse
    (B, Hq, Sq); packed, with cu_seqlens, (T, H, D) -> (Tq, Hq, Dv), (Hq, Tq). Rows past a length and tokens past the last
    sequence get out 0 and lse -inf. Inputs, S, P and out are rounded to `dtype`; for a 16-bit `dtype` products accumulate
    and the softmax is taken in float32, as a naive GPU implementation does, and out and lse come back as float32 arrays.
    An input that no row sees reaches no result, NaN included; 0 * NaN at a visible key is NaN.
    """
    dtype = np.dtype(dtype)
    wide = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    q, k, v = (x.astype(dtype).astype(wide) for x in (q, k, v))
    out = np.zeros((*q.shape[:-1], v.shape[-1]), wide)
    lse = np.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -np.inf, wide)
    lengths = {"q_lens": q_lens, "kv_lens": kv_lens, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    with np.errstate(all="ignore"):
        for span in spans(q, k, **lengths):
            parts = q[span.q], k[span.k], v[span.k], out[span.q], lse[span.lse]
            _sequence(span.batch, *parts, scale, mask, mods, sinks, dropout, seed, dtype)
    return out, lse


def _sequence(
    batch: int,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    scale: float,
    mask: Mask,
    mods: Sequence[ScoreMod],
    sinks: Array | None,
    dropout: float,
    seed: int,
    dtype: np.dtype[Any],
) -> None:
    """One sequence: q (seqlen_q, num_heads, D), k, v (seqlen_k, num_heads_kv, ...) -> out, lse (num_heads, seqlen_q)."""
    group = max(1, q.shape[1] // max(1, k.shape[1]))
    for h in range(q.shape[1]):
        tile = Tile.of(batch, range(h, h + 1), range(len(q)), range(len(k)), len(q), len(k))
        s, visible = scores(q[:, h], k[:, h // group], tile, scale, mask, mods, dtype)
        p, lse[h] = softmax(s, None if sinks is None else np.asarray(sinks)[h].astype(q.dtype))
        if dropout > 0:
            p = p * dropout_bits.keep(seed, dropout, tile)[0] / (1 - dropout)
        o = weighted_sum(rounded(p, dtype)[None], v[None, :, h // group], visible[None])
        out[:, h] = rounded(o[0], dtype)


def with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    scale: float,
    mask: Mask,
    cache_seqlens: Array,
    mods: Sequence[ScoreMod] = (),
    sinks: Array | None = None,
    k: Array | None = None,
    v: Array | None = None,
    page_table: Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    cu_seqlens_q: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    dtype: npt.DTypeLike = np.float64,
) -> tuple[Array, Array, Array, Array]:
    """`attention_with_kvcache` a token at a time: (out, lse, the caches with the new tokens in them).

    The caches keep their dtype, so what is read is rounded to it whatever `dtype` is; the rest is as in `forward`.
    """
    dtype = np.dtype(dtype)
    wide = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    packed = cu_seqlens_q is not None
    starts = np.arange(len(q)) if cu_seqlens_q is None else cu_seqlens_q[:-1]
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    out = np.zeros((*q.shape[:-1], v_cache.shape[-1]), wide)
    lse = np.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -np.inf, wide)
    with np.errstate(all="ignore"):
        for b, start in enumerate(starts):
            at: Index = (b,) if cu_seqlens_q is None else (slice(int(start), int(cu_seqlens_q[b + 1])),)
            row = b if cache_batch_idx is None else int(cache_batch_idx[b])
            pad = 0 if cache_leftpad is None else int(cache_leftpad[b])
            new = 0 if k is None else len(k[at])
            length = int(cache_seqlens[b])

            def place(n: int, row: int = row) -> tuple[int, int]:
                if page_table is None:
                    return row, n
                return int(page_table[row, n // k_cache.shape[1]]), n % k_cache.shape[1]

            scales = [np.ones((), np.float32) if s is None else s[b] if s.ndim == 2 else s for s in (k_scale, v_scale)]
            for n in range(new):
                assert k is not None and v is not None
                token = k[at][n].astype(np.float64)
                if rotary_cos is not None and rotary_sin is not None:
                    position = length - pad + n
                    token = rotated(token, rotary_cos[position], rotary_sin[position], rotary_interleaved)
                k_cache[place(length + n)] = stored(token, scales[0], k_cache.dtype)
                v_cache[place(length + n)] = stored(v[at][n].astype(np.float64), scales[1], v_cache.dtype)
            q_b = q[at].astype(dtype).astype(wide)
            seqlen_q, seqlen_k = len(q_b), length + new - pad
            if rotary_cos is not None and rotary_sin is not None:
                for i in range(seqlen_q):
                    position = max(0, seqlen_k - seqlen_q + i)
                    q_b[i] = rounded(rotated(q_b[i], rotary_cos[position], rotary_sin[position], rotary_interleaved), dtype)
            places = [place(pad + j) for j in range(seqlen_k)]
            keys, values = (
                np.array([loaded(c[n], s) for n in places]).reshape(seqlen_k, *c.shape[2:]).astype(dtype).astype(wide)
                for c, s in zip((k_cache, v_cache), scales, strict=True)
            )
            lse_b = lse[:, at[0]] if packed else lse[b]
            _sequence(b, q_b, keys, values, out[at], lse_b, scale, mask, mods, sinks, 0.0, 0, dtype)
    return out, lse, k_cache, v_cache


def rotated(x: Array, cosine: Array, sine: Array, interleaved: bool) -> Array:
    """Rotary embedding of x (heads, D) by angles (rotary_dim / 2,): of neighbours, or of the halves of the first rotary_dim."""
    half, x = len(cosine), x.copy()
    cosine, sine = cosine.astype(x.dtype), sine.astype(x.dtype)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = x[:, first].copy(), x[:, second].copy()
    x[:, first], x[:, second] = a * cosine - b * sine, a * sine + b * cosine
    return x


def stored(x: Array, scale: Array, dtype: np.dtype[Any]) -> Array:
    """x (heads, D) as a cache of `dtype` holds it; scale (heads,) or a number."""
    if dtype.itemsize > 1:
        return x.astype(dtype)
    quotient = x.astype(np.float32) / np.asarray(scale, np.float32)[..., None]
    if dtype == np.int8:
        return np.clip(np.where(np.isnan(quotient), -128, np.rint(quotient)), -128, 127).astype(np.int8)
    return np.asarray(np.clip(quotient, -448, 448).astype(_e4m3()).view(dtype))


def loaded(x: Array, scale: Array) -> Array:
    """The inverse of `stored`, in float64."""
    if x.dtype.itemsize > 1:
        return x.astype(np.float64)
    numbers = x.astype(np.float64) if x.dtype == np.int8 else x.view(_e4m3()).astype(np.float64)
    return np.asarray(numbers * np.asarray(scale, np.float64)[..., None])


def _e4m3() -> np.dtype[Any]:
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
    return dtype


class Gradients(NamedTuple):
    """Of a scalar L, given dout = dL/dout and dlse = dL/dlse; each has the shape of what it belongs to."""

    dq: Array
    dk: Array
    dv: Array
    dmods: tuple[tuple[Array, ...], ...]
    """For every modification, one array for each of its `differentiable`."""
    dsinks: Array | None
    """None in a call without sinks."""


def backward(
    dout: Array,
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
    dlse: Array | None = None,
    dtype: npt.DTypeLike = np.float64,
    operand: Callable[[Array], Array] = np.asarray,
) -> Gradients:
    """Gradients of `forward`, everything computed anew from its inputs with every step done in `dtype`.

    dout: as out, (B, Sq, Hq, Dv) or packed (Tq, Hq, Dv); dlse: as lse, (B, Hq, Sq) or packed (Hq, Tq), None for zeros. The
    other arguments are those of `forward`. S, P, dP, dS (after each modification too) and the results are rounded to `dtype`;
    for a 16-bit one they come back as float32 arrays. P is exp(S - lse), so that the rounding of lse counts as in a kernel. A
    pair of a query and a key that it does not see contributes nothing, NaN included, and neither does a row with lse -inf;
    padding gets gradients 0. `operand` is what a matrix product makes of P and dS before it multiplies them (of the inputs, the
    caller makes it).
    """
    dtype = np.dtype(dtype)
    wide = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    dout, q, k, v = (x.astype(dtype).astype(wide) for x in (dout, q, k, v))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dmods = tuple(tuple(np.zeros(np.shape(mod.arrays[n]), wide) for n in mod.differentiable) for mod in mods)
    dsinks = None if sinks is None else np.zeros(np.shape(sinks), wide)
    lengths = {"q_lens": q_lens, "kv_lens": kv_lens, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    with np.errstate(all="ignore"):
        for span in spans(q, k, **lengths):
            (rows, heads), (columns, heads_kv) = q[span.q].shape[:2], k[span.k].shape[:2]
            group = max(1, heads // max(1, heads_kv))
            for h in range(heads):
                tile = Tile.of(span.batch, range(h, h + 1), range(rows), range(columns), rows, columns)
                kept = np.ones((), wide)
                if dropout > 0:
                    kept = dropout_bits.keep(seed, dropout, tile)[0] / np.asarray(1 - dropout, wide)
                parts = head_backward(
                    dout[span.q][:, h],
                    np.zeros(rows, wide) if dlse is None else dlse[span.lse][h].astype(wide),
                    q[span.q][:, h],
                    k[span.k][:, h // group],
                    v[span.k][:, h // group],
                    np.asarray(-np.inf if sinks is None else sinks[h]).astype(wide),
                    tile,
                    kept,
                    float(scale),
                    mask,
                    mods,
                    dmods,
                    dtype,
                    operand,
                )
                dq[span.q][:, h] = parts[0]
                dk[span.k][:, h // group] += parts[1]
                dv[span.k][:, h // group] += parts[2]
                if dsinks is not None:
                    dsinks[h] += parts[3]
        dq, dk, dv = (rounded(x, dtype) for x in (dq, dk, dv))
        dmods = tuple(tuple(rounded(x, dtype) for x in totals) for totals in dmods)
        return Gradients(dq, dk, dv, dmods, None if dsinks is None else rounded(dsinks, dtype))


def head_backward(
    dout: Array,
    dlse: Array,
    q: Array,
    k: Array,
    v: Array,
    sink: Array,
    tile: Tile,
    kept: Array,
    scale: float,
    mask: Mask,
    mods: Sequence[ScoreMod],
    dmods: Sequence[Sequence[Array]],
    dtype: np.dtype[Any],
    operand: Callable[[Array], Array],
) -> tuple[Array, Array, Array, Array]:
    """(dq, dk, dv, dsink) of one head; adds to `dmods`.

    dout (seqlen_q, Dv), dlse (seqlen_q,), q (seqlen_q, D), k (seqlen_k, D), v (seqlen_k, Dv); `kept` is the factor of dropout,
    0 or 1 / (1 - p), that broadcasts to (seqlen_q, seqlen_k).
    """
    chain = modified(q, k, tile, scale, mods, dtype)
    visible = np.broadcast_to(mask.keep(tile), chain[-1].shape)[0]
    lse = softmax(np.where(visible, chain[-1][0], -np.inf), sink)[1]
    alive = ~np.isneginf(lse)
    visible = visible & alive[:, None]
    p = np.where(visible, np.exp(chain[-1][0] - lse[:, None]), 0)
    p, p_kept = rounded(p, dtype), rounded(p * kept, dtype)
    out = rounded(weighted_sum(operand(p_kept)[None], v[None], visible[None])[0], dtype)
    delta = (dout * out).sum(axis=-1) - dlse
    dp = rounded(rounded(dout @ v.T, dtype) * kept, dtype)
    ds = np.where(visible, rounded(p * (dp - delta[:, None]), dtype), 0)[None]
    for mod, s, totals in zip(reversed(mods), reversed(chain[:-1]), reversed(dmods), strict=True):
        mod.accumulate(s, ds, tile, totals)
        ds = np.where(visible, rounded(ds * mod.grad(s, tile), dtype), 0)
    ds, p_kept = operand(ds), operand(p_kept)
    dq = scale * weighted_sum(ds, k[None], visible[None])[0]
    dk = scale * weighted_sum(ds[0].T[None], q[None], visible.T[None])[0]
    dv = weighted_sum(p_kept.T[None], dout[None], visible.T[None])[0]
    dsink = -np.where(alive, np.exp(sink - lse) * delta, 0).sum()
    return dq, dk, dv, dsink


def scores(
    q: Array, k: Array, tile: Tile, scale: float, mask: Mask, mods: Sequence[ScoreMod], dtype: np.dtype[Any]
) -> tuple[Array, BoolArray]:
    """S of one head, -inf where masked, and which keys are visible, both (seqlen_q, seqlen_k)."""
    s = modified(q, k, tile, scale, mods, dtype)[-1]
    visible = np.broadcast_to(mask.keep(tile), s.shape)[0]
    return np.where(visible, s[0], -np.inf), visible


def modified(q: Array, k: Array, tile: Tile, scale: float, mods: Sequence[ScoreMod], dtype: np.dtype[Any]) -> list[Array]:
    """Scores of one head before the first modification and after each, (1, seqlen_q, seqlen_k)."""
    chain = [rounded(q @ k.T * float(scale), dtype)[None]]
    for mod in mods:
        chain.append(np.broadcast_to(rounded(mod.apply(chain[-1], tile), dtype), chain[-1].shape))
    return chain


def softmax(s: Array, sink: Array | None) -> tuple[Array, Array]:
    """P (rows, columns) and lse (rows,) of scores (rows, columns); a row without any finite score or sink has P 0, lse -inf."""
    row_max = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sink is not None:
        row_max = np.maximum(row_max, sink)
    row_max = np.where(row_max == -np.inf, 0.0, row_max)
    p = np.exp(s - row_max)
    row_sum = p.sum(axis=-1, keepdims=True)
    if sink is not None:
        row_sum = row_sum + np.exp(sink - row_max)
    lse = row_max + np.log(row_sum)
    return p / np.where(row_sum == 0, 1.0, row_sum), lse[:, 0]


def weighted_sum(p: Array, v: Array, visible: BoolArray) -> Array:
    """P @ v over the visible keys alone: (heads, rows, columns) @ (heads, columns, Dv); `visible` broadcasts to P.

    A matrix product multiplies an invisible key's value by 0, which loses no information unless the value is NaN or
    infinite. Such values are taken out of the product and added for the rows that see them.
    """
    finite = np.isfinite(v)
    if finite.all():
        return np.asarray(p @ v)
    out = p @ np.where(finite, v, 0.0)
    special = np.where(finite, 0.0, v)
    visible = np.broadcast_to(visible, p.shape)
    for j in np.flatnonzero(~finite.all(axis=(0, 2))):
        term = p[:, :, j, None] * special[:, None, j]
        out += np.where(visible[:, :, j, None], term, 0.0)
    return np.asarray(out)


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """`x` with the precision of `dtype`, in the dtype that it has."""
    return x if x.dtype == dtype else x.astype(dtype).astype(x.dtype)
