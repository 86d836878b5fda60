"""The array libraries, as the rest of the package sees them. No other file names one of their functions.

`library_of(x, name)` finds the `Library` that owns an array. A library describes its arrays (`view`, `device`), makes new ones
(`empty`), and names the stream its user works on (`stream`). CuPy and PyTorch are native: kernels read and write their CUDA
arrays in place. The others go through CuPy: `to_cupy` brings an input to the GPU, `retain` keeps it alive until the kernel is
done, `give_back` turns a CuPy result into the caller's kind. On the CPU every kind goes through NumPy: `host`, `from_host`.

Importing this module imports NumPy alone; CuPy, PyTorch and JAX are imported when their first array arrives, or when
`gpu_available` has to look for a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Device = tuple[str, int]
CPU: Device = ("cpu", 0)
MIN_COMPUTE_CAPABILITY = 80
"""Ten times the oldest compute capability that has kernels."""

_CUDA, _CUDA_MANAGED = 2, 13  # DLPack device types whose memory kernels can read
_HOST_MEMORY = (1, 3)  # plain and page-locked host memory
UNCHANGED: AbstractContextManager[Any] = contextlib.nullcontext()


class View(NamedTuple):
    """Where an array lies and how: all that a kernel knows of it. `ptr` is 0 for some arrays without elements."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """in elements, not bytes; 0 along a broadcast axis"""
    dtype: str
    """NumPy's (and ml_dtypes') name: float16, bfloat16, float32, float64, bool, uint8, int32, ..."""


class Gathered(NamedTuple):
    """Arrays of a call."""

    addresses: list[int]
    kinds: Hashable
    """everything else that a plan depends on, and where each array is"""
    needs_grad: bool
    """whether one of them does (`Library.needs_grad`)"""


_view = tuple.__new__  # half the time of View(...): that one packs its arguments twice


class Library:
    """One kind of array. This base borrows CuPy on a GPU and NumPy on the CPU; native libraries override it.

    Methods that take `name` name that argument in the TypeError or ValueError they raise.
    """

    name = "array"
    native = False
    """Whether kernels read and write the CUDA arrays of this library in place."""
    supports_out = False
    """Whether results can be written into an array of the caller."""

    def __repr__(self) -> str:
        return self.name

    def view(self, x: Any, name: str = "array") -> View:
        """Pointer, shape, element strides and dtype name; valid while `x` lives.

        TypeError for memory that cannot be described so (byte-swapped, sparse, traced), ValueError for a byte stride or a
        pointer that is not a multiple of the element size.
        """
        if self.device(x, name)[0] == "cpu":
            return NUMPY.view(self.host(x), name)
        return CUPY.view(self.to_cupy(x), name)

    def device(self, x: Any, name: str = "array") -> Device:
        """("cpu", 0) or ("cuda", ordinal); TypeError for any other device and for an array that spans several."""
        try:
            kind, index = x.__dlpack_device__()
        except BufferError as error:
            raise TypeError(f"{name}: got an array on no single device ({error}), expected one CPU or CUDA device") from error
        if kind in (_CUDA, _CUDA_MANAGED):
            return ("cuda", int(index))
        if kind in _HOST_MEMORY:
            return CPU
        raise TypeError(f"{name}: got an array on DLPack device type {int(kind)}, expected CPU or CUDA memory")

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        """An uninitialised C-contiguous array that a computation on `device` can write, allocated on the current stream."""
        return np.empty(shape, numpy_dtype(dtype)) if device[0] == "cpu" else CUPY.empty(shape, dtype, device)

    def maker(self, shape: tuple[int, ...], dtype: str, device: Device) -> Callable[[], Any]:
        """What makes such arrays as `empty` does, in less time, whenever `device` is the current one."""
        return functools.partial(self.empty, shape, dtype, device)

    def lender(self, size: int, device: Device) -> Callable[[int], tuple[int, Any]]:
        """What lends so many bytes of `device`, the current one, to work on a stream: their address, and what to `reclaim`."""
        make, address = self.maker((size,), "uint8", device), self.address

        def lend(stream: int) -> tuple[int, Any]:
            memory = make()
            return address(memory), memory

        return lend

    def reclaim(self, lent: Any) -> None:
        """Work that needs what was lent is queued: in the order of its stream, the memory may be used again."""

    def gather(self, named: dict[str, Any]) -> Gathered:
        """What a warm call must know of its arrays. Native libraries alone have this and `address`, for arrays on a GPU.

        Some exception for an array that is not of this library, or that `view` refuses.
        """
        raise NotImplementedError

    address: Any
    """of an array that `maker` made; RuntimeError where `check_transforms` raises"""

    def check_transforms(self) -> None:
        """NotImplementedError where the library makes arrays that have no memory."""

    def stream(self, device: Device) -> int:
        """The caller's current stream on `device` as a driver handle: 0 is the legacy default stream, 2 the per-thread one."""
        return 0 if device[0] == "cpu" else CUPY.stream(device)

    def guard(self, device: Device) -> AbstractContextManager[Any]:
        """Makes `device` the current one inside a with block."""
        return UNCHANGED if device[0] == "cpu" else CUPY.guard(device)

    def host(self, x: Any) -> Array:
        """The array as NumPy sees it: shared memory on the CPU, a copy (after waiting for the stream) from a GPU."""
        raise NotImplementedError

    def from_host(self, x: Array, like: Any) -> Any:
        """A NumPy array as this library's kind, where `like` is; shares memory on the CPU, so the caller gives `x` away."""
        raise NotImplementedError

    def to_cupy(self, x: Any) -> Any:
        """A CuPy array over a CUDA array's memory; CuPy's current stream waits for what its producer has queued."""
        return _cupy().from_dlpack(x)

    def results(self, device: Device) -> Library:
        """The library of the arrays that `give_back` and `from_host` return; a call takes those beside arrays of its own."""
        return self

    def give_back(self, x: Any, out: Any = None) -> Any:
        """A CuPy result as this library's kind, ordered after CuPy's current stream; `out` receives it where supported."""
        return x

    def retain(self, arrays: tuple[Any, ...]) -> None:
        """Keep `arrays`, as `to_cupy` made them, alive until all work now queued on CuPy's current stream is done.

        An owner that frees memory does not know of our stream: without this it could hand the memory out again while a
        kernel still reads it. The device must be current. References are dropped at a later call, never by waiting.
        """
        _retain(arrays)

    def cast(self, x: Any, dtype: str) -> Any:
        """An array that `empty` made, in another dtype; in stream order."""
        return x.astype(numpy_dtype(dtype), copy=False)

    def writable(self, x: Any) -> bool:
        """Whether `x` may be written as `out=`."""
        return self.supports_out

    def needs_grad(self, arrays: Iterable[Any]) -> bool:
        """Whether the library would have to record a call in order to differentiate it with respect to one of `arrays`."""
        return False

    def autocasts(self, inputs: tuple[Any, ...], device: Device) -> bool:
        """Whether the library wants one of `inputs` in another dtype for a computation on `device`."""
        return False


