"""A call in six steps: view, problem, plan, build, launch, give back. Forward and backward; api.py is the public face."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuattn import arrays, jit
from cuattn.arrays import Device as ArrayDevice
from cuattn.arrays import Gathered, Library, View, library_of
from cuattn.backward import POINTERS as BACKWARD_POINTERS
from cuattn.backward import (
    PREPARING_SMS,
    STORE,
    WORKSPACE,
    BackwardPlan,
    make_backward_plan,
    make_backward_problem,
)
from cuattn.codegen import BIAS_THREADS, COMBINE_THREADS, PREPARE_THREADS, Unit, backward_units, bias_is_wide, units
from cuattn.decode import DecodePlan
from cuattn.fields import ITEMSIZE
from cuattn.launch import Launch, backward_struct, forward_struct
from cuattn.masks import Mask
from cuattn.plan import WARPS_PER_COMBINE, Plan, make_plan
from cuattn.problem import POINTERS, SLOT, Problem, make_problem, max_seqlen_of
from cuattn.registry import Device
from cuattn.score_mods import Bias, ScoreMod


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
    gathered: Gathered | None = None
    """where kernels use the arrays in place"""

    def with_lse(self) -> Call:
        """The same call, that returns lse too."""
        options = self.options
        if options.return_lse:
            return self
        both: Options = new(Options, (*options[:3], True, *options[4:]))
        return new(Call, (*self[:6], both, *self[7:]))

    def over(self, present: dict[str, Any]) -> Call:
        """The same call over other arrays of the same library and device, of which some may have other dtypes."""
        gathered = gather(self.library, self.device, present, self.own, self.mask, self.mods)
        return self._replace(present=present, gathered=gathered)

    @property
    def on_cpu(self) -> bool:
        return self.device[0] == "cpu" and (self.library is not arrays.NUMPY or not arrays.gpu_available()[0])


def forward(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: Options, seed: int) -> Any:
    """out, or (out, lse) with `options.return_lse`.

    named: q, k, v, and those of sinks, q_lens, kv_lens, out, cu_seqlens_q and cu_seqlens_k that are given.
    """
    if arrays.traced(named["q"]):
        from cuattn.torch import trace

        return trace(named, mask, mods, options, seed)
    call, needs_grad = resolve(named, mask, mods, options, seed)
    if needs_grad or call.library.autocasts((named["q"], named["k"], named["v"]), call.device):
        return _torch().record(call, needs_grad)
    return execute(call)


@functools.cache
def _torch() -> Any:
    return importlib.import_module("cuattn.torch")


def execute(call: Call) -> Any:
    """`forward` of checked arguments, with nothing recorded for differentiation."""
    if call.gathered is not None:
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
    if arrays.traced(named["q"]):
        from cuattn.torch import trace_backward

        return trace_backward(named, mask, mods, options, seed, wanted)
    call = resolve(named, mask, mods, options, seed)[0]
    if wanted is None:
        wanted = tuple([bool(mod.differentiable) for mod in mods])
    if call.gathered is not None:
        return _launch_backward(call, wanted)
    if call.on_cpu:
        return _backward_on_cpu(call, wanted)
    return _backward_through_cupy(call, wanted)


def resolve(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], options: Options, seed: int) -> tuple[Call, bool]:
    """The call, and whether its library wants to record it for differentiation."""
    q = named["q"]
    library = library_of(q, "q")
    device = library.device(q, "q")
    own: tuple[Any, ...] = ()
    if mods or mask.arrays:
        mask, own = own_arrays(mask, mods, library, q, device)
    gathered = gather(library, device, named, own, mask, mods)
    needs_grad = check_kinds(library, device, named, mask, mods) if gathered is None else gathered[2]
    if "out" in named and "dout" not in named:
        check_writable(named["out"])
    if type(seed) is not int or seed < 0 or seed >> 64:
        seed = _seed(seed)
    if options.max_seqlen_q is not None:
        options = _of_integers(options)
    return new(Call, (library, device, named, mask, mods, own, options, seed, gathered)), needs_grad


def own_arrays(
    mask: Mask, mods: tuple[ScoreMod, ...], library: Library, q: Any, device: ArrayDevice
) -> tuple[Mask, tuple[Any, ...]]:
    """The mask, over arrays that are where q is, and the arrays of mask and modifications."""
    own = mask.arrays
    if own:
        mask = _place_blocks(mask, library, q, device)
        own = mask.arrays
    if mods:
        own += tuple([a for mod in mods for a in mod.arrays])
    return mask, own


def gather(
    library: Library,
    device: ArrayDevice,
    present: dict[str, Any],
    own: tuple[Any, ...],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
) -> Gathered | None:
    """What a warm call must know of its arrays. None if kernels cannot use them in place."""
    if not library.native or device[0] != "cuda":
        return None
    try:
        return library.gather({**present, **{f"array {n}": x for n, x in enumerate(own)}} if own else present)
    except Exception:  # let the checks name the array
        if check_kinds(library, device, present, mask, mods):
            _torch().check_transforms()
        for name, x in _with_names(present, mask, mods):
            library.view(x, name)
        raise


new = tuple.__new__  # half the time of Call(...): that one packs its arguments twice


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: got {seed!r}, expected an integer")
    if not 0 <= seed.__index__() < 2**64:
        raise ValueError(f"seed: got {seed!r}, expected 0 <= seed < 2^64")
    return int(seed.__index__())


def _of_integers(options: Options) -> Options:
    """With the longest lengths as Python's own: plans are kept by them, and a tensor is another key each time."""
    q, k = options.max_seqlen_q, options.max_seqlen_k
    if type(q) is int is type(k):
        return options
    return options._replace(max_seqlen_q=max_seqlen_of("max_seqlen_q", q), max_seqlen_k=max_seqlen_of("max_seqlen_k", k))


