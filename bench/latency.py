"""`python -m bench latency`: time from a call to its finished result, one call at a time: what a user waits for.

Host and GPU time together, on the host's clock, in interleaved rounds. p50 and p99 are over all calls of a contender.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from bench.baselines import Baseline
from bench.cases import Case
from bench.forward import OURS, free_memory, l2_bytes, ours
from bench.inputs import Inputs, best_arrays
from bench.progress import within
from bench.results import Row, Store, make_row
from bench.timing import Contender, Deadline, first_line, synchronize, warm_up

PEERS = ("cudnn", "flash", "xformers", "fa3", "fa4")
ROUNDS, CALLS = 5, 100
"""of a contender, and calls of a round"""
QUICK_ROUNDS = 2


def latencies(contender: Contender, calls: int) -> list[float]:
    """Microseconds of each of `calls` calls, the wait for its result included."""
    times = []
    with contender.context():
        for _ in range(calls):
            begin = time.perf_counter_ns()
            result = contender()
            if contender.wait is None:
                synchronize()
            else:
                contender.wait(result)
            times.append((time.perf_counter_ns() - begin) * 1e-3)
            del result
    return times


def measure(contenders: Sequence[Contender], rounds: int, calls: int = CALLS) -> dict[str, tuple[float, float]]:
    """(p50, p99) of each contender that works."""
    samples: dict[str, list[float]] = {}
    ready = []
    for contender in contenders:
        try:
            warm_up(contender)
            ready.append(contender)
        except Exception as error:
            print(f"  ! {contender.name}: {first_line(error)}")
    for _ in range(rounds):
        for contender in ready:
            samples.setdefault(contender.name, []).extend(latencies(contender, calls))
    found = {}
    for name, times in samples.items():
        p50, p99 = np.percentile(times, (50, 99))
        found[name] = (round(float(p50), 2), round(float(p99), 2))
    return found


def contenders(case: Case, baselines: Sequence[Baseline], inputs: Inputs) -> list[Contender]:
    """Ours, and the peers that serve the case; prints why another cannot be prepared."""
    found = [ours(inputs)]
    for baseline in baselines:
        if baseline.declines(case):
            continue
        try:
            found.append(baseline.contender(inputs))
        except Exception as error:
            print(f"  ! {baseline.name}: {first_line(error)}")
    return found


def run(cases: Sequence[Case], baselines: Sequence[Baseline], rounds: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Measure the cases in order until the deadline, storing every row as it comes."""
    arrays = best_arrays()
    for case in within(deadline, cases):
        try:
            found = measure(contenders(case, baselines, Inputs.of(case, arrays, l2_bytes())), rounds)
        except Exception as error:
            print(f"latency, {case}: {first_line(error)}")
            continue
        if OURS not in found:
            print(f"latency, {case}: not measured")
            continue
        p50, p99 = found.pop(OURS)
        others = "  ".join(f"{name} {a:.1f} / {b:.1f}" for name, (a, b) in found.items())
        print(f"latency, {case}: p50 {p50:.1f} us, p99 {p99:.1f} us | {others}", flush=True)
        peers, tails = ({name: pair[n] for name, pair in found.items()} for n in (0, 1))
        store.add(make_row(case, p50, peers, env, None, p99=p99, peers_p99=tails))
        free_memory(arrays)
