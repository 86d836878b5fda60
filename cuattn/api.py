"""The public verbs, and the six steps of a call: view, problem, plan, build, launch, give back."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuattn import arrays, jit
from cuattn.arrays import Device as ArrayDevice
from cuattn.arrays import Library, View, library_of
from cuattn.codegen import Unit, units
from cuattn.launch import Parameters
from cuattn.masks import Mask
from cuattn.plan import WARPS_PER_COMBINE, WARPS_PER_TILE_MAP, Plan, make_plan
from cuattn.problem import POINTERS, SLOT, Problem, make_problem, parse_mask, parse_mods
from cuattn.registry import DEVICES, Device
from cuattn.score_mods import ScoreMod

__all__ = ["attention", "attention_varlen", "backend_info", "explain"]


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
    named = {"q": q, "k": k, "v": v, "sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens, "out": out}
    return _call(
        named,
        _mask_of(causal, window, mask),
        parse_mods(softcap, alibi_slopes, bias, score_mod),
        Options(scale, dropout, precision, return_lse, None, None),
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
    for name, cumulative in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cumulative is None:
            raise TypeError(f"{name}: got None, expected an int32 array of shape (batch + 1,)")
    named = {"q": q, "k": k, "v": v, "sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens, "out": out}
    return _call(
        {**named, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
        _mask_of(causal, window, mask),
        parse_mods(softcap, alibi_slopes, bias, score_mod),
        Options(scale, dropout, precision, return_lse, max_seqlen_q, max_seqlen_k),
        seed,
    )


_FULL, _CAUSAL = parse_mask(False, None, None), parse_mask(True, None, None)


def _mask_of(causal: Any, window: Any, mask: Any) -> Mask:
    """`parse_mask`, with the most common answers at hand."""
    if mask is None and window is None and (causal is False or causal is True):
        return _CAUSAL if causal else _FULL
    return parse_mask(causal, window, mask)


class Options(NamedTuple):
    """Scalar options of a call that take part in its plan."""

    scale: float | None
    dropout: float
    precision: str
    return_lse: bool
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def _call(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: Options, seed: int) -> Any:
    q = named["q"]
    library = library_of(q, "q")
    device = library.device(q, "q")
    present = {name: x for name, x in named.items() if x is not None}
    own = mask.arrays
    if own:
        mask = _place_blocks(mask, library, q, device)
        own = mask.arrays
    if mods:
        own += tuple(a for mod in mods for a in mod.arrays)
    _check_kinds(library, device, present, mask, mods)
    if type(seed) is not int or seed < 0 or seed >> 64:
        seed = _seed(seed)
    if device[0] == "cuda" and library.native:
        return _launch(library, device, present, mask, mods, own, options, seed)
    if device[0] == "cpu" and (library is not arrays.NUMPY or not arrays.gpu_available()[0]):
        return _on_cpu(library, present, mask, mods, own, options, seed)
    return _through_cupy(library, device, present, mask, mods, own, options, seed)


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: got {seed!r}, expected an integer")
    if not 0 <= seed.__index__() < 2**64:
        raise ValueError(f"seed: got {seed!r}, expected 0 <= seed < 2^64")
    return int(seed.__index__())


def _check_kinds(
    library: Library, device: ArrayDevice, present: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...]
) -> None:
    """Every array of one kind, on one device, none that a gradient is wanted for."""
    kind, needs_grad = type(present["q"]), library.needs_grad
    for name, x in present.items():
        if type(x) is not kind or library.device(x, name) != device or needs_grad(x):
            _check_kind(library, device, name, x)
    for x in mask.arrays:
        _check_kind(library, device, "mask", x)
    for mod in mods:
        for x in mod.arrays:
            _check_kind(library, device, _MOD_NAMES.get(type(mod).__name__, "score_mod"), x)
    out = present.get("out")
    if out is not None and not library.writable(out):
        reason = "a read-only array" if library.supports_out else f"a {library.name} array, which cannot be written"
        raise ValueError(f"out: got {reason}, expected a writable array")


_MOD_NAMES = {"Alibi": "alibi_slopes", "Bias": "bias"}


def _check_kind(library: Library, device: ArrayDevice, name: str, x: Any) -> None:
    other = library_of(x, name)
    if other is not library:
        raise TypeError(f"{name}: got {other.name} array, expected {library.name} as q is")
    where = library.device(x, name)
    if where != device:
        raise ValueError(f"{name}: got an array on {where[0]}:{where[1]}, expected {device[0]}:{device[1]} as q is")
    if library.needs_grad(x):
        raise NotImplementedError(
            f"{name}: got a tensor that requires grad; this call does not record gradients. Detach it or use no_grad()"
        )


_placed: weakref.WeakKeyDictionary[Mask, dict[tuple[str, ArrayDevice], Mask]] = weakref.WeakKeyDictionary()


def _place_blocks(mask: Mask, library: Library, like: Any, device: ArrayDevice) -> Mask:
    """Block layouts are often made by NumPy or SciPy: bring them to where q is, once for each mask object."""
    own = mask.arrays
    if library is arrays.NUMPY or not any(isinstance(a, np.ndarray) for a in own):
        return mask
    from cuattn.masks import And, BlockSparse

    if isinstance(mask, And):
        return And(tuple(_place_blocks(m, library, like, device) for m in mask.masks))
    if not isinstance(mask, BlockSparse):
        return mask
    by_place = _placed.setdefault(mask, {})
    if (library.name, device) not in by_place:
        moved = [library.from_host(a, like) if isinstance(a, np.ndarray) else a for a in own]
        by_place[library.name, device] = mask.bind(moved)
    return by_place[library.name, device]


def _bind_mods(mods: tuple[ScoreMod, ...], own: Sequence[Any]) -> tuple[ScoreMod, ...]:
    """`mods` over other arrays, given one after the other."""
    bound, position = [], 0
    for mod in mods:
        bound.append(mod.bind(own[position : position + len(mod.arrays)]))
        position += len(mod.arrays)
    return tuple(bound)


# On the CPU -----------------------------------------------------------------------------------------------------------


def _on_cpu(
    library: Library,
    present: dict[str, Any],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    own: Sequence[Any],
    options: Options,
    seed: int,
) -> Any:
    from cuattn import cpu

    views = {name: library.view(x, name) for name, x in present.items()}
    own_views = [library.view(x) for x in own]
    problem = _problem(views, mask, mods, own_views, options)
    host = {name: library.host(x) for name, x in present.items()}
    _check_host_lengths(host, problem)
    dense3 = not problem.packed and host["q"].ndim == 3
    if dense3:
        host.update({name: host[name][None] for name in ("q", "k", "v", "out") if name in host})
    own_host = [library.host(x) for x in own]
    count = len(mask.arrays)
    _debug(problem, "numpy backend")
    out, lse = cpu.forward(
        **host,
        scale=problem.scale,
        mask=mask.bind(own_host[:count]),
        mods=_bind_mods(mods, own_host[count:]),
        dropout=problem.dropout,
        seed=seed,
    )
    if dense3:
        out, lse = out[0], lse[0]
    result = present["out"] if "out" in present else library.from_host(out, present["q"])
    return (result, library.from_host(lse, present["q"])) if options.return_lse else result


def _check_host_lengths(host: dict[str, np.ndarray[Any, Any]], problem: Problem) -> None:
    """Lengths that the host can see are checked; those on a GPU are the caller's promise."""
    for name, longest in (("q_lens", problem.seqlen_q), ("kv_lens", problem.seqlen_k)):
        if name in host and host[name].size and not (host[name].min() >= 0 and host[name].max() <= longest):
            raise ValueError(f"{name}: got values from {host[name].min()} to {host[name].max()}, expected 0 to {longest}")
    for side, longest, total in (("q", problem.seqlen_q, problem.total_q), ("k", problem.seqlen_k, problem.total_k)):
        name = f"cu_seqlens_{side}"
        if name not in host:
            continue
        cumulative = host[name].astype(np.int64)
        steps = np.diff(cumulative)
        if cumulative[0] != 0 or (steps < 0).any() or cumulative[-1] > total:
            raise ValueError(f"{name}: got {cumulative.tolist()}, expected a non-decreasing row from 0 to at most {total}")
        if steps.size and steps.max() > longest:
            raise ValueError(f"max_seqlen_{side}: got {longest}, expected at least {steps.max()}, the longest sequence")