class NumPy(Library):
    """NumPy arrays, bfloat16 through ml_dtypes. They travel to the GPU and back: `to_cupy` and `give_back` copy."""

    name = "numpy"
    supports_out = True

    def view(self, x: Any, name: str = "array") -> View:
        try:
            strides, dtype, _ = _elements(x.strides, x.dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        return _view(View, (x.ctypes.data, x.shape, strides, dtype))

    def device(self, x: Any, name: str = "array") -> Device:
        return CPU

    def host(self, x: Any) -> Array:
        return np.asarray(x)

    def from_host(self, x: Array, like: Any) -> Any:
        return x

    def to_cupy(self, x: Any) -> Any:
        return upload(x)

    def give_back(self, x: Any, out: Any = None) -> Any:
        return download(x, out)

    def retain(self, arrays: tuple[Any, ...]) -> None:
        """Nothing to do: the uploaded copies are CuPy's, whose pool reuses memory in stream order."""

    def writable(self, x: Any) -> bool:
        return bool(x.flags.writeable)


class CuPy(Library):
    """CuPy arrays. `view`, `device`, `stream` and `guard` are on the path of every call: attribute reads and one look-up."""

    name = "cupy"
    native = True
    supports_out = True

    @functools.cached_property
    def _ndarray(self) -> Any:
        return _cupy().ndarray

    @functools.cached_property
    def _current_stream(self) -> Any:
        return _cupy().cuda.get_current_stream

    @functools.cached_property
    def _current_device(self) -> Any:
        return _cupy().cuda.runtime.getDevice

    def current_device(self) -> Device:
        """The device on which CuPy allocates now."""
        return ("cuda", int(self._current_device()))

    def view(self, x: Any, name: str = "array") -> View:
        ptr = x.data.ptr
        try:
            strides, dtype, low_bits = _elements(x.strides, x.dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if ptr & low_bits:
            raise _misaligned(name, ptr, dtype)
        return _view(View, (ptr, x.shape, strides, dtype))

    _kind = staticmethod(operator.attrgetter("dtype", "shape", "strides", "data.device_id"))

    def gather(self, named: dict[str, Any]) -> Gathered:
        addresses: list[int] = []
        kinds: list[Hashable] = [*named]
        for x in named.values():
            ptr = x.data.ptr
            addresses.append(ptr)
            kinds += (ptr & 15, self._kind(x))
        return _view(Gathered, (addresses, tuple(kinds), False))

    address = staticmethod(operator.attrgetter("data.ptr"))

    def device(self, x: Any, name: str = "array") -> Device:
        return ("cuda", x.data.device_id)

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        with self.guard(device):
            return self.maker(shape, dtype, device)()

    def maker(self, shape: tuple[int, ...], dtype: str, device: Device) -> Callable[[], Any]:
        return functools.partial(self._ndarray, shape, numpy_dtype(dtype))

    def stream(self, device: Device) -> int:
        return int(self._current_stream(device[1]).ptr)

    def guard(self, device: Device) -> AbstractContextManager[Any]:
        if self._current_device() == device[1]:
            return UNCHANGED
        guard: AbstractContextManager[Any] = _cupy().cuda.Device(device[1])
        return guard

    def host(self, x: Any) -> Array:
        with self.guard(self.device(x)):
            return download(x)

    def from_host(self, x: Array, like: Any) -> Any:
        with self.guard(self.device(like)):
            return upload(x)

    def to_cupy(self, x: Any) -> Any:
        return x

    def retain(self, arrays: tuple[Any, ...]) -> None:
        """Nothing to do: CuPy's pool reuses memory in stream order."""


PINNED = 1 << 20
"""Bytes up to which an array travels to a GPU through pinned memory, which PyTorch keeps."""


class Torch(Library):
    """PyTorch tensors, through raw pointers and PyTorch's own allocator and stream: nothing of CuPy's, no DLPack capsule."""

    name = "torch"
    native = True
    supports_out = True

    @functools.cached_property
    def _torch(self) -> Any:
        return importlib.import_module("torch")

    @functools.cached_property
    def _forward_ad(self) -> Any:
        return importlib.import_module("torch.autograd.forward_ad")

    @functools.cached_property
    def _raw_stream(self) -> Any:
        """index -> stream handle. The private function skips building a Stream object, some 2 us."""
        public = self._torch.cuda.current_stream
        return getattr(self._torch._C, "_cuda_getCurrentRawStream", None) or (lambda index: public(index).cuda_stream)

    @functools.cached_property
    def _current_device(self) -> Any:
        return getattr(self._torch._C, "_cuda_getDevice", None) or self._torch.cuda.current_device

    def view(self, x: Any, name: str = "array") -> View:
        try:
            ptr, shape, strides = x.data_ptr(), tuple(x.shape), x.stride()
        except RuntimeError as error:  # sparse, nested, inside torch.func transforms
            raise TypeError(f"{name}: got a tensor without plain strided memory ({error})") from error
        try:
            dtype, low_bits = _TORCH_ELEMENTS[x.dtype]
        except KeyError:
            dtype, low_bits = _torch_element(x.dtype)
        if not ptr or ptr & low_bits or (strides and (strides[-1] != 1 or shape[-1] == 1)):
            self._inspect(x, name)
        return _view(View, (ptr, shape, strides, dtype))

    def _inspect(self, x: Any, name: str) -> None:
        """Refuse a tensor whose memory does not hold its values. Rare enough to be looked at only when something is unusual."""
        ptr, (dtype, low_bits) = x.data_ptr(), _TORCH_ELEMENTS.get(x.dtype) or _torch_element(x.dtype)
        if ptr == 0 and x.numel():
            raise TypeError(f"{name}: got a tensor without memory (device {x.device}), expected a CPU or CUDA tensor")
        if ptr & low_bits:
            raise _misaligned(name, ptr, dtype)
        if x.is_neg() or x.is_conj():  # steps over the other parts of complex numbers, unless the last axis was added later
            raise TypeError(f"{name}: got a lazily negated or conjugated view, expected x.resolve_conj().resolve_neg()")

    def device(self, x: Any, name: str = "array") -> Device:
        if x.is_cuda:
            return ("cuda", x.get_device())
        if x.device.type == "cpu":
            return CPU
        raise TypeError(f"{name}: got a tensor on device {x.device}, expected cpu or cuda")

    def gather(self, named: dict[str, Any]) -> Gathered:
        addresses: list[int] = []
        kinds: list[Hashable] = [*named]
        needs_grad, tensor = False, self._torch.Tensor
        for name, x in named.items():
            kind = type(x)
            if kind is not tensor and library_of(x, name) is not self:
                raise TypeError(f"{name}: got {kind}")
            ptr, shape, strides = x.data_ptr(), x.shape, x.stride()
            if not ptr or x.is_neg() or (strides and strides[-1] != 1):
                self._inspect(x, name)
            if x.requires_grad:
                needs_grad = True
            addresses.append(ptr)
            kinds += (ptr & 15, x.dtype, shape, strides, x.get_device())
        if needs_grad and not self._torch.is_grad_enabled():
            needs_grad = False
        if getattr(self._forward_ad, "_current_level", 0) >= 0:
            needs_grad = self.needs_grad(named.values())
        return _view(Gathered, (addresses, tuple(kinds), needs_grad))

    address = staticmethod(operator.methodcaller("data_ptr"))

    def check_transforms(self) -> None:
        from cuattn.torch import check_transforms

        check_transforms()

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        return self.maker(shape, dtype, device)()

    def maker(self, shape: tuple[int, ...], dtype: str, device: Device) -> Callable[[], Any]:
        # PyTorch reads its arguments in less time than those of torch.empty.
        function, strides = self._torch.empty_strided, contiguous_strides(shape)
        return functools.partial(function, shape, strides, dtype=_torch_dtype(dtype), device=_torch_device(device))

    @functools.cached_property
    def _raw_memory(self) -> tuple[Callable[[int, int], int] | None, Callable[[int], None] | None]:
        """What torch.cuda.caching_allocator_alloc and _delete call: in half the time that a tensor takes."""
        names = ("_cuda_cudaCachingAllocator_raw_alloc", "_cuda_cudaCachingAllocator_raw_delete")
        alloc, delete = (getattr(self._torch._C, name, None) for name in names)
        return (alloc, delete) if alloc is not None and delete is not None else (None, None)

    def lender(self, size: int, device: Device) -> Callable[[int], tuple[int, Any]]:
        alloc, _ = self._raw_memory
        if alloc is None:
            return super().lender(size, device)

        def lend(stream: int) -> tuple[int, Any]:
            address = alloc(size, stream)
            return address, address

        return lend

    def reclaim(self, lent: Any) -> None:
        _, delete = self._raw_memory
        if delete is not None:
            delete(lent)

    def stream(self, device: Device) -> int:
        return 0 if device[0] == "cpu" else int(self._raw_stream(device[1]))

    def guard(self, device: Device) -> AbstractContextManager[Any]:
        if device[0] == "cpu" or self._current_device() == device[1]:
            return UNCHANGED
        guard: AbstractContextManager[Any] = self._torch.cuda.device(device[1])
        return guard

    def host(self, x: Any) -> Array:
        x = x.detach().cpu().resolve_conj().resolve_neg()
        dtype, _ = _torch_element(x.dtype)
        if dtype.startswith(("bfloat16", "float8")):  # PyTorch hands NumPy only NumPy's own dtypes
            carrier = self._torch.int16 if x.element_size() == 2 else self._torch.uint8
            return np.asarray(x.view(carrier).numpy().view(numpy_dtype(dtype)))
        return np.asarray(x.numpy())

    def from_host(self, x: Array, like: Any) -> Any:
        if not x.flags.writeable or any(stride < 0 for stride in x.strides):
            x = x.copy()  # PyTorch has neither read-only tensors nor negative strides
        if x.dtype.kind == "V":
            carrier = np.dtype(f"i{x.dtype.itemsize}")
            tensor = self._torch.from_numpy(x.view(carrier)).view(_torch_dtype(x.dtype.name))
        else:
            tensor = self._torch.from_numpy(x)
        if like.device.type == "cuda" and x.nbytes <= PINNED:  # or PyTorch would wait for everything queued before
            return tensor.pin_memory().to(like.device, non_blocking=True)
        return tensor.to(like.device)

    def retain(self, arrays: tuple[Any, ...]) -> None:
        """Nothing to do: the kernel runs on the stream PyTorch's allocator orders this memory by."""

    def cast(self, x: Any, dtype: str) -> Any:
        return x.to(_torch_dtype(dtype))

    def needs_grad(self, arrays: Iterable[Any]) -> bool:
        """True for tensors that require grad while grad mode is on, and for dual tensors of forward-mode differentiation."""
        if self._torch.is_grad_enabled():
            for x in arrays:
                if x.requires_grad:
                    return True
        forward_ad = self._forward_ad
        if getattr(forward_ad, "_current_level", 0) < 0:
            return False
        return any(forward_ad.unpack_dual(x).tangent is not None for x in arrays)

    def autocasts(self, inputs: tuple[Any, ...], device: Device) -> bool:
        if not self._torch.is_autocast_enabled(device[0]):
            return False
        from cuattn.torch import CASTABLE

        dtype = self._torch.get_autocast_dtype(device[0])
        return any(x.dtype in CASTABLE and x.dtype != dtype for x in inputs if isinstance(x, self._torch.Tensor))

    def writable(self, x: Any) -> bool:
        return not self.needs_grad((x,))


class Jax(Library):
    """JAX arrays outside of jit, grad and vmap. They are immutable, so there is no `out=`, and have no stream of the user's."""

    name = "jax"

    @functools.cached_property
    def _jax(self) -> Any:
        importlib.import_module("jax.dlpack")
        return importlib.import_module("jax")

    def host(self, x: Any) -> Array:
        return np.asarray(x)

    def from_host(self, x: Array, like: Any) -> Any:
        return self._jax.device_put(x, like.device, may_alias=True)

    def give_back(self, x: Any, out: Any = None) -> Any:
        return self._jax.dlpack.from_dlpack(x)


class DLPack(Library):
    """Any other array with `__dlpack__`. Results are CuPy arrays for a CUDA producer and NumPy arrays for a CPU one."""

    name = "dlpack"

    def results(self, device: Device) -> Library:
        return NUMPY if device[0] == "cpu" else CUPY

    def host(self, x: Any) -> Array:
        if self.device(x)[0] == "cuda":
            return CUPY.host(self.to_cupy(x))
        return x if isinstance(x, np.ndarray) else np.from_dlpack(x)

    def from_host(self, x: Array, like: Any) -> Any:
        device = self.device(like)
        if device[0] == "cpu":
            return x
        with CUPY.guard(device):
            return upload(x)

    def give_back(self, x: Any, out: Any = None) -> Any:
        if out is None:
            return x
        out[...] = x
        return out


class CudaInterface(DLPack):
    """Arrays with `__cuda_array_interface__` and no `__dlpack__`, Numba's for one. Results are CuPy arrays."""

    name = "cuda_array_interface"

    def device(self, x: Any, name: str = "array") -> Device:
        return CUPY.device(self.to_cupy(x))

    def to_cupy(self, x: Any) -> Any:
        """A CuPy array over the same memory, after waiting for the stream that the interface names, if it names one."""
        return _cupy().asarray(x)


def traced(x: Any) -> bool:
    """Whether a call on `x` is being traced (torch.compile, torch.export) instead of run: its tensors have no contents."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return False
    # The compiler, while it reads this, takes the first for True. Others run it with tensors that dispatch in Python.
    return bool(torch.compiler.is_dynamo_compiling() or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__)


NUMPY, CUPY, TORCH, JAX, DLPACK, CUDA_INTERFACE = NumPy(), CuPy(), Torch(), Jax(), DLPack(), CudaInterface()
_BY_TYPE: dict[type, Library] = {np.ndarray: NUMPY}


def library_of(x: Any, name: str) -> Library:
    """The library that owns `x`; compare results with `is`. TypeError naming the argument `name` if none does."""
    try:
        return _BY_TYPE[type(x)]
    except KeyError:
        library = _BY_TYPE[type(x)] = _identify(x, name)
        return library


def _identify(x: Any, name: str) -> Library:
    """Owner of an array of a type not met before. A library that was never imported cannot own it."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name}: got a masked array, expected a plain NumPy array (and a mask= for what is invisible)")
        return NUMPY
    cupy, torch, jax = (sys.modules.get(module) for module in ("cupy", "torch", "jax"))
    if cupy is not None and isinstance(x, cupy.ndarray):
        if type(x).__module__.startswith("cupyx.distributed"):
            raise TypeError(f"{name}: got {kind}, expected an array on one device")
        return CUPY
    if torch is not None and isinstance(x, torch.Tensor):
        if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # fake, distributed, quantised wrappers
            raise TypeError(f"{name}: got {kind}, a tensor subclass without memory of its own, expected a plain torch.Tensor")
        return TORCH
    if jax is not None and isinstance(x, jax.Array):
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{name}: got a traced JAX value (inside jit, grad or vmap), expected a concrete jax.Array; "
                "traced ones are for cuattn.jax.attention"
            )
        return JAX
    if isinstance(x, type):
        pass
    elif hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return DLPACK
    elif hasattr(x, "__cuda_array_interface__"):
        return CUDA_INTERFACE
    others = "or one with __dlpack__ or __cuda_array_interface__"
    raise TypeError(f"{name}: got {kind}, expected a NumPy, CuPy, PyTorch or JAX array, {others}")


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a `View.dtype` name; bfloat16 and float8 are ml_dtypes'."""
    if name.startswith(("bfloat16", "float8")):
        dtype: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        return dtype
    return np.dtype(name)


