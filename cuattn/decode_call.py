"""`attention_with_kvcache` in the six steps of call.py, whose parts it uses: one or two launches, caches written in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuattn import arrays, call
from cuattn.arrays import Device as ArrayDevice
from cuattn.arrays import Library, View
from cuattn.codegen import decode_units
from cuattn.decode import (
    APPEND_THREADS,
    CACHE_DTYPES,
    POINTERS,
    SLOT,
    WORKSPACE,
    DecodePlan,
    DecodeProblem,
    Scalars,
    lse_shape,
    make_decode_plan,
    make_decode_problem,
)
from cuattn.launch import DecodeParameters
from cuattn.masks import Mask
from cuattn.score_mods import ScoreMod


class _Call(NamedTuple):
    """Arguments, known to be of one kind and on one device."""

    library: Library
    device: ArrayDevice
    present: dict[str, Any]
    mask: Mask
    mods: tuple[ScoreMod, ...]
    own: tuple[Any, ...]
    """arrays of the mask, then of the modifications"""
    scalars: Scalars
    length: int
    """of all sequences, where cache_seqlens is not an array"""


WRITTEN = ("k_cache", "v_cache")


def attend(named: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], scalars: Scalars) -> Any:
    """out, or (out, lse). `named`: by name in `decode.POINTERS`, None for what is not given; cache_seqlens may be a number."""
    q, length = named["q"], 0
    library = arrays.library_of(q, "q")
    device = library.device(q, "q")
    present = {name: x for name, x in named.items() if x is not None}
    if isinstance(present.get("cache_seqlens"), (int, np.integer)) and not isinstance(present["cache_seqlens"], bool):
        length = int(present.pop("cache_seqlens"))
    elif "cache_seqlens" not in present:
        raise TypeError("cache_seqlens: got None, expected an integer or an int32 array of shape (batch,)")
    if mask.arrays:
        mask = call._place_blocks(mask, library, q, device)
    own = (*mask.arrays, *(a for mod in mods for a in mod.arrays))
    if call._check_kinds(library, device, present, mask, mods):
        raise NotImplementedError(
            "attention_with_kvcache: has no gradient; call it under torch.no_grad() or on detached tensors"
        )
    if "k" in present:
        for name in WRITTEN:
            if not library.supports_out or not library.writable(present[name]):
                kind = "a read-only" if library.supports_out else f"a {library.name}"
                raise ValueError(f"{name}: got {kind} array, expected a writable one to append to")
    made = _Call(library, device, present, mask, mods, own, scalars, length)
    if device[0] == "cuda" and library.native:
        return _launch(made)
    if device[0] == "cpu" and (library is not arrays.NUMPY or not arrays.gpu_available()[0]):
        return _on_cpu(made)
    return _through_cupy(made)


def _problem(made: _Call) -> DecodeProblem:
    library = made.library
    views = {name: library.view(x, name) for name, x in made.present.items()}
    return make_decode_problem(views, made.mask, made.mods, [library.view(x) for x in made.own], made.scalars)


def _check_host(host: dict[str, Any], length: int, problem: DecodeProblem) -> None:
    """Lengths, pages and rows that the host can see are checked; those on a GPU are the caller's promise."""
    p = problem
    if "cu_seqlens_q" in host:
        cumulative = host["cu_seqlens_q"].astype(np.int64)
        steps = np.diff(cumulative)
        if cumulative[0] != 0 or (steps < 0).any() or cumulative[-1] > p.total_q:
            raise ValueError(
                f"cu_seqlens_q: got {cumulative.tolist()}, expected a non-decreasing row from 0 to at most {p.total_q}"
            )
        if steps.size and steps.max() > p.seqlen_q:
            raise ValueError(f"max_seqlen_q: got {p.seqlen_q}, expected at least {steps.max()}, the longest sequence")
    else:
        steps = np.full(p.batch, p.seqlen_new)
    added = steps if "k" in host else np.zeros(p.batch, np.int64)
    before = host["cache_seqlens"].astype(np.int64) if "cache_seqlens" in host else np.full(p.batch, length)
    pad = host["cache_leftpad"].astype(np.int64) if "cache_leftpad" in host else np.zeros(p.batch, np.int64)
    after = before + added
    if p.batch and (pad.min() < 0 or (before < pad).any()):
        raise ValueError(f"cache_leftpad: got {pad.tolist()}, expected 0 to cache_seqlens, {before.tolist()}")
    if p.batch and after.max() > p.capacity:
        raise ValueError(
            f"cache_seqlens: got {before.tolist()}, expected at most {p.capacity} with the new tokens, the cache's room"
        )
    if p.rotary_len and p.batch and (after - pad).max() > p.rotary_len:
        raise ValueError(f"rotary_cos: got {p.rotary_len} positions, expected at least {(after - pad).max()}")
    rows = host.get("cache_batch_idx", np.arange(p.batch))
    if p.batch and (rows.min() < 0 or rows.max() >= p.table_rows):
        raise ValueError(f"cache_batch_idx: got {rows.tolist()}, expected 0 to {p.table_rows - 1}")
    if "page_table" in host:
        for b in range(p.batch):
            pages = host["page_table"][rows[b], : -(-int(after[b]) // p.page_size)]
            if pages.size and (pages.min() < 0 or pages.max() >= p.pages):
                raise ValueError(
                    f"page_table: got page {pages.min()} to {pages.max()} in row {rows[b]}, expected 0 to {p.pages - 1}"
                )


def _on_cpu(made: _Call) -> Any:
    from cuattn import cpu_decode

    library, present = made.library, made.present
    problem = _problem(made)
    host = {name: library.host(x) for name, x in present.items()}
    _check_host(host, made.length, problem)
    call._debug(problem, "numpy backend")
    host.setdefault("cache_seqlens", np.full(problem.batch, made.length, np.int32))
    dense3 = not problem.packed and host["q"].ndim == 3
    if dense3:
        host.update({name: host[name][None] for name in ("q", "k", "v", "out") if name in host})
    own, count = [library.host(x) for x in made.own], len(made.mask.arrays)
    out, lse = cpu_decode.forward(
        **host,
        scale=problem.scale,
        mask=made.mask.bind(own[:count]),
        mods=call._bind_mods(made.mods, own[count:]),
        rotary_interleaved=problem.rotary_interleaved,
    )
    if dense3:
        out, lse = out[0], lse[0]
    result = present["out"] if "out" in present else library.from_host(out, present["q"])
    return (result, library.from_host(lse, present["q"])) if made.scalars.return_lse else result


def _through_cupy(made: _Call) -> Any:
    """Arrays that kernels cannot write in place: the GPU works on CuPy arrays, and what it has written travels back."""
    library = made.library
    problem = _problem(made)
    device = made.device
    if library is arrays.NUMPY:
        _check_host(made.present, made.length, problem)
        device = arrays.CUPY.current_device()
    with arrays.CUPY.guard(device):
        count = len(made.mask.arrays)
        given = {name: _bits(x) for name, x in made.present.items() if name != "out"}
        present = {name: library.to_cupy(x) for name, x in given.items()}
        own = tuple(library.to_cupy(x) for x in made.own)
        lent = _Call(
            arrays.CUPY,
            device,
            present,
            made.mask.bind(own[:count]),
            call._bind_mods(made.mods, own[count:]),
            own,
            made.scalars,
            made.length,
        )
        result = _launch(lent)
        library.retain((*present.values(), *own))
        out, *rest = result if made.scalars.return_lse else (result,)
        if "k" in present:
            for name in WRITTEN:
                library.give_back(present[name], given[name])
        result = library.give_back(out, made.present.get("out"))
        return (result, *(library.give_back(x) for x in rest)) if rest else result


def _bits(x: Any) -> Any:
    """A NumPy array of e4m3, which CuPy does not have, as its bits; anything else as it is."""
    return x.view(np.uint8) if isinstance(x, np.ndarray) and x.dtype.name in CACHE_DTYPES and x.dtype != np.int8 else x


# On the GPU -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """Steps 2 to 4 of a call, done."""

    plan: DecodePlan
    steps: tuple[call._Step, ...]
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    workspace: tuple[tuple[int, int], ...]
    """(slot, bytes) of each part; () where there is none"""


_INDICES = ("cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q")
"""What a kernel addresses memory by: copied to the host and checked with CUATTN_DEBUG=1."""
_NO_POINTERS = [0] * len(POINTERS)
_OUT, _LSE, _CALL, _LENGTH = (SLOT[name] for name in ("out", "lse", "call", "cache_seqlen"))
_CALL_BITS = (1 << 48) - 1
"""Of a call's number that a ticket has room for."""


def _launch(made: _Call) -> Any:
    library, device, present, mask, mods, own, scalars, length = made
    view = library.view
    views = {name: view(x, name) for name, x in present.items()}
    own_views = [view(x) for x in own] if own else ()
    signature: tuple[Any, ...] = tuple([(name, *v[1:], v[0] & 15) for name, v in views.items()])
    if own:
        signature += tuple([(*v[1:], v[0] & 15) for v in own_views])
    key = ("decode", device, signature, mask.key(), tuple([m.key() for m in mods]) if mods else (), scalars)
    with library.guard(device):
        try:
            prepared = call._prepared.get(key)
        except TypeError:  # an option that cannot be hashed is not a valid one either: let the checks name it
            prepared = None
        if prepared is None:
            prepared = _prepare(key, views, mask, mods, own_views, scalars, device)
        plan: DecodePlan = prepared.plan
        if os.environ.get("CUATTN_DEBUG"):
            host = {name: library.host(present[name]) for name in _INDICES if name in present}
            _check_host({**host, **{name: None for name in ("k",) if name in present}}, length, plan.problem)
        out = present.get("out")
        if out is None:
            out = library.empty(prepared.out_shape, plan.problem.dtype, device)
        lse = library.empty(prepared.lse_shape, plan.problem.real, device) if scalars.return_lse else None
        if not prepared.steps:
            return out if lse is None else (out, lse)
        pointers = _NO_POINTERS.copy()
        for name, v in views.items():
            pointers[SLOT[name]] = v[0]
        if "out" not in views:
            pointers[_OUT] = view(out)[0]
        pointers[_LSE] = 0 if lse is None else view(lse)[0]
        pointers[_CALL] = next(call._calls) & _CALL_BITS
        pointers[_LENGTH] = min(max(length, 0), plan.problem.capacity)
        if own:
            pointers += [v[0] for v in own_views]
        workspace = call._allocate(library, device, prepared.workspace, plan, pointers) if prepared.workspace else None
        stream = call._Stream(library.stream(device))
        for step in prepared.steps:
            packed = np.void(step.parameters.pack(pointers))
            step.function(step.grid, step.block, (packed,), step.smem_bytes, stream)
        del workspace  # its memory is reused in stream order
    return out if lse is None else (out, lse)


def _prepare(
    key: Any,
    views: dict[str, View],
    mask: Mask,
    mods: tuple[ScoreMod, ...],
    own_views: Sequence[View],
    scalars: Scalars,
    device: ArrayDevice,
) -> _Prepared:
    """Problem, plan and kernels of a call seen for the first time; the device is current."""
    mask, mods = mask.bind(own_views[: len(mask.arrays)]), call._bind_mods(mods, own_views[len(mask.arrays) :])
    problem = make_decode_problem(views, mask, mods, own_views, scalars)
    plan = make_decode_plan(problem, call.device_of(device[1]))
    call._debug(problem, plan)
    steps = () if plan.empty else prepare_steps(plan)
    sizes = zip((SLOT[name] for name in WORKSPACE), plan.workspace, strict=True)
    q = views["q"].shape
    prepared = _Prepared(
        plan, steps, (*q[:-1], problem.head_dim_v), lse_shape(problem, q), tuple(sizes) if any(plan.workspace) else ()
    )
    call._remember(key, prepared)
    return prepared


def prepare_steps(plan: DecodePlan) -> tuple[call._Step, ...]:
    """The kernels of a plan, loaded, with their grids."""
    p, steps = plan.problem, []
    for role, unit in decode_units(plan).items():
        grid = plan.grid
        if role == "append":
            tokens = p.total_q if p.packed else p.batch * p.seqlen_new
            grid = (-(-tokens * p.num_heads_kv // (APPEND_THREADS // 32)), 1, 1)
        if all(grid):
            parameters = DecodeParameters(plan, role == "decode")
            steps.append(call._Step(call._load(unit, plan), grid, (unit.threads, 1, 1), unit.smem_bytes, parameters))
    return tuple(steps)
