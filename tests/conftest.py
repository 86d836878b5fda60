"""Backends, GPU selection, the compilation pass and the GPU report.

A test that takes `backend` runs twice with the same body: on NumPy arrays with the NumPy backend, and, marked `gpu`, on CuPy
arrays with the CUDA kernels. Before the first GPU test, the kernels of every collected case are compiled in parallel.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import arrays, jit
from cuattn.backward import BackwardPlan
from cuattn.codegen import backward_units, units
from tests.cases import PREPARED, Case, answer, questions
from tests.source_hash import source_hash

REPORT = Path(__file__).parent / "gpu_report.json"


class NumPyBackend:
    """NumPy arrays, computed by cuattn/cpu.py."""

    name = "numpy"

    def put(self, x: np.ndarray) -> Any:
        return x

    def get(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Everything that is allocated and not yet written reads as NaN."""
        empty = np.empty

        def poisoned_empty(*args: Any, **kwargs: Any) -> np.ndarray:
            x = empty(*args, **kwargs)
            x.reshape(-1).view(np.uint8)[...] = 0xFF
            return x

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "empty", poisoned_empty)
            yield


class CuPyBackend:
    """CuPy arrays on the current device, computed by the CUDA kernels."""

    name = "cupy"

    def put(self, x: np.ndarray) -> Any:
        import cupy

        return cupy.asarray(x)

    def get(self, x: Any) -> np.ndarray:
        import cupy

        return cupy.asnumpy(x)

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """Outputs and workspaces hold NaN (all bits set) until a kernel writes them."""
        import cupy

        pool = cupy.get_default_memory_pool()

        def malloc(size: int) -> Any:
            memory = pool.malloc(size)
            if size:
                memory.memset_async(0xFF, size, cupy.cuda.get_current_stream())
            return memory

        with cupy.cuda.using_allocator(malloc):
            yield


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NumPyBackend | CuPyBackend:
    if request.param == "cupy":
        return CuPyBackend()
    force_numpy(monkeypatch)
    return NumPyBackend()


@pytest.fixture
def numpy_backend(monkeypatch: pytest.MonkeyPatch) -> NumPyBackend:
    """The NumPy backend, whatever the machine has."""
    force_numpy(monkeypatch)
    return NumPyBackend()


@pytest.fixture
def cupy_backend() -> CuPyBackend:
    """The CUDA kernels; a test that takes this is marked `gpu`."""
    return CuPyBackend()


def force_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy arrays would travel to a GPU where there is one: pretend that there is none."""
    monkeypatch.setattr(arrays, "gpu_available", lambda: (False, "the test asks for the NumPy backend"))


# GPU selection and the compilation pass -------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    usable, reason = arrays.gpu_available()
    if not usable:
        skip = pytest.mark.skip(reason=f"no usable GPU: {reason}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    else:
        items.sort(key=lambda item: not _cases(item))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "compile the kernels of the selected GPU cases for ARCH (sm_90a, ...), which needs no GPU, and run nothing"
    parser.addoption("--compile-for", metavar="ARCH", help=text)


COMPILING: list[concurrent.futures.Future[Any]] = []
"""The kernels of the cases, in the order of the tests, which run meanwhile."""


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs a part of the tests of another one (`pytest -n`)."""
    return hasattr(config, "workerinput")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start to compile the kernels of all GPU cases, and ask the oracle: one by one would take most of a run's time."""
    items = [item for item in session.items if "gpu" in item.keywords]
    arch = session.config.getoption("compile_for", None)
    if arch:
        jobs = _jobs(items, arch=arch)
        jit.compile_many(jobs)
        pytest.exit(f"compiled {len(jobs)} kernels for {arch} into {jit.cache_folder()}", returncode=0)
    if session.config.option.collectonly or is_worker(session.config) or not arrays.gpu_available()[0]:
        return  # workers compile in parallel as they are
    start = time.perf_counter()
    jobs = _jobs(items)
    if not jobs:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)  # NVRTC releases the interpreter
    COMPILING.extend(pool.submit(jit.build, *job) for job in jobs)
    pool.shutdown(wait=False)
    planned = time.perf_counter()
    backward = _distinct(items, "backward")
    forward = dict.fromkeys(c for item in items if "backward" not in item.nodeid for c in _cases(item))
    asked = [q for c in forward for q in questions(c, False)] + [q for c in backward for q in questions(c, True)]
    _ask_ahead(asked)
    if reporter is not None:
        took = f"{len(asked)} answers of the oracle in {time.perf_counter() - planned:.1f} s"
        reporter.write_line(f"compiling {len(jobs)} kernels, planned in {planned - start:.1f} s; {took}")


def _distinct(items: Iterable[pytest.Item], word: str) -> dict[Case, None]:
    """The cases of tests whose name has a word in it."""
    return dict.fromkeys(c for item in items if word in item.nodeid for c in _cases(item))


