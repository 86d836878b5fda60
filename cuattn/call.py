"""A call in six steps: view, problem, plan, build, launch, give back. Forward and backward; api.py is the public face."""

from __future__ import annotations

import itertools
import math
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
from cuattn.backward import POINTERS as BACKWARD_POINTERS
from cuattn.backward import (
    STORE,
    WORKSPACE,
    ZEROED,
    BackwardPlan,
    make_backward_plan,
    make_backward_problem,
)
from cuattn.codegen import BIAS_THREADS, COMBINE_THREADS, PREPARE_THREADS, Unit, backward_units, bias_is_wide, units
from cuattn.decode import DecodePlan
from cuattn.fields import ITEMSIZE
from cuattn.launch import BackwardParameters, DecodeParameters, Parameters
from cuattn.masks import Mask
from cuattn.plan import WARPS_PER_COMBINE, Plan, make_plan
from cuattn.problem import POINTERS, SLOT, Problem, make_problem
from cuattn.registry import Device
from cuattn.score_mods import ScoreMod, UserMod


class Options(NamedTuple):
    """Scalar options of a call that take part in its plan."""

    scale: float | None
    dropout: float
    precision: str
    return_lse: bool
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    deterministic: bool


class Raw(NamedTuple):
    """Gradients as the backward gives them, of q's kind, in the dtypes of what they belong to."""

    dq: Any
    dk: Any
    dv: Any
    dmods: tuple[tuple[Any, ...], ...]
    """by score modification, of each array in `differentiable`; () where they were not wanted"""
    dsinks: Any
    """None without sinks"""


class Call(NamedTuple):
    """Arguments, known to be of one kind and on one device."""

    library: Library
    device: ArrayDevice
    present: dict[str, Any]
    mask: Mask
    mods: tuple[ScoreMod, ...]
    own: tuple[Any, ...]
    """arrays of the mask, then of the modifications"""
    options: Options
    seed: int

    @property
    def on_cpu(self) -> bool:
        return self.device[0] == "cpu" and (self.library is not arrays.NUMPY or not arrays.gpu_available()[0])


def forward(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: Options, seed: int) -> Any:
    """out, or (out, lse) with `options.return_lse`.

    named: q, k, v, and those of sinks, q_lens, kv_lens, out, cu_seqlens_q and cu_seqlens_k that are given (None: not given).
    """
    if arrays.traced(named["q"]):
        from cuattn.torch import trace

        return trace(named, mask, mods, options, seed)
    call, needs_grad = _resolve(named, mask, mods, options, seed)
    if needs_grad or call.library.autocasts((named["q"], named["k"], named["v"]), call.device):
        from cuattn.torch import record

        return record(call)
    return execute(call)


def execute(call: Call) -> Any:
    """`forward` of checked arguments, with nothing recorded for differentiation."""
    if call.device[0] == "cuda" and call.library.native:
        return _launch(call)
    if call.on_cpu:
        return _on_cpu(call)
    return _through_cupy(call)


def backward(
    named: dict[str, Any],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    options: Options,
    seed: int,
    wanted: tuple[bool, ...] | None = None,
) -> Raw:
    """Gradients of `forward`. `named`: as there, with out, lse (as the forward returned them), dout, and dlse if there is one.

    wanted: by score modification, whether the gradients of its differentiable arrays are; default: all of them.
    """
    for name in ("dout", "out", "lse"):
        if named.get(name) is None:
            raise TypeError(f"{name}: got None, expected an array")
    if arrays.traced(named["q"]):
        from cuattn.torch import trace_backward

        return trace_backward(named, mask, mods, options, seed, wanted)
    call, _ = _resolve(named, mask, mods, options, seed)
    if wanted is None:
        wanted = tuple([bool(mod.differentiable) for mod in mods])
    if call.device[0] == "cuda" and call.library.native:
        return _launch_backward(call, wanted)
    if call.on_cpu:
        return _backward_on_cpu(call, wanted)
    return _backward_through_cupy(call, wanted)


def _resolve(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: Options, seed: int) -> tuple[Call, bool]:
    """The call, and whether its library wants to record it for differentiation."""
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
    needs_grad = _check_kinds(library, device, present, mask, mods)
    if type(seed) is not int or seed < 0 or seed >> 64:
        seed = _seed(seed)
    return Call(library, device, present, mask, mods, own, options, seed), needs_grad


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: got {seed!r}, expected an integer")
    if not 0 <= seed.__index__() < 2**64:
        raise ValueError(f"seed: got {seed!r}, expected 0 <= seed < 2^64")
    return int(seed.__index__())


