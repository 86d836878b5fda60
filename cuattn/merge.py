"""Attention over disjoint sets of keys, merged exactly: `merge_states`, and `attention_cascade` over a prefix that is shared.

Written in the operations that NumPy, CuPy, PyTorch and JAX have in common, so the latter two differentiate it as it stands.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from cuattn.api import attention, attention_with_kvcache


def merge_states(states: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Attention over all keys from that over disjoint sets of them.

    states: (out, lse) of each set, as `attention` returns them for the same queries: out (batch, seqlen_q, num_heads,
      head_dim_v) with lse (batch, num_heads, seqlen_q), or both without a batch axis. Sinks belong to one of the sets.

    Returns (out, lse) of the same shapes and dtypes: lse = log sum_n exp(lse_n), out = sum_n exp(lse_n - lse) out_n. A row that
    saw no key anywhere has out 0 and lse -inf. Differentiable by PyTorch and JAX, for others see `merge_states_backward`.
    Raises ValueError for no states or shapes that differ.

    >>> import numpy as np
    >>> out, lse = merge_states([(np.ones((1, 1, 4)), np.zeros((1, 1))), (np.zeros((1, 1, 4)), np.zeros((1, 1)))])
    >>> out[0, 0, 0], round(float(lse[0, 0]), 4)
    (np.float64(0.5), 0.6931)
    """
    states = _checked(states)
    xp = _namespace(states[0][1])
    shares, lse = _shares(xp, [state[1] for state in states])
    out = sum(_by_row(share) * state[0] for share, state in zip(shares, states, strict=True))
    return _cast(out, states[0][0]), lse


def merge_states_backward(dout: Any, dlse: Any, states: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Gradients by (out, lse) of each of `states`, from those by what `merge_states` returns; dlse may be None.

    With w_n = exp(lse_n - lse): dout_n = w_n dout, and dlse_n = w_n (sum_d dout (out_n - out) + dlse).
    """
    states = _checked(states)
    xp = _namespace(states[0][1])
    shares, _ = _shares(xp, [state[1] for state in states])
    out = sum(_by_row(share) * state[0] for share, state in zip(shares, states, strict=True))
    gradients = []
    for share, (out_n, lse_n) in zip(shares, states, strict=True):
        row = (_by_row(share) * dout * (out_n - out)).sum(-1).swapaxes(-1, -2)
        by_lse = row if dlse is None else row + share * dlse
        gradients.append((_cast(_by_row(share) * dout, out_n), _cast(by_lse, lse_n)))
    return gradients


def attention_cascade(
    q: Any,
    k_prefix: Any,
    v_prefix: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    softcap: float | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`attention_with_kvcache` for sequences that begin alike: keys of their common prefix are read once, not once for each.

    k_prefix, v_prefix: (tokens, num_heads_kv, head_dim or head_dim_v), of q's dtype: visible to every query. The caches hold
      what comes after it, and lengths and positions count from there.
    options: those of `attention_with_kvcache` that do not depend on where a key lies: cache_seqlens, page_table,
      cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q, num_splits, k_scale, v_scale, sinks, deterministic, precision.

    Returns out, or (out, lse), over both. Raises as `attention_with_kvcache` does, and TypeError for other options.
    """
    strange = [name for name in options if name not in _CASCADE_OPTIONS]
    if strange:
        raise TypeError(f"{strange[0]}: got it in attention_cascade, expected one of {', '.join(_CASCADE_OPTIONS)}")
    shape = q.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"q: got shape {tuple(shape)}, expected (batch, seqlen_q, num_heads, head_dim) or one axis less")
    shared = {"scale": scale, "softcap": softcap, "precision": options.get("precision", "ieee")}
    rows = q.reshape(math.prod(shape[:-2]), *shape[-2:])
    out, lse = attention(rows, k_prefix, v_prefix, return_lse=True, **shared)
    out = out.reshape(*shape[:-1], out.shape[-1])
    if len(shape) == 4:
        lse = lse.reshape(shape[2], shape[0], shape[1]).swapaxes(0, 1)
    suffix = attention_with_kvcache(
        q, k_cache, v_cache, k, v, scale=scale, causal=causal, softcap=softcap, return_lse=True, **options
    )
    merged = merge_states([(out, lse), suffix])
    return merged if return_lse else merged[0]


_CASCADE_OPTIONS = (
    "cache_seqlens",
    "page_table",
    "cache_batch_idx",
    "cache_leftpad",
    "cu_seqlens_q",
    "max_seqlen_q",
    "num_splits",
    "k_scale",
    "v_scale",
    "sinks",
    "deterministic",
    "precision",
)


def _checked(states: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    pairs = [(out, lse) for out, lse in states]
    if not pairs:
        raise ValueError("states: got none, expected at least one (out, lse)")
    shape = tuple(pairs[0][0].shape)
    rows = (*shape[:-3], shape[-2], shape[-3]) if len(shape) in (3, 4) else ()
    for out, lse in pairs:
        if tuple(out.shape) != shape or tuple(lse.shape) != rows:
            found = f"out {tuple(out.shape)} with lse {tuple(lse.shape)}"
            raise ValueError(f"states: got {found}, expected out {shape}, (batch, seqlen_q, num_heads, head_dim_v), lse {rows}")
    return pairs


def _namespace(x: Any) -> Any:
    """The module with the functions of an array's library."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return importlib.import_module(type(x).__module__.partition(".")[0])


def _shares(xp: Any, lses: list[Any]) -> tuple[list[Any], Any]:
    """exp(lse_n - lse) of each set, and lse; shares of a row without keys are 0."""
    top = lses[0]
    for other in lses[1:]:
        top = xp.maximum(top, other)
    shift = xp.where(top == -math.inf, 0 * xp.ones_like(top), top)
    sizes = [xp.exp(lse - shift) for lse in lses]
    total = sum(sizes[1:], sizes[0])
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    lse = xp.where(empty, xp.full_like(total, -math.inf), shift + xp.log(total))
    return [size / total for size in sizes], lse


def _by_row(x: Any) -> Any:
    """(..., num_heads, seqlen_q) as it multiplies an output."""
    return x.swapaxes(-1, -2)[..., None]


def _cast(x: Any, like: Any) -> Any:
    return x.astype(like.dtype) if hasattr(x, "astype") else x.to(like.dtype)