def _problem(
    views: dict[str, View], mask: Mask, mods: tuple[ScoreMod, ...], own_views: Sequence[View], options: Options
) -> Problem:
    count = len(mask.arrays)
    return make_problem(
        views,
        mask,
        own_views[:count],
        mods,
        own_views[count:],
        max_seqlen_q=options.max_seqlen_q,
        max_seqlen_k=options.max_seqlen_k,
        scale=options.scale,
        dropout=options.dropout,
        precision=options.precision,
        return_lse=options.return_lse,
    )


# On the GPU -----------------------------------------------------------------------------------------------------------


def _through_cupy(
    library: Library,
    device: ArrayDevice,
    present: dict[str, Any],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    own: Sequence[Any],
    options: Options,
    seed: int,
) -> Any:
    """Arrays that kernels cannot use in place: NumPy's travel to the GPU and back, JAX's and DLPack's are borrowed."""
    views = {name: library.view(x, name) for name, x in present.items()}
    problem = _problem(views, mask, mods, [library.view(x) for x in own], options)  # the user's own strides and values
    if library is arrays.NUMPY:
        _check_host_lengths({name: x for name, x in present.items() if name.endswith("lens") or "cu_" in name}, problem)
        device = arrays.CUPY.current_device()
    with arrays.CUPY.guard(device):
        lent = {name: library.to_cupy(x) for name, x in present.items() if name != "out"}
        own_lent = tuple(library.to_cupy(x) for x in own)
        count = len(mask.arrays)
        bound = mask.bind(own_lent[:count]), _bind_mods(mods, own_lent[count:])
        result = _launch(arrays.CUPY, device, lent, *bound, own_lent, options, seed)
        library.retain((*lent.values(), *own_lent))
        if options.return_lse:
            return library.give_back(result[0], present.get("out")), library.give_back(result[1])
        return library.give_back(result, present.get("out"))


