"""Array libraries: views point at the right bytes, round trips keep kind and memory, strange arrays are refused by name."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
import threading
from typing import Any

import ml_dtypes  # before CuPy  # noqa: F401
import numpy as np
import pytest

import cuattn
from cuattn import arrays, call, decode_call
from cuattn.arrays import CPU, CUPY, DLPACK, JAX, NUMPY, TORCH, View, library_of, numpy_dtype

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the GPU's memory from the others

DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int32", "int64")


def ramp(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape).astype(numpy_dtype(dtype))


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def elements(view: View) -> bytes:
    """What a kernel would read: every element of a view of host memory, in C order."""
    size = numpy_dtype(view.dtype).itemsize
    offsets = [size * int(np.dot(index, view.strides)) for index in np.ndindex(view.shape)]
    return b"".join(ctypes.string_at(view.ptr + offset, size) for offset in offsets)


class Producer:
    """An array of no known library that speaks DLPack."""

    def __init__(self, x: Any, device: tuple[int, int] | None = None) -> None:
        self.x = x
        self.device = device

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device or self.x.__dlpack_device__()


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.swapaxes(0, 1),
    "sliced": lambda x: x[1:, ::2],
    "broadcast": lambda x: x[:, None, :1],
    "scalar": lambda x: x[1, 2, 3],
    "empty": lambda x: x[:0],
}


def kinds() -> list[Any]:
    return [pytest.param(name, id=name) for name in ("numpy", "torch", "jax", "dlpack")]


def make(kind: str, x: np.ndarray) -> Any:
    """A host array of the given kind."""
    if kind == "torch":
        pytest.importorskip("torch")
        return TORCH.from_host(x.copy(), like=importlib.import_module("torch").zeros(()))
    if kind == "jax":
        jax = pytest.importorskip("jax")
        if x.dtype.name in ("float64", "int64"):
            pytest.skip("JAX keeps 64-bit types for jax_enable_x64")
        return jax.device_put(x, jax.devices("cpu")[0])
    if kind == "dlpack":
        if x.dtype.name == "bfloat16":
            pytest.skip("NumPy imports no bfloat16 through DLPack")
        return Producer(x)
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds())
def test_view_reads_the_elements(kind: str, dtype: str, layout: str) -> None:
    base = ramp((3, 4, 5), dtype)
    expected = np.asarray(LAYOUTS[layout](base), base.dtype)
    owned = kind in ("numpy", "dlpack")  # these wrap a NumPy view as it is, the others make the view themselves
    x = make(kind, expected) if owned else LAYOUTS[layout](make(kind, base))
    library = library_of(x, "q")
    view = library.view(x)
    assert library.name == kind
    assert library.device(x) == CPU
    assert type(view.shape) is tuple and type(view.strides) is tuple
    assert (view.shape, view.dtype) == (expected.shape, dtype)
    assert elements(view) == expected.tobytes()
    assert library.host(x).tobytes() == expected.tobytes()
    assert library.host(x).dtype == expected.dtype


def test_view_of_a_broadcast_axis_has_stride_zero() -> None:
    torch = pytest.importorskip("torch")
    assert NUMPY.view(np.broadcast_to(np.ones((1, 4), np.float32), (3, 4))).strides == (0, 1)
    assert TORCH.view(torch.ones(1, 4).expand(3, 4)).strides == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds())
def test_host_round_trip(kind: str, dtype: str) -> None:
    x = ramp((2, 3, 4), dtype)
    like = make(kind, ramp((1,), dtype))
    library = library_of(like, "q")
    back = library.from_host(x.copy(), like)
    assert kind == "dlpack" or type(back) is type(like)
    assert library_of(back, "q").device(back) == CPU
    assert library_of(back, "q").host(back).tobytes() == x.tobytes()
    assert library_of(back, "q").view(back).dtype == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_host_shares_memory(kind: str, dtype: str) -> None:
    x = make(kind, ramp((2, 3), dtype))
    library = library_of(x, "q")
    host = library.host(x)
    assert address(host) == library.view(x).ptr
    host[0, 0] = 9
    assert library.host(x)[0, 0] == 9
    assert library.view(library.from_host(host, x)).ptr == address(host)


def test_jax_host_is_shared_and_read_only() -> None:
    jax = pytest.importorskip("jax")
    x = jax.device_put(np.ones((2, 64), numpy_dtype("bfloat16")), jax.devices("cpu")[0])
    host = JAX.host(x)
    assert address(host) == x.unsafe_buffer_pointer()
    assert not host.flags.writeable
    assert not JAX.supports_out and not JAX.writable(x)


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_empty_on_the_cpu(kind: str, dtype: str) -> None:
    library = library_of(make(kind, ramp((1,), dtype)), "q")
    x = library.empty((2, 0, 3), dtype, CPU)
    view = library_of(x, "q").view(x)
    assert (view.shape, view.dtype) == ((2, 0, 3), dtype)
    assert library_of(library.empty((2, 3), dtype, CPU), "q").view(library.empty((2, 3), dtype, CPU)).strides == (3, 1)


@pytest.mark.parametrize("kind", kinds())
def test_cpu_stream_and_guard_do_nothing(kind: str) -> None:
    x = make(kind, ramp((1,), "float32"))
    library = library_of(x, "q")
    assert library.stream(CPU) == 0
    with library.guard(CPU), library.guard(CPU):
        pass
    assert library.native == (kind == "torch")
    assert not library.needs_grad([x])


def test_numpy_read_only_and_subclasses() -> None:
    x = ramp((2, 2), "float32")
    assert NUMPY.writable(x)
    x.flags.writeable = False
    assert not NUMPY.writable(x)
    assert NUMPY.from_host(x, x) is x

    class Tagged(np.ndarray):
        pass

    tagged = x.view(Tagged)
    assert library_of(tagged, "q") is NUMPY and type(NUMPY.host(tagged)) is np.ndarray


def test_numpy_needs_no_aligned_memory_but_whole_elements() -> None:
    x = np.zeros(9, np.uint8)[1:].view(np.float32)
    assert NUMPY.view(x).strides == (1,)
    packed = np.zeros(4, [("a", np.float32), ("b", np.int16)])
    with pytest.raises(ValueError, match=r"k: got byte strides \(6,\), expected multiples of the element size 4"):
        NUMPY.view(packed["a"], "k")
    assert NUMPY.view(packed).dtype == "void48"  # a name no kernel takes: refused where dtypes are checked


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_byte_swapped_is_refused(dtype: str) -> None:
    x = np.zeros((2, 2), np.dtype(dtype).newbyteorder("S"))
    with pytest.raises(TypeError, match="bias: got byte-swapped elements"):
        NUMPY.view(x, "bias")
    NUMPY.view(np.zeros((2, 2), dtype))  # not confused with its twin in the cache


@pytest.mark.parametrize("x", [None, 1.0, [1.0], (1.0,), "q", np.float32(1), np.ndarray, object()], ids=repr)
def test_not_an_array(x: Any) -> None:
    with pytest.raises(TypeError, match=r"^cu_seqlens_q: got .*, expected a NumPy, CuPy, PyTorch or JAX array"):
        library_of(x, "cu_seqlens_q")


def test_masked_array_is_refused() -> None:
    with pytest.raises(TypeError, match="q: got a masked array"):
        library_of(np.ma.ones(3), "q")


def test_type_errors_are_not_remembered() -> None:
    class Late:
        pass

    with pytest.raises(TypeError):
        library_of(Late(), "q")
    Late.__dlpack__ = Late.__dlpack_device__ = lambda self: None  # type: ignore[attr-defined]
    assert library_of(Late(), "q") is DLPACK


# PyTorch ---------------------------------------------------------------------------------------------------------------------


def test_torch_needs_grad() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3)
    p = torch.nn.Parameter(x.clone())
    assert library_of(p, "q") is TORCH
    assert not TORCH.needs_grad([x]) and TORCH.writable(x)
    assert TORCH.needs_grad([p]) and not TORCH.writable(p)
    assert TORCH.needs_grad([p * 2])
    assert not TORCH.needs_grad([p.detach()])
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert not TORCH.needs_grad([p])
    np.testing.assert_array_equal(TORCH.host(p), np.ones((2, 3)))


def test_torch_forward_mode_needs_grad() -> None:
    torch = pytest.importorskip("torch")
    forward_ad = importlib.import_module("torch.autograd.forward_ad")
    x = torch.ones(2)
    with forward_ad.dual_level():
        assert TORCH.needs_grad([forward_ad.make_dual(x, x)])
        assert not TORCH.needs_grad([x])


def test_torch_from_host_copies_what_torch_cannot_hold(recwarn: pytest.WarningsRecorder) -> None:
    torch = pytest.importorskip("torch")
    x = ramp((2, 3), "bfloat16")
    x.flags.writeable = False
    tensor = TORCH.from_host(x, torch.zeros(()))
    tensor[0, 0] = 7
    assert x[0, 0] == 0
    assert TORCH.host(TORCH.from_host(ramp((4,), "float32")[::-1], tensor)).tolist() == [3, 2, 1, 0]
    assert not recwarn.list


def torch_strangers(torch: Any) -> dict[str, Any]:
    return {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "negated": torch.zeros(3, dtype=torch.complex64).conj().imag,
        "conjugated": torch.zeros(3, 2, dtype=torch.complex64).T.conj(),
    }


@pytest.mark.parametrize("kind", ["sparse", "meta", "negated", "conjugated"])
def test_torch_without_plain_memory(kind: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch_strangers(torch)[kind]
    with pytest.raises(TypeError, match=r"^v: got a"):
        library_of(x, "v").view(x, "v")


def test_torch_other_devices() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="q: got a tensor on device meta, expected cpu or cuda"):
        TORCH.device(torch.empty(3, device="meta"), "q")


def test_torch_misaligned() -> None:
    torch = pytest.importorskip("torch")
    memory = bytearray(64)
    tensors = [torch.frombuffer(memory, dtype=torch.float16, offset=offset, count=4) for offset in (0, 1)]
    even, odd = sorted(tensors, key=lambda x: x.data_ptr() % 2)
    TORCH.view(even, "q")
    with pytest.raises(ValueError, match=r"q: got an array at address .*, expected a multiple of its element size"):
        TORCH.view(odd, "q")


def test_torch_transforms_and_wrappers_are_refused() -> None:
    torch = pytest.importorskip("torch")
    fake = importlib.import_module("torch._subclasses.fake_tensor")

    def body(x: Any) -> Any:
        library_of(x, "q").view(x, "q")
        return x.sum()

    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(TypeError, match="q: got a tensor without plain strided memory"):
            transform(body)(torch.ones(3))
    with fake.FakeTensorMode():
        x = torch.ones(3)
    with pytest.raises(TypeError, match=r"q: got .*FakeTensor, a tensor subclass without memory of its own"):
        library_of(x, "q")


# JAX and DLPack --------------------------------------------------------------------------------------------------------------


def test_jax_traced_values_are_refused() -> None:
    jax = pytest.importorskip("jax")

    def body(x: Any) -> Any:
        library_of(x, "k")
        return x.sum()

    x = jax.numpy.ones((2, 3))
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match="k: got a traced JAX value"):
            transform(body)(x)
    assert library_of(x, "k") is JAX


def test_jax_from_host_shares_aligned_memory() -> None:
    jax = pytest.importorskip("jax")
    like = jax.device_put(np.ones(1, np.float32), jax.devices("cpu")[0])
    memory = np.zeros(1024 + 64, np.uint8)
    start = -address(memory) % 64
    x = memory[start : start + 1024].view(np.float32)
    assert JAX.from_host(x, like).unsafe_buffer_pointer() == address(x)


@pytest.mark.parametrize(("device", "expected"), [((1, 0), CPU), ((3, 0), CPU), ((2, 1), ("cuda", 1)), ((13, 2), ("cuda", 2))])
def test_dlpack_devices(device: tuple[int, int], expected: tuple[str, int]) -> None:
    x = Producer(np.ones(3), device)
    assert library_of(x, "q") is DLPACK
    assert DLPACK.device(x, "q") == expected


def test_dlpack_strange_devices() -> None:
    with pytest.raises(TypeError, match="q: got an array on DLPack device type 10"):
        DLPACK.device(Producer(np.ones(3), (10, 0)), "q")

    class Sharded(Producer):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise BufferError("sharded over 4 devices")

    with pytest.raises(TypeError, match="q: got an array on no single device"):
        DLPACK.view(Sharded(np.ones(3)), "q")


# Imports and GPU look-up -----------------------------------------------------------------------------------------------------


def test_import_is_lazy() -> None:
    code = (
        "import sys, numpy as np; from cuattn import arrays; x = np.ones(3, np.float32); arrays.library_of(x, 'q').view(x);"
        "print([m for m in ('cupy', 'torch', 'jax', 'ml_dtypes', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_gpu_available_is_a_verdict_with_a_reason() -> None:
    usable, reason = arrays.gpu_available()
    assert isinstance(usable, bool) and reason
    assert arrays.gpu_available() is arrays.gpu_available()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "the package cupy is not installed"),
        (ImportError("libcudart.so.12: cannot open"), "CuPy cannot be imported: libcudart"),
        (RuntimeError("broken"), "CuPy cannot be imported: broken"),
    ],
    ids=["absent", "library", "broken"],
)
def test_gpu_available_never_raises(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def fail() -> Any:
        raise error

    monkeypatch.setattr(arrays, "_cupy", fail)
    usable, got = arrays.gpu_available.__wrapped__()
    assert not usable and got.startswith(reason)


class FakeRuntime:
    is_hip = False
    driver, count, capability = 13000, 1, "90"

    def driverGetVersion(self) -> int:
        return self.driver

    def getDeviceCount(self) -> int:
        if self.count < 0:
            raise RuntimeError("cudaErrorInsufficientDriver")
        return self.count

    def getDeviceProperties(self, index: int) -> dict[str, bytes]:
        return {"name": b"Fake GPU"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_hip": True}, "CuPy is built for ROCm"),
        ({"driver": 0}, "no NVIDIA driver"),
        ({"count": 0}, "no CUDA device"),
        ({"count": -1}, "no usable CUDA device: cudaErrorInsufficientDriver"),
        ({"capability": "75"}, "Fake GPU has compute capability 75"),
    ],
    ids=lambda value: str(value),
)
def test_gpu_available_reasons(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str) -> None:
    runtime = FakeRuntime()
    vars(runtime).update(changes)

    class Device:
        id = 0
        compute_capability = runtime.capability

    class Cuda:
        pass

    fake, cuda = Cuda(), Cuda()
    fake.cuda, cuda.runtime, cuda.Device = cuda, runtime, Device  # type: ignore[attr-defined]
    monkeypatch.setattr(arrays, "_cupy", lambda: fake)
    usable, got = arrays.gpu_available.__wrapped__()
    assert not usable and got.startswith(reason)


def retained(x: Any) -> bool:
    return any(y is x for _, held in arrays._retained for y in held)


def test_retain_drops_what_is_done_and_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        done = False

        def __init__(self, disable_timing: bool) -> None:
            events.append(self)

        def record(self, stream: Any) -> None:
            assert stream == "current"

    class Fake:
        pass

    events: list[Event] = []
    fake, cuda = Fake(), Fake()
    fake.cuda, cuda.Event, cuda.get_current_stream = cuda, Event, lambda: "current"  # type: ignore[attr-defined]
    monkeypatch.setattr(arrays, "_cupy", lambda: fake)
    monkeypatch.setattr(arrays, "_retained", [])
    objects = [object() for _ in range(4)]
    for x in objects[:3]:
        JAX.retain((x,))
    events[1].done = True
    DLPACK.retain((objects[3],))
    assert [retained(x) for x in objects] == [True, False, True, True]
    for native in (NUMPY, CUPY, TORCH):  # their memory is reused in stream order
        native.retain((objects[1],))
    assert not retained(objects[1])


# CuPy without a GPU: arrays over an address that is never read ---------------------------------------------------------------


def cupy_over(ptr: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None, device: int = 0) -> Any:
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(ptr, 1 << 30, None, device), 0)
    return cupy.ndarray(shape, numpy_dtype(dtype), memptr=memory, strides=strides)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cupy_view(dtype: str) -> None:
    size = numpy_dtype(dtype).itemsize
    x = cupy_over(4096, (2, 3, 4), dtype, device=1)
    assert library_of(x, "q") is CUPY
    assert CUPY.view(x) == View(4096, (2, 3, 4), (12, 4, 1), dtype)
    assert CUPY.device(x) == ("cuda", 1)
    y = cupy_over(4096, (2, 3, 4), dtype, (0, 4 * size, size))
    assert CUPY.view(y).strides == (0, 4, 1)
    assert CUPY.view(cupy_over(0, (0, 4), dtype)).shape == (0, 4)
    assert CUPY.view(cupy_over(4096, (), dtype)) == View(4096, (), (), dtype)
    assert CUPY.writable(x) and CUPY.native and CUPY.to_cupy(x) is x and not CUPY.needs_grad([x])


def test_cupy_view_refuses_parts_of_elements() -> None:
    with pytest.raises(ValueError, match=r"q: got an array at address 0x1001, expected a multiple"):
        CUPY.view(cupy_over(4097, (2,), "float16"), "q")
    with pytest.raises(ValueError, match=r"q: got byte strides \(6,\)"):
        CUPY.view(cupy_over(4096, (2,), "float32", (6,)), "q")


# With a GPU ------------------------------------------------------------------------------------------------------------------


def gpu_array(kind: str, x: np.ndarray) -> Any:
    """A CUDA array of the given kind on device 0."""
    cupy = importlib.import_module("cupy")
    if kind == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch has no CUDA here")
        return TORCH.from_host(x.copy(), torch.zeros((), device="cuda:0"))
    if kind == "jax":
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("JAX has no CUDA here")
        return jax.device_put(x, jax.devices("gpu")[0])
    return Producer(cupy.asarray(x)) if kind == "dlpack" else cupy.asarray(x)


def read(kind: str, x: Any) -> np.ndarray:
    return library_of(x, "x").host(x)


GPU_KINDS = ("cupy", "torch", "jax", "dlpack")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "bool", "uint8", "int32"])
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_gpu_view_and_host(kind: str, dtype: str) -> None:
    cupy = importlib.import_module("cupy")
    x = ramp((2, 3, 4), dtype)
    y = gpu_array(kind, x)
    library = library_of(y, "q")
    assert library.device(y) == ("cuda", 0)
    assert library.host(y).tobytes() == x.tobytes() and library.host(y).dtype == x.dtype
    view = library.view(y)
    assert view[1:] == ((2, 3, 4), (12, 4, 1), dtype)
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(view.ptr, x.nbytes, y), 0)
    assert cupy.asnumpy(cupy.ndarray(x.shape, x.dtype, memptr=memory)).tobytes() == x.tobytes()
    same = library.to_cupy(y)
    assert CUPY.view(same) == view


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_gpu_arrays_without_elements(kind: str) -> None:
    x = gpu_array(kind, np.zeros((2, 0, 3), np.float16))
    library = library_of(x, "q")
    assert library.view(x).shape == (2, 0, 3)
    assert library.device(x) == ("cuda", 0)
    assert library.host(x).shape == (2, 0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["numpy", "cupy", "jax", "dlpack"])
def test_gpu_give_back(kind: str, dtype: str) -> None:
    x = ramp((2, 3, 4), dtype)
    y = x if kind == "numpy" else gpu_array(kind, x)
    library = library_of(y, "q")
    device = ("cuda", 0)
    with library.guard(device):
        lent = library.to_cupy(y)
        result = CUPY.empty(lent.shape, dtype, device)
        result[...] = lent
        library.retain((lent,))
        back = library.give_back(result)
    assert read(kind, back).tobytes() == x.tobytes()
    assert kind == "dlpack" or type(back) is type(y)


@pytest.mark.gpu
def test_gpu_upload_and_download() -> None:
    x = ramp((2, 3, 4), "bfloat16")
    assert arrays.upload(x.T).flags.c_contiguous
    np.testing.assert_array_equal(arrays.download(arrays.upload(x.T)), x.T)
    wide = np.broadcast_to(x[:, :1], (2, 5, 4))
    assert CUPY.view(arrays.upload(wide)).strides == (4, 0, 1)
    np.testing.assert_array_equal(arrays.download(arrays.upload(wide)), wide)
    out = np.zeros((4, 3, 2), x.dtype).T
    assert arrays.download(arrays.upload(x), out) is out
    np.testing.assert_array_equal(out, x)
    assert arrays.upload(np.float32(3.0).reshape(())).shape == ()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cupy", "torch"])
def test_gpu_stream_is_the_callers(kind: str) -> None:
    x = gpu_array(kind, ramp((2,), "float32"))
    library, device = library_of(x, "q"), ("cuda", 0)
    stream: Any
    if kind == "torch":
        torch = importlib.import_module("torch")
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream().cuda_stream
        handle, scope = stream.cuda_stream, torch.cuda.stream(stream)
    else:
        cupy = importlib.import_module("cupy")
        stream, current = cupy.cuda.Stream(non_blocking=True), 0
        handle, scope = stream.ptr, stream
    assert library.stream(device) == current
    with scope:
        assert library.stream(device) == handle != current
        elsewhere: list[int] = []
        thread = threading.Thread(target=lambda: elsewhere.append(library.stream(device)))
        thread.start()
        thread.join()
    assert elsewhere == [current]  # current streams are a thread's own
    assert library.stream(device) == current


@pytest.mark.gpu
def test_gpu_torch_stream_without_private_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_array("torch", ramp((2,), "float32"))
    torch = importlib.import_module("torch")
    library = arrays.Torch()
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    monkeypatch.delattr(torch._C, "_cuda_getDevice", raising=False)
    stream = torch.cuda.Stream()
    handle, ordinal = library._raw_stream, library._current_device
    monkeypatch.undo()  # PyTorch itself may call them
    with torch.cuda.stream(stream):
        assert handle(0) == stream.cuda_stream
    assert ordinal() == 0


@pytest.mark.gpu
def test_gpu_per_thread_default_stream() -> None:
    code = "import cupy; from cuattn import arrays; print(arrays.CUPY.stream(('cuda', 0)))"
    env = {**os.environ, "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert result.stdout.strip() == "2"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cupy", "torch", "jax"])
def test_gpu_empty(kind: str) -> None:
    library = library_of(gpu_array(kind, ramp((2,), "float32")), "q")
    x = library.empty((2, 3, 4), "bfloat16", ("cuda", 0))
    assert library_of(x, "out").view(x)[1:] == ((2, 3, 4), (12, 4, 1), "bfloat16")
    assert library_of(x, "out").device(x) == ("cuda", 0)
    nothing = library.empty((2, 0), "float32", ("cuda", 0))
    assert library_of(nothing, "out").view(nothing).shape == (2, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cupy", "torch"])
def test_gpu_guard_on_a_second_device(kind: str) -> None:
    cupy = importlib.import_module("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    library = library_of(gpu_array(kind, ramp((2,), "float32")), "q")
    x = library.empty((2,), "float32", ("cuda", 1))
    assert library.device(x) == ("cuda", 1) and cupy.cuda.runtime.getDevice() == 0
    with library.guard(("cuda", 1)):
        assert cupy.cuda.runtime.getDevice() == 1
        with library.guard(("cuda", 1)):
            assert cupy.cuda.runtime.getDevice() == 1
    assert cupy.cuda.runtime.getDevice() == 0


@pytest.mark.gpu
def test_gpu_retain_holds_until_the_stream_is_done() -> None:
    cupy = importlib.import_module("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    gate = threading.Event()
    with stream:
        x = cupy.zeros(4, cupy.float32)
        stream.synchronize()
        stream.launch_host_func(lambda _: gate.wait(10), None)  # holds the stream
        DLPACK.retain((x,))
        DLPACK.retain(())
        assert retained(x)
        gate.set()
        stream.synchronize()
        DLPACK.retain(())
        assert not retained(x)


@pytest.mark.gpu
def test_gpu_jax_order_follows_the_cupy_stream() -> None:
    """JAX must see what CuPy's stream has queued, and CuPy what JAX has, without a synchronisation between them."""
    x = gpu_array("jax", np.ones((1024, 1024), np.float32))
    cupy = importlib.import_module("cupy")
    for _ in range(3):
        with cupy.cuda.Stream(non_blocking=True):
            lent = JAX.to_cupy(x @ x)
            result = lent * 2
            JAX.retain((lent,))
            back = JAX.give_back(result)
        assert float((back + 0).min()) == float((back + 0).max()) == 2048


