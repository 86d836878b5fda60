"""PyTorch: gradients, autocast and torch.compile of the public verbs; PyTorch's own signature; Hugging Face transformers.

`attention` and `attention_varlen` are differentiable on tensors as they stand, whether or not this module was imported. An
eager call goes through one `torch.autograd.Function`. A call that torch.compile or torch.export traces becomes an operator,
`cuattn::attention`, that knows the shapes of its outputs and its gradient, the operator `cuattn::attention_backward`. Both ways
lead to `call.forward` and `call.backward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import forward_ad

from cuattn import call
from cuattn.api import attention, attention_varlen
from cuattn.formula import decode, encode
from cuattn.masks import Mask
from cuattn.problem import renamed
from cuattn.score_mods import Alibi, ScoreMod

__all__ = ["attention", "attention_varlen", "register_transformers", "scaled_dot_product_attention"]


# The signature of torch.nn.functional -----------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`: the same arguments, defaults and layout.

    query: (..., num_heads, seqlen_q, head_dim); key, value: (..., num_heads_kv, seqlen_k, head_dim or head_dim_v), any number
      of leading axes, none included. They are read in place, whatever their strides.
    attn_mask: broadcasts to (..., num_heads, seqlen_q, seqlen_k); boolean, True where a key is visible, or floating point,
      added to the scores and differentiable (its gradient is summed to the shape of the mask where it is computed).
    dropout_p: applied whenever it is above 0, as there; its seed comes from PyTorch's generator of the device.
    is_causal: top-left, key j is visible to query i iff j <= i; not together with attn_mask. scale: None is 1 / sqrt(head_dim).
    enable_gqa: allow fewer heads in key and value than in query.

    Returns (..., num_heads, seqlen_q, head_dim_v). A query that sees no key gives 0. Raises as `cuattn.attention` does.

    >>> x = torch.ones(1, 2, 4, 8)
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([1, 2, 4, 8])
    """
    causal = "top-left" if is_causal else False
    if attn_mask is None and not dropout_p and _plain(query, key, value):
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        try:
            return attention(q, k, v, causal=causal, scale=scale).transpose(1, 2)
        except (TypeError, ValueError):  # it is raised again below, by this function's names, unless broadcasting helps
            pass
    _check_sdpa(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    query, key, value = _broadcast(query, key, value)
    lead = query.shape[:-2]
    q, k, v = (last_axis_contiguous(_heads_last(x)) for x in (query, key, value))
    options: dict[str, Any] = {"causal": causal, "scale": scale}
    if attn_mask is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = _four_axes(attn_mask, lead, shape)
    if dropout_p:
        options.update(dropout=dropout_p, seed=draw_seed(query.device))
    try:
        out = attention(q, k, v, **options).transpose(1, 2)
    except (TypeError, ValueError) as error:
        raise renamed(error, SDPA_NAMES) from None
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


SDPA_NAMES = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask"}
"""What `attention` calls its arguments, and what they are called there."""


def _plain(query: Any, key: Any, value: Any) -> bool:
    """Four axes, as many heads of keys as of queries, contiguous rows: there is nothing to bring about."""
    if not (type(query) is type(key) is type(value) is torch.Tensor and query.ndim == key.ndim == value.ndim == 4):
        return False
    return bool(query.size(1) == key.size(1) and query.stride(3) == key.stride(3) == value.stride(3) == 1)


def _check_sdpa(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, enable_gqa: Any) -> None:
    """What `attention` would refuse under other names, or not at all."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor; cuattn.attention takes other arrays")
        if x.ndim < 2 or x.ndim != query.ndim:
            axes = "at least 2 axes" if x is query else f"{query.ndim} axes as query has"
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {axes}, (..., heads, seqlen, head_dim)")
        if x.device != query.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {query.device} as query: move it with .to()")
        if any([n != m and 1 not in (n, m) for n, m in zip(x.shape[:-3], query.shape[:-3], strict=True)]):
            expected = f"those that broadcast with {tuple(query.shape[:-3])} as query has"
            raise ValueError(f"{name}: got leading axes {tuple(x.shape[:-3])}, expected {expected}")
        if not enable_gqa and x.ndim > 2 and x.shape[-3] != query.shape[-3] and 1 not in (x.shape[-3], query.shape[-3]):
            found = f"{x.shape[-3]} heads beside {query.shape[-3]} of query"
            raise ValueError(f"{name}: got {found}, expected as many or 1, or enable_gqa=True and a divisor of them")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p!r}, expected a number p with 0 <= p < 1")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("is_causal: got True together with an attn_mask, expected one of them: put the triangle into the mask")
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask: got {type(attn_mask).__name__}, expected a torch.Tensor or None")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: got a tensor on {attn_mask.device}, expected {query.device} as query: move it with .to()")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: got {attn_mask.dtype}, expected bool (True = visible) or a floating-point dtype")


def _broadcast(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """The three with the same leading axes, as views. One head of both keys and values stays one, which all queries share."""
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    axes = [list(x.shape[-3:]) for x in (query, key, value)]
    if query.ndim > 2:
        q, k, v = axes
        k[0], v[0] = (max(k[0], v[0]) if 1 in (k[0], v[0]) else x[0] for x in (k, v))
        q[0] = k[0] if q[0] == 1 else q[0]
    expanded = (x.expand(*lead, *own) for x, own in zip((query, key, value), axes, strict=True))
    return tuple(expanded)


def _heads_last(x: Any) -> Any:
    """(..., heads, seqlen, head_dim) as (batch, seqlen, heads, head_dim); a view, unless several batch axes do not fold."""
    if x.ndim == 2:
        return x[None, :, None]
    if x.ndim == 3:
        return x.transpose(0, 1)[None]
    return (x if x.ndim == 4 else x.flatten(0, -4)).transpose(1, 2)


def _four_axes(mask: Any, lead: tuple[int, ...], shape: tuple[int, int, int, int]) -> Any:
    """A mask that broadcasts to (*lead, seqlen_q, seqlen_k), as one that broadcasts to `shape`, the same with four axes."""
    full = (*lead, *shape[2:])
    padded = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    if mask.ndim > len(full) or any([n not in (1, m) for n, m in zip(padded, full, strict=True)]):
        raise ValueError(f"attn_mask: got shape {tuple(mask.shape)}, expected one that broadcasts to {tuple(full)}")
    if len(full) > 4:
        mask = mask.expand(*full[:-3], *padded[-3:]).flatten(0, -4)
    return mask.contiguous() if mask.ndim and mask.stride(-1) not in (0, 1) else mask


def last_axis_contiguous(x: Any) -> Any:
    """The tensor itself, or a copy where its last axis has gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def draw_seed(device: Any) -> int:
    """A seed for dropout from PyTorch's default generator of a device, which moves on: `torch.manual_seed` repeats it.

    Waits for no GPU. Raises NotImplementedError while a CUDA graph is captured, which would replay one pattern for ever.
    """
    if device.type != "cuda":
        return int(torch.randint(2**63 - 1, ()).item())
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("dropout: a captured CUDA graph would repeat one pattern; capture with dropout 0")
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # the generator counts in steps of four
    return int((generator.initial_seed() + 0x9E3779B97F4A7C15 * (offset // 4)) % 2**64)


# Hugging Face transformers ----------------------------------------------------------------------------------------------


def register_transformers(name: str = "cuattn") -> None:
    """Make cuattn an attention implementation of Hugging Face transformers (4.53 or newer).

        cuattn.torch.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="cuattn")

    Grouped heads, sliding windows, softcap, sinks, position biases with their gradient, dropout, padding, static and sliding
    caches work. Plain causal and sliding-window masks are never materialised, padding costs one byte a token; every other
    pattern (packed documents, blocks, custom masks) comes as the boolean mask that "sdpa" would get. A layer with a sliding
    window must hand `sliding_window` to its attention function, as "flash_attention_2" needs it too.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, transformers_attention)
    AttentionMaskInterface.register(name, transformers_mask)


def transformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **more: Any,
) -> Any:
    """The mask that layers of a model receive.

    None or a uint8 (batch, 1, 1, kv_length) of padding: the layer's own causal band and window are to be applied as well. A
    boolean (batch, 1, q_length, kv_length) is the whole mask.
    """
    from transformers.masking_utils import sdpa_mask

    band = allow_is_causal_skip and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if local_size is not None:
        band = band and getattr(config, "sliding_window", None) == local_size
        band = band and getattr(config, "attention_chunk_size", None) is None
    if not band:
        more["mask_function"] = mask_function
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            **more,
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    if padding.shape[1] < kv_length:
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    reads = not torch.compiler.is_compiling() and not (padding.is_cuda and torch.cuda.is_current_stream_capturing())
    if reads and bool(padding.all()):
        return None
    return padding[:, None, None].to(torch.uint8)


def transformers_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    cache: Any = None,
    **more: Any,
) -> tuple[Any, None]:
    """One layer: query (batch, heads, seqlen_q, head_dim) to (batch, seqlen_q, heads, head_dim_v), and None for the weights."""
    if cache is not None:
        raise NotImplementedError(
            "cache: paged caches of transformers' continuous batching are not supported, use 'paged|eager'"
        )
    if more.get("output_attentions"):
        raise NotImplementedError("output_attentions: attention weights are never stored; use attn_implementation='eager'")
    q, k, v = (last_axis_contiguous(x.transpose(1, 2)) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    bias, shape = position_bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    band = attention_mask is None or attention_mask.dtype == torch.uint8
    if band and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        options.update({"causal": True} if sliding_window is None else {"window": (sliding_window - 1, 0)})
    if attention_mask is not None and attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    elif attention_mask is not None:
        options["mask"] = _four_axes_named("attention_mask", attention_mask, shape)
    if bias is not None:
        options["bias"] = _four_axes_named("attention_mask" if position_bias is None else "position_bias", bias, shape)
    if dropout:
        options.update(dropout=dropout, seed=draw_seed(query.device))
    return attention(q, k, v, **options), None


def _four_axes_named(name: str, mask: Any, shape: tuple[int, int, int, int]) -> Any:
    if mask.ndim != 4 or any([n not in (1, m) for n, m in zip(mask.shape, shape, strict=True)]):
        way_out = "pass the 2-D (batch, kv_length) mask and let the model build this one"
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected one that broadcasts to {tuple(shape)}; {way_out}")
    return mask.contiguous() if mask.stride(-1) not in (0, 1) else mask


# Eager calls ----------------------------------------------------------------------------------------------------------


def record(arguments: call.Call, needs_grad: bool) -> Any:
    """`call.execute`, under autocast and autograd.

    Returns out, or (out, lse); both are differentiable with respect to q, k, v, sinks and the differentiable arrays of the
    modifications. Autocast casts q, k and v as it does for PyTorch's own attention. Raises ValueError for `out` in a call to be
    differentiated, NotImplementedError for an array that requires grad but has none and inside a transform of torch.func.
    """
    casts = _casts(arguments.present)
    if casts:
        arguments = arguments.over({**arguments.present, **casts})
    if not needs_grad:
        return call.execute(arguments)
    present, mods = arguments.present, arguments.mods
    if forward_ad._current_level >= 0:
        _check_forward_mode(present, mods)
    _check_differentiable(present.get("out"), mods)
    check_transforms()
    inputs = [present.get(name) for name in ("q", "k", "v", "sinks")]
    if mods:
        inputs += [mod.arrays[n] for mod in mods for n in mod.differentiable]
    return _apply(arguments, *inputs)


def check_transforms() -> None:
    """Raise inside a transform of torch.func, whose tensors have no memory of their own."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("cuattn: transforms of torch.func (grad, vmap, ...) are not supported, use torch.autograd")


CASTABLE = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that autocast changes."""


def _casts(named: Mapping[str, Any]) -> dict[str, Any]:
    """Those of q, k and v that autocast wants in another dtype, cast to it."""
    kind = "cuda" if named["q"].is_cuda else named["q"].device.type
    if not torch.is_autocast_enabled(kind):
        return {}
    dtype = torch.get_autocast_dtype(kind)
    tensors = {name: named[name] for name in ("q", "k", "v") if isinstance(named.get(name), torch.Tensor)}
    return {name: x.to(dtype) for name, x in tensors.items() if x.dtype in CASTABLE and x.dtype != dtype}


def _needs_gradient(named: Mapping[str, Any], mods: tuple[ScoreMod, ...]) -> bool:
    return torch.is_grad_enabled() and any([getattr(x, "requires_grad", False) for x in _inputs(named, mods)])


def _inputs(named: Mapping[str, Any], mods: tuple[ScoreMod, ...]) -> list[Any]:
    """What a derivative could be asked for."""
    inputs = [named.get(name) for name in ("q", "k", "v", "sinks")]
    if mods:
        inputs += [x for mod in mods for x in mod.arrays]
    return inputs


def _check_differentiable(out: Any, mods: tuple[ScoreMod, ...]) -> None:
    """Refuse what autograd cannot record, and tensors that would silently get no gradient."""
    if out is not None:
        raise ValueError("out: got a tensor in a call with inputs that require grad, expected None (or a call under no_grad())")
    for mod in mods:
        for n, x in enumerate(mod.arrays):
            if getattr(x, "requires_grad", False) and n not in mod.differentiable:
                name = "alibi_slopes" if isinstance(mod, Alibi) else f"array {n} of the score_mod"
                raise NotImplementedError(f"{name}: got a tensor that requires grad, but has no gradient here. Detach it")


def _check_forward_mode(named: Mapping[str, Any], mods: tuple[ScoreMod, ...]) -> None:
    for x in _inputs(named, mods):
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("cuattn: forward-mode differentiation (jvp) is not supported")


class _Described(NamedTuple):
    """What a mask or modification may ask of an array that it is not bound to yet, and which array it is."""

    shape: tuple[int, ...]
    dtype: Any
    position: int

    @staticmethod
    def of(own: Sequence[Any]) -> list[_Described]:
        return [_Described(tuple(x.shape), x.dtype, n) for n, x in enumerate(own)]


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """out, or (out, lse), as autograd sees them: of q, k, v, sinks and the differentiable arrays of the modifications."""

    @staticmethod
    def forward(ctx: Any, arguments: call.Call, *_: Any) -> Any:
        """The tensors that follow `arguments` are among them. Grad mode is off in here."""
        present, mask, mods, own, options, seed = arguments[2:8]
        out, lse = call.execute(arguments.with_lse())
        # Every array is saved, so that autograd notices when one changes in place; nothing else keeps them alive.
        ctx.save_for_backward(*present.values(), out, lse, *own)
        if own:
            mask, mods = call.bind(mask, mods, _Described.of(own))
        ctx.rest = (*present, "out", "lse"), mask, mods, options, seed
        ctx.set_materialize_grads(False)
        return (out, lse) if options.return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        if dout is None and dlse is None:
            return (None,) * (1 + len(needed))
        saved, (names, mask, mods, options, seed) = ctx.saved_tensors, ctx.rest
        named = dict(zip(names, saved, strict=False))
        if len(saved) > len(named):
            mask, mods = call.bind(mask, mods, saved[len(named) :])
        if not torch.is_grad_enabled():
            return (None, *_gradients(dout, dlse, named, mask, mods, options, seed, needed))
        with torch.no_grad():  # create_graph=True: all that is recorded of the gradients is that they are final
            gradients = _gradients(dout, dlse, named, mask, mods, options, seed, needed)
        return (None, *_Final.apply(gradients, dout, dlse, *saved))


_apply = super(torch.autograd.Function, _Attention).apply
"""Function.apply without what it does for transforms of torch.func, which are refused before."""


class _Final(torch.autograd.Function):  # type: ignore[misc]
    """Gradients that depend on `inputs` in a way that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Any], *inputs: Any) -> tuple[Any, ...]:
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _no_second_derivative(ctx, *cotangents)


def _no_second_derivative(ctx: Any, *cotangents: Any) -> Any:
    raise NotImplementedError("cuattn: a gradient of attention cannot be differentiated again (double backward)")


def _gradients(
    dout: Any,
    dlse: Any,
    named: dict[str, Any],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    options: call.Options,
    seed: int,
    needed: Sequence[bool],
) -> list[Any]:
    """Gradients of q, k, v, sinks and the differentiable arrays of `mods`, in this order; None where not needed.

    named: the call's arrays with its out and lse; to be given away. dout and dlse, of their shapes: not both None, which stands
      for zeros.
    """
    out = named["out"]
    if dout is None:
        dout = out.new_zeros(out.shape[-1:]).expand(out.shape)
    named["dout"] = _readable(dout)
    if dlse is not None:
        named["dlse"] = dlse
    if not options.deterministic and torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    wanted: list[bool] = []
    if mods:
        flags = iter(needed[4:])
        wanted = [any([next(flags) for _ in mod.differentiable]) for mod in mods]
    dq, dk, dv, dmods, dsinks = call.backward(named, mask, mods, options, seed, tuple(wanted))
    gradients = [dq, dk, dv, dsinks]
    for mod, own in zip(mods, dmods, strict=True):
        gradients += own or (None,) * len(mod.differentiable)
    return [x if need else None for x, need in zip(gradients, needed, strict=True)]


def _readable(x: Any) -> Any:
    """A cotangent with a contiguous last axis; other axes along which it is broadcast, as a sum's is, stay so."""
    if x.stride(-1) == 1 and not x.is_neg():
        return x
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:-1])
    return x[once].resolve_conj().resolve_neg().contiguous().expand(x.shape)