def _check_kinds(
    library: Library, device: ArrayDevice, present: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...]
) -> bool:
    """Every array is of one kind and on one device. Returns whether a gradient by one of them may be asked for later."""
    kind, needs_grad = type(present["q"]), library.needs_grad
    wants = False
    for name, x in present.items():
        if type(x) is not kind or library.device(x, name) != device:
            _check_kind(library, device, name, x)
        wants = wants or (name != "out" and needs_grad(x))
    for x in mask.arrays:
        _check_kind(library, device, "mask", x)
    for mod in mods:
        for x in mod.arrays:
            _check_kind(library, device, _MOD_NAMES.get(type(mod).__name__, "score_mod"), x)
            wants = wants or needs_grad(x)
    out = present.get("out")
    if out is not None and "dout" not in present and not library.writable(out):
        reason = "a read-only array" if library.supports_out else f"a {library.name} array, which cannot be written"
        raise ValueError(f"out: got {reason}, expected a writable array")
    return wants


_MOD_NAMES = {"Alibi": "alibi_slopes", "Bias": "bias"}


def _check_kind(library: Library, device: ArrayDevice, name: str, x: Any) -> None:
    other = library_of(x, name)
    if other is not library:
        raise TypeError(f"{name}: got {other.name} array, expected {library.name} as q is")
    where = library.device(x, name)
    if where != device:
        raise ValueError(f"{name}: got an array on {where[0]}:{where[1]}, expected {device[0]}:{device[1]} as q is")


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


def _on_cpu(call: Call) -> Any:
    from cuattn import cpu

    library, present = call.library, call.present
    problem, host, own_host, dense3 = _host_arguments(call, present)
    count = len(call.mask.arrays)
    _debug(problem, "numpy backend")
    out, lse = cpu.forward(
        **host,
        scale=problem.scale,
        mask=call.mask.bind(own_host[:count]),
        mods=_bind_mods(call.mods, own_host[count:]),
        dropout=problem.dropout,
        seed=call.seed,
    )
    if dense3:
        out, lse = out[0], lse[0]
    result = present["out"] if "out" in present else library.from_host(out, present["q"])
    return (result, library.from_host(lse, present["q"])) if call.options.return_lse else result


def _backward_on_cpu(call: Call, wanted: tuple[bool, ...]) -> Raw:
    from cuattn import cpu

    library, present = call.library, call.present
    problem, host, own_host, dense3 = _host_arguments(call, {n: x for n, x in present.items() if n not in _BACKWARD_ONLY})
    views = {name: library.view(present[name], name) for name in (*_BACKWARD_ONLY, "out") if name in present}
    make_backward_problem(problem, views["dout"], views["lse"], views.get("dlse"), views["out"], wanted, False)
    host.update({name: library.host(present[name]) for name in _BACKWARD_ONLY if name in present})
    if dense3:
        host.update({name: host[name][None] for name in _BACKWARD_ONLY if name in host})
    count = len(call.mask.arrays)
    gradients = cpu.backward(
        **host,
        scale=problem.scale,
        mask=call.mask.bind(own_host[:count]),
        mods=_bind_mods(call.mods, own_host[count:]),
        dropout=problem.dropout,
        seed=call.seed,
    )

    def give(x: Any) -> Any:
        return library.from_host(x, present["q"])

    dq, dk, dv = (give(x[0] if dense3 else x) for x in gradients[:3])
    dmods = tuple(tuple(map(give, each)) if want else () for each, want in zip(gradients.dmods, wanted, strict=True))
    return Raw(dq, dk, dv, dmods, None if gradients.dsinks is None else give(gradients.dsinks))


_BACKWARD_ONLY = ("dout", "lse", "dlse")


def _host_arguments(
    call: Call, present: dict[str, Any]
) -> tuple[Problem, dict[str, np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], bool]:
    """The checked problem, arrays as NumPy sees them (4-D where dense), those of mask and mods, and whether q was 3-D."""
    library = call.library
    views = {name: library.view(x, name) for name, x in present.items()}
    problem = problem_of(views, call.mask, call.mods, [library.view(x) for x in call.own], call.options)
    host = {name: library.host(x) for name, x in present.items()}
    _check_host_lengths(host, problem)
    dense3 = not problem.packed and host["q"].ndim == 3
    if dense3:
        host.update({name: host[name][None] for name in ("q", "k", "v", "out") if name in host})
    return problem, host, [library.host(x) for x in call.own], dense3


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


