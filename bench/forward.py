"""`python -m bench forward`: GPU time of the forward pass beside every peer that serves the case."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.baselines import Baseline
from bench.cases import MODIFICATIONS, Case
from bench.ceilings import Ceilings
from bench.inputs import Arrays, HostArrays, Inputs, best_arrays
from bench.progress import within
from bench.results import Row, Store, make_row
from bench.timing import Contender, Deadline, Timing, first_line, measure
from cuattn.plan import Plan

OURS, PLAIN = "cuattn", "plain"
DISAGREE = 0.1
"""A peer whose output differs from ours by more than this fraction of the largest output computes something else."""


def ours(inputs: Inputs) -> Contender:
    """The public call on each set of inputs."""
    import cuattn

    attend = cuattn.attention_varlen if inputs.case.packed else cuattn.attention
    packing, options = inputs.packing(), inputs.options()
    return Contender(OURS, [functools.partial(attend, *qkv, *packing, **options) for qkv in inputs.sets])


def without_mods(inputs: Inputs) -> list[Contender]:
    """The same calls without the score modifications; none where there are none, or other options beside them."""
    if not inputs.case.mods or set(inputs.case.mods) - MODIFICATIONS:
        return []
    case = dataclasses.replace(inputs.case, mods=())
    calls = ours(dataclasses.replace(inputs, case=case, bias=None, slopes=None)).calls
    return [Contender(PLAIN, calls)]


def l2_bytes() -> int:
    import cupy

    return int(cupy.cuda.Device().attributes["L2CacheSize"])


def free_memory(arrays: Arrays) -> None:
    """Give cached blocks back: PyTorch and CuPy keep a pool each, and some baselines need a large part of the GPU."""
    import cupy

    arrays.release()
    cupy.get_default_memory_pool().free_all_blocks()


def difference(mine: Any, theirs: Any, heads_first: bool) -> float | None:
    """Largest difference of two results relative to the largest value of `mine`; None unless both are PyTorch tensors."""
    theirs = theirs[0] if isinstance(theirs, (tuple, list)) else theirs
    if type(mine).__module__ != "torch" or type(theirs).__module__ != "torch":
        return None
    theirs = theirs.transpose(-3, -2) if heads_first else theirs
    gap = (mine.float() - theirs.reshape(mine.shape).float()).abs().max()
    return float(gap / mine.float().abs().max())


def check_peers(mine: Contender, peers: Sequence[tuple[Baseline, Contender]], case: Case) -> None:
    """Print a warning for every peer that computes something else than we do; dropout is random, so it is not compared."""
    if "dropout" in case.mods:
        return
    for baseline, contender in peers:
        try:
            with contender.context():
                gap = difference(mine.calls[0](), contender.calls[0](), baseline.heads_first)
        except Exception:
            continue  # measure() reports why the peer does not run
        if gap is not None and not gap <= DISAGREE:
            print(f"  ! {contender.name}: result differs by {gap:.2g} of the largest output")


def reference_error(case: Case, arrays: Arrays) -> float:
    """Largest error of a small problem against the float64 reference, relative to the largest output."""
    import cuattn
    from cuattn import reference

    small = dataclasses.replace(case, batch=1, num_heads=2, num_heads_kv=2, seqlen_q=1024, seqlen_k=1024)
    inputs = Inputs.of(small, arrays)
    q, k, v = inputs.sets[0]
    out = np.asarray(arrays.get(cuattn.attention(q, k, v, **inputs.options())), np.float64)
    host = [arrays.get(x) for x in (q, k, v)]
    expected, _ = reference.forward(*host, scale=small.head_dim**-0.5, mask=small.mask_object(), mods=(), dtype=np.float64)
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def line(case: Case, row: Row, timing: Timing) -> str:
    """A case's printed line: us | TFLOP/s | GB/s | % of bound | x each peer."""
    bound = "     -" if row["bound_pct"] is None else f"{row['bound_pct']:5.1f}%"
    peers = "  ".join(f"x{us / row['us']:.2f} {name}" for name, us in row["peers"].items())
    rates = f"{row['us']:10.1f} us | {row['tflops']:6.1f} TFLOP/s | {row['gbps']:6.0f} GB/s | {bound}"
    more = f" | error {row['error']:.2e}" if "error" in row else ""
    more += f" | x{row['plain'] / row['us']:.3f} plain" if "plain" in row else ""
    return f"{case!s:44} {rates} | {peers}{more} (spread {100 * timing.spread:.0f}%)"