# Operators ------------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The arguments of `cuattn::attention`, in order; the last ones of `cuattn::attention_backward` too."""

    q: Any
    k: Any
    v: Any
    sinks: Any
    q_lens: Any
    kv_lens: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    own: list[Any]
    """the arrays of the mask and of the modifications"""
    formula: str
    """mask and modifications without their arrays, written by `encode`"""
    scale: float | None
    dropout: float
    precision: str
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    deterministic: bool
    seed: int
    """as a signed integer of 64 bits"""

    def parts(self) -> tuple[dict[str, Any], Mask, tuple[ScoreMod, ...], call.Options, int]:
        """The arguments of `call.forward`."""
        named = {name: x for name, x in zip(_NAMES, self[: len(_NAMES)], strict=True) if x is not None}
        mask, *mods = decode(self.formula, self.own)
        lengths = (self.max_seqlen_q, self.max_seqlen_k)
        options = call.Options(self.scale, self.dropout, self.precision, True, *lengths, self.deterministic)
        return named, mask, tuple(mods), options, self.seed % 2**64

    def differentiable(self) -> list[int]:
        """Positions in `own` of the arrays that have a gradient."""
        _, *mods = decode(self.formula, _Described.of(self.own))
        return [mod.arrays[n].position for mod in mods for n in mod.differentiable]