def problem_of(
    views: dict[str, View], mask: Mask, mods: tuple[ScoreMod, ...], own_views: Sequence[View], options: Options
) -> Problem:
    """Step 2: `own_views` are of the arrays of the mask, then of the modifications."""
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


def _through_cupy(call: Call) -> Any:
    """Arrays that kernels cannot use in place: NumPy's travel to the GPU and back, JAX's and DLPack's are borrowed."""
    library, out = call.library, call.present.get("out")
    device = _check_in_place(call, call.present)
    with arrays.CUPY.guard(device):
        lent = _lend(call, device, ("out",))
        result = _launch(lent)
        library.retain((*lent.present.values(), *lent.own))
        if call.options.return_lse:
            return library.give_back(result[0], out), library.give_back(result[1])
        return library.give_back(result, out)


def _backward_through_cupy(call: Call, wanted: tuple[bool, ...]) -> Raw:
    library = call.library
    device = _check_in_place(call, {n: x for n, x in call.present.items() if n not in _BACKWARD_ONLY})
    with arrays.CUPY.guard(device):
        lent = _lend(call, device, ())
        raw = _launch_backward(lent, wanted)
        library.retain((*lent.present.values(), *lent.own))
        give = library.give_back
        dmods = tuple(tuple(map(give, each)) for each in raw.dmods)
        return Raw(give(raw.dq), give(raw.dk), give(raw.dv), dmods, None if raw.dsinks is None else give(raw.dsinks))


def _check_in_place(call: Call, present: dict[str, Any]) -> ArrayDevice:
    """Check the user's own strides and values, before anything is copied; returns where kernels will run."""
    library = call.library
    views = {name: library.view(x, name) for name, x in present.items()}
    problem = problem_of(views, call.mask, call.mods, [library.view(x) for x in call.own], call.options)
    if library is not arrays.NUMPY:
        return call.device
    _check_host_lengths({name: x for name, x in present.items() if name.endswith("lens") or "cu_" in name}, problem)
    return arrays.CUPY.current_device()


def _lend(call: Call, device: ArrayDevice, left_out: tuple[str, ...]) -> Call:
    """The same call over CuPy arrays."""
    to_cupy, count = call.library.to_cupy, len(call.mask.arrays)
    present = {name: to_cupy(x) for name, x in call.present.items() if name not in left_out}
    own = tuple(to_cupy(x) for x in call.own)
    mask, mods = call.mask.bind(own[:count]), _bind_mods(call.mods, own[count:])
    return Call(arrays.CUPY, device, present, mask, mods, own, call.options, call.seed)


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
    parameters: Parameters | BackwardParameters | DecodeParameters


@dataclass(frozen=True)
class _Prepared:
    """Steps 2 to 4 of a call, done."""

    plan: Plan
    steps: tuple[_Step, ...]
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    workspace: tuple[tuple[int, int], ...]
    """(slot, bytes) of each part; () where there is none"""


_prepared: dict[Any, Any] = {}
_prepare_lock = threading.Lock()
_MAX_PREPARED = 4096


def _launch(call: Call) -> Any:
    library, device, present, mask, mods, own, options, seed = call
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
        workspace = _allocate(library, device, prepared.workspace, plan, pointers) if prepared.workspace else None
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


def _allocate(
    library: Library,
    device: ArrayDevice,
    parts: tuple[tuple[int, int], ...],
    plan: Plan | BackwardPlan | DecodePlan,
    pointers: list[int],
) -> Any:
    """One allocation for the whole workspace, parts of it as (slot, bytes); their addresses go into `pointers`."""
    total = sum(size for _, size in parts)
    try:
        workspace = library.empty((total,), "uint8", device)
    except Exception as error:
        raise MemoryError(f"no room for a workspace of {total} bytes: {error}\nneeded by {plan}") from error
    address = library.view(workspace)[0]
    for slot, size in parts:
        pointers[slot] = address if size else 0
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
    problem = problem_of(views, mask, mods, own_views, options)
    plan = make_plan(problem, device_of(device[1]))
    _debug(problem, plan)
    steps = tuple(_step(role, unit, plan) for role, unit in units(plan).items()) if not plan.empty else ()
    q = views["q"].shape
    rows = (q[1], q[0]) if problem.packed or len(q) == 3 else (q[0], q[2], q[1])
    workspace = tuple((_WORKSPACE + n, size) for n, size in enumerate(plan.workspace)) if any(plan.workspace) else ()
    prepared = _Prepared(plan, steps, (*q[:-1], problem.head_dim_v), rows, workspace)
    _remember(key, prepared)
    return prepared


