"""The NumPy backend over a KV cache: new tokens go in, then each sequence is gathered and attended by cpu.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuattn.cpu import Array, Options, sequence
from cuattn.masks import Mask
from cuattn.reference import loaded, stored
from cuattn.score_mods import ScoreMod


def forward(
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
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Attention on the CPU: (out, lse), after k and v have been written into the caches. Arguments are taken as valid.

    q (B, Sq, Hq, D), or packed (Tq, Hq, D) with cu_seqlens_q; caches (Bc, Sc, Hkv, D) or, with page_table, (pages, page_size,
    Hkv, D); k, v as q with Hkv heads. out and lse as `cpu.forward` gives them.
    """
    wide = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    out = np.empty((*q.shape[:-1], v_cache.shape[-1]), q.dtype) if out is None else out
    lse = np.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -np.inf, wide)
    out[...] = 0
    options = Options(mask, tuple(mods), 0.0, 0)
    logits = np.full(q.shape[-2], -np.inf, wide) if sinks is None else np.asarray(sinks).astype(wide)
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    page_size = k_cache.shape[1]
    with np.errstate(all="ignore"):
        for b in range(batch):
            at = b if cu_seqlens_q is None else slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
            row = b if cache_batch_idx is None else int(cache_batch_idx[b])
            pad = 0 if cache_leftpad is None else int(cache_leftpad[b])
            stop = start = int(cache_seqlens[b])
            stop += 0 if k is None else len(k[at])
            places = np.arange(stop)
            pages = np.full(stop, row) if page_table is None else page_table[row][places // page_size]
            slots = places if page_table is None else places % page_size
            scales = [np.ones((), np.float32) if s is None else s[b] if s.ndim == 2 else s for s in (k_scale, v_scale)]
            if k is not None and v is not None:
                new_k = k[at].astype(wide)
                if rotary_cos is not None and rotary_sin is not None:
                    angles = slice(start - pad, stop - pad)
                    new_k = rotate(new_k, rotary_cos[angles], rotary_sin[angles], rotary_interleaved)
                k_cache[pages[start:], slots[start:]] = stored(new_k, scales[0], k_cache.dtype)
                v_cache[pages[start:], slots[start:]] = stored(v[at].astype(wide), scales[1], v_cache.dtype)
            q_b = q[at].astype(wide)
            if rotary_cos is not None and rotary_sin is not None:
                positions = np.maximum(np.arange(len(q_b)) + stop - pad - len(q_b), 0)
                q_b = rotate(q_b, rotary_cos[positions], rotary_sin[positions], rotary_interleaved)
            keys, values = (
                loaded(c[pages[pad:], slots[pad:]], s).astype(wide) for c, s in zip((k_cache, v_cache), scales, strict=True)
            )
            lse_b = lse[b] if cu_seqlens_q is None else lse[:, at]
            sequence(b, np.multiply(q_b, scale, dtype=wide), keys, values, logits, options, out[at], lse_b)
    return out, lse


def rotate(x: Array, cosine: Array, sine: Array, interleaved: bool) -> Array:
    """Rotary embedding of x (tokens, heads, D) by the angles of its tokens, (tokens, rotary_dim / 2)."""
    half = cosine.shape[1]
    cosine, sine = (angle[:, None].astype(x.dtype) for angle in (cosine, sine))
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = np.stack([a * cosine - b * sine, a * sine + b * cosine], axis=-1).reshape(*x.shape[:-1], 2 * half)
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = np.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1)
    return np.concatenate([turned, x[..., 2 * half :]], axis=-1)
