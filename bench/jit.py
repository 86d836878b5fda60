"""`python -m bench jit`: the first call of a fresh process, with an empty cache and with a filled disk cache."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from bench.cases import Case
from bench.progress import within
from bench.results import ROOT, Row, Store, make_row
from bench.timing import Deadline

PROCESS_LIMIT = 120
"""Seconds after which a process counts as hung."""


def seconds(case: Case, folder: str) -> float:
    """The first call in a fresh process whose caches, those of CuPy and CUDA included, live in `folder`."""
    arguments = (case.dtype, case.head_dim, case.num_heads, case.seqlen_q)
    environment = {**os.environ, "CUATTN_CACHE_DIR": f"{folder}/cuattn", "CUPY_CACHE_DIR": f"{folder}/cupy"}
    environment["CUDA_CACHE_PATH"] = f"{folder}/cuda"  # NVRTC and the driver keep a cache of their own
    command = [sys.executable, "-m", "bench.first_call", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PROCESS_LIMIT, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return float(done.stdout.split()[-1])


def run(cases: Sequence[Case], rounds: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Median over `rounds` pairs of processes: a cold one, then a warm one on the same folder."""
    for case in within(deadline, cases):
        samples: dict[str, list[float]] = {"cold": [], "warm": []}
        try:
            for _ in range(rounds):
                if deadline.passed and samples["warm"]:
                    break
                with tempfile.TemporaryDirectory() as folder:
                    for kind in samples:
                        samples[kind].append(seconds(case, folder))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"first call, {case}: {error}")
            continue
        medians = {kind: statistics.median(values) for kind, values in samples.items()}
        spread = " ".join(f"{min(v):.3f}-{max(v):.3f}" for v in samples.values())
        print(f"first call, {case}: cold {medians['cold']:.3f} s, warm {medians['warm']:.3f} s ({spread})", flush=True)
        for kind, value in medians.items():
            store.add(make_row(dataclasses.replace(case, bench=f"jit/{kind}"), value * 1e6, {}, env, None))
