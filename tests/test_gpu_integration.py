"""What surrounds a kernel on the GPU: streams, graphs, threads, array libraries, devices, memory, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import reference
from cuattn.masks import Causal, Full
from tests.cases import DTYPES, KINDS, Case
from tests.tolerance import assert_close, limit, verify

pytestmark = pytest.mark.gpu

GRAPH_CASES = (
    Case("bfloat16", mask="causal", mods=("softcap",)),
    Case("float16", "ieee", 1, 1, 5003, 2, 1, 64),
    Case("float32", mask="boolean", sequences="lens", batch=4, dropout=0.2),
    Case("float32", "tf32", 4, 113, 203, mask="window", sequences="packed", mods=("alibi",), sinks=True),
    Case("float64", mask="block_sparse"),
)


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    return torch


@pytest.fixture
def busy(cupy: Any) -> Callable[[], None]:
    """busy(): keeps the current stream occupied for a while, so that whoever does not wait for it reads stale data."""
    source = """extern "C" __global__ void busy(long long cycles) {
        const long long start = clock64();
        while (clock64() - start < cycles) {}
    }"""
    kernel = cupy.RawKernel(source, "busy")
    kernel.compile()
    return lambda: kernel((1,), (1,), (500_000_000,))


def torch_put(torch: Any) -> Callable[[np.ndarray], Any]:
    def put(x: np.ndarray) -> Any:
        x = np.ascontiguousarray(x)
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16).cuda()
        return torch.from_numpy(x.copy()).cuda()

    return put


def torch_get(x: Any) -> np.ndarray:
    x = x.detach().cpu()
    if str(x.dtype) == "torch.bfloat16":
        import torch

        return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def call_of(case: Case) -> Callable[..., Any]:
    return cuattn.attention_varlen if case.packed else cuattn.attention


# Streams and graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_cupy_graph(cupy: Any, cupy_backend: Any, case: Case) -> None:
    """One warm call, then a capture; a replay computes from what the inputs hold by then."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arguments = case.arguments(cupy_backend.put)
        q = arguments["q"].copy()
        out = cupy.empty(case.out_shape, case.numpy_dtype)
        call_of(case)(**arguments, out=out)
        arguments["q"][...] = 0
        stream.begin_capture()
        call_of(case)(**arguments, out=out)
        graph = stream.end_capture()
        for _ in range(2):
            arguments["q"][...] = q
            out.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            verify(case, cupy.asnumpy(out))