@functools.lru_cache(4096)
def _elements(strides: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[tuple[int, ...], str, int]:
    """(strides in elements, dtype name, element size - 1) of an array with byte strides."""
    if not dtype.isnative:
        raise TypeError(f"got byte-swapped elements ({dtype.str}), expected native byte order")
    size = dtype.itemsize or 1
    if any(stride % size for stride in strides):
        raise ValueError(f"got byte strides {strides}, expected multiples of the element size {size}")
    # A size that is no power of two (a structured or string dtype) is refused by its name; here it only must not divide.
    low_bits = size - 1 if size & (size - 1) == 0 else 0
    return tuple(stride // size for stride in strides), dtype.name, low_bits


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Element strides of a C-contiguous array."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _misaligned(name: str, ptr: int, dtype: str) -> ValueError:
    return ValueError(f"{name}: got an array at address {ptr:#x}, expected a multiple of its element size ({dtype})")


_TORCH_ELEMENTS: dict[Any, tuple[str, int]] = {}


def _torch_element(dtype: Any) -> tuple[str, int]:
    """(name, element size - 1) of a torch.dtype, from then on in _TORCH_ELEMENTS."""
    element = _TORCH_ELEMENTS[dtype] = str(dtype).removeprefix("torch."), dtype.itemsize - 1
    return element


@functools.cache
def _torch_dtype(name: str) -> Any:
    return getattr(importlib.import_module("torch"), name)


@functools.cache
def _torch_device(device: Device) -> Any:
    torch = importlib.import_module("torch")
    return torch.device("cpu") if device[0] == "cpu" else torch.device(*device)


@functools.cache
def _cupy() -> Any:
    importlib.import_module("ml_dtypes")  # before CuPy, which looks for bfloat16 once, when it is imported
    return importlib.import_module("cupy")


def upload(x: Array) -> Any:
    """A C-ordered copy on CuPy's current device and stream. A broadcast axis travels once and keeps stride 0."""
    cupy = _cupy()
    once = tuple(slice(0, 1) if stride == 0 and n > 1 else slice(None) for n, stride in zip(x.shape, x.strides, strict=True))
    copy = cupy.asarray(x[(*once, ...)], order="C")
    return copy if copy.shape == x.shape else cupy.broadcast_to(copy, x.shape)


def download(x: Any, out: Array | None = None) -> Array:
    """A CuPy array as NumPy's, after everything queued on CuPy's current stream; written into `out` if given."""
    host: Array = _cupy().asnumpy(x)
    if out is None:
        return host
    out[...] = host
    return out


_retained: list[tuple[Any, tuple[Any, ...]]] = []
_retained_lock = threading.Lock()


def _retain(arrays: tuple[Any, ...]) -> None:
    cupy = _cupy()
    event = cupy.cuda.Event(disable_timing=True)
    event.record(cupy.cuda.get_current_stream())
    running = [(event, arrays)]
    finished: list[Any] = []
    with _retained_lock:
        for entry in _retained:
            (finished if entry[0].done else running).append(entry)
        _retained[:] = running
    del finished  # outside the lock: a producer's deleter may run any code


@functools.cache
def gpu_available() -> tuple[bool, str]:
    """(whether NumPy arrays are computed on a GPU, the reason why or why not). Looked up once; never raises."""
    try:
        cupy = _cupy()
    except ModuleNotFoundError as error:
        return False, f"the package {error.name} is not installed"
    except Exception as error:
        return False, f"CuPy cannot be imported: {error}"
    runtime = cupy.cuda.runtime
    try:
        if runtime.is_hip:
            return False, "CuPy is built for ROCm, the kernels are CUDA"
        if runtime.driverGetVersion() == 0:
            return False, "no NVIDIA driver"
        if runtime.getDeviceCount() == 0:
            return False, "no CUDA device"
        device = cupy.cuda.Device()
        gpu = runtime.getDeviceProperties(device.id)["name"].decode()
        if int(device.compute_capability) < MIN_COMPUTE_CAPABILITY:
            return False, f"{gpu} has compute capability {device.compute_capability}, the kernels need {MIN_COMPUTE_CAPABILITY}"
    except Exception as error:
        return False, f"no usable CUDA device: {error}"
    try:
        major, minor = cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return False, f"NVRTC, the CUDA compiler library, cannot be loaded: {error}"
    return True, f"{gpu}, CuPy {cupy.__version__}, NVRTC {major}.{minor}"
