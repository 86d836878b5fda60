"""`python -m bench host`: time from call to return of a warm call, on a problem so small that the GPU waits for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.baselines import Baseline
from bench.cases import HOST
from bench.forward import OURS, ours
from bench.inputs import Arrays, CupyArrays, Inputs, TorchArrays, torch_on_gpu
from bench.results import Row, Store, make_row
from bench.timing import Deadline, measure_host

CALLS = 4000
QUICK_CALLS = 2000


def run(baselines: Sequence[Baseline], calls: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Measure on CuPy arrays and on PyTorch tensors; peers join on the tensors they take."""
    kinds: list[tuple[Arrays, list[Baseline]]] = [(CupyArrays(), [])]
    if torch_on_gpu():
        peers = [b for b in baselines if b.name in ("cudnn", "flash", "fa3", "fa4") and not b.declines(HOST)]
        kinds.append((TorchArrays(), peers))
    for arrays, peers in kinds:
        if deadline.passed:
            print(f"time limit: {arrays.name} arrays not measured")
            return
        case = dataclasses.replace(HOST, bench=f"host/{arrays.name}")
        inputs = Inputs.of(case, arrays)
        times = measure_host([ours(inputs), *(b.contender(inputs) for b in peers)], calls)
        if OURS not in times:
            continue
        timing = times.pop(OURS)
        others = "  ".join(f"{name} {t.us:.1f}" for name, t in times.items())
        note = f" | {others} us" if others else ""
        print(f"host, {arrays.name} arrays: {timing.us:.1f} us (spread {100 * timing.spread:.0f}%){note}", flush=True)
        store.add(make_row(case, timing.us, {name: t.us for name, t in times.items()}, env, None))
