"""The public verbs. What they do is in call.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuattn import arrays, call, decode_call, jit
from cuattn.arrays import View, contiguous_strides, library_of
from cuattn.backward import BackwardPlan, make_backward_plan, make_backward_problem
from cuattn.decode import Scalars
from cuattn.masks import Mask
from cuattn.plan import Plan, make_plan
from cuattn.problem import parse_mask, parse_mods
from cuattn.registry import DEVICES
from cuattn.score_mods import Bias, ScoreMod, UserMod

__all__ = [
    "Gradients",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_with_kvcache",
    "backend_info",
    "explain",
    "vjp",
]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    q_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
    deterministic: bool = False,
    precision: str = "ieee",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Exact attention, softmax(scale * q k^T, modified and masked) v, without ever storing the scores.

    q: (batch, seqlen_q, num_heads, head_dim); k: (batch, seqlen_k, num_heads_kv, head_dim); v: (batch, seqlen_k, num_heads_kv,
      head_dim_v), float16, bfloat16, float32 or float64, num_heads a multiple of num_heads_kv. The batch axis may be left out.
      NumPy, CuPy, PyTorch, JAX or DLPack arrays, all of one kind, on one device; last axis contiguous, other strides free.
    scale: of the scores, default 1 / sqrt(head_dim).
    causal: True hides keys after the query, aligned at the ends of both sequences (j <= i + seqlen_k - seqlen_q); "top-left"
      aligns their starts (j <= i).
    window: (left, right) keys visible on either side of the query's aligned position, inclusive; None leaves a side open.
    mask: a Mask, `m1 & m2`, a boolean array (True = visible) that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), or a
      scipy.sparse BSR matrix whose nonzero elements are visible. It is intersected with causal and window.
    softcap, alibi_slopes, bias, score_mod: modify the scaled score, in this order. softcap c: c tanh(s / c). alibi_slopes
      (num_heads,) or (batch, num_heads) float32: s - slope |i + seqlen_k - seqlen_q - j|. bias: added, broadcasts as mask does.
      score_mod: a ScoreMod, a list of them, or CUDA C: an expression, or (expression, derivative).
    sinks: (num_heads,) extra logits that take part in the softmax but have no value.
    kv_lens, q_lens: (batch,) int32 numbers of valid tokens; what lies past them is padding, never read into a result. Padding
      rows of the output are 0, their lse -inf.
    dropout: probability p in [0, 1) of dropping a probability, a pure function of (seed, batch, head, i, j); the rest is
      divided by 1 - p.
    deterministic: accepted for symmetry with the backward: the forward is always bitwise reproducible.
    precision: of float32 products: "ieee", "tf32x3" (close to ieee, on tensor cores) or "tf32".
    return_lse: also return the logarithm of the sum of exponentials (natural, sinks included): (batch, num_heads, seqlen_q),
      float32, or float64 for float64 inputs.
    out: array to write the result into, of the result's shape, dtype and kind.

    Returns out, (batch, seqlen_q, num_heads, head_dim_v) of q's kind and dtype, or (out, lse). A query that sees no key gives 0
    and -inf. Raises ValueError or TypeError naming the argument before anything is launched, NotImplementedError when no kernel
    serves the combination. Source: Dao, "FlashAttention-2", 2023, algorithm 1.

    >>> import numpy as np
    >>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
    >>> attention(q, k, v, causal=True).shape
    (1, 4, 2, 8)
    """
    return call.forward(
        _named(q, k, v, sinks, q_lens, kv_lens, out),
        _mask_of(causal, window, mask),
        parse_mods(softcap, alibi_slopes, bias, score_mod),
        call.Options(scale, dropout, precision, return_lse, None, None, deterministic),
        seed,
    )


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    q_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
    deterministic: bool = False,
    precision: str = "ieee",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """`attention` over sequences of different lengths packed one after the other, without padding.

    q: (total_q, num_heads, head_dim); k, v: (total_k, num_heads_kv, head_dim or head_dim_v).
    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 cumulative lengths, the first 0: sequence b is rows cu[b] to cu[b + 1].
    max_seqlen_q, max_seqlen_k: the longest lengths (Python integers: the lengths themselves stay on the device, unread).
    Options are those of `attention`; i and j count from the start of each sequence, batch is the sequence's index, and mask and
    bias broadcast to (batch, num_heads, max_seqlen_q, max_seqlen_k).

    Returns out (total_q, num_heads, head_dim_v), or (out, lse) with lse (num_heads, total_q). Tokens past cu_seqlens_q[-1] are
    padding: 0 and -inf.

    >>> import numpy as np
    >>> q = k = v = np.ones((5, 2, 8), np.float32)
    >>> lengths = np.array([0, 2, 5], np.int32)
    >>> attention_varlen(q, k, v, lengths, lengths, 3, 3, causal=True).shape
    (5, 2, 8)
    """
    _check_cumulative(cu_seqlens_q, cu_seqlens_k)
    return call.forward(
        {**_named(q, k, v, sinks, q_lens, kv_lens, out), "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        _mask_of(causal, window, mask),
        parse_mods(softcap, alibi_slopes, bias, score_mod),
        call.Options(scale, dropout, precision, return_lse, max_seqlen_q, max_seqlen_k, deterministic),
        seed,
    )


def _named(q: Any, k: Any, v: Any, sinks: Any, q_lens: Any, kv_lens: Any, out: Any) -> dict[str, Any]:
    """Arrays by name: q, k, v, and those of the others that are given."""
    named = {"q": q, "k": k, "v": v}
    if sinks is not None:
        named["sinks"] = sinks
    if q_lens is not None:
        named["q_lens"] = q_lens
    if kv_lens is not None:
        named["kv_lens"] = kv_lens
    if out is not None:
        named["out"] = out
    return named


def _cotangents(dout: Any, out: Any, lse: Any, dlse: Any) -> dict[str, Any]:
    """What a backward takes beside the arrays of its forward."""
    for name, x in (("dout", dout), ("out", out), ("lse", lse)):
        if x is None:
            raise TypeError(f"{name}: got None, expected an array")
    return {"dout": dout, "lse": lse} if dlse is None else {"dout": dout, "lse": lse, "dlse": dlse}


def _check_cumulative(cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    for name, cumulative in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cumulative is None:
            raise TypeError(f"{name}: got None, expected an int32 array of shape (batch + 1,)")


_FULL, _CAUSAL, _TOP_LEFT = (parse_mask(causal, None, None) for causal in (False, True, "top-left"))


def _mask_of(causal: Any, window: Any, mask: Any) -> Mask:
    """`parse_mask`, with the most common answers at hand."""
    if mask is None and window is None:
        if causal is False or causal is True:
            return _CAUSAL if causal else _FULL
        if type(causal) is str and causal == "top-left":
            return _TOP_LEFT
    return parse_mask(causal, window, mask)


def attention_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any = None,
    k: Any = None,
    v: Any = None,
    *,
    cache_seqlens: Any,
    page_table: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    k_scale: Any = None,
    v_scale: Any = None,
    head_dim_v: int | None = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    deterministic: bool = False,
    precision: str = "ieee",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of a few new tokens over a cache of keys and values, into which it first writes theirs.

    q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with cu_seqlens_q and max_seqlen_q as in
      `attention_varlen`. Any number of tokens; built for one to a few dozen.
    k_cache, v_cache: (rows, seqlen, num_heads_kv, head_dim or head_dim_v), or with page_table (pages, page_size, num_heads_kv,
      ...). Of q's dtype, or under 16-bit q of 8 bits: float8_e4m3fn, uint8 that holds its bits, or int8.
    head_dim_v: without a v_cache, values are the first head_dim_v columns of the keys, which are read once. Multi-head latent
      attention in its absorbed form, over 512 columns of a latent and 64 rotated ones, has k_cache (..., 1, 576) and head_dim_v
      512; such models have a scale of their own. New tokens are k alone, and rotary_cos is None.
    k, v: (batch, tokens, num_heads_kv, ...), packed (total_q, num_heads_kv, ...): new tokens, written into the cache behind
      what it holds. None: the cache holds everything already.
    cache_seqlens: (batch,) int32 or one integer: tokens in the cache before the new ones, padding on the left included. They
      stay on the device, unread, and are not changed.
    page_table: (batch, max_pages) int32: token n of a sequence lies in page page_table[b, n // page_size].
    cache_batch_idx: (batch,) int32: which row of the cache, or of the page table, is whose. Default: their own.
    cache_leftpad: (batch,) int32: tokens to skip at the start. i, j and positions count from there.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2): rotates the first rotary_dim dimensions of new keys by their position
      j, and of query i by that of the key it is aligned with, i + seqlen_k - seqlen_q. rotary_interleaved: pairs (0, 1), (2, 3)
      ..., otherwise (0, rotary_dim / 2), (1, rotary_dim / 2 + 1) ...
    num_splits: into how many parts a sequence's keys are divided; 0 divides all work evenly over the GPU.
    k_scale, v_scale: (num_heads_kv,) or (batch, num_heads_kv) float32: what the elements of an 8-bit cache are multiplied with,
      and new ones divided by; default 1.
    deterministic: what a sequence yields does not depend, to the bit, on the others in the batch. Without it, results are
      reproducible for the same lengths on the same GPU.
    Other options are those of `attention`; seqlen_k is a sequence's length with its new tokens, and mask and bias broadcast to
    (batch, num_heads, seqlen_q, tokens that the cache has room for).

    Returns out of q's shape with head_dim_v, or (out, lse). A length or page that only the device knows and that lies outside
    the cache is neither read nor written: its keys count as zeros (CUATTN_DEBUG=1 looks, and raises). Has no gradient. Raises
    as `attention` does.

    >>> import numpy as np
    >>> cache_k, cache_v = np.zeros((2, 1, 16, 2, 8), np.float16)
    >>> new = np.ones((1, 1, 2, 8), np.float16)
    >>> attention_with_kvcache(new, cache_k, cache_v, new, new, cache_seqlens=0, causal=True)[0, 0, 0, :2]
    array([1., 1.], dtype=float16)
    >>> int(cache_k[0, :, 0, 0].sum())
    1
    """
    present = {"q": q, "k_cache": k_cache}
    if v_cache is not None:
        present["v_cache"] = v_cache
    if k is not None:
        present["k"] = k
    if v is not None:
        present["v"] = v
    present["cache_seqlens"] = cache_seqlens
    if page_table is not None:
        present["page_table"] = page_table
    if cache_batch_idx is not None:
        present["cache_batch_idx"] = cache_batch_idx
    if cache_leftpad is not None:
        present["cache_leftpad"] = cache_leftpad
    if cu_seqlens_q is not None:
        present["cu_seqlens_q"] = cu_seqlens_q
    if rotary_cos is not None:
        present["rotary_cos"] = rotary_cos
    if rotary_sin is not None:
        present["rotary_sin"] = rotary_sin
    if k_scale is not None:
        present["k_scale"] = k_scale
    if v_scale is not None:
        present["v_scale"] = v_scale
    if sinks is not None:
        present["sinks"] = sinks
    if out is not None:
        present["out"] = out
    mods: tuple[ScoreMod, ...] = ()
    if softcap is not None or alibi_slopes is not None or bias is not None or score_mod is not None:
        mods = parse_mods(softcap, alibi_slopes, bias, score_mod)
    flags = bool(deterministic), num_splits, bool(rotary_interleaved)
    return decode_call.attend(
        present,
        _mask_of(causal, window, mask),
        mods,
        call.new(Scalars, (scale, return_lse, *flags, max_seqlen_q, precision, head_dim_v)),
    )


# Gradients ------------------------------------------------------------------------------------------------------------


class _Five(NamedTuple):
    dq: Any
    dk: Any
    dv: Any
    dbias: Any
    dsinks: Any


class Gradients(_Five):
    """dq, dk, dv, dbias, dsinks, each of the shape and dtype of what it belongs to; None for what was not given.

    `dparams`, beside the tuple, holds the gradients of the float vectors of user code (`UserMod.param_gradients`) by name, for
    each score modification in order of `score_mod`.
    """

    dparams: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def of(raw: call.Raw, mods: tuple[ScoreMod, ...]) -> Gradients:
        """Gradients by their public names."""
        biases = [grads[0] for mod, grads in zip(mods, raw.dmods, strict=True) if isinstance(mod, Bias) and grads]
        gradients = Gradients(raw.dq, raw.dk, raw.dv, biases[0] if biases else None, raw.dsinks)
        gradients.dparams = tuple(
            dict(zip(mod.differentiable_names if grads else (), grads, strict=True))
            for mod, grads in zip(mods, raw.dmods, strict=True)
            if isinstance(mod, UserMod)
        )
        return gradients


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    q_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
    deterministic: bool = False,
    precision: str = "ieee",
) -> Gradients:
    """Gradients of `attention` from that of its result, in linear memory: the probabilities are computed anew from lse.

    dout: gradient of a loss by out, of out's shape and dtype; last axis contiguous, other strides free (0 too).
    q, k, v, and every option: as they were given to `attention`. out, lse: what it returned with return_lse=True.
    dlse: gradient by lse, of its shape and dtype, if the loss depends on it.
    deterministic: bitwise equal gradients from run to run. On Hopper's kernel CTAs add to dq in the order of their keys; on the
      portable one each of those that share the keys of a head adds to a dq of its own, up to
      (multiprocessors / (batch num_heads_kv)) of them. Sums over batches or heads into elements of a bias have an order too.
      Gradients of user parameters are refused.

    Returns Gradients(dq, dk, dv, dbias, dsinks). dbias is reduced to the shape of the bias, dk and dv over the query heads of
    their head. Rows that see no key, padding and what lies past a length get 0. Raises as `attention` does, and
    NotImplementedError for a score_mod without a derivative. Source: Dao, "FlashAttention-2", 2023, algorithm 2.

    >>> import numpy as np
    >>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
    >>> out, lse = attention(q, k, v, return_lse=True)
    >>> attention_backward(np.ones_like(out), q, k, v, out, lse).dv[0, :, 0, 0]
    array([1., 1., 1., 1.], dtype=float32)
    """
    named = {**_named(q, k, v, sinks, q_lens, kv_lens, out), **_cotangents(dout, out, lse, dlse)}
    mods = parse_mods(softcap, alibi_slopes, bias, score_mod)
    options = call.Options(scale, dropout, precision, True, None, None, deterministic)
    return Gradients.of(call.backward(named, _mask_of(causal, window, mask), mods, options, seed), mods)


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dlse: Any = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    q_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
    deterministic: bool = False,
    precision: str = "ieee",
) -> Gradients:
    """Gradients of `attention_varlen`; arguments as there and as in `attention_backward`. Tokens of padding get 0.

    >>> import numpy as np
    >>> q = k = v = np.ones((5, 2, 8), np.float32)
    >>> lengths = np.array([0, 2, 5], np.int32)
    >>> out, lse = attention_varlen(q, k, v, lengths, lengths, 3, 3, return_lse=True)
    >>> attention_varlen_backward(np.ones_like(out), q, k, v, out, lse, lengths, lengths, 3, 3).dv[:, 0, 0]
    array([1., 1., 1., 1., 1.], dtype=float32)
    """
    _check_cumulative(cu_seqlens_q, cu_seqlens_k)
    named = {**_named(q, k, v, sinks, q_lens, kv_lens, out), **_cotangents(dout, out, lse, dlse)}
    named.update(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    mods = parse_mods(softcap, alibi_slopes, bias, score_mod)
    options = call.Options(scale, dropout, precision, True, max_seqlen_q, max_seqlen_k, deterministic)
    return Gradients.of(call.backward(named, _mask_of(causal, window, mask), mods, options, seed), mods)


def vjp(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> tuple[Any, Callable[..., Gradients]]:
    """`attention`, or with cu_seqlens `attention_varlen`, and its vector-Jacobian product.

    Returns (out, pullback), or ((out, lse), pullback) with return_lse; pullback(dout, dlse=None) returns Gradients. Options are
    those of `attention` but out. The pullback keeps q, k, v, out and lse alive and may be called any number of times.

    >>> import numpy as np
    >>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
    >>> out, pullback = vjp(q, k, v, causal=True)
    >>> pullback(np.ones_like(out)).dv[0, :, 0, 0].round(4)
    array([2.0833, 1.0833, 0.5833, 0.25  ], dtype=float32)
    """
    if "out" in options:
        raise TypeError("out: got an array, expected none: the pullback keeps the result")
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    where = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) if packed else ()
    function, gradient = (attention_varlen, attention_varlen_backward) if packed else (attention, attention_backward)
    out, lse = function(q, k, v, *where, return_lse=True, **options)

    def pullback(dout: Any, dlse: Any = None) -> Gradients:
        result: Gradients = gradient(dout, q, k, v, out, lse, *where, dlse=dlse, **options)
        return result

    return ((out, lse) if return_lse else out), pullback


# Looking without running ----------------------------------------------------------------------------------------------


def explain(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    arch: str | None = None,
    backward: bool = False,
    **options: Any,
) -> Plan | BackwardPlan:
    """The plan that `attention`, or with cu_seqlens `attention_varlen`, would run for these arguments; launches nothing.

    arch: plan for a typical GPU of this architecture (a key of `cuattn.registry.DEVICES`) instead of the arrays' own device;
      needs no GPU.
    backward: the plan of the gradients instead, for contiguous dout, out and lse.
    Options are those of `attention`. Printable: `print(cuattn.explain(q, k, v, causal=True))`.
    """
    take = options.get
    mask = parse_mask(take("causal", False), take("window"), take("mask"))
    mods = parse_mods(take("softcap"), take("alibi_slopes"), take("bias"), take("score_mod"))
    named = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    named.update({name: take(name) for name in ("sinks", "q_lens", "kv_lens", "out")})
    library = library_of(q, "q")
    views = {name: library.view(x, name) for name, x in named.items() if x is not None}
    own = [*mask.arrays, *(a for mod in mods for a in mod.arrays)]
    scalars = call.Options(
        take("scale"),
        take("dropout", 0.0),
        take("precision", "ieee"),
        take("return_lse", False),
        max_seqlen_q,
        max_seqlen_k,
        False,
    )
    problem = call.problem_of(views, mask, mods, [library_of(x, "mask").view(x) for x in own], scalars)
    where = library.device(q, "q")
    device = DEVICES[arch] if arch is not None else call.device_of(where[1] if where[0] == "cuda" else 0)
    if not backward:
        return make_plan(problem, device)
    shape = (*views["q"].shape[:-1], problem.head_dim_v)
    out = View(0, shape, contiguous_strides(shape), problem.dtype)
    rows = (*shape[:-3], shape[-2], shape[-3])
    lse = View(0, rows, contiguous_strides(rows), problem.real)
    wanted = tuple(bool(mod.differentiable) for mod in mods)
    return make_backward_plan(make_backward_problem(problem, out, lse, None, out, wanted, take("deterministic", False)), device)


@dataclass(frozen=True)
class BackendInfo:
    """What a call on NumPy arrays would use, and why. Versions are None where the library is absent."""

    backend: str
    """cuda or numpy"""
    reason: str
    gpu: str | None
    compute_capability: str | None
    driver: str | None
    cupy: str | None
    nvrtc: str | None
    cache_dir: str
    cached_kernels: int

    def __str__(self) -> str:
        rows = [
            ("backend", f"{self.backend} ({self.reason})"),
            ("GPU", f"{self.gpu or 'none'}" + (f", compute capability {self.compute_capability}" if self.gpu else "")),
            ("driver", self.driver or "none"),
            ("CuPy", self.cupy or "not installed"),
            ("NVRTC", self.nvrtc or "not found"),
            ("cache", f"{self.cache_dir} ({self.cached_kernels} kernels)"),
        ]
        return "\n".join(f"{name:8} {value}" for name, value in rows)


def backend_info() -> BackendInfo:
    """Which backend computes NumPy arrays on this machine, with the versions that matter. Never raises for a missing GPU."""
    usable, reason = arrays.gpu_available()
    folder = jit.cache_folder()
    gpu = capability = driver = cupy_version = nvrtc_version = None
    with contextlib.suppress(Exception):
        import cupy

        cupy_version = cupy.__version__
        nvrtc_version = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    if usable:
        from cupy.cuda import runtime

        properties = runtime.getDeviceProperties(runtime.getDevice())
        gpu = properties["name"].decode()
        capability = f"{properties['major']}.{properties['minor']}"
        version = runtime.driverGetVersion()
        driver = f"CUDA {version // 1000}.{version % 1000 // 10}"
    return BackendInfo(
        "cuda" if usable else "numpy",
        reason,
        gpu,
        capability,
        driver,
        cupy_version,
        nvrtc_version,
        str(folder),
        len(list(folder.glob("*.cubin"))) if folder.is_dir() else 0,
    )