_NAMES = _Call._fields[:8]
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? q_lens, Tensor? kv_lens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor[] own, str formula, float? scale, float dropout, str precision, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "bool deterministic, SymInt seed"
)


def _attention(*arguments: Any) -> tuple[Any, Any]:
    out, lse = call.forward(*_Call(*arguments).parts())
    return out, lse


def _attention_fake(*arguments: Any) -> tuple[Any, Any]:
    """Outputs without contents, while a call is traced."""
    q, v = arguments[0], arguments[2]
    *batch, tokens, heads, _ = q.shape
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty((*batch, heads, tokens), dtype=statistics)


def _attention_backward(dout: Any, dlse: Any, out: Any, lse: Any, needed: list[bool], *arguments: Any) -> list[Any]:
    """Those gradients, in the order of `_gradients`, that are needed."""
    named, mask, mods, options, seed = _Call(*arguments).parts()
    gradients = _gradients(dout, dlse, {**named, "out": out, "lse": lse}, mask, mods, options, seed, needed)
    return [x.contiguous() for x in gradients if x is not None]


def _attention_backward_fake(dout: Any, dlse: Any, out: Any, lse: Any, needed: list[bool], *arguments: Any) -> list[Any]:
    call_ = _Call(*arguments)
    inputs = [*call_[:4], *(call_.own[n] for n in call_.differentiable())]
    return [x.new_empty(x.shape) for x, need in zip(inputs, needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    call_ = _Call(*inputs)
    ctx.save_for_backward(*call_[: len(_NAMES)], *call_.own, *output)
    ctx.scalars = call_[len(_NAMES) + 1 :]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    """One gradient or None for each argument of `cuattn::attention`."""
    *inputs, out, lse = ctx.saved_tensors
    call_ = _Call._make([*inputs[: len(_NAMES)], inputs[len(_NAMES) :], *ctx.scalars])
    positions, needs = call_.differentiable(), ctx.needs_input_grad
    needed = [*needs[:4], *(needs[len(_NAMES)][n] for n in positions)]
    if dout is None and dlse is None:
        needed = [False] * len(needed)
    found = iter(_BACKWARD(dout, dlse, out, lse, needed, *call_) if any(needed) else ())
    gradients = [next(found) if need else None for need in needed]
    own: list[Any] = [None] * len(call_.own)
    for n, x in zip(positions, gradients[4:], strict=True):
        own[n] = x
    return (*gradients[:4], *(None,) * (len(_NAMES) - 4), own, *(None,) * len(ctx.scalars))


_library = torch.library.Library("cuattn", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_COTANGENTS = "Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needed"
_library.define(f"attention({_SCHEMA}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(f"attention_backward({_COTANGENTS}, {_SCHEMA}) -> Tensor[]", tags=_TAGS)
for _name, _real, _fake, _gradient, _setup in (
    ("attention", _attention, _attention_fake, _differentiate, _setup_context),
    ("attention_backward", _attention_backward, _attention_backward_fake, _no_second_derivative, None),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cuattn::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"cuattn::{_name}", _gradient, setup_context=_setup, lib=_library)
_FORWARD, _BACKWARD = torch.ops.cuattn.attention.default, torch.ops.cuattn.attention_backward.default


# Traced calls: Python that torch.compile reads, from the public verb down to `encode` ---------------------------------


def trace(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: call.Options, seed: int) -> Any:
    """`call.forward` while torch.compile or torch.export traces it: one operator, with autocast's casts before it."""
    if seed < 0 or seed >= 2**64:
        raise ValueError("seed: expected 0 <= seed < 2^64")
    out = named.get("out")
    if _needs_gradient(named, mods):
        _check_differentiable(out, mods)
    if forward_ad._current_level >= 0:
        raise NotImplementedError("cuattn: forward-mode differentiation (jvp) is not supported")
    result, lse = _FORWARD(*_arguments({**named, **_casts(named)}, mask, mods, options, seed))
    if out is not None:
        if out.shape != result.shape or out.dtype != result.dtype:
            raise ValueError("out: got another shape or dtype than the result's")
        result = out.copy_(result)
    return (result, lse) if options.return_lse else result


def trace_backward(
    named: dict[str, Any],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    options: call.Options,
    seed: int,
    wanted: tuple[bool, ...] | None = None,
) -> call.Raw:
    """`call.backward` while torch.compile or torch.export traces it."""
    sinks = named.get("sinks")
    wanted = tuple([True for _ in mods]) if wanted is None else wanted
    counts = [len(mod.differentiable) for mod in mods]
    needed = [True, True, True, sinks is not None]
    for count, want in zip(counts, wanted, strict=True):
        needed += [want] * count
    cotangents = (named["dout"], named.get("dlse"), named["out"], named["lse"])
    found = _BACKWARD(*cotangents, needed, *_arguments(named, mask, mods, options, seed))
    start, dmods = 4 if sinks is not None else 3, []
    for count, want in zip(counts, wanted, strict=True):
        dmods.append(tuple(found[start : start + count * want]))
        start += count * want
    return call.Raw(found[0], found[1], found[2], tuple(dmods), found[3] if sinks is not None else None)


def _arguments(
    named: Mapping[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: call.Options, seed: int
) -> tuple[Any, ...]:
    """The arguments of `cuattn::attention`, as `_Call` lists them."""
    own: list[Any] = []
    formula = encode((mask, *mods), own)
    device = named["q"].device
    return (
        *[named.get(name) for name in _NAMES],
        [torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for x in own],
        formula,
        options.scale,
        options.dropout,
        options.precision,
        options.max_seqlen_q,
        options.max_seqlen_k,
        options.deterministic,
        seed if seed < 2**63 else seed - 2**64,
    )