def _jobs(items: Sequence[pytest.Item], **options: Any) -> list[tuple[str, str]]:
    """(source, arch) of the kernels of all cases, in the order of the tests; options: of `explain`."""
    plans = [_plan(c, **options) for c in _distinct(items, "")]
    plans += [_plan(c, backward=True, **options) for c in _distinct(items, "backward")]
    plans += [_plan(c, backward=True, deterministic=True, **options) for c in _distinct(items, "deterministic")]
    return [*dict.fromkeys((unit.source, p.device.arch) for p in plans if p is not None for unit in _units(p).values())]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that are no cases come last, and alone: some of them look at the cache of kernels."""
    if COMPILING and not _cases(item):
        concurrent.futures.wait(COMPILING)  # one that failed to compile is the business of its test
        COMPILING.clear()


def _ask_ahead(asked: list[Any]) -> None:
    """Answers in worker processes, where there are many questions and processors."""
    workers = (os.cpu_count() or 1) - 1
    if workers < 4 or len(asked) < 32:
        return
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    with pytest.MonkeyPatch.context() as patch:
        for name in threads:
            patch.setenv(name, "1")
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            PREPARED.update(zip(asked, pool.map(answer, asked, chunksize=4), strict=True))


def _cases(item: pytest.Item) -> list[Case]:
    """Cases among a test's parameters."""
    callspec = getattr(item, "callspec", None)
    return [v for v in callspec.params.values() if isinstance(v, Case)] if callspec is not None else []


def _plan(case: Case, **options: Any) -> Any:
    """The plan of a case, made without touching the GPU; None where that fails, which the case's test will report."""
    with contextlib.suppress(Exception):
        return cuattn.explain(**case.arguments(), **options)


def _units(plan: Any) -> dict[str, Any]:
    return backward_units(plan) if isinstance(plan, BackwardPlan) else units(plan)


# The GPU report ------------------------------------------------------------------------------------------------------------


class GpuReport:
    """Counts the outcomes of GPU tests and writes tests/gpu_report.json when the whole GPU suite has run."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" not in report.keywords:
            return
        if report.outcome != "passed" or report.nodeid not in self.outcomes:
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        partial = config.option.keyword or config.option.deselect or session.shouldfail
        whole = not partial and not is_worker(config) and all(Path(arg).is_dir() for arg in config.args)
        if whole and config.option.markexpr == "gpu" and self.outcomes and arrays.gpu_available()[0]:
            REPORT.write_text(json.dumps(self.summary(), indent=1) + "\n")

    def summary(self) -> dict[str, Any]:
        names = list(self.outcomes.values())
        counts = {outcome: names.count(outcome) for outcome in ("passed", "failed", "skipped")}
        failures = sorted(node for node, outcome in self.outcomes.items() if outcome == "failed")
        return {**environment(), **counts, "failures": failures}


def environment() -> dict[str, Any]:
    """What the GPU tests ran on."""
    import cupy

    info = cuattn.backend_info()
    kernel_module = Path("/proc/driver/nvidia/version")
    driver = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", kernel_module.read_text()) if kernel_module.exists() else None
    cuda = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "source_hash": source_hash(),
        "gpu": info.gpu,
        "driver": driver[1] if driver else info.driver,
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "nvrtc": info.nvrtc,
        "cupy": info.cupy,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GpuReport(), "gpu-report")


# Guard bands ---------------------------------------------------------------------------------------------------------------

GUARD = 61.0
"""Written around an output; exact in every dtype, and no result of these tests."""
BAND = 1 << 14
"""Elements on either side of an output: a whole tile of 128 x 128."""


class Guarded:
    """An output array filled with NaN inside a band of memory that nobody may write."""

    def __init__(self, backend: Any, shape: tuple[int, ...], dtype: Any, *, strided: bool = False) -> None:
        self._get = backend.get
        if strided:  # a band along every axis, so that rows are neither contiguous nor aligned
            margins = [(1, 2)] * (len(shape) - 1) + [(3, 5)]
            base = np.full([n + before + after for n, (before, after) in zip(shape, margins, strict=True)], GUARD, dtype)
            self._index: Any = tuple(slice(before, before + n) for n, (before, _) in zip(shape, margins, strict=True))
        else:
            size = int(np.prod(shape))
            base = np.full(size + 2 * BAND, GUARD, dtype)
            self._index = slice(BAND, BAND + size)
        self._outside = np.ones(base.shape, np.bool_)
        self._outside[self._index] = False
        base[self._index] = np.nan
        self._base = backend.put(base)
        self.array = self._base[self._index].reshape(shape) if not strided else self._base[self._index]

    def check(self) -> None:
        """Fail if anything around the array has changed."""
        base = self._get(self._base).astype(np.float64)
        changed = np.argwhere(self._outside & (base != GUARD))
        assert not len(changed), f"{len(changed)} elements outside the output were written, the first at {tuple(changed[0])}"


@pytest.fixture
def guarded(backend: Any) -> Callable[..., Guarded]:
    """guarded(shape, dtype, strided=False): an output of this test's backend inside a guard band."""
    return lambda shape, dtype, **options: Guarded(backend, shape, dtype, **options)