class _Stream(NamedTuple):
    """What `cupy.cuda.Function` needs of a stream."""

    ptr: int


@dataclass(frozen=True)
class _Step:
    """One kernel of a call, ready to launch."""

    function: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int
    parameters: Parameters


@dataclass(frozen=True)
class _Prepared:
    """Steps 2 to 4 of a call, done."""

    plan: Plan
    steps: tuple[_Step, ...]
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    workspace: tuple[int, ...]


_prepared: dict[Any, _Prepared] = {}
_prepare_lock = threading.Lock()
_MAX_PREPARED = 4096


def _launch(
    library: Library,
    device: ArrayDevice,
    present: dict[str, Any],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    own: Sequence[Any],
    options: Options,
    seed: int,
) -> Any:
    view = library.view
    views = {name: view(x, name) for name, x in present.items()}
    own_views = [view(x) for x in own] if own else ()
    signature: tuple[Any, ...] = tuple([(name, *v[1:], v[0] & 15) for name, v in views.items()])
    if own:
        signature += tuple([(*v[1:], v[0] & 15) for v in own_views])
    key = (device, signature, mask.key(), tuple([m.key() for m in mods]) if mods else (), options)
    with library.guard(device):
        try:
            prepared = _prepared.get(key)
        except TypeError:  # an option that cannot be hashed is not a valid one either: let the checks name it
            prepared = None
        if prepared is None:
            prepared = _prepare(key, views, mask, mods, own_views, options, device)
        plan = prepared.plan
        out = present.get("out")
        if out is None:
            out = library.empty(prepared.out_shape, plan.problem.dtype, device)
        lse = library.empty(prepared.lse_shape, plan.problem.real, device) if options.return_lse else None
        if plan.empty:
            return out if lse is None else (out, lse)
        pointers = _NO_POINTERS.copy()
        for name, v in views.items():
            pointers[SLOT[name]] = v[0]
        if "out" not in views:
            pointers[_OUT] = view(out)[0]
        pointers[_LSE] = 0 if lse is None else view(lse)[0]
        pointers[_SEED] = seed
        pointers[_CALL] = next(_calls)
        if own:
            pointers += [v[0] for v in own_views]
        workspace = _allocate(library, device, prepared, pointers) if prepared.workspace else None
        stream = _Stream(library.stream(device))
        for step in prepared.steps:
            packed = np.void(step.parameters.pack(pointers))
            step.function(step.grid, step.block, (packed,), step.smem_bytes, stream)
        del workspace  # its memory is reused in stream order
    return out if lse is None else (out, lse)


_NO_POINTERS = [0] * len(POINTERS)
_OUT, _LSE, _SEED, _CALL, _WORKSPACE = (SLOT[name] for name in ("out", "lse", "seed", "call", "partial_out"))
_calls = itertools.count(secrets.randbits(62))
"""Numbers of calls (kernels/params.cuh)."""