def check_kinds(library: Library, device: ArrayDevice, present: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...]) -> bool:
    """Every array is of one kind and on one device. Returns whether a gradient by one of them may be asked for later."""
    for name, x in _with_names(present, mask, mods):
        _check_kind(library, device, name, x)
    return library.needs_grad(present.values()) or any([library.needs_grad(mod.arrays) for mod in mods])


def _with_names(present: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...]) -> Iterator[tuple[str, Any]]:
    """Every array of a call, with the argument that brought it."""
    yield from present.items()
    for x in mask.arrays:
        yield "mask", x
    for mod in mods:
        for x in mod.arrays:
            yield _MOD_NAMES.get(type(mod).__name__, "score_mod"), x


_MOD_NAMES = {"Alibi": "alibi_slopes", "Bias": "bias"}


def check_writable(out: Any) -> None:
    """Raise for an `out`, of one of the kinds that a call takes, that cannot be written."""
    library = library_of(out, "out")
    if not library.writable(out):
        reason = "a read-only array" if library.supports_out else f"a {library.name} array, which cannot be written"
        raise ValueError(f"out: got {reason}, expected a writable array")


def _check_kind(library: Library, device: ArrayDevice, name: str, x: Any) -> None:
    other = library_of(x, name)
    if other is not library and other is not library.results(device):
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


def bind(mask: Mask, mods: tuple[ScoreMod, ...], own: Sequence[Any]) -> tuple[Mask, tuple[ScoreMod, ...]]:
    """Mask and modifications over other arrays, given one after the other."""
    position = len(mask.arrays)
    mask, bound = mask.bind(own[:position]), []
    for mod in mods:
        bound.append(mod.bind(own[position : position + len(mod.arrays)]))
        position += len(mod.arrays)
    return mask, tuple(bound)


# On the CPU -----------------------------------------------------------------------------------------------------------


