"""`python -m bench error`: the error of each library against float64, of results and gradients, on the same inputs.

The reference is PyTorch's textbook formula and its autograd on the inputs in float64. Two numbers for each array: the largest
error relative to its largest element, and the root of the mean square relative to that of the array. Needs PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import backward, forward
from bench.baselines import BASELINES, Baseline
from bench.cases import Case
from bench.inputs import Arrays, Inputs, best_arrays
from bench.progress import within
from bench.results import Row, Store, make_row
from bench.timing import Contender, Deadline, first_line

PEERS = ("cudnn", "flash", "efficient", "xformers", "fa3", "fa4")
"""Those worth a comparison; others are built of the same kernels, or do not round results to the input dtype."""
GRADIENTS = ("dq", "dk", "dv")

Errors = dict[str, tuple[float, float]]
"""(largest, root of the mean square) of each array"""


def error(found: Any, expected: Any) -> tuple[float, float]:
    """(largest, root of the mean square), relative to those of `expected`."""
    gap = found.double().reshape(expected.shape) - expected
    pairs = (gap.abs().max(), expected.abs().max()), (gap.square().mean().sqrt(), expected.square().mean().sqrt())
    worst, rms = (float(f"{float(own / whole):.3g}") for own, whole in pairs)
    return worst, rms


def reference(inputs: Inputs, dout: Any) -> dict[str, Any]:
    """out, dq, dk and dv of the first set of inputs."""
    (math,) = (baseline for baseline in BASELINES if baseline.name == "math")
    wide = dataclasses.replace(
        inputs,
        case=dataclasses.replace(inputs.case, dtype="float64"),
        sets=[tuple(x.double() for x in inputs.sets[0])],
    )
    return {"out": peer_output(math, wide), **gradients(backward.theirs(math, wide, [dout.double()]))}


def peer_output(baseline: Baseline, inputs: Inputs) -> Any:
    """A peer's result as a PyTorch tensor in our layout."""
    import torch

    with baseline.context():
        result = baseline.calls(inputs)[0]()
    out = result[0] if isinstance(result, (tuple, list)) else result
    out = out if isinstance(out, torch.Tensor) else torch.from_dlpack(out)
    return out.transpose(-3, -2) if baseline.heads_first else out


def gradients(contender: Contender) -> dict[str, Any]:
    with contender.context():
        return dict(zip(GRADIENTS, contender(), strict=False))


def errors_of(case: Case, baselines: Sequence[Baseline], arrays: Arrays) -> dict[str, Errors]:
    """By library."""
    inputs = Inputs.of(case, arrays)  # one set: they are small, and need not be cold
    (dout, *_) = inputs.cotangents()
    expected = reference(inputs, dout)
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (forward.OURS, lambda: {"out": forward.ours(inputs)()}),
        (forward.OURS, lambda: gradients(backward.ours(inputs, [dout]))),
    ]
    for baseline in baselines:
        if not baseline.declines(case):
            jobs.append((baseline.name, lambda baseline=baseline: {"out": peer_output(baseline, inputs)}))
        if not baseline.declines_gradient(case):
            jobs.append((baseline.name, lambda baseline=baseline: gradients(backward.theirs(baseline, inputs, [dout]))))
    found: dict[str, Errors] = {}
    for name, job in jobs:
        try:
            computed = job()
        except Exception as problem:
            print(f"  ! {name}: {first_line(problem)}")
            continue
        found.setdefault(name, {}).update({array: error(x, expected[array]) for array, x in computed.items()})
    return found


def line(name: str, errors: Errors) -> str:
    """A library's printed line: largest error, and in brackets the root of the mean square."""
    return f"  {name:12} " + "  ".join(f"{array} {worst:.2e} ({rms:.2e})" for array, (worst, rms) in errors.items())


def ratios(found: Mapping[str, dict[str, Errors]]) -> list[str]:
    """A line for each array of each case: our two numbers, and how many times each peer's they are.

    found: by case and library.
    """
    names = list(dict.fromkeys(name for errors in found.values() for name in errors if name != forward.OURS))
    lines = [f"{'rms (largest); ours over the peer':58} {'cuattn':>20}" + "".join(f" {name:>14}" for name in names)]
    for case, errors in found.items():
        for array, (worst, rms) in errors.get(forward.OURS, {}).items():
            cells = []
            for name in names:
                other = errors.get(name, {}).get(array)
                cells.append(f"{rms / other[1]:.2f} ({worst / other[0]:.2f})" if other else "")
            lines.append(f"{case:54} {array:3} {rms:9.2e} ({worst:.2e})" + "".join(f" {cell:>14}" for cell in cells))
    return lines


def run(cases: Sequence[Case], baselines: Sequence[Baseline], store: Store, env: Row, deadline: Deadline) -> None:
    """Measure the cases in order until the deadline, storing every row as it comes, and print them all once more."""
    arrays = best_arrays()
    found: dict[str, dict[str, Errors]] = {}
    for case in within(deadline, cases):
        try:
            errors = errors_of(case, baselines, arrays)
        except Exception as problem:
            print(f"{case}: {first_line(problem)}")
            continue
        print(f"{case}: largest error (root of the mean square) against float64", flush=True)
        for name, own in errors.items():
            print(line(name, own), flush=True)
        found[str(case)] = errors
        if forward.OURS in errors:
            store.add(make_row(case, None, {}, env, None, errors=errors))
        forward.free_memory(arrays)
    print("\n".join(ratios(found)), flush=True)
