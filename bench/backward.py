"""`python -m bench backward`: GPU time of the gradients alone, beside every peer that has them for the case."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.baselines import BASELINES, Baseline
from bench.cases import Case
from bench.ceilings import Ceilings
from bench.forward import DISAGREE, OURS, difference, explained, l2_bytes, line
from bench.forward import plan as forward_plan
from bench.forward import sources as forward_sources
from bench.inputs import Arrays, Inputs
from bench.results import Row, make_row
from bench.timing import Contender, first_line, measure
from cuattn.backward import BackwardPlan
from cuattn.plan import Plan

GRADIENTS = ("dq", "dk", "dv", "dbias")


def peer_names(wanted: Sequence[str]) -> list[str]:
    """Of the named baselines, or of all, those that have gradients; prints why another has not."""
    named = [b for b in BASELINES if not wanted or b.name in wanted]
    for baseline in named:
        if baseline.no_gradient:
            print(f"  - {baseline.name}: {baseline.no_gradient}")
    unknown = [name for name in wanted if name not in {b.name for b in BASELINES}]
    return [*(b.name for b in named if not b.no_gradient), *unknown]


def ours(inputs: Inputs, douts: Sequence[Any]) -> Contender:
    """The public call on each set of inputs, after a forward of its own."""
    import cuattn

    packed = inputs.case.packed
    forward = cuattn.attention_varlen if packed else cuattn.attention
    backward = cuattn.attention_varlen_backward if packed else cuattn.attention_backward
    packing, options, calls = inputs.packing(), inputs.options(), []
    for qkv, dout in zip(inputs.sets, douts, strict=True):
        out, lse = forward(*qkv, *packing, return_lse=True, **options)
        calls.append(functools.partial(backward, dout, *qkv, out, lse, *packing, **options))
    return Contender(OURS, calls)


def theirs(baseline: Baseline, inputs: Inputs, douts: Sequence[Any]) -> Contender:
    """A peer's gradients through autograd: its forward has run once for each set of inputs, its graph is kept."""
    import torch

    sets = [tuple(x.detach().requires_grad_() for x in qkv) for qkv in inputs.sets]
    bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_()
    leaves = dataclasses.replace(inputs, sets=sets, bias=bias)
    context = functools.partial(conditions, baseline, inputs.case)
    calls = []
    with context():
        for qkv, forward, dout in zip(sets, baseline.calls(leaves), douts, strict=True):
            result = forward()
            out = result[0] if isinstance(result, (tuple, list)) else result
            wanted = qkv if bias is None else (*qkv, bias)
            dout = dout.transpose(-3, -2) if baseline.heads_first else dout
            calls.append(functools.partial(torch.autograd.grad, out, wanted, dout, retain_graph=True))
    return Contender(baseline.name, calls, context=context)


@contextlib.contextmanager
def conditions(baseline: Baseline, case: Case) -> Iterator[None]:
    """What the peer needs around its calls; a deterministic case asks PyTorch's own kernels for determinism too."""
    with baseline.context():
        if "deterministic" not in case.mods:
            yield
            return
        import torch

        torch.utils.deterministic.fill_uninitialized_memory = False  # a check for users, at the cost of a pass over memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def check_peers(mine: Contender, peers: Sequence[Contender], case: Case) -> None:
    """Print a warning for every gradient of a peer that is another than ours; dropout is random, so it is not compared."""
    if "dropout" in case.mods or not peers:
        return
    expected = [x for x in mine.calls[0]()[: len(GRADIENTS)] if x is not None]
    for peer in peers:
        try:
            with peer.context():
                found = peer.calls[0]()
            gaps = [difference(ours, theirs, False) for ours, theirs in zip(expected, found, strict=True)]
        except Exception:
            continue  # measure() reports why the peer does not run
        for name, gap in zip(GRADIENTS, gaps, strict=False):
            if gap is not None and not gap <= DISAGREE:
                print(f"  ! {peer.name}: {name} differs by {gap:.2g} of its largest element")


def reference_error(case: Case, arrays: Arrays) -> float:
    """Largest error of dq, dk and dv of a small problem against the float64 reference, each relative to its largest element."""
    import cuattn
    from cuattn import reference

    small = dataclasses.replace(case, batch=1, num_heads=2, num_heads_kv=2, seqlen_q=1024, seqlen_k=1024)
    inputs = Inputs.of(small, arrays)
    (qkv,), (dout,) = inputs.sets[:1], inputs.cotangents()[:1]
    out, lse = cuattn.attention(*qkv, return_lse=True, **inputs.options())
    found = cuattn.attention_backward(dout, *qkv, out, lse, **inputs.options())
    host = [arrays.get(x) for x in (dout, *qkv)]
    expected = reference.backward(*host, scale=small.head_dim**-0.5, mask=small.mask_object(), dtype=np.float64)
    pairs = zip((found.dq, found.dk, found.dv), (expected.dq, expected.dk, expected.dv), strict=True)
    return max(float(np.abs(np.asarray(arrays.get(x), np.float64) - y).max() / np.abs(y).max()) for x, y in pairs)


def run_case(
    case: Case, baselines: Sequence[Baseline], arrays: Arrays, rounds: int, env: Row, ceilings: Ceilings | None
) -> Row | None:
    """Measure one case and print its line; None if cuattn itself does not run it."""
    inputs = Inputs.of(case, arrays, l2_bytes())
    douts = inputs.cotangents()
    mine = ours(inputs, douts)
    peers: list[Contender] = []
    for baseline in baselines:
        if baseline.declines_gradient(case):
            continue
        try:
            peers.append(theirs(baseline, inputs, douts))
        except Exception as error:
            print(f"  ! {baseline.name}: {first_line(error)}")
    times = measure([mine, *peers], rounds)
    if OURS not in times:
        print(f"{case!s:44} not measured")
        return None
    check_peers(mine, peers, case)
    more = {"error": reference_error(case, arrays)} if case.dtype == "float32" else {}
    timing = times.pop(OURS)
    row = make_row(case, timing.us, {name: t.us for name, t in times.items()}, env, ceilings, **more)
    print(line(case, row, timing), flush=True)
    return row


# Kernels ahead of time ------------------------------------------------------------------------------------------------


def plans(case: Case, arch: str | None = None) -> tuple[Plan, BackwardPlan]:
    """The plans of a case's forward and backward; with `arch` for a typical GPU of it, else for the current one."""
    backward = explained(case, arch, backward=True)
    assert isinstance(backward, BackwardPlan)
    return forward_plan(case, arch), backward


def sources(case: Case, arch: str | None = None) -> list[tuple[str, str]]:
    """(source, architecture) of every kernel that a case needs."""
    from cuattn.codegen import backward_units

    forward, backward = plans(case, arch)
    units = backward_units(backward).values()
    return [*forward_sources(case, arch), *((unit.source, forward.device.arch) for unit in units)]