@pytest.mark.gpu
def test_gpu_is_available() -> None:
    usable, reason = arrays.gpu_available()
    assert usable and "NVRTC" in reason


class _OnGpu:
    """PyTorch's CPU tensors, all but some taken for tensors of a GPU, in calls that end where a plan would be made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *elsewhere: Any) -> None:
        self.elsewhere = elsewhere
        torch = type(arrays.library_of(pytest.importorskip("torch").zeros(1), "x"))
        monkeypatch.setattr(torch, "device", lambda _, x, name="array": self.device(x))
        monkeypatch.setattr(torch, "guard", lambda *_: contextlib.nullcontext())
        for module, name in ((call, "problem_of"), (decode_call, "make_decode_problem")):
            monkeypatch.setattr(module, name, self.stop)

    def device(self, x: Any) -> tuple[str, int]:
        return ("cpu", 0) if any(x is other for other in self.elsewhere) else ("cuda", 0)

    @staticmethod
    def stop(*_: Any) -> Any:
        raise NotImplementedError("a problem")


@pytest.mark.parametrize("name", ["k", "v", "dout", "k_cache", "cache_seqlens"])
def test_a_first_call_looks_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kernels would read an address of the CPU."""
    torch = pytest.importorskip("torch")
    q, k, v, dout, out = (torch.zeros(1, 5, 2, 8) for _ in range(5))
    lens, lse = torch.ones(1, dtype=torch.int32), torch.zeros(1, 2, 5)
    tensors = {"k": k, "v": v, "dout": dout, "k_cache": k, "cache_seqlens": lens}
    calls: list[Any] = [
        lambda: cuattn.attention(q, k, v),
        lambda: cuattn.attention_backward(dout, q, k, v, out, lse),
        lambda: cuattn.attention_with_kvcache(q, k, v, cache_seqlens=lens),
    ]
    _OnGpu(monkeypatch)
    for run in calls:
        with pytest.raises(NotImplementedError, match="a problem"):
            run()
    _OnGpu(monkeypatch, tensors[name])
    concerned = {"k": calls[:2], "v": calls[:2], "dout": calls[1:2]}.get(name, calls[2:])
    for run in concerned:
        with pytest.raises(ValueError, match=rf"^{name}: got an array on cpu:0, expected cuda:0 as q is"):
            run()


def test_a_warm_call_takes_parameters() -> None:
    """Whatever tensors PyTorch derives from its own: models keep sinks and biases as parameters."""
    torch = pytest.importorskip("torch")

    class Derived(torch.nn.Parameter):  # type: ignore[misc, name-defined]
        pass

    x = Derived(torch.zeros(2, 3))
    found = arrays.library_of(torch.zeros(1), "x").gather({"sinks": x})
    assert found.addresses == [x.data_ptr()] and found.needs_grad


def test_a_lazily_negated_tensor_is_refused_whatever_its_last_axis() -> None:
    """One element along it has any stride, 1 too."""
    torch = pytest.importorskip("torch")
    lazy = torch.zeros(3, 4, dtype=torch.complex64).conj().imag.unsqueeze(-1)
    assert lazy.is_neg() and lazy.stride(-1) == 1
    for look in (lambda: TORCH.view(lazy, "q"), lambda: TORCH.gather({"q": lazy})):
        with pytest.raises(TypeError, match=r"^q: got a lazily negated"):
            look()