def _allocate(library: Library, device: ArrayDevice, prepared: _Prepared, pointers: list[int]) -> Any:
    """One allocation for the whole workspace; its parts' addresses go into `pointers`."""
    total = sum(prepared.workspace)
    try:
        workspace = library.empty((total,), "uint8", device)
    except Exception as error:
        raise MemoryError(f"no room for a workspace of {total} bytes: {error}\nneeded by {prepared.plan}") from error
    address = library.view(workspace)[0]
    for part, size in enumerate(prepared.workspace):
        pointers[_WORKSPACE + part] = address if size else 0
        address += size
    return workspace


def _prepare(
    key: Any,
    views: dict[str, View],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    own_views: Sequence[View],
    options: Options,
    device: ArrayDevice,
) -> _Prepared:
    """Problem, plan and kernels of a call seen for the first time; the device is current."""
    # What is kept must not keep the caller's arrays alive: masks and mods are bound to descriptions of them.
    mask, mods = mask.bind(own_views[: len(mask.arrays)]), _bind_mods(mods, own_views[len(mask.arrays) :])
    problem = _problem(views, mask, mods, own_views, options)
    plan = make_plan(problem, device_of(device[1]))
    _debug(problem, plan)
    steps = tuple(_step(role, unit, plan) for role, unit in units(plan).items()) if not plan.empty else ()
    q = views["q"].shape
    rows = (q[1], q[0]) if problem.packed or len(q) == 3 else (q[0], q[2], q[1])
    prepared = _Prepared(plan, steps, (*q[:-1], problem.head_dim_v), rows, plan.workspace if any(plan.workspace) else ())
    with _prepare_lock:
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    return prepared


def _step(role: str, unit: Unit, plan: Plan) -> _Step:
    try:
        cubin = jit.build(unit.source, plan.device.arch)
    except jit.CompileError as error:
        raise jit.CompileError(f"{error}\nwhile building {unit.entry} for {plan}") from None
    function = jit.load(cubin, unit)
    _debug(f"{unit.entry}: {cubin.path or 'in memory'}")
    grid = plan.grid
    if role == "tile_map":
        grid = -(-plan.map_batches * plan.map_heads * plan.m_blocks * plan.map_words // WARPS_PER_TILE_MAP)
    elif role in ("magnitude", "split"):
        grid = plan.split_grid
    elif role == "combine":
        grid = -(-plan.partial_rows // WARPS_PER_COMBINE)
    with_mods = role == "forward"
    return _Step(function, (grid, 1, 1), (unit.threads, 1, 1), unit.smem_bytes, Parameters(plan, with_mods))


_devices: dict[int, Device] = {}


def device_of(index: int) -> Device:
    """What plans need to know of a GPU, asked once."""
    if index not in _devices:
        from cupy.cuda import runtime

        properties = runtime.getDeviceProperties(index)
        number = 10 * properties["major"] + properties["minor"]
        _devices[index] = Device(
            f"sm_{number}a" if number == 90 else f"sm_{number}",
            properties["sharedMemPerBlockOptin"],
            properties["sharedMemPerMultiprocessor"],
            properties["multiProcessorCount"],
        )
    return _devices[index]


def _debug(*parts: object) -> None:
    if os.environ.get("CUATTN_DEBUG"):
        for part in parts:
            print(f"cuattn: {part}", file=sys.stderr)


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
    **options: Any,
) -> Plan:
    """The plan that `attention`, or with cu_seqlens `attention_varlen`, would run for these arguments; launches nothing.

    arch: plan for a typical GPU of this architecture (a key of `cuattn.registry.DEVICES`) instead of the arrays' own device;
      needs no GPU. Options are those of `attention`. Printable: `print(cuattn.explain(q, k, v, causal=True))`.
    """
    take = options.get
    mask = parse_mask(take("causal", False), take("window"), take("mask"))
    mods = parse_mods(take("softcap"), take("alibi_slopes"), take("bias"), take("score_mod"))
    named = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    named.update({name: take(name) for name in ("sinks", "q_lens", "kv_lens", "out")})
    library = library_of(q, "q")
    views = {name: library.view(x, name) for name, x in named.items() if x is not None}
    own = [*mask.arrays, *(a for mod in mods for a in mod.arrays)]
    scalars = Options(
        take("scale"),
        take("dropout", 0.0),
        take("precision", "ieee"),
        take("return_lse", False),
        max_seqlen_q,
        max_seqlen_k,
    )
    problem = _problem(views, mask, mods, [library_of(x, "mask").view(x) for x in own], scalars)
    where = library.device(q, "q")
    device = DEVICES[arch] if arch is not None else device_of(where[1] if where[0] == "cuda" else 0)
    return make_plan(problem, device)


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