def _on_cpu(call: Call) -> Any:
    from cuattn import cpu

    library, present = call.library, call.present
    problem, host, own_host, dense3 = _host_arguments(call, present)
    mask, mods = bind(call.mask, call.mods, own_host)
    debug(problem, "numpy backend")
    out, lse = cpu.forward(
        **host,
        scale=problem.scale,
        mask=mask,
        mods=mods,
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
    mask, mods = bind(call.mask, call.mods, own_host)
    gradients = cpu.backward(
        **host,
        scale=problem.scale,
        mask=mask,
        mods=mods,
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
    to_cupy = call.library.to_cupy
    present = {name: to_cupy(x) for name, x in call.present.items() if name not in left_out}
    own = tuple(to_cupy(x) for x in call.own)
    mask, mods = bind(call.mask, call.mods, own)
    gathered = gather(arrays.CUPY, device, present, own, mask, mods)
    return Call(arrays.CUPY, device, present, mask, mods, own, call.options, call.seed, gathered)


class Result(NamedTuple):
    """An array that a call makes."""

    slot: int
    shape: tuple[int, ...]
    dtype: str
    cleared: int = 0
    """bytes to clear because kernels add to it"""


class Layout(NamedTuple):
    """What a call brings and makes, in order: its words. By slot, where a kernel's struct is concerned."""

    given: tuple[int, ...]
    """slots of addresses and numbers that the caller brings"""
    results: tuple[Result, ...]
    workspace: tuple[tuple[int, int], ...]
    """(slot, bytes) of each part that is not empty"""

    @property
    def position(self) -> dict[int, int]:
        """Of a slot among the words."""
        slots = (*self.given, *[result.slot for result in self.results], *[slot for slot, _ in self.workspace])
        return {slot: n for n, slot in enumerate(slots)}

    @property
    def workspace_bytes(self) -> int:
        return sum(size for _, size in self.workspace)


class Prepared:
    """Steps 2 to 4 of a call, done: what is left is to make its arrays and to launch."""

    def __init__(self, plan: Plan | BackwardPlan | DecodePlan, layout: Layout, launches: Sequence[Launch]) -> None:
        self.plan, self.results, self._launches = plan, layout.results, launches
        self.workspace_bytes = layout.workspace_bytes if launches else 0
        starts = itertools.accumulate([size for _, size in layout.workspace], initial=0)
        self._starts = tuple(itertools.islice(starts, len(layout.workspace))) if launches else ()
        first = len(layout.given)
        self._cleared = tuple((first + n, result.cleared) for n, result in enumerate(layout.results) if result.cleared)

    def launch(self, words: list[int], workspace: int, stream: int) -> None:
        """Everything that the GPU has to do, in the order of the stream. words: as `Layout`, without the workspace."""
        for start in self._starts:
            words.append(workspace + start)
        for position, size in self._cleared:
            runtime().memsetAsync(words[position], 0, size, stream)
        handle = _stream(stream)
        for launch in self._launches:
            launch(words, handle)


class _Stream(NamedTuple):
    """What `cupy.cuda.Function` needs of a stream."""

    ptr: int


_stream = functools.lru_cache(64)(_Stream)


@functools.cache
def runtime() -> Any:
    """CUDA's runtime, as CuPy has it."""
    return importlib.import_module("cupy.cuda").runtime


class Makers(NamedTuple):
    """How a library makes the arrays of a prepared call on its device, which is the current one."""

    results: tuple[Callable[[], Any], ...]
    lend: Callable[[int], tuple[int, Any]] | None
    """the workspace"""

    @staticmethod
    def of(prepared: Prepared, library: Library, device: ArrayDevice) -> Makers:
        size = prepared.workspace_bytes
        results = tuple(library.maker(result.shape, result.dtype, device) for result in prepared.results)
        return Makers(results, library.lender(size, device) if size else None)


_prepared: dict[Hashable, tuple[Prepared, Makers]] = {}
_prepare_lock = threading.Lock()
_MAX_PREPARED = 4096


def known(key: Hashable) -> tuple[Prepared, Makers] | None:
    """What an earlier call of the same key has prepared."""
    try:
        return _prepared.get(key)
    except TypeError:  # an option that cannot be hashed is not a valid one either: let the checks name it
        return None


def remember(key: Hashable, prepared: Prepared, library: Library, device: ArrayDevice) -> tuple[Prepared, Makers]:
    """Both, also for later calls of this key."""
    made = prepared, Makers.of(prepared, library, device)
    with _prepare_lock:
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = made
    return made


def run(library: Library, device: ArrayDevice, prepared: Prepared, makers: Makers, words: list[int]) -> list[Any]:
    """Step 5: the results of a call. `words`: those that the caller brings. The device is current."""
    results = [make() for make in makers.results]
    try:
        for result in results:
            words.append(library.address(result))
    except RuntimeError:
        library.check_transforms()
        raise
    stream, lend = library.stream(device), makers.lend
    if lend is None:
        prepared.launch(words, 0, stream)
        return results
    try:
        address, lent = lend(stream)
    except Exception as error:
        library.check_transforms()
        size = prepared.workspace_bytes
        raise MemoryError(f"no room for a workspace of {size} bytes: {error}\nneeded by {prepared.plan}") from error
    try:
        prepared.launch(words, address, stream)
    finally:
        library.reclaim(lent)
    return results


numbers = itertools.count(secrets.randbits(62))
"""Numbers of calls (kernels/params.cuh)."""


def _launch(call: Call) -> Any:
    library, device, present, mask, mods, _, options, seed, gathered = call
    assert gathered is not None
    addresses, kinds, _ = gathered
    key = ("forward", library.name, kinds, mask.key(), tuple([m.key() for m in mods]) if mods else (), options)
    with library.guard(device):
        prepared, makers = known(key) or remember(key, prepare(checked(call)), library, device)
        results = run(library, device, prepared, makers, [*addresses, seed, next(numbers)])
    return in_order(present.get("out"), results, options.return_lse)


def in_order(out: Any, results: list[Any], return_lse: bool) -> Any:
    """out, or (out, lse), from an `out` of the caller's if there is one, and what was made."""
    if out is None:
        return tuple(results) if return_lse else results[0]
    return (out, *results) if return_lse else out


def _describe(call: Call) -> tuple[dict[str, View], Mask, tuple[ScoreMod, ...], list[View]]:
    """Descriptions of a call's arrays, and its mask and modifications over them: these keep no array of the caller's alive."""
    view = call.library.view
    own_views = [view(x) for x in call.own]
    mask, mods = bind(call.mask, call.mods, own_views)
    return {name: view(x, name) for name, x in call.present.items()}, mask, mods, own_views


def checked(call: Call) -> Call:
    """The call, after `check_kinds`: a key says where arrays are, so that the first call of a key answers for the others."""
    check_kinds(call.library, call.device, call.present, call.mask, call.mods)
    return call


def prepare(call: Call) -> Prepared:
    """Problem, plan and kernels of a call seen for the first time; the device is current.

    A call brings the addresses of its arrays and of those of mask and modifications, the seed, and its number.
    """
    views, mask, mods, own_views = _describe(call)
    problem = problem_of(views, mask, mods, own_views, call.options)
    plan = make_plan(problem, device_of(call.device[1]))
    debug(problem, plan)
    q = views["q"].shape
    rows = (q[1], q[0]) if problem.packed or len(q) == 3 else (q[0], q[2], q[1])
    results = [Result(SLOT["out"], (*q[:-1], problem.head_dim_v), problem.dtype)] if "out" not in views else []
    results += [Result(SLOT["lse"], rows, problem.real)] if call.options.return_lse else []
    slots = (*[SLOT[name] for name in views], *range(len(POINTERS), len(POINTERS) + len(own_views)), _SEED, _CALL)
    workspace = tuple((_WORKSPACE + n, size) for n, size in enumerate(plan.workspace) if size)
    layout = Layout(slots, tuple(results), workspace)
    launches = [] if plan.empty else [_launch_of(role, unit, plan, layout.position) for role, unit in units(plan).items()]
    return Prepared(plan, layout, launches)


_SEED, _CALL, _WORKSPACE = (SLOT[name] for name in ("seed", "call", "partial_out"))


def load(unit: Unit, plan: Plan | BackwardPlan | DecodePlan) -> Any:
    """The kernel of a translation unit, built if need be."""
    try:
        cubin = jit.build(unit.source, plan.device.arch)
    except jit.CompileError as error:
        raise jit.CompileError(f"{error}\nwhile building {unit.entry} for {plan}") from None
    debug(f"{unit.entry}: {cubin.path or 'in memory'}")
    return jit.load(cubin, unit)


def _launch_of(role: str, unit: Unit, plan: Plan, position: Mapping[int, int]) -> Launch:
    grid = plan.grid
    if role == "tile_map":
        grid = plan.map_batches * plan.map_heads * plan.m_blocks * plan.map_words
    elif role in ("magnitude", "split"):
        grid = plan.split_grid
    elif role == "combine":
        grid = -(-plan.partial_rows // WARPS_PER_COMBINE)
    return Launch(load(unit, plan), grid, unit.threads, unit.smem_bytes, forward_struct(plan, role == "forward"), position)


# Backward on the GPU --------------------------------------------------------------------------------------------------


def _launch_backward(call: Call, wanted: tuple[bool, ...]) -> Raw:
    library, device, _, mask, mods, _, options, seed, gathered = call
    assert gathered is not None
    addresses, kinds, _ = gathered
    key = ("backward", library.name, kinds, mask.key(), tuple([m.key() for m in mods]) if mods else (), options, wanted)
    with library.guard(device):
        prepared, makers = known(key) or remember(key, prepare_backward(checked(call), wanted), library, device)
        results = run(library, device, prepared, makers, [*addresses, seed])
        return _raw(call, wanted, results)


_FORWARD_NAMES = frozenset(POINTERS) - {"lse"}


def _raw(call: Call, wanted: tuple[bool, ...], results: list[Any]) -> Raw:
    """Results in the order of `prepare_backward`, as the caller gets them; those of user parameters come in float64."""
    if len(results) == 3:
        return new(Raw, (*results, ((),) * len(wanted), None))
    dq, dk, dv, *rest = results
    dsinks = rest.pop(0) if "sinks" in call.present else None
    dmods: list[tuple[Any, ...]] = [()] * len(call.mods)
    if rest:
        for is_bias in (True, False):
            for n, (mod, want) in enumerate(zip(call.mods, wanted, strict=True)):
                if want and isinstance(mod, Bias) == is_bias:
                    dtypes = [call.library.view(mod.arrays[m])[3] for m in mod.differentiable]
                    dmods[n] = tuple([call.library.cast(rest.pop(0), dtype) for dtype in dtypes])
    return Raw(dq, dk, dv, tuple(dmods), dsinks)


def prepare_backward(call: Call, wanted: tuple[bool, ...]) -> Prepared:
    """`prepare` of the gradients: of q, k, v, sinks, the bias and user parameters, in this order."""
    views, mask, mods, own_views = _describe(call)
    problem = problem_of({n: v for n, v in views.items() if n in _FORWARD_NAMES}, mask, mods, own_views, call.options)
    lse, dlse, deterministic = views["lse"], views.get("dlse"), call.options.deterministic
    backward = make_backward_problem(problem, views["dout"], lse, dlse, views["out"], wanted, deterministic)
    plan = make_backward_plan(backward, device_of(call.device[1]))
    debug(backward, plan)
    slot_of = {**SLOT, **{name: backward.slot(name) for name in BACKWARD_POINTERS}}
    results = [_gradient(slot_of[f"d{name}"], views[name].shape, problem.dtype, plan.empty) for name in ("q", "k", "v")]
    if "sinks" in views:
        results.append(_gradient(slot_of["dsinks"], views["sinks"].shape, views["sinks"].dtype, plan.empty))
    if backward.bias is not None:
        bias = backward.bias
        added = plan.empty or (plan.bias_kind is STORE and not plan.writes_bias)
        results.append(_gradient(slot_of["dbias"], bias.shape, bias.dtype, added))
    start = backward.first_slot + len(BACKWARD_POINTERS)
    results += [_gradient(start + n, operand.shape, "float64", True) for n, operand in enumerate(backward.parameters)]
    slots = (*[slot_of[name] for name in views], *range(len(POINTERS), len(POINTERS) + len(own_views)), _SEED)
    sizes = zip(WORKSPACE, plan.workspace, strict=True)
    workspace = tuple((slot_of[name], size) for name, size in sizes if size)
    layout = Layout(slots, tuple(results), workspace)
    return Prepared(plan, layout, [] if plan.empty else _backward_launches(plan, layout.position))


def _gradient(slot: int, shape: tuple[int, ...], dtype: str, added: bool) -> Result:
    """added: kernels add to it, or none writes it."""
    return Result(slot, shape, dtype, added * ITEMSIZE[dtype] * math.prod(shape))


def _backward_launches(plan: BackwardPlan, position: Mapping[int, int]) -> list[Launch]:
    p = plan.problem
    grids = {
        "magnitude": plan.split_grid,
        "split": plan.split_grid,
        "tile_map": plan.map_batches * plan.map_heads * plan.m_blocks * plan.map_words,
        "prepare": PREPARING_SMS if plan.prepared_units else -(-plan.partial_rows * plan.prepare_lanes // PREPARE_THREADS),
        "sinks": p.num_heads,
        "convert": plan.m_blocks * p.num_heads * plan.batches,
        "combine": -(-plan.rows_kv * 32 // COMBINE_THREADS),
        "bias": plan.bias_units if bias_is_wide(plan) else -(-plan.bias_units // BIAS_THREADS),
    }
    whole = (0, 0, plan.batches, p.num_heads_kv)
    launches = []
    for role, unit in backward_units(plan).items():
        function = load(unit, plan)
        for part in plan.launches if role == "backward" else (whole,):
            grid = plan.grid(*part[2:]) if role == "backward" else grids[role]
            attends = role == "backward"
            struct = forward_struct(plan, False) if role == "tile_map" else backward_struct(plan, part, attends)
            if grid:
                launches.append(Launch(function, grid, unit.threads, unit.smem_bytes, struct, position))
    return launches


# The device -----------------------------------------------------------------------------------------------------------

_devices: dict[int, Device] = {}


def device_of(index: int) -> Device:
    """What plans need to know of a GPU, asked once."""
    if index not in _devices:
        properties = runtime().getDeviceProperties(index)
        number = 10 * properties["major"] + properties["minor"]
        _devices[index] = Device(
            f"sm_{number}a" if number == 90 else f"sm_{number}",
            properties["sharedMemPerBlockOptin"],
            properties["sharedMemPerMultiprocessor"],
            properties["multiProcessorCount"],
        )
    return _devices[index]


_environment = getattr(os.environ, "_data", os.environ)  # os.environ itself takes 0.7 us to say no
_DEBUG = os.environ.encodekey("CUATTN_DEBUG") if _environment is not os.environ else "CUATTN_DEBUG"


def debugging() -> bool:
    """Whether CUATTN_DEBUG is set."""
    return bool(_environment.get(_DEBUG))


def debug(*parts: object) -> None:
    """Print them under CUATTN_DEBUG=1."""
    if debugging():
        for part in parts:
            print(f"cuattn: {part}", file=sys.stderr)
