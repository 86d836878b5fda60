"""The public functions of flash-attn 2.8 over cuattn: `from cuattn.flash_attn import flash_attn_func`.

Same names, arguments, defaults, return values and conventions; every dtype and head size that cuattn serves. All but the one
with a cache are differentiable through autograd. Where the two libraries differ on purpose:

- softmax_lse is differentiable, not a by-product whose gradient is dropped. As there, it is +inf on a row that sees no key.
- S_dmask comes without the padding of its last two axes to multiples of 128.
- Gradients of tokens past cu_seqlens[-1] are 0, not uninitialised memory.
- Dropout draws its seed from PyTorch's generator of the device, but not the same bits as flash-attn does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cuattn.api import attention_with_kvcache
from cuattn.torch import attention, attention_varlen, draw_seed, last_axis_contiguous

__all__ = [
    "flash_attn_func",
    "flash_attn_func_with_grad",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
]


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, headdim).

    nheads is a multiple of nheads_k: query head h reads key head h // (nheads / nheads_k).
    dropout_p: probability of dropping a probability; 0 at evaluation. softmax_scale: None is 1 / sqrt(headdim).
    causal: aligned at the bottom right, key j is visible to query i iff j <= i + seqlen_k - seqlen_q.
    window_size: (left, right) around that diagonal, inclusive; -1 leaves a side open. softcap: 0 is none.
    alibi_slopes: (nheads,) or (batch, nheads) float32, adds -slope |i + seqlen_k - seqlen_q - j| to the score.
    deterministic: bitwise equal gradients from run to run.

    Returns out (batch, seqlen_q, nheads, headdim); with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse (batch,
    nheads, seqlen_q) float32; S_dmask (batch, nheads, seqlen_q, seqlen_k) the probabilities before dropout, negative where
    dropped, or an empty tensor without dropout. S_dmask is meant for tests: it has the size that attention avoids.

    >>> q = k = v = torch.ones(1, 4, 2, 8)
    >>> flash_attn_func(q, k, v, causal=True).shape
    torch.Size([1, 4, 2, 8])
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend((q, k, v), (), options, dropout_p, deterministic, return_attn_probs)


flash_attn_func_with_grad = flash_attn_func


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` over kv (batch, seqlen_k, 2, nheads_k, headdim), read in place; its gradient is packed alike."""
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend((q, *_unpack("kv", kv, 2, 5)), (), options, dropout_p, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` over qkv (batch, seqlen, 3, nheads, headdim), read in place; its gradient is packed alike."""
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _attend(_unpack("qkv", qkv, 3, 5), (), options, dropout_p, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """`flash_attn_func` over packed sequences: q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim).

    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 cumulative lengths, the first 0. max_seqlen_q, max_seqlen_k: the longest.
    block_table: (batch, max_blocks) int32 with k and v in pages (num_blocks, page_size, nheads_k, headdim), any page size; the
      pages of the batch are gathered into one contiguous copy first. cu_seqlens_k then gives lengths alone.

    softmax_lse is (nheads, total_q), S_dmask (batch, nheads, max_seqlen_q, max_seqlen_k).
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        k, v, packing = _gather_pages(k, v, block_table, packing, options)
    return _attend((q, k, v), packing, options, dropout_p, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` over kv (total_k, 2, nheads_k, headdim), read in place."""
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend((q, *_unpack("kv", kv, 2, 4)), packing, options, dropout_p, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` over qkv (total, 3, nheads, headdim), read in place."""
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    packing = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _attend(_unpack("qkv", qkv, 3, 4), packing, options, dropout_p, deterministic, return_attn_probs)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (batch, seqlen_q, nheads, headdim) over a cache, into which k and v (batch, seqlen_new, ...) go first.

    k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table (batch, max_blocks) int32 pages
      (num_blocks, page_size, nheads_k, headdim) of any size; changed in place.
    cache_seqlens: int or (batch,) int32, tokens in the cache before the new ones; None: all that it has room for, without k.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2); needs k, as many new keys as queries, and a causal or local mask where
      there are several queries. Other arguments: `cuattn.attention_with_kvcache` and `flash_attn_func`.

    Returns out, or (out, softmax_lse) with softmax_lse (batch, nheads, seqlen_q). Has no gradient.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    options |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_interleaved": rotary_interleaved}
    options |= {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "num_splits": num_splits}
    result = attend_to_cache(q, k_cache, v_cache, k, v, cache_seqlens, block_table, return_softmax_lse, options)
    return (result[0], _as_flash_attn(result[1])) if return_softmax_lse else result