@pytest.mark.parametrize("case", GRAPH_CASES, ids=str)
def test_torch_graph(torch: Any, case: Case) -> None:
    arguments = case.arguments(torch_put(torch))
    q = arguments["q"].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call_of(case)(**arguments)
    torch.cuda.current_stream().wait_stream(side)
    arguments["q"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call_of(case)(**arguments, return_lse=True)
    arguments["q"].copy_(q)
    graph.replay()
    torch.cuda.synchronize()
    verify(case, torch_get(out), torch_get(lse))


@pytest.mark.parametrize("non_blocking", [False, True])
def test_current_stream_without_synchronisation(cupy: Any, cupy_backend: Any, busy: Any, non_blocking: bool) -> None:
    case = Case("bfloat16", mask="causal", mods=("alibi",), sequences="kv_lens")
    stream = cupy.cuda.Stream(non_blocking=non_blocking)
    with stream:
        arguments = case.arguments(cupy_backend.put)
        q = arguments["q"].copy()
        call_of(case)(**arguments, return_lse=True)
        arguments["q"][...] = 0
        stream.synchronize()
        busy()
        arguments["q"][...] = q
        out, lse = call_of(case)(**arguments, return_lse=True)
        assert not stream.done, "the call waited for the GPU"
    stream.synchronize()
    verify(case, cupy.asnumpy(out), cupy.asnumpy(lse))


def test_torch_current_stream(torch: Any, busy: Any) -> None:
    cupy = pytest.importorskip("cupy")
    case = Case("float16", mask="window")
    arguments = case.arguments(torch_put(torch))
    q = arguments["q"].clone()
    arguments["q"].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call_of(case)(**arguments)
        stream.synchronize()
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            busy()
        arguments["q"].copy_(q)
        out = call_of(case)(**arguments)
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    verify(case, torch_get(out))


def test_threads(cupy: Any, cupy_backend: Any) -> None:
    """Threads that call at once, each on its own stream, some of them wanting one kernel that nobody has compiled yet."""
    cases = [Case(dtype, precision, head_dim=d, mask="window_left") for dtype, precision in KINDS[::2] for d in (72, 88)] * 2
    arguments = [case.arguments(cupy_backend.put) for case in cases]
    results: list[Any] = [None] * len(cases)
    barrier = threading.Barrier(len(cases))

    def work(index: int) -> None:
        try:
            barrier.wait()
            with cupy.cuda.Stream(non_blocking=True) as stream:
                out = cuattn.attention(**arguments[index])
                stream.synchronize()
                results[index] = cupy.asnumpy(out)
        except Exception as error:
            results[index] = error

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, result in zip(cases, results, strict=True):
        if isinstance(result, Exception):
            raise result
        verify(case, result)


# Array libraries and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_travel(dtype: str) -> None:
    case = Case(dtype, batch=4, sequences="lens", mask="boolean", mods=("bias",), sinks=True)
    target = np.full(case.out_shape, np.nan, case.numpy_dtype)
    out, lse = case.run(return_lse=True, out=target)
    assert out is target
    assert isinstance(lse, np.ndarray)
    verify(case, out, lse)
    verify(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", ["dense", "lens", "packed"])
def test_torch_tensors(torch: Any, dtype: str, sequences: str) -> None:
    case = Case(dtype, batch=4, sequences=sequences, mask="causal", mods=("alibi", "bias"))
    put = torch_put(torch)
    out, lse = case.run(put, return_lse=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    assert out.device == lse.device == case.arguments(put)["q"].device
    verify(case, torch_get(out), torch_get(lse))
    target = torch.full_like(out, float("nan"))
    assert case.run(put, out=target) is target
    verify(case, torch_get(target))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jax_arrays(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX sees no GPU")
    case = Case(dtype, batch=4, sequences="kv_lens", mask="causal", mods=("alibi",))
    out, lse = case.run(lambda x: jax.numpy.asarray(np.ascontiguousarray(x)), return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    verify(case, np.asarray(out), np.asarray(lse))


@pytest.mark.parametrize("name", ["k", "v", "out", "kv_lens", "bias"])
def test_mixed_devices(cupy: Any, cupy_backend: Any, name: str) -> None:
    case = Case(sequences="kv_lens", mods=("bias",))
    arguments = {**case.arguments(cupy_backend.put), "out": cupy.full(case.out_shape, 7, np.float32)}
    arguments[name] = cupy.asnumpy(arguments[name])
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got .*expected"):
        cuattn.attention(**arguments)
    assert (np.asarray(cupy_backend.get(arguments["out"])) == 7).all()


@pytest.mark.parametrize("name", ["k", "v", "dout"])
def test_torch_tensors_on_several_devices(torch: Any, name: str) -> None:
    """One left on the CPU is refused by its name, with the device that was expected."""
    q, k, v = (torch.zeros(1, 5, 2, 8, device="cuda") for _ in range(3))
    out, lse = cuattn.attention(q, k, v, return_lse=True)
    arguments = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    with pytest.raises(ValueError, match=f"^{name}: got an array on cpu:0, expected cuda:{q.get_device()} as q is"):
        cuattn.attention_backward(**{**arguments, name: arguments[name].cpu()})


def test_another_device(cupy: Any) -> None:
    """Arrays on a device that is not the current one: computed there, and the current device stays."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    case = Case("float16", mask="causal", sequences="lens", batch=4)

    def put(x: np.ndarray) -> Any:
        with cupy.cuda.Device(1):
            return cupy.asarray(x)

    with cupy.cuda.Device(0):
        out = case.run(put)
        assert cupy.cuda.Device() == cupy.cuda.Device(0)
    assert out.device == cupy.cuda.Device(1)
    verify(case, cupy.asnumpy(out))


# Memory --------------------------------------------------------------------------------------------------------------------


PEAKED = 0.5
"""A scale that leaves few keys with weight: an average over very many would be 0, whatever a kernel does."""


class Peak:
    """Allocator on top of the pool that records the largest number of bytes held at once."""

    def __init__(self, cupy: Any) -> None:
        self._pool = cupy.get_default_memory_pool()
        self._start = self._pool.used_bytes()
        self.bytes = 0

    def malloc(self, size: int) -> Any:
        memory = self._pool.malloc(size)
        self.bytes = max(self.bytes, self._pool.used_bytes() - self._start)
        return memory


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_linear(cupy: Any, dtype: str) -> None:
    """64k tokens in outputs and O(N) workspace: the score matrix would take 16 GiB. The last rows are checked."""
    n, heads, d, tail = 1 << 16, 2, 64, 48
    q, k, v = _random(cupy, (1, n, heads, d), dtype, 3)
    cuattn.attention(q[:, :256], k[:, :256], v[:, :256], scale=PEAKED, causal=True)
    peak = Peak(cupy)
    with cupy.cuda.using_allocator(peak.malloc):
        out, lse = cuattn.attention(q, k, v, scale=PEAKED, causal=True, return_lse=True)
    assert peak.bytes <= 4 * (out.nbytes + lse.nbytes)
    _check_slice(cupy, dtype, q[:, -tail:], k, v, out[:, -tail:], Causal())


HUGE = (
    ("long", (1, (1 << 31) // (64 * 128) + 77, 64, 128), (1, 64, 64, 128)),
    ("wide", ((1 << 31) // (16 * 64 * 128) + 3, 16, 64, 128), ((1 << 31) // (16 * 64 * 128) + 3, 16, 64, 128)),
    ("many_keys", (1, 5, 64, 128), (1, (1 << 31) // (64 * 128) + 77, 64, 128)),
)
"""Shapes of q and of k, v with more than 2^31 elements."""


@pytest.mark.slow
@pytest.mark.parametrize(("shape_q", "shape_k"), [h[1:] for h in HUGE], ids=[h[0] for h in HUGE])
def test_more_than_2_31_elements(cupy: Any, shape_q: tuple[int, ...], shape_k: tuple[int, ...]) -> None:
    """The last sequence's last rows and heads are right, which takes 64-bit offsets everywhere."""
    free, _ = cupy.cuda.runtime.memGetInfo()
    elements = 2 * np.prod(shape_q) + 2 * np.prod(shape_k)
    if free < 2.5 * elements:
        pytest.skip("needs more GPU memory")
    (q,), (k, v) = _random(cupy, shape_q, "bfloat16", 1), _random(cupy, shape_k, "bfloat16", 2)
    out = cuattn.attention(q, k, v, scale=PEAKED)
    rows = slice(max(0, shape_q[1] - 16), None)
    _check_slice(cupy, "bfloat16", q[-1:, rows, -2:], k[-1:, :, -2:], v[-1:, :, -2:], out[-1:, rows, -2:], Full())
    del q, k, v, out
    cupy.get_default_memory_pool().free_all_blocks()


def _random(cupy: Any, shape: tuple[int, ...], dtype: str, count: int) -> Iterator[Any]:
    """Large arrays from a short random block, repeated with a period that is prime and so aligned with no tile."""
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32).astype(DTYPES[dtype])
    size = int(np.prod(shape))
    for i in range(count):
        period = cupy.asarray(np.roll(block, 1000 * i))
        x = cupy.empty(size, period.dtype)
        whole = size // period.size * period.size
        x[:whole].reshape(-1, period.size)[...] = period
        x[whole:] = period[: size - whole]
        yield x.reshape(shape)


def _check_slice(cupy: Any, dtype: str, q: Any, k: Any, v: Any, out: Any, mask: Any) -> None:
    """Compare part of an output with the oracle on the part of the inputs that it depends on."""
    tensors = [cupy.asnumpy(cupy.ascontiguousarray(x)) for x in (q, k, v)]
    exact, naive = (
        reference.forward(*tensors, scale=PEAKED, mask=mask, dtype=t)[0] for t in (np.dtype(np.float64), tensors[0].dtype)
    )
    assert_close("out", cupy.asnumpy(out), exact, limit(exact, naive, tensors[0].dtype, dtype))


# Errors and reports --------------------------------------------------------------------------------------------------------


def test_user_code_that_does_not_compile(cupy: Any, cupy_backend: Any) -> None:
    """The error shows the compiler's message beside the user's own line."""
    case = Case()
    with pytest.raises(cuattn.CompileError) as error:
        case.run(cupy_backend.put, score_mod="s\n + no_such_function(s)")
    message = str(error.value)
    assert message.startswith("score_mod")
    assert "\n     + no_such_function(s)\n" in message
    assert "Plan(" in message


def test_out_of_memory_names_the_plan(cupy: Any, cupy_backend: Any) -> None:
    """The message says what needed the memory; the next call works."""
    case = Case("float16", "ieee", 1, 1, 5003, 2, 1, 64)
    arguments = {**case.arguments(cupy_backend.put), "out": cupy.empty(case.out_shape, case.numpy_dtype)}
    cuattn.attention(**arguments)

    def malloc(size: int) -> Any:
        raise cupy.cuda.memory.OutOfMemoryError(size, 0, 0)

    with cupy.cuda.using_allocator(malloc), pytest.raises(MemoryError, match=r"(?s)Plan\(.*workspace"):
        cuattn.attention(**arguments)
    verify(case, cupy.asnumpy(cuattn.attention(**arguments)))


def test_backend_info(cupy: Any) -> None:
    info = cuattn.backend_info()
    assert info.backend == "cuda"
    assert info.gpu is not None and info.gpu in str(info)
    assert info.cupy == cupy.__version__


def test_debug_prints_problem_plan_and_kernel() -> None:
    """CUATTN_DEBUG=1 shows steps 2 to 4; without it a call is silent."""
    code = "import cupy, cuattn; q = cupy.ones((1, 8, 2, 64), 'f'); cuattn.attention(q, q, q, causal=True)"
    for debug in ("1", ""):
        environment = {**os.environ, "CUATTN_DEBUG": debug, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        text = (run.stdout + run.stderr).lower()
        assert ("problem" in text and "plan" in text and "cubin" in text) == bool(debug), text


@pytest.mark.parametrize("case", [replace(GRAPH_CASES[0], head_dim=d) for d in (64, 128)], ids=str)
def test_every_step_prints_as_one_line(case: Case) -> None:
    plan = cuattn.explain(**case.arguments())
    assert "\n" not in str(plan)
    assert str(case.head_dim) in str(plan)
