"""FlashAttention 3's functions over cuattn: `from cuattn.flash_attn3 import flash_attn_func`.

The argument order of `flash_attn_interface`: the fourth is softmax_scale, there is no dropout, and `return_attn_probs` gives
(out, softmax_lse). softmax_lse is -inf on a row that sees no key. `num_splits` (but that of flash_attn_with_kvcache),
`pack_gqa` and `sm_margin` tune that library's kernels and are accepted without effect: cuattn plans by itself. Arguments of
what cuattn does not compute (qv, scales of fp8 inputs, attention_chunk) raise NotImplementedError when given. Of the other
functions of that module, flash_attn_combine is `cuattn.merge_states`, and nothing needs get_scheduler_metadata.
"""

from __future__ import annotations

from typing import Any

import torch

from cuattn.flash_attn import attend_to_cache, parse_scale, parse_softcap, parse_window
from cuattn.torch import attention, attention_varlen, last_axis_contiguous

__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention over q (batch, seqlen_q, nheads, headdim), k (batch, seqlen_k, nheads_k, headdim), v with a headdim of its own.

    The options that they share are those of `cuattn.flash_attn.flash_attn_func`. Returns out, or (out, softmax_lse) with
    softmax_lse (batch, nheads, seqlen_q) float32, differentiable.

    >>> q = k = v = torch.ones(1, 4, 2, 8)
    >>> flash_attn_func(q, k, v, 0.5, True).shape
    torch.Size([1, 4, 2, 8])
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None)
    q, k, v = (last_axis_contiguous(x) for x in (q, k, v))
    return attention(
        q,
        k,
        v,
        scale=parse_scale(softmax_scale),
        softcap=parse_softcap(softcap),
        deterministic=deterministic,
        return_lse=return_attn_probs,
        **parse_window(window_size, causal),
    )


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` over packed sequences: q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim).

    seqused_q, seqused_k: (batch,) int32, how many of the tokens between two cu_seqlens are in use; None: all.
    softmax_lse is (nheads, total_q).
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None)
    q, k, v = (last_axis_contiguous(x) for x in (q, k, v))
    return attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        q_lens=seqused_q,
        kv_lens=seqused_k,
        scale=parse_scale(softmax_scale),
        softcap=parse_softcap(softcap),
        deterministic=deterministic,
        return_lse=return_attn_probs,
        **parse_window(window_size, causal),
    )


def flash_attn_qkvpacked_func(
    qkv: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` over qkv (batch, seqlen, 3, nheads, headdim), read in place; its gradient is packed alike.

    num_heads_q: for qkv (batch, seqlen, num_heads_q + 2 nheads_k, headdim), how many of the heads are queries'.
    """
    if qkv.ndim == 5:
        if qkv.shape[-3] != 3 or num_heads_q is not None:
            expected = "(batch, seqlen, 3, nheads, headdim), and num_heads_q only with four axes"
            raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, num_heads_q {num_heads_q}, expected {expected}")
        q, k, v = qkv.unbind(-3)
    else:
        heads = qkv.shape[2] if qkv.ndim == 4 else 0
        if num_heads_q is None or not 0 < num_heads_q < heads or (heads - num_heads_q) % 2:
            expected = "(batch, seqlen, num_heads_q + 2 nheads_k, headdim)"
            raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, num_heads_q {num_heads_q}, expected {expected}")
        heads_kv = (heads - num_heads_q) // 2
        q, k, v = torch.split(qkv, [num_heads_q, heads_kv, heads_kv], dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`cuattn.flash_attn.flash_attn_with_kvcache` in this order of arguments, with page_table for block_table.

    cu_seqlens_q (batch + 1,) int32, max_seqlen_q: for packed q (total_q, nheads, headdim), over keys that are all in the cache.
    scheduler_metadata: accepted without effect. rotary_seqlens, cu_seqlens_k_new: NotImplementedError when given.

    Returns out; with return_softmax_lse four values as there, (out, softmax_lse, None, None): there are no partial results to
    show. softmax_lse is (batch, nheads, seqlen_q), packed (nheads, total_q). Has no gradient.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None)
    _refuse(cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens)
    if cu_seqlens_q is not None and k is not None:
        raise NotImplementedError("k: got new keys beside cu_seqlens_q, expected all keys in the cache")
    options = {"scale": parse_scale(softmax_scale), "softcap": parse_softcap(softcap), **parse_window(window_size, causal)}
    options |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_interleaved": rotary_interleaved}
    options |= {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "num_splits": num_splits}
    options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    result = attend_to_cache(q, k_cache, v_cache, k, v, cache_seqlens, page_table, return_softmax_lse, options)
    return (*result, None, None) if return_softmax_lse else result


def _refuse(**arguments: Any) -> None:
    for name, x in arguments.items():
        if x is not None:
            found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
            raise NotImplementedError(f"{name}: got {found}, expected nothing: cuattn has no kernel for it")
