"""Time on the GPU and time on the host, for several contenders in interleaved rounds."""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[], Any]

ROUND_US = 20_000.0
"""GPU time that one round of one contender aims at."""
MAX_CALLS = 50
MAX_SPIN_US = 20_000.0
DRAIN = 50
"""Host timing empties the launch queue after this many calls: far fewer than a full queue (1024) holds."""

WINDOW = 200
"""Calls of a contender between two of its turns, in host timing."""
LEAST_WARM, MOST_WARM = 0.5, 5.0
"""Seconds of calls before the host is timed."""
FALL = 0.02
"""A median that is lower by less than this has not fallen."""

SPIN_SOURCE = r"""
extern "C" __global__ void spin(unsigned long long ns) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - start < ns);
}
"""


class Timing(NamedTuple):
    """Median microseconds of a call, and the spread (largest - smallest) / median over the rounds."""

    us: float
    spread: float
    p99: float | None = None
    """99 of 100 calls took less; host time alone"""

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        median = statistics.median(samples)
        return Timing(median, (max(samples) - min(samples)) / median)


@dataclass
class Contender:
    """Something to time: `calls` do the same work on different inputs and take turns.

    `wait`, where given, blocks until a call's result is complete: for libraries whose work is on a stream of their own, which
    events on the current stream do not see. `context` is entered around each round, outside the clock.
    """

    name: str
    calls: Sequence[Call]
    wait: Callable[[Any], Any] | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    turn: int = field(default=0, repr=False)

    def __call__(self) -> Any:
        self.turn += 1
        return self.calls[self.turn % len(self.calls)]()


@functools.lru_cache(maxsize=1)
def _spin() -> Any:
    import cupy

    return cupy.RawKernel(SPIN_SOURCE, "spin")


def synchronize() -> None:
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


def gpu_round(contender: Contender, calls: int, queue_us: float) -> float:
    """Microseconds of one call: GPU time of `calls` calls, queued while the GPU spins for `queue_us`."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    with contender.context():
        if contender.wait is not None:
            synchronize()
            begin = time.perf_counter_ns()
            for _ in range(calls):
                result = contender()
            contender.wait(result)
            return (time.perf_counter_ns() - begin) * 1e-3 / calls
        _spin()((1,), (1,), (np.uint64(min(queue_us, MAX_SPIN_US) * 1e3),))
        start.record()
        for _ in range(calls):
            contender()
        stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e3 / calls


def warm_up(contender: Contender) -> tuple[int, float]:
    """Compile, load and try each input set; returns (calls per round, host microseconds of a call)."""
    host = []
    with contender.context():
        for _ in range(max(3, len(contender.calls))):
            begin = time.perf_counter_ns()
            contender()
            host.append((time.perf_counter_ns() - begin) * 1e-3)
            synchronize()
    once = gpu_round(contender, 2, 2 * min(host) + 50)
    return int(np.clip(ROUND_US / once, 2, MAX_CALLS)), min(host)


def measure(contenders: Sequence[Contender], rounds: int, report: Callable[[str], None] = print) -> dict[str, Timing]:
    """Median GPU time of each contender that works; `report` hears why one does not."""
    ready: list[tuple[Contender, int, float]] = []
    for contender in contenders:
        try:
            ready.append((contender, *warm_up(contender)))
        except Exception as error:
            report(f"  ! {contender.name}: {first_line(error)}")
    samples: dict[str, list[float]] = {contender.name: [] for contender, _, _ in ready}
    for turn in range(rounds):
        # NOTE: in another order each time. A GPU at its power limit is faster for a while after one that needed less of it.
        for contender, calls, host in random.Random(turn).sample(ready, len(ready)):
            samples[contender.name].append(gpu_round(contender, calls, 1.5 * calls * host + 50))
    return {name: Timing.of(values) for name, values in samples.items()}


def host_times(contender: Contender, calls: int) -> list[float]:
    """Microseconds from call to return of each of `calls` calls, in batches with an empty launch queue at the start."""
    times = []
    with contender.context():
        for done in range(0, calls, DRAIN):
            synchronize()
            for _ in range(min(DRAIN, calls - done)):
                begin = time.perf_counter_ns()
                contender()
                times.append((time.perf_counter_ns() - begin) * 1e-3)
    synchronize()
    return times


def settle(contenders: Sequence[Contender]) -> None:
    """Warm calls in turn, for LEAST_WARM seconds and until no median of a window falls any more, MOST_WARM at most.

    The first row of a process would otherwise be that of a processor below its clock, whoever is in it.
    """
    start, lowest = time.monotonic(), {contender.name: float("inf") for contender in contenders}
    falling = True
    while (falling or time.monotonic() - start < LEAST_WARM) and time.monotonic() - start < MOST_WARM:
        falling = False
        for contender in contenders:
            median = statistics.median(host_times(contender, WINDOW))
            falling |= median < (1 - FALL) * lowest[contender.name]
            lowest[contender.name] = min(median, lowest[contender.name])


def measure_host(contenders: Sequence[Contender], calls: int, report: Callable[[str], None] = print) -> dict[str, Timing]:
    """Median host time of a warm call, over at least `calls` calls of each contender in interleaved rounds of WINDOW."""
    ready: list[Contender] = []
    for contender in contenders:
        try:
            host_times(contender, 2 * DRAIN)
            ready.append(contender)
        except Exception as error:
            report(f"  ! {contender.name}: {first_line(error)}")
    settle(ready)
    samples: dict[str, list[list[float]]] = {contender.name: [] for contender in ready}
    for _ in range(-(-calls // WINDOW)):
        for contender in ready:
            samples[contender.name].append(host_times(contender, WINDOW))
    result = {}
    for name, batches in samples.items():
        spread = Timing.of([statistics.median(batch) for batch in batches]).spread
        times = [t for batch in batches for t in batch]
        result[name] = Timing(statistics.median(times), spread, float(np.percentile(times, 99)))
    return result


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


class Deadline:
    """A limit on the wall time of a part; a case that starts before it is finished."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """seconds"""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return not self.left