def attend_to_cache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    cache_seqlens: Any,
    page_table: Any,
    return_lse: bool,
    options: dict[str, Any],
) -> Any:
    """`cuattn.attention_with_kvcache` with what flash-attn asks for besides; out, or (out, lse)."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(x, torch.Tensor):
            raise _not_a_tensor(name, x)
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: got None together with k, expected where the new tokens go")
        cache_seqlens = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    if options["rotary_cos"] is not None:
        _check_rotary(q, k, options)
    q, k, v = (None if x is None else last_axis_contiguous(x) for x in (q, k, v))
    named = {"cache_seqlens": cache_seqlens, "page_table": page_table, "return_lse": return_lse}
    return attention_with_kvcache(q, k_cache, v_cache, k, v, **named, **options)


def _check_rotary(q: Any, k: Any, options: dict[str, Any]) -> None:
    """There, query i is rotated as position cache_seqlens + i, or without a causal or local mask as cache_seqlens."""
    if k is None:
        raise ValueError("rotary_cos: got a table without k, expected new keys to rotate")
    everything = options.get("causal") is False or options.get("window") == (None, None)
    if q.shape[1] != k.shape[1] or (everything and q.shape[1] > 1):
        found = f"{q.shape[1]} queries, {k.shape[1]} new keys and {'no' if everything else 'a'} causal or local mask"
        raise NotImplementedError(f"rotary_cos: got {found}, expected as many keys as queries, and causal=True for several")


# Padding --------------------------------------------------------------------------------------------------------------


def unpad_input(hidden_states: Any, attention_mask: Any, unused_mask: Any = None) -> tuple[Any, Any, Any, int, Any]:
    """Pack the valid tokens of a padded batch, for the varlen functions. Differentiable; waits for the device once.

    hidden_states: (batch, seqlen, ...). attention_mask: (batch, seqlen), nonzero where a token is valid; unused_mask: the same
      for tokens that are allocated and not used. Returns (tokens, indices, cu_seqlens, max_seqlen, seqlens): tokens of both
      masks (total, ...), their indices in the flattened batch, and seqlens (batch,) of the valid ones alone.

    >>> padded, mask = torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> tokens, indices, cu_seqlens, longest, used = unpad_input(padded, mask)
    >>> tokens.flatten().tolist(), cu_seqlens.tolist(), longest
    ([0.0, 1.0, 3.0], [0, 2, 3], 2)
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = attention_mask + unused_mask
    used = attention_mask.sum(-1, dtype=torch.int32)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten()).flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """The reverse of `unpad_input`: (total, ...) tokens into (batch, seqlen, ...), zeros elsewhere. Differentiable."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(x: Any, indices: Any) -> Any:
    """x[indices] of x (rows, ...), for indices (total,). Differentiable."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Any, indices: Any, first_axis_dim: int) -> Any:
    """The reverse: values (total, ...) as the rows `indices` of (first_axis_dim, ...), zeros elsewhere. Differentiable."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def _check_mask(name: str, mask: Any, hidden_states: Any) -> None:
    if not isinstance(mask, torch.Tensor):
        raise _not_a_tensor(name, mask)
    if mask.shape != hidden_states.shape[:2]:
        expected = tuple(hidden_states.shape[:2])
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {expected}, batch and seqlen of hidden_states")


# What they share ------------------------------------------------------------------------------------------------------


def _options(softmax_scale: Any, causal: bool, window_size: Any, softcap: float, alibi_slopes: Any) -> dict[str, Any]:
    """The options of `cuattn.attention`, without dropout."""
    return {
        "scale": parse_scale(softmax_scale),
        "softcap": parse_softcap(softcap),
        "alibi_slopes": alibi_slopes,
        **parse_window(window_size, causal),
    }


def parse_scale(softmax_scale: Any) -> float | None:
    """Any scalar as a number; a tensor on a GPU is waited for."""
    if softmax_scale is None or type(softmax_scale) is float:
        return softmax_scale
    scalar = isinstance(softmax_scale, (int, float, np.number)) and not isinstance(softmax_scale, bool)
    scalar = scalar or (isinstance(softmax_scale, torch.Tensor) and softmax_scale.numel() == 1)
    if not scalar or not math.isfinite(float(softmax_scale)):
        raise ValueError(f"softmax_scale: got {softmax_scale!r}, expected a finite number or None")
    return float(softmax_scale)


def parse_softcap(softcap: Any) -> float | None:
    """0 stands for none."""
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not softcap >= 0:
        raise ValueError(f"softcap: got {softcap!r}, expected a number >= 0 (0: none)")
    return softcap or None


def parse_window(window_size: Any, causal: Any) -> dict[str, Any]:
    """causal and window_size as one band of keys; a negative side (or None) is open."""
    if causal not in (True, False):
        raise ValueError(f"causal: got {causal!r}, expected a bool; cuattn.attention has causal='top-left'")
    causal = bool(causal)
    if window_size == (-1, -1):
        return {"causal": causal}
    try:
        left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size: got {window_size!r}, expected (left, right), two integers, -1 for an open side"
        ) from None
    if causal:
        return {"causal": True} if left is None else {"window": (left, 0)}
    return {"window": (left, right)}


def _unpack(name: str, packed: Any, count: int, axes: int) -> tuple[Any, ...]:
    """Views of q, k and v, or of k and v. Their gradients come back as one stacked tensor."""
    if not isinstance(packed, torch.Tensor):
        raise _not_a_tensor(name, packed)
    if packed.ndim != axes or packed.shape[-3] != count:
        lead = "batch, seqlen" if axes == 5 else "total"
        raise ValueError(f"{name}: got shape {tuple(packed.shape)}, expected ({lead}, {count}, nheads, headdim)")
    return tuple(packed.unbind(-3))


def _not_a_tensor(name: str, x: Any) -> TypeError:
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    return TypeError(f"{name}: got {kind}, expected a torch.Tensor; cuattn.attention takes the arrays of other libraries")


def _attend(
    qkv: tuple[Any, ...], packing: tuple[Any, ...], options: dict[str, Any], dropout_p: float, deterministic: bool, probs: bool
) -> Any:
    """packing: the four arguments of attention_varlen that follow q, k and v; empty for a dense call."""
    for name, x in zip("qkv", qkv, strict=True):
        if not isinstance(x, torch.Tensor):
            raise _not_a_tensor(name, x)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p!r}, expected a number p with 0 <= p < 1")
    q, k, v = [last_axis_contiguous(x) for x in qkv]
    verb: Any = attention_varlen if packing else attention
    if dropout_p:
        options = {**options, "dropout": dropout_p, "seed": draw_seed(q.device)}
    if not probs:
        return verb(q, k, v, *packing, deterministic=deterministic, **options)
    out, lse = verb(q, k, v, *packing, deterministic=deterministic, return_lse=True, **options)
    with torch.no_grad():
        s_dmask = _probabilities(q, k, packing, options) if dropout_p else q.new_empty(0)
    return out, _as_flash_attn(lse), s_dmask


def _as_flash_attn(lse: Any) -> Any:
    """A row that sees no key has +inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _gather_pages(k: Any, v: Any, block_table: Any, packing: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Pages as a packed batch in which every sequence has room for all of its pages; its length goes into `options`."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, _ = packing
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)} with a block_table, expected (blocks, page_size, nheads_k, headdim)"
            )
    if block_table.ndim != 2 or block_table.dtype != torch.int32:
        found = f"{block_table.dtype} of shape {tuple(block_table.shape)}"
        raise ValueError(f"block_table: got {found}, expected int32 of shape (batch, max_blocks)")
    # Entries past a sequence's last page are never read by the kernel and may hold anything.
    pages = block_table.flatten().clamp(0, k.shape[0] - 1)
    batch, room = block_table.shape[0], block_table.shape[1] * k.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=k.device) * room
    options["kv_lens"] = cu_seqlens_k.diff()
    gathered = (x.index_select(0, pages).flatten(0, 1) for x in (k, v))
    return (*gathered, (cu_seqlens_q, starts, max_seqlen_q, room))


