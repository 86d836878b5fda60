"""`attention_with_kvcache` in the six steps of call.py, whose parts it uses: one or two launches, caches written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cuattn import arrays, call
from cuattn.arrays import Device as ArrayDevice
from cuattn.arrays import Gathered, Library, View
from cuattn.codegen import decode_units
from cuattn.decode import (
    APPEND_THREADS,
    CACHE_DTYPES,
    POINTERS,
    SHARED,
    SLOT,
    WORKSPACE,
    DecodePlan,
    DecodeProblem,
    Scalars,
    lse_shape,
    make_decode_plan,
    make_decode_problem,
)
from cuattn.launch import Launch, decode_struct
from cuattn.masks import Mask
from cuattn.problem import max_seqlen_of
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


def attend(present: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...], scalars: Scalars) -> Any:
    """out, or (out, lse). present: by name in `decode.POINTERS`, q and the caches first; cache_seqlens may be a number."""
    q, lengths, length = present["q"], present["cache_seqlens"], 0
    library = arrays.library_of(q, "q")
    device = library.device(q, "q")
    if type(lengths) is not type(q):
        if lengths is None:
            raise TypeError("cache_seqlens: got None, expected an integer or an int32 array of shape (batch,)")
        if isinstance(lengths, (int, np.integer)) and not isinstance(lengths, bool):
            length = int(present.pop("cache_seqlens"))
    if scalars.head_dim_v is None and "v_cache" not in present:
        raise TypeError("v_cache: got None, expected an array, or head_dim_v where values are columns of the keys")
    if scalars.max_seqlen_q is not None and type(scalars.max_seqlen_q) is not int:
        scalars = scalars._replace(max_seqlen_q=max_seqlen_of("max_seqlen_q", scalars.max_seqlen_q))
    own: tuple[Any, ...] = ()
    if mods or mask.arrays:
        mask, own = call.own_arrays(mask, mods, library, q, device)
    gathered = call.gather(library, device, present, own, mask, mods)
    if gathered is None or gathered[2]:  # in place and without gradients, everything may be written
        _check_written(library, device, present, mask, mods)
    made: _Call = call.new(_Call, (library, device, present, mask, mods, own, scalars, length))
    if gathered is not None:
        return _launch(made, gathered)
    if device[0] == "cpu" and (library is not arrays.NUMPY or not arrays.gpu_available()[0]):
        return _on_cpu(made)
    return _through_cupy(made)


def _check_written(
    library: Library, device: ArrayDevice, present: dict[str, Any], mask: Mask, mods: tuple[ScoreMod, ...]
) -> None:
    """Raise for a call that asks for gradients, or would write what cannot be written."""
    needs_grad = call.check_kinds(library, device, present, mask, mods)
    if "out" in present:
        call.check_writable(present["out"])
    if needs_grad:
        raise NotImplementedError(
            "attention_with_kvcache: has no gradient; call it under torch.no_grad() or on detached tensors"
        )
    if "k" in present:
        for name in (n for n in WRITTEN if n in present):
            if not library.supports_out or not library.writable(present[name]):
                kind = "a read-only" if library.supports_out else f"a {library.name}"
                raise ValueError(f"{name}: got {kind} array, expected a writable one to append to")


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
    call.debug(problem, "numpy backend")
    host.setdefault("cache_seqlens", np.full(problem.batch, made.length, np.int32))
    if problem.latent:
        host.update({name: _values(host[of], name, problem) for name, of in SHARED.items() if of in host})
    dense3 = not problem.packed and host["q"].ndim == 3
    if dense3:
        host.update({name: host[name][None] for name in ("q", "k", "v", "out") if name in host})
    mask, mods = call.bind(made.mask, made.mods, [library.host(x) for x in made.own])
    out, lse = cpu_decode.forward(
        **host,
        scale=problem.scale,
        mask=mask,
        mods=mods,
        rotary_interleaved=problem.rotary_interleaved,
    )
    if dense3:
        out, lse = out[0], lse[0]
    result = present["out"] if "out" in present else library.from_host(out, present["q"])
    return (result, library.from_host(lse, present["q"])) if made.scalars.return_lse else result


def _values(source: Any, name: str, problem: DecodeProblem) -> Any:
    return source if name == "v_scale" else source[..., : problem.head_dim_v]


def _through_cupy(made: _Call) -> Any:
    """Arrays that kernels cannot write in place: the GPU works on CuPy arrays, and what it has written travels back."""
    library = made.library
    problem = _problem(made)
    device = made.device
    if library is arrays.NUMPY:
        _check_host(made.present, made.length, problem)
        device = arrays.CUPY.current_device()
    with arrays.CUPY.guard(device):
        given = {name: _bits(x) for name, x in made.present.items() if name != "out"}
        present = {name: library.to_cupy(x) for name, x in given.items()}
        own = tuple(library.to_cupy(x) for x in made.own)
        mask, mods = call.bind(made.mask, made.mods, own)
        lent = _Call(arrays.CUPY, device, present, mask, mods, own, made.scalars, made.length)
        gathered = call.gather(arrays.CUPY, device, present, own, mask, mods)
        assert gathered is not None
        result = _launch(lent, gathered)
        library.retain((*present.values(), *own))
        out, *rest = result if made.scalars.return_lse else (result,)
        if "k" in present:
            for name in (n for n in WRITTEN if n in present):
                library.give_back(present[name], given[name])
        result = library.give_back(out, made.present.get("out"))
        return (result, *(library.give_back(x) for x in rest)) if rest else result


def _bits(x: Any) -> Any:
    """A NumPy array of e4m3, which CuPy does not have, as its bits; anything else as it is."""
    return x.view(np.uint8) if isinstance(x, np.ndarray) and x.dtype.name in CACHE_DTYPES and x.dtype != np.int8 else x


# On the GPU -----------------------------------------------------------------------------------------------------------


_INDICES = ("cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q")
"""What a kernel addresses memory by: copied to the host and checked with CUATTN_DEBUG=1."""
_OUT, _LSE, _CALL, _LENGTH = (SLOT[name] for name in ("out", "lse", "call", "cache_seqlen"))
_CALL_BITS = (1 << 48) - 1
"""Of a call's number that a ticket has room for."""


