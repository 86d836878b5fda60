"""FlashAttention 3's functions over cuattn: `from cuattn.flash_attn3 import flash_attn_func`.

The argument order of `flash_attn_interface`: the fourth is softmax_scale, there is no dropout, and `return_attn_probs` gives
(out, softmax_lse). softmax_lse is -inf on a row that sees no key. `num_splits`, `pack_gqa` and `sm_margin` tune that
library's kernels and are accepted without effect: cuattn plans by itself. Arguments of what cuattn does not compute (qv,
scales of fp8 inputs, attention_chunk) raise NotImplementedError when given.
"""

from __future__ import annotations

from typing import Any

import torch

from cuattn.flash_attn import parse_softcap, parse_window
from cuattn.torch import attention, attention_varlen, last_axis_contiguous

__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func"]


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
        scale=softmax_scale,
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
        scale=softmax_scale,
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


def _refuse(**arguments: Any) -> None:
    for name, x in arguments.items():
        if x is not None:
            raise NotImplementedError(f"{name}: got {x!r}, expected nothing: cuattn has no kernel for it")