def _remember(key: Any, prepared: Any) -> None:
    with _prepare_lock:
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared


def _load(unit: Unit, plan: Plan | BackwardPlan | DecodePlan) -> Any:
    """The kernel of a translation unit, built if need be."""
    try:
        cubin = jit.build(unit.source, plan.device.arch)
    except jit.CompileError as error:
        raise jit.CompileError(f"{error}\nwhile building {unit.entry} for {plan}") from None
    _debug(f"{unit.entry}: {cubin.path or 'in memory'}")
    return jit.load(cubin, unit)


def _step(role: str, unit: Unit, plan: Plan) -> _Step:
    function = _load(unit, plan)
    grid = plan.grid
    if role == "tile_map":
        grid = plan.map_batches * plan.map_heads * plan.m_blocks * plan.map_words
    elif role in ("magnitude", "split"):
        grid = plan.split_grid
    elif role == "combine":
        grid = -(-plan.partial_rows // WARPS_PER_COMBINE)
    with_mods = role == "forward"
    return _Step(function, (grid, 1, 1), (unit.threads, 1, 1), unit.smem_bytes, Parameters(plan, with_mods))


# Backward on the GPU --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PreparedBackward:
    """Steps 2 to 4 of a backward, done."""

    plan: BackwardPlan
    steps: tuple[_Step, ...]
    workspace: tuple[tuple[int, int], ...]
    """(slot, bytes) of each part"""
    zeroed: int
    """bytes at the start of the workspace to which kernels add"""
    slots: dict[str, int]
    """of every pointer that the backward's own struct has, and of those that the forward's has too"""
    pointers: tuple[int, ...]
    """none yet"""
    gradients: tuple[tuple[str, int, tuple[int, ...], str, int], ...]
    """(name, slot, shape, dtype, bytes to clear because kernels add to it) of each result"""


def _launch_backward(call: Call, wanted: tuple[bool, ...]) -> Raw:
    library, device, present, mask, mods, own, options, seed = call
    view = library.view
    views = {name: view(x, name) for name, x in present.items()}
    own_views = [view(x) for x in own]
    signature: tuple[Any, ...] = tuple([(name, *v[1:], v[0] & 15) for name, v in views.items()])
    signature += tuple([(*v[1:], v[0] & 15) for v in own_views])
    key = ("backward", device, signature, mask.key(), tuple([m.key() for m in mods]), options, wanted)
    with library.guard(device):
        try:
            prepared = _prepared.get(key)
        except TypeError:
            prepared = None
        if prepared is None:
            prepared = _prepare_backward(key, views, mask, mods, own_views, options, wanted, device)
        pointers, slots = [*prepared.pointers], prepared.slots
        for name, v in views.items():
            pointers[slots[name]] = v[0]
        pointers[_SEED] = seed
        for n, v in enumerate(own_views):
            pointers[len(POINTERS) + n] = v[0]
        stream = _Stream(library.stream(device))
        results = {}
        for name, slot, shape, dtype, cleared in prepared.gradients:
            results[name] = x = library.empty(shape, dtype, device)
            pointers[slot] = view(x)[0]
            _clear(pointers[slot], cleared, stream)
        if prepared.steps:
            workspace = _allocate(library, device, prepared.workspace, prepared.plan, pointers)
            _clear(pointers[prepared.workspace[0][0]], prepared.zeroed, stream)
            for step in prepared.steps:
                packed = np.void(step.parameters.pack(pointers))
                step.function(step.grid, step.block, (packed,), step.smem_bytes, stream)
            del workspace  # its memory is reused in stream order
        return _raw(call, wanted, results)


_FORWARD_NAMES = frozenset(POINTERS) - {"lse"}


def _clear(address: int, size: int, stream: _Stream) -> None:
    """Zero so many bytes, in stream order."""
    if size:
        from cupy.cuda import runtime

        runtime.memsetAsync(address, 0, size, stream.ptr)


def _raw(call: Call, wanted: tuple[bool, ...], results: dict[str, Any]) -> Raw:
    """Results by name, as the caller gets them; gradients of user parameters come in float64."""
    dmods: list[tuple[Any, ...]] = []
    parameters = (x for name, x in results.items() if name.startswith(_PARAMETER))
    for mod, want in zip(call.mods, wanted, strict=True):
        if not want or not mod.differentiable:
            dmods.append(())
        elif isinstance(mod, UserMod):
            dtypes = [call.library.view(mod.arrays[n])[3] for n in mod.differentiable]
            dmods.append(tuple([call.library.cast(next(parameters), dtype) for dtype in dtypes]))
        else:
            dmods.append((results["dbias"],))
    return Raw(results["dq"], results["dk"], results["dv"], tuple(dmods), results.get("dsinks"))


_PARAMETER = "parameter "
"""What names of gradients of user parameters start with."""


def _prepare_backward(
    key: Any,
    views: dict[str, View],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    own_views: Sequence[View],
    options: Options,
    wanted: tuple[bool, ...],
    device: ArrayDevice,
) -> _PreparedBackward:
    mask, mods = mask.bind(own_views[: len(mask.arrays)]), _bind_mods(mods, own_views[len(mask.arrays) :])
    problem = problem_of({n: v for n, v in views.items() if n in _FORWARD_NAMES}, mask, mods, own_views, options)
    lse, dlse = views["lse"], views.get("dlse")
    backward = make_backward_problem(problem, views["dout"], lse, dlse, views["out"], wanted, options.deterministic)
    plan = make_backward_plan(backward, device_of(device[1]))
    _debug(backward, plan)
    gradients = [(f"d{name}", views[name].shape, problem.dtype, plan.empty) for name in ("q", "k", "v")]
    if "sinks" in views:
        gradients.append(("dsinks", views["sinks"].shape, views["sinks"].dtype, plan.empty))
    bias = backward.bias
    if bias is not None:
        gradients.append(("dbias", bias.shape, bias.dtype, plan.empty or plan.bias_kind is STORE))
    slots = {**SLOT, **{name: backward.slot(name) for name in BACKWARD_POINTERS}}
    start = backward.first_slot + len(BACKWARD_POINTERS)
    for n, operand in enumerate(backward.parameters):
        slots[f"{_PARAMETER}{n}"] = start + n
        gradients.append((f"{_PARAMETER}{n}", operand.shape, "float64", True))
    prepared = _PreparedBackward(
        plan,
        () if plan.empty else _backward_steps(plan),
        tuple((slots[name], size) for name, size in zip(WORKSPACE, plan.workspace, strict=True)),
        sum(plan.workspace[: len(ZEROED)]),
        slots,
        (0,) * (start + len(backward.parameters)),
        tuple((n, slots[n], shape, dtype, added * ITEMSIZE[dtype] * math.prod(shape)) for n, shape, dtype, added in gradients),
    )
    _remember(key, prepared)
    return prepared


def _backward_steps(plan: BackwardPlan) -> tuple[_Step, ...]:
    p, bias = plan.problem, plan.backward.bias
    grids = {
        "magnitude": plan.split_grid,
        "split": plan.split_grid,
        "tile_map": plan.map_batches * plan.map_heads * plan.m_blocks * plan.map_words,
        "prepare": -(-plan.partial_rows * plan.prepare_lanes // PREPARE_THREADS),
        "sinks": p.num_heads,
        "convert": plan.m_blocks * p.num_heads * plan.batches,
        "combine": -(-plan.rows_kv * 32 // COMBINE_THREADS),
        "bias": 0 if bias is None else -(-math.prod(bias.shape) // (1 if bias_is_wide(plan) else BIAS_THREADS)),
    }
    whole = (0, 0, plan.batches, p.num_heads_kv)
    steps = []
    for role, unit in backward_units(plan).items():
        function, block = _load(unit, plan), (unit.threads, 1, 1)
        if role == "tile_map":
            steps.append(_Step(function, (grids[role], 1, 1), block, unit.smem_bytes, Parameters(plan, False)))
            continue
        for launch in plan.launches if role == "backward" else (whole,):
            grid = plan.grid(*launch[2:]) if role == "backward" else grids[role]
            if grid:
                parameters = BackwardParameters(plan, launch, role == "backward")
                steps.append(_Step(function, (grid, 1, 1), block, unit.smem_bytes, parameters))
    return tuple(steps)


# The device -----------------------------------------------------------------------------------------------------------

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
