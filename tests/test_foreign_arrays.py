"""Arrays of libraries that cuattn has never heard of: `__dlpack__` or `__cuda_array_interface__` is all that they offer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import ml_dtypes  # before CuPy  # noqa: F401
import numpy as np
import pytest

import cuattn
from cuattn import arrays


class Producer:
    """Speaks DLPack, and nothing else."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._x.__dlpack_device__()


class Interface:
    """Has the CUDA array interface, and nothing else."""

    def __init__(self, x: Any) -> None:
        self._x = x

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self._x.__cuda_array_interface__)


def on_gpu(x: np.ndarray) -> Any:
    return importlib.import_module("cupy").asarray(x)


def numba_array(x: np.ndarray) -> Any:
    pytest.importorskip("numba")
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("Numba finds no GPU")
    return cuda.to_device(x)


def warp_array(device: str) -> Callable[[np.ndarray], Any]:
    def make(x: np.ndarray) -> Any:
        warp = pytest.importorskip("warp")
        return warp.array(x, dtype=getattr(warp, x.dtype.name), device=device)

    return make


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "producer": Producer,
    "warp": warp_array("cpu"),
    "producer-cuda": lambda x: Producer(on_gpu(x)),
    "interface-cuda": lambda x: Interface(on_gpu(x)),
    "numba-cuda": numba_array,
    "warp-cuda": warp_array("cuda:0"),
}


@pytest.fixture(params=[pytest.param(k, marks=pytest.mark.gpu) if k.endswith("cuda") else k for k in KINDS])
def make(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Any]:
    return KINDS[request.param]


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv() -> list[np.ndarray]:
    return [normal(2, 33, 4, 32, seed=0), normal(2, 47, 2, 32, seed=1), normal(2, 47, 2, 24, seed=2)]


def host(x: Any) -> np.ndarray:
    """A result in NumPy, by way of the protocol that it must offer."""
    assert hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")
    return np.asarray(arrays.library_of(x, "result").host(x))


def same_as_on(x: Any, expected: Callable[..., Any], *inputs: np.ndarray) -> list[np.ndarray]:
    """What NumPy arrays give where `x` was computed: on the CPU through CPU tensors of no other library, or on the GPU."""
    on_cpu = arrays.library_of(x, "result").device(x) == arrays.CPU
    put = Producer if on_cpu else on_gpu
    return [host(y) for y in expected(*(put(array) for array in inputs))]


def test_dense_call(make: Callable[[np.ndarray], Any]) -> None:
    inputs = qkv()
    kv_lens = np.array([47, 5], np.int32)

    def call(q: Any, k: Any, v: Any, lens: Any) -> Any:
        return cuattn.attention(q, k, v, causal=True, kv_lens=lens, return_lse=True)

    out, lse = call(*map(make, (*inputs, kv_lens)))
    assert isinstance(out, np.ndarray) or type(out).__module__.startswith("cupy")
    for mine, expected in zip((out, lse), same_as_on(out, call, *inputs, kv_lens), strict=True):
        np.testing.assert_array_equal(host(mine), expected)


def test_packed_call_with_gradients(make: Callable[[np.ndarray], Any]) -> None:
    inputs = [normal(40, 4, 32, seed=n) for n in range(3)]
    cu_seqlens, dout = np.array([0, 7, 40], np.int32), normal(40, 4, 32, seed=3)

    def call(q: Any, k: Any, v: Any, cu: Any, dout: Any) -> Any:
        packing, options = (cu, cu, 33, 33), {"window": (9, 0), "deterministic": True}
        out, lse = cuattn.attention_varlen(q, k, v, *packing, return_lse=True, **options)
        return [out, *cuattn.attention_varlen_backward(dout, q, k, v, out, lse, *packing, **options)[:3]]

    results = call(*map(make, (*inputs, cu_seqlens, dout)))
    for mine, expected in zip(results, same_as_on(results[0], call, *inputs, cu_seqlens, dout), strict=True):
        np.testing.assert_array_equal(host(mine), expected)


def test_pullback(make: Callable[[np.ndarray], Any]) -> None:
    inputs = qkv()

    def call(q: Any, k: Any, v: Any) -> Any:
        out, pullback = cuattn.vjp(q, k, v, causal=True, deterministic=True)
        return [out, *pullback(out)[:3]]

    results = call(*map(make, inputs))
    for mine, expected in zip(results, same_as_on(results[0], call, *inputs), strict=True):
        np.testing.assert_array_equal(host(mine), expected)


def test_a_kind_takes_its_own_results_and_no_others() -> None:
    q, k, v = qkv()
    np.testing.assert_array_equal(cuattn.attention(Producer(q), k, v), cuattn.attention(*map(Producer, (q, k, v))))
    with pytest.raises(TypeError, match=r"^k: got dlpack array, expected numpy as q is"):
        cuattn.attention(q, Producer(k), v)


def test_out_is_of_the_kind_of_results(make: Callable[[np.ndarray], Any]) -> None:
    inputs = [make(x) for x in qkv()]
    expected = cuattn.attention(*inputs)
    out = 0 * expected
    assert cuattn.attention(*inputs, out=out) is out
    np.testing.assert_array_equal(host(out), host(expected))
    with pytest.raises(ValueError, match=r"^out: got an? \w+ array, which cannot be written"):
        cuattn.attention(*inputs, out=make(host(out)))


def test_results_are_written_where_the_caller_wants_them() -> None:
    """As after a call on a GPU, with NumPy arrays in the place of CuPy's."""
    result = qkv()[0]
    for library in (arrays.DLPACK, arrays.CUDA_INTERFACE):
        out = np.zeros_like(result)
        assert library.give_back(result, out) is out and library.give_back(result) is result
        np.testing.assert_array_equal(out, result)


def test_out_that_cannot_be_written_is_refused_by_name() -> None:
    q, k, v = map(Producer, qkv())
    out = np.zeros((2, 33, 4, 24), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: got a read-only array"):
        cuattn.attention(q, k, v, out=out)
    lens = np.array([3, 3], np.int32)
    with pytest.raises(ValueError, match=r"^out: got a read-only array"):
        cuattn.attention_with_kvcache(q, k, v, cache_seqlens=lens, out=out)


@pytest.mark.gpu
def test_the_cuda_array_interface_is_read_in_place() -> None:
    x = on_gpu(qkv()[0])
    library = arrays.library_of(Interface(x), "q")
    assert library is arrays.CUDA_INTERFACE
    assert library.view(Interface(x)).ptr == x.data.ptr and library.device(Interface(x)) == ("cuda", x.data.device_id)


def test_a_class_is_no_array() -> None:
    for kind in (Producer, Interface):
        with pytest.raises(TypeError, match=r"q: got builtins\.type"):
            arrays.library_of(kind, "q")
