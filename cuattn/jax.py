"""JAX: the public verbs inside jit, grad, vmap and shard_map.

    out = jax.jit(cuattn.jax.attention, static_argnames="causal")(q, k, v, causal=True)

A call becomes one typed foreign function call (`jax.ffi`): on a GPU its handler launches the kernels on XLA's own stream and
over XLA's own buffers, nothing is copied; on the CPU it runs the NumPy backend. Gradients are a custom_vjp, for those
arguments alone that are differentiated. Under vmap a dense call folds the mapped axis into the batch where that is exact, and
runs once for each element otherwise. Under shard_map each shard is a call of its own; under plain jit XLA gathers sharded
arguments first, as it does for every foreign call.
"""

from __future__ import annotations

import ast
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from cuattn import arrays, call, xla
from cuattn.arrays import Library, View, contiguous_strides
from cuattn.fields import ITEMSIZE
from cuattn.formula import decode, encode
from cuattn.masks import And, BlockSparse, BooleanMask, Mask, SlidingWindow
from cuattn.problem import parse_mask, parse_mods, renamed
from cuattn.score_mods import Alibi, Bias, ScoreMod, UserMod

__all__ = ["attention", "attention_varlen", "dot_product_attention"]

TARGET = "cuattn"


# Public verbs ---------------------------------------------------------------------------------------------------------


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
    seed: Any = 0,
    deterministic: bool = False,
    precision: str = "ieee",
    return_lse: bool = False,
) -> Any:
    """`cuattn.attention` for JAX arrays, traced or not: the same arguments and results, without `out`.

    Differentiable in reverse mode with respect to q, k, v, bias, sinks and the float vectors of a `UserMod` that have an entry
    in `param_gradients`; out and lse are both differentiable. A gradient by anything else raises NotImplementedError.
    seed: an integer, or inside jit an integer scalar array; on a GPU that one is read back, which waits for the stream.
    NumPy arrays are accepted where JAX would take them; float64 needs `jax_enable_x64`.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> dv = jax.jit(jax.grad(lambda v: attention(x, x, v, causal=True).sum()))(x)
    >>> np.asarray(dv)[0, :, 0, 0].round(4)
    array([2.0833, 1.0833, 0.5833, 0.25  ], dtype=float32)
    """
    named = {"q": q, "k": k, "v": v, "sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens}
    return _call(
        named,
        parse_mask(causal, window, _arrays_of_jax(mask)),
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
    seed: Any = 0,
    deterministic: bool = False,
    precision: str = "ieee",
    return_lse: bool = False,
) -> Any:
    """`cuattn.attention_varlen` for JAX arrays, traced or not; as `attention` above. The two longest lengths are static.

    >>> x, cu_seqlens = jnp.ones((5, 2, 8)), jnp.array([0, 2, 5])
    >>> jax.jit(attention_varlen, static_argnums=(5, 6))(x, x, x, cu_seqlens, cu_seqlens, 3, 3).shape
    (5, 2, 8)
    """
    named = {"q": q, "k": k, "v": v, "sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens}
    for name, cumulative in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cumulative is None:
            raise TypeError(f"{name}: got None, expected an int32 array of shape (batch + 1,)")
    return _call(
        {**named, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        parse_mask(causal, window, _arrays_of_jax(mask)),
        parse_mods(softcap, alibi_slopes, bias, score_mod),
        call.Options(scale, dropout, precision, return_lse, max_seqlen_q, max_seqlen_k, deterministic),
        seed,
    )


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Any = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`: the same arguments, defaults and layout.

    query: (B, T, N, H) or (T, N, H); key, value: (B, S, K, H) or (S, K, H), N a multiple of K. bias, mask: broadcast to (B, N,
      T, S); mask is boolean, True where a key is visible. is_causal: top-left, j <= i. local_window_size: n or (left, right)
      keys around position i. query_seq_lengths, key_value_seq_lengths: (B,) int32.
    implementation: accepted without effect.

    Returns (..., T, N, H), with return_residual also the logarithm of the sum of exponentials (..., T, N), float32 for 16-bit
    inputs and differentiable. A query that sees no key gives 0, where jax.nn gives the mean of all values; there the residual
    has the dtype of the inputs and no gradient.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 4, 2, 8)
    """
    parts: list[Mask] = [] if mask is None else [BooleanMask(_array("mask", mask))]
    if is_causal:
        parts.append(SlidingWindow(None, 0, True))
    if local_window_size is not None:
        pair = tuple(local_window_size) if isinstance(local_window_size, (tuple, list)) else (local_window_size,) * 2
        if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in pair):
            raise ValueError(f"local_window_size: got {local_window_size!r}, expected n or (left, right), none below 0")
        parts.append(SlidingWindow(*pair, True))
    lengths = {"q_lens": query_seq_lengths, "kv_lens": key_value_seq_lengths}
    try:
        result = attention(query, key, value, scale=scale, mask=And.of(parts), bias=bias, return_lse=return_residual, **lengths)
    except (TypeError, ValueError) as error:
        raise renamed(error, JAX_NAMES) from None
    return (result[0], jnp.swapaxes(result[1], -1, -2)) if return_residual else result


JAX_NAMES = {"q": "query", "k": "key", "v": "value", "q_lens": "query_seq_lengths", "kv_lens": "key_value_seq_lengths"}
"""What `attention` calls its arguments, and what jax.nn calls them."""


def _array(name: str, x: Any) -> Any:
    """x as a JAX array. TypeError for another library's, ValueError where JAX would silently round it."""
    if isinstance(x, jax.Array):
        return x
    if not isinstance(x, (np.ndarray, np.generic)):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise TypeError(
            f"{name}: got {kind}, expected a JAX or NumPy array; cuattn.attention takes the arrays of other libraries"
        )
    if x.dtype == np.float64 and not jax.config.jax_enable_x64:
        way_out = "jax.config.update('jax_enable_x64', True), or pass float32"
        raise ValueError(f"{name}: got a float64 NumPy array, which JAX would round to float32; call {way_out}")
    return jnp.asarray(x)


def _arrays_of_jax(mask: Any) -> Any:
    return _array("mask", mask) if isinstance(mask, np.ndarray) else mask


# A call as one program ------------------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """Everything about a call but its arrays. As text it is part of the compiled program, and valid in any process."""

    formula: str
    """mask and modifications without their arrays (cuattn/formula.py)"""
    options: tuple[Any, ...]
    """`call.Options`"""
    seed: int | None
    """None: the last array"""
    names: tuple[str, ...]
    """of the first arrays; those of the mask and of the modifications follow"""


class _Aval(NamedTuple):
    shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(x: Any) -> _Aval:
        return _Aval(tuple(x.shape), np.dtype(x.dtype).name)

    def at(self, address: int) -> View:
        return _view(View, (address, self.shape, _strides(self.shape), self.dtype))

    def on_host(self, address: int) -> Any:
        """A NumPy array over memory of the CPU."""
        dtype = arrays.numpy_dtype(self.dtype)
        size = math.prod(self.shape) * dtype.itemsize
        if not size:
            return np.empty(self.shape, dtype)
        return np.frombuffer(_bytes(size).from_address(address), dtype).reshape(self.shape)

    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, arrays.numpy_dtype(self.dtype))


_view = tuple.__new__  # half the time of View(...): that one packs its arguments twice
_strides = functools.lru_cache(4096)(contiguous_strides)


@functools.lru_cache(4096)
def _bytes(size: int) -> Any:
    import ctypes

    return ctypes.c_char * size


def _call(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: call.Options, seed: Any) -> Any:
    present = {name: _array(name, x) for name, x in named.items() if x is not None}
    own: list[Any] = []
    formula = encode((mask, *mods), own)
    labels = _labels(mask, mods)
    own = [_array(label, x) for label, x in zip(labels, own, strict=True)]
    _check(present, formula, own, options)
    flat = [*present.values(), *own]
    if isinstance(seed, (jax.Array, np.ndarray)):
        if seed.shape or not jnp.issubdtype(seed.dtype, jnp.integer):
            raise TypeError(f"seed: got {seed.dtype} of shape {seed.shape}, expected an integer or a scalar array of integers")
        flat.append(jnp.asarray(seed))
        number = None
    else:
        number = call._seed(seed)
    signature = Signature(formula, tuple(options), number, tuple(present))
    results = _attend(signature, *_all_varying(flat))
    return results if options.return_lse else results[0]


def _all_varying(flat: Sequence[Any], like: Sequence[Any] = ()) -> list[Any]:
    """Inside shard_map, arrays as varying over every mesh axis over which one of them or of `like` varies.

    That is the rule of JAX's own operations. The gradient of an array that all shards share is then summed over them.
    """
    axes: frozenset[str] = frozenset().union(*map(_varying_axes, (*flat, *like)))
    return [_vary(x, axes - _varying_axes(x)) for x in flat] if axes else list(flat)


def _varying_axes(x: Any) -> frozenset[str]:
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    axes: frozenset[str] = getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    return axes


def _vary(x: Any, axes: frozenset[str]) -> Any:
    if not axes:
        return x
    names = tuple(sorted(axes))
    return jax.lax.pcast(x, names, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, names)


def _labels(mask: Mask, mods: tuple[ScoreMod, ...]) -> list[str]:
    """The argument by which each array of the mask and of the modifications came."""
    labels = ["mask"] * len(mask.arrays)
    for mod in mods:
        labels += [{Alibi: "alibi_slopes", Bias: "bias"}.get(type(mod), "score_mod")] * len(mod.arrays)
    return labels


def _check(present: dict[str, Any], formula: str, own: Sequence[Any], options: call.Options) -> None:
    """Raise for a call that breaks the contract, while it is traced."""
    views = {name: _Aval.of(x).at(0) for name, x in present.items()}
    own_views = [_Aval.of(x).at(0) for x in own]
    mask, *mods = decode(formula, own_views)
    call.problem_of(views, mask, tuple(mods), own_views, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(signature: Signature, *flat: Any) -> Any:
    """(out,), or (out, lse) with return_lse."""
    return _batchable(_Forward(signature, tuple(map(_Aval.of, flat))))(*flat)


class _Static:
    """A value that JAX carries along without looking inside."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


jax.tree_util.register_static(_Static)


def _attend_forward(signature: Signature, *primals: Any) -> Any:
    """Results, and what the backward needs: the arrays, out, lse and which of the arrays are differentiated."""
    flat = [x.value for x in primals]
    perturbed = tuple([bool(x.perturbed) for x in primals])
    program = _Forward(signature, tuple(map(_Aval.of, flat)))
    for name, x, wanted, can in zip(program.labels, flat, perturbed, program.differentiable, strict=True):
        if wanted and not can and jnp.issubdtype(x.dtype, jnp.floating):
            raise NotImplementedError(f"{name}: has no gradient here; wrap it in jax.lax.stop_gradient")
    both = signature._replace(options=tuple(call.Options(*signature.options)._replace(return_lse=True)))
    out, lse = _final(_batchable(_Forward(both, program.avals)))(*flat)
    results = (out, lse) if call.Options(*signature.options).return_lse else (out,)
    return results, (tuple(flat), out, lse, _Static(perturbed))


def _attend_backward(signature: Signature, saved: Any, cotangents: Any) -> Any:
    flat, out, lse, perturbed = saved
    forward = _Forward(signature, tuple(map(_Aval.of, flat)))
    dout, dlse = cotangents[0], cotangents[1] if len(cotangents) > 1 else None
    zero = [x is None or isinstance(x, SymbolicZero) for x in (dout, dlse)]
    if all(zero):
        return (None,) * len(flat)
    dout = jnp.zeros(out.shape, out.dtype) if zero[0] else dout
    extra = {"out": out, "lse": lse, "dout": dout} | ({} if zero[1] else {"dlse": dlse})
    avals = (*forward.avals, *map(_Aval.of, extra.values()))
    program = _Backward(signature, avals, tuple(extra), forward.wanted(perturbed.value))
    gradients = dict(zip(program.targets, _final(_batchable(program))(*flat, *extra.values()), strict=True))
    return tuple(gradients.get(n) if want else None for n, want in enumerate(perturbed.value))


def _final(function: Any) -> Any:
    """A function whose derivative is refused by its name instead of XLA's."""
    final = jax.custom_jvp(function)

    @final.defjvp  # type: ignore[untyped-decorator]
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError("cuattn: a gradient of attention cannot be differentiated again (double backward)")

    return final


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


# The two programs -----------------------------------------------------------------------------------------------------


class _Program:
    """What XLA calls: a signature and the shapes of its arrays. `text` says it all."""

    kind = ""

    def __init__(
        self, signature: Signature, avals: tuple[_Aval, ...], extra: tuple[str, ...] = (), wanted: tuple[bool, ...] = ()
    ) -> None:
        """extra: names of the last arrays, which are not the call's own. wanted: by modification, whether gradients are."""
        self.signature, self.avals, self.extra_names, self.wanted_mods = signature, avals, extra, wanted
        self.text = repr((self.kind, tuple(signature), tuple(map(tuple, avals)), extra, wanted))
        self._hash = hash(self.text)
        self.ready: dict[tuple[int, ...], _Ready] = {}
        """by GPU and alignments of the arrays"""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.text == other.text

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def named_count(self) -> int:
        return len(self.signature.names)

    @functools.cached_property
    def own_avals(self) -> tuple[_Aval, ...]:
        stop = len(self.avals) - len(self.extra_names) - (self.signature.seed is None)
        return self.avals[self.named_count : stop]

    @functools.cached_property
    def parts(self) -> tuple[Mask, tuple[ScoreMod, ...]]:
        """Mask and modifications over descriptions of their arrays."""
        mask, *mods = decode(self.signature.formula, [aval.at(0) for aval in self.own_avals])
        return mask, tuple(mods)

    @functools.cached_property
    def options(self) -> call.Options:
        return call.Options(*self.signature.options)

    @functools.cached_property
    def labels(self) -> list[str]:
        """The argument that each array belongs to."""
        mask, mods = self.parts
        seed = ["seed"] if self.signature.seed is None else []
        return [*self.signature.names, *_labels(mask, mods), *seed, *self.extra_names]

    @functools.cached_property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.signature.names

    @property
    def results(self) -> tuple[_Aval, ...]:
        raise NotImplementedError

    def prepare(self, views: Sequence[View], device: arrays.Device) -> call.Prepared:
        """Steps 2 to 4, for arrays that lie as these do."""
        raise NotImplementedError

    def words(self, addresses: Sequence[int], seed: int) -> list[int]:
        """What a call brings, in the order of `call.Layout`."""
        raise NotImplementedError

    def on_host(self, values: Sequence[Any], results: Sequence[Any], seed: int) -> None:
        """Compute over memory of the CPU."""
        raise NotImplementedError

    def call_over(self, library: Library, device: arrays.Device, values: Sequence[Any], seed: int) -> call.Call:
        """The call of cuattn/call.py over arrays of a library."""
        own = tuple(values[self.named_count : self.named_count + len(self.own_avals)])
        named = dict(zip(self.signature.names, values, strict=False))
        named.update(zip(self.extra_names, values[len(values) - len(self.extra_names) :], strict=True))
        mask, mods = self.parts
        if own:
            mask, mods = call.bind(mask, mods, own)
        return call.Call(library, device, named, mask, mods, own, self.options, seed)

    def seed_position(self) -> int:
        return self.named_count + len(self.own_avals)

    @functools.cached_property
    def order(self) -> list[int]:
        """Positions of the arrays in the order in which `call_over` lists them: those with names before the others."""
        count = len(self.avals)
        return [
            *range(self.named_count),
            *range(count - len(self.extra_names), count),
            *range(self.named_count, self.seed_position()),
        ]


class _Forward(_Program):
    kind = "forward"

    @functools.cached_property
    def results(self) -> tuple[_Aval, ...]:
        (q, dtype), v = self.avals[0], self.avals[2]
        out = _Aval((*q[:-1], v.shape[-1]), dtype)
        *batch, tokens, heads, _ = q
        lse = _Aval((*batch, heads, tokens), "float64" if dtype == "float64" else "float32")
        return (out, lse) if self.options.return_lse else (out,)

    @functools.cached_property
    def differentiable(self) -> list[bool]:
        """By array."""
        mask, mods = self.parts
        named = [name in ("q", "k", "v", "sinks") for name in self.signature.names]
        own = [False] * len(mask.arrays)
        for mod in mods:
            own += [n in mod.differentiable for n in range(len(mod.arrays))]
        return [*named, *own, *[False] * (self.signature.seed is None)]

    def wanted(self, perturbed: tuple[bool, ...]) -> tuple[bool, ...]:
        """By modification, whether one of its arrays is differentiated."""
        mask, mods = self.parts
        start, wanted = self.named_count + len(mask.arrays), []
        for mod in mods:
            wanted.append(any(perturbed[start + n] for n in mod.differentiable))
            start += len(mod.arrays)
        return tuple(wanted)

    def prepare(self, views: Sequence[View], device: arrays.Device) -> call.Prepared:
        return call.prepare(self.call_over(_VIEWS, device, views, 0))

    def words(self, addresses: Sequence[int], seed: int) -> list[int]:
        return [*[addresses[n] for n in self.order], seed, next(call.numbers)]

    def on_host(self, values: Sequence[Any], results: Sequence[Any], seed: int) -> None:
        request = self.call_over(arrays.NUMPY, arrays.CPU, values, seed)
        request.present["out"] = results[0]
        found = call._on_cpu(request)
        if self.options.return_lse:
            results[1][...] = found[1]


class _Backward(_Program):
    kind = "backward"

    @functools.cached_property
    def targets(self) -> list[int]:
        """Positions of the arrays whose gradients are the results, in order: q, k, v, sinks, the bias, user parameters."""
        mask, mods = self.parts
        targets = [self.signature.names.index(n) for n in ("q", "k", "v", "sinks") if n in self.signature.names]
        bias: list[int] = []
        parameters: list[int] = []
        start = self.named_count + len(mask.arrays)
        for mod, want in zip(mods, self.wanted_mods, strict=True):
            positions = [start + n for n in mod.differentiable if want]
            (bias if isinstance(mod, Bias) else parameters).extend(positions)
            start += len(mod.arrays)
        return [*targets, *bias, *parameters]

    @functools.cached_property
    def results(self) -> tuple[_Aval, ...]:
        return tuple(self.avals[n] for n in self.targets)

    def prepare(self, views: Sequence[View], device: arrays.Device) -> call.Prepared:
        return call.prepare_backward(self.call_over(_VIEWS, device, views, 0), self.wanted_mods)

    def words(self, addresses: Sequence[int], seed: int) -> list[int]:
        return [*[addresses[n] for n in self.order], seed]

    def on_host(self, values: Sequence[Any], results: Sequence[Any], seed: int) -> None:
        raw = call._backward_on_cpu(self.call_over(arrays.NUMPY, arrays.CPU, values, seed), self.wanted_mods)
        _, mods = self.parts
        found = [x for x in (raw.dq, raw.dk, raw.dv, raw.dsinks) if x is not None]
        for is_bias in (True, False):
            found += [x for mod, own in zip(mods, raw.dmods, strict=True) if isinstance(mod, Bias) == is_bias for x in own]
        for result, x in zip(results, found, strict=True):
            result[...] = x


# Running ------------------------------------------------------------------------------------------------------------------


class _Views(Library):
    """XLA's buffers are their own views."""

    name = "jax"
    native = True

    def view(self, x: Any, name: str = "array") -> View:
        view: View = x
        return view


_VIEWS = _Views()


def _cupy_array(view: View) -> Any:
    """CuPy's ndarray over memory that someone else owns."""
    cupy = arrays._cupy()
    dtype = arrays.numpy_dtype(view.dtype)
    memory = cupy.cuda.UnownedMemory(view.ptr, math.prod(view.shape) * dtype.itemsize, None)
    return cupy.ndarray(view.shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


@functools.lru_cache(4096)
def _program(text: bytes) -> _Program:
    """The program that a compiled call names."""
    kind, signature, avals, extra, wanted = ast.literal_eval(text.decode())
    build = _Forward if kind == "forward" else _Backward
    return build(Signature(*signature), tuple(_Aval(*aval) for aval in avals), extra, wanted)


_thread = threading.local()


def _device(*buffers: Sequence[int]) -> int:
    """The GPU that holds buffers; CUDA's runtime is told once in each of XLA's threads."""
    if not _several():
        if not getattr(_thread, "ready", False):
            call.runtime().setDevice(0)
            _thread.ready = True
        return 0
    runtime, known = call.runtime(), next((address for part in buffers for address in part if address), 0)
    index = int(runtime.pointerGetAttributes(known).device) if known else 0
    runtime.setDevice(index)
    return index


@functools.cache
def _several() -> bool:
    return bool(call.runtime().getDeviceCount() > 1)


class _Ready(NamedTuple):
    """A program over arrays of certain alignments on one GPU."""

    prepared: call.Prepared
    casts: tuple[tuple[int, _Aval], ...]
    """(position, as what kernels write it) of results of another dtype: gradients of user parameters, in float64"""


_MAX_READY = 256


def _prepare(program: _Program, addresses: Sequence[int], index: int) -> _Ready:
    views = [aval.at(address) for aval, address in zip(program.avals, addresses, strict=True)]
    prepared = program.prepare(views, ("cuda", index))
    written = [_Aval(result.shape, result.dtype) for result in prepared.results]
    casts = enumerate(zip(written, program.results, strict=True))
    return _Ready(prepared, tuple((n, aval) for n, (aval, result) in casts if aval.dtype != result.dtype))


def _run_on_gpu(frame: xla.Frame) -> None:
    program, addresses, results = _program(frame.text), frame.arguments, frame.results
    index = _device(addresses, results)
    key = (index, *[address & 15 for address in addresses])
    ready = program.ready.get(key)
    if ready is None:
        if len(program.ready) >= _MAX_READY:
            program.ready.clear()
        ready = program.ready[key] = _prepare(program, addresses, index)
    stream, seed = frame.stream(), program.signature.seed
    if seed is None:
        position = program.seed_position()
        seed = _read_seed(program.avals[position].at(addresses[position]), stream)
    made, workspace, size = results.copy(), 0, ready.prepared.workspace_bytes
    scratch: list[tuple[int, int]] = []
    try:
        for n, aval in ready.casts:
            scratch.append(frame.allocate(math.prod(aval.shape) * ITEMSIZE[aval.dtype]))
            made[n] = scratch[-1][0]
        if size:
            scratch.append(frame.allocate(size))
            workspace = scratch[-1][0]
        ready.prepared.launch(program.words(addresses, seed) + made, workspace, stream)
        for n, aval in ready.casts:
            _cast(aval.at(made[n]), program.results[n].at(results[n]), stream)
    finally:
        for part in scratch:
            frame.free(*part)


def _cast(source: View, target: View, stream: int) -> None:
    """One array into another of another dtype, in the order of the stream."""
    with arrays._cupy().cuda.ExternalStream(stream):
        _cupy_array(target)[...] = _cupy_array(source)


def _read_seed(view: View, stream: int) -> int:
    runtime = call.runtime()
    host = np.empty((), arrays.numpy_dtype(view.dtype))
    runtime.memcpyAsync(host.ctypes.data, view.ptr, host.nbytes, runtime.memcpyDeviceToHost, stream)
    runtime.streamSynchronize(stream)
    return int(host) % 2**64


def _run_on_host(frame: xla.Frame) -> None:
    program = _program(frame.text)
    values = [aval.on_host(address) for aval, address in zip(program.avals, frame.arguments, strict=True)]
    results = [aval.on_host(address) for aval, address in zip(program.results, frame.results, strict=True)]
    seed = program.signature.seed
    if seed is None:
        seed = int(values[program.seed_position()]) % 2**64
    program.on_host(values, results, seed)


_HANDLERS = {"cpu": xla.handler(_run_on_host), "CUDA": xla.handler(_run_on_gpu)}


def _register() -> None:
    import ctypes

    for platform, function in _HANDLERS.items():
        address = ctypes.cast(function, ctypes.c_void_p).value
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(address), platform=platform)


_register()


# vmap -----------------------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _batchable(program: _Program) -> Any:
    """The foreign call of a program, and how vmap maps it."""

    @custom_vmap  # type: ignore[untyped-decorator]
    def run(*flat: Any) -> Any:
        structs = [aval.struct() for aval in program.results]
        return tuple(_all_varying(jax.ffi.ffi_call(TARGET, structs)(*flat, program=program.text), flat))

    @run.def_vmap  # type: ignore[untyped-decorator]
    def rule(size: int, batched: Sequence[bool], *flat: Any) -> Any:
        folded = _fold(program, size, batched, flat)
        if folded is None:
            mapped = [x for x, each in zip(flat, batched, strict=True) if each]
            results = jax.lax.map(lambda own: run(*_merge(own, batched, flat)), mapped)
        else:
            wider, arguments = folded
            shapes = [(size, *aval.shape) for aval in program.results]
            results = tuple(x.reshape(s) for x, s in zip(_batchable(wider)(*arguments), shapes, strict=True))
        return results, (True,) * len(results)

    return run


def _merge(own: Sequence[Any], batched: Sequence[bool], flat: Sequence[Any]) -> Iterator[Any]:
    """`flat` with one element of each mapped array."""
    elements = iter(own)
    return (next(elements) if each else x for x, each in zip(flat, batched, strict=True))


def _fold(program: _Program, size: int, batched: Sequence[bool], flat: Sequence[Any]) -> tuple[_Program, list[Any]] | None:
    """The program of `size` times the batch and its arrays, where that is the same as so many calls; else None.

    Not so: packed calls; dropout, whose bits depend on the batch; a sum over the batch (gradients of sinks, of a bias, of
    parameters); user code that reads the batch; mapped arrays without a batch axis.
    """
    _, mods = program.parts
    backward = isinstance(program, _Backward)
    if program.packed or program.options.dropout or (backward and (any(program.wanted_mods) or "sinks" in program.labels)):
        return None
    if any(isinstance(mod, UserMod) and _reads_batch(mod) for mod in mods):
        return None
    has_batch = len(program.avals[0].shape) == 4
    batch = program.avals[0].shape[0] if has_batch else 1
    arguments = []
    for label, rank, x, each in zip(program.labels, _own_ranks(program), flat, batched, strict=True):
        if label in ("seed", "sinks", "score_mod") or rank == 0:
            if each:
                return None
            arguments.append(x)
        elif label in ("mask", "bias", "alibi_slopes"):
            arguments.append(_fold_broadcast(x, each, rank, batch, size))
        else:
            x = x if each else jnp.broadcast_to(x[None], (size, *x.shape))
            lens = label in ("q_lens", "kv_lens")
            arguments.append(x.reshape(size * batch, *x.shape[2:]) if has_batch or lens else x)
    signature = program.signature
    return type(program)(signature, tuple(map(_Aval.of, arguments)), program.extra_names, program.wanted_mods), arguments


def _own_ranks(program: _Program) -> list[int]:
    """Axes of each array when its batch axis is written out; 0 for those that have none."""
    mask, mods = program.parts
    ranks = [4] * program.named_count
    for part in mask.masks if isinstance(mask, And) else (mask,):
        ranks += ([4, 0] if isinstance(part, BlockSparse) else [4])[: len(part.arrays)]
    for mod in mods:
        ranks += [2 if isinstance(mod, Alibi) else 4] * len(mod.arrays)
    return ranks + [4] * (len(program.avals) - len(ranks))


def _fold_broadcast(x: Any, each: bool, rank: int, batch: int, size: int) -> Any:
    """An array that broadcasts to (batch, ...), as one that broadcasts to (size * batch, ...)."""
    shape = x.shape[1:] if each else x.shape
    written = (1,) * (rank - len(shape)) + tuple(shape)
    if not each and written[0] == 1:
        return x
    x = x.reshape(size if each else 1, *written)
    return jnp.broadcast_to(x, (size, batch, *written[1:])).reshape(size * batch, *written[1:])


def _reads_batch(mod: UserMod) -> bool:
    from cuattn.expressions import names

    texts = [mod.expression, mod.gradient or "0", *(text for pair in mod.param_gradients.values() for text in pair)]
    return any("b" in names(text) for text in texts)