PROBABILITY_COLUMNS = 256
"""Keys whose probabilities one call gives: the values are then columns of the identity matrix."""


def _probabilities(q: Any, k: Any, packing: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """softmax(S), by the same kernels as the result, with the sign of the dropout: (batch, heads, seqlen_q, seqlen_k)."""
    verb: Any = attention_varlen if packing else attention
    plain = {name: x for name, x in options.items() if name not in ("dropout", "seed")}
    # Where q and k are 0 every key has the same probability: what is 0 then was dropped.
    drop = {name: options[name] for name in ("dropout", "seed")}
    lengths = {"kv_lens": options["kv_lens"]} if "kv_lens" in options else {}
    columns, place = _identity(q, k, packing)
    parts = []
    for v in columns:
        p = verb(q, k, v, *packing, **plain)
        kept = verb(torch.zeros_like(q), torch.zeros_like(k), v, *packing, **drop, **lengths)
        parts.append(torch.where(kept > 0, p, -p))
    return place(torch.cat(parts, -1))


def _identity(q: Any, k: Any, packing: tuple[Any, ...]) -> tuple[Any, Any]:
    """Values that are columns of the identity, and a function that brings (..., heads, keys) into (batch, heads, ...)."""
    if not packing:
        column = torch.arange(k.shape[1], device=k.device)
        length, lead = k.shape[1], tuple(k.shape[:3])

        def place(p: Any) -> Any:
            return p.transpose(1, 2)
    else:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, length = packing
        _, column = _positions(k.shape[0], cu_seqlens_k)
        lead = tuple(k.shape[:2])

        def place(p: Any) -> Any:
            batch = len(cu_seqlens_q) - 1
            sequence, row = _positions(q.shape[0], cu_seqlens_q)
            inside = sequence < batch
            placed = p.new_zeros((batch, max_seqlen_q, q.shape[1], length))
            placed[sequence[inside], row[inside]] = p[inside]
            return placed.transpose(1, 2)

    def columns() -> Any:
        for start in range(0, length, PROBABILITY_COLUMNS):
            keys = torch.arange(start, min(start + PROBABILITY_COLUMNS, length), device=k.device)
            yield (column[:, None, None] == keys).to(q.dtype).expand(*lead, -1)

    return columns(), place


def _positions(tokens: int, cu_seqlens: Any) -> tuple[Any, Any]:
    """(sequence, position in it) of every token of a packed array; the sequence of a token past the end is the batch size."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return sequence, token - cu_seqlens[sequence]