def run_case(
    case: Case, baselines: Sequence[Baseline], arrays: Arrays, rounds: int, env: Row, ceilings: Ceilings | None
) -> Row | None:
    """Measure one case and print its line; None if cuattn itself does not run it."""
    inputs = Inputs.of(case, arrays, l2_bytes())
    mine = ours(inputs)
    peers: list[tuple[Baseline, Contender]] = []
    for baseline in baselines:
        if baseline.declines(case):
            continue
        try:
            peers.append((baseline, baseline.contender(inputs)))
        except Exception as error:
            print(f"  ! {baseline.name}: {first_line(error)}")
    times = measure([mine, *without_mods(inputs), *(contender for _, contender in peers)], rounds)
    if OURS not in times:
        print(f"{case!s:44} not measured")
        return None
    check_peers(mine, peers, case)
    more = {"error": reference_error(case, arrays)} if case.dtype == "float32" else {}
    timing = times.pop(OURS)
    if PLAIN in times:
        more["plain"] = round(times.pop(PLAIN).us, 2)
    row = make_row(case, timing.us, {name: t.us for name, t in times.items()}, env, ceilings, **more)
    print(line(case, row, timing), flush=True)
    return row


def run(
    cases: Sequence[Case],
    baselines: Sequence[Baseline],
    rounds: int,
    store: Store,
    env: Row,
    ceilings: Ceilings | None,
    deadline: Deadline,
    run_case: Callable[..., Row | None] = run_case,
) -> None:
    """Measure the cases in order until the deadline, each by `run_case`, storing every row as it comes."""
    arrays = best_arrays()
    for case in within(deadline, cases):
        try:
            row = run_case(case, baselines, arrays, rounds, env, ceilings)
        except Exception as error:
            print(f"{case!s:44} failed: {first_line(error)}")
            row = None
        if row is not None:
            store.add(row)
        free_memory(arrays)


# Kernels ahead of time ------------------------------------------------------------------------------------------------


def explained(case: Case, arch: str | None, backward: bool = False) -> Any:
    """The plan of a case's forward, as its backward needs it, or of that backward; on `arch`, or on the current GPU."""
    import cuattn

    inputs = Inputs.of(case, HostArrays())
    q, k, v = inputs.sets[0]
    options = {**inputs.options(), "return_lse": case.backward, "arch": arch}
    if backward:
        options |= {"backward": True, "out": np.empty((*q.shape[:-1], case.head_dim_v), q.dtype)}
    return cuattn.explain(q, k, v, *inputs.packing(), **options)


def plan(case: Case, arch: str | None = None) -> Plan:
    """The plan of a case's forward; with `arch` for a typical GPU of it, else for the current one."""
    found = explained(case, arch)
    assert isinstance(found, Plan)
    return found


def sources(case: Case, arch: str | None = None) -> list[tuple[str, str]]:
    """(source, architecture) of every kernel that the forward of a case needs."""
    from cuattn.codegen import units

    chosen = plan(case, arch)
    return [(unit.source, chosen.device.arch) for unit in units(chosen).values()]


def prewarm(cases: Sequence[Any], sources: Callable[[Any], list[tuple[str, str]]] = sources) -> None:
    """Compile what the cases need on all cores at once; a kernel that does not compile is reported by its case."""
    from cuattn import jit

    jobs: dict[tuple[str, str], None] = {}
    for case in cases:
        try:
            jobs.update(dict.fromkeys(sources(case)))
        except Exception as error:
            print(f"  ! {case}: {first_line(error)}")
    with contextlib.suppress(jit.CompileError):
        jit.compile_many(jobs)
    print(f"{len(jobs)} kernels compiled or in the cache", flush=True)