def _holds_values(views: dict[str, View]) -> bool:
    """Whether a v_cache that begins where k_cache does is columns of it, in a call that means the same with head_dim_v."""
    k, v = views["k_cache"], views["v_cache"]
    alike = (v.strides, v.shape[:-1], v.dtype) == (k.strides, k.shape[:-1], k.dtype) and v.shape[-1] < k.shape[-1]
    return alike and not views.keys() & {"k", "v", "k_scale", "v_scale", "rotary_cos"}


def _launch(made: _Call, gathered: Gathered) -> Any:
    guard = made.library.guard(made.device)
    if guard is arrays.UNCHANGED:  # entering it takes longer than to look
        return _launch_here(made, gathered)
    with guard:
        return _launch_here(made, gathered)


def _launch_here(made: _Call, gathered: Gathered) -> Any:
    """The device is current."""
    library, device, present, mask, mods, _, scalars, length = made
    words, kinds, _ = gathered
    shared = words[1] == words[2] and "v_cache" in present  # q, k_cache and v_cache come first
    mod_keys = tuple([m.key() for m in mods]) if mods else ()
    key = ("decode", library.name, kinds, shared, mask.key(), mod_keys, scalars)
    prepared, makers = call.known(key) or call.remember(key, _prepare(made, shared), library, device)
    problem: Any = prepared.plan.problem
    if call.debugging():
        host = {name: library.host(present[name]) for name in _INDICES if name in present}
        _check_host({**host, **{name: None for name in ("k",) if name in present}}, length, problem)
    if length:
        length = min(max(length, 0), problem.capacity)
    words += (next(call.numbers) & _CALL_BITS, length)
    results = call.run(library, device, prepared, makers, words)
    return call.in_order(present.get("out"), results, scalars.return_lse)


def _prepare(made: _Call, shared: bool) -> call.Prepared:
    """Problem, plan and kernels of a call seen for the first time; the device is current.

    shared: whether k_cache and v_cache begin at the same address.
    """
    call.check_kinds(made.library, made.device, made.present, made.mask, made.mods)
    view = made.library.view
    views = {name: view(x, name) for name, x in made.present.items()}
    own_views = [view(x) for x in made.own]
    # What is kept must not keep the caller's arrays alive: masks and mods are bound to descriptions of them.
    mask, mods = call.bind(made.mask, made.mods, own_views)
    scalars = made.scalars
    if shared and _holds_values(views):
        scalars = scalars._replace(head_dim_v=views.pop("v_cache").shape[-1])
    problem = make_decode_problem(views, mask, mods, own_views, scalars)
    plan = make_decode_plan(problem, call.device_of(made.device[1]))
    call.debug(problem, plan)
    q = views["q"].shape
    results = [] if "out" in views else [call.Result(_OUT, (*q[:-1], problem.head_dim_v), problem.dtype)]
    results += [call.Result(_LSE, lse_shape(problem, q), problem.real)] if made.scalars.return_lse else []
    slots = (*[SLOT[name] for name in made.present], *range(len(POINTERS), len(POINTERS) + len(own_views)), _CALL, _LENGTH)
    workspace = tuple((SLOT[name], size) for name, size in zip(WORKSPACE, plan.workspace, strict=True) if size)
    layout = call.Layout(slots, tuple(results), workspace)
    return call.Prepared(plan, layout, [] if plan.empty else prepare_launches(plan, layout.position))


def prepare_launches(plan: DecodePlan, position: Mapping[int, int]) -> list[Launch]:
    """The kernels of a plan, loaded, with their grids."""
    p, launches = plan.problem, []
    for role, unit in decode_units(plan).items():
        grid = plan.grid
        if role == "append":
            tokens = p.total_q if p.packed else p.batch * p.seqlen_new
            grid = (-(-tokens * p.num_heads_kv // (APPEND_THREADS // 32)), 1, 1)
        for piece in range(plan.pieces if role == "decode" else 1) if all(grid) else ():
            struct = decode_struct(plan, role == "decode", piece)
            launches.append(Launch(call.load(unit, plan), grid, unit.threads, unit.smem_bytes, struct, position))
    return launches
