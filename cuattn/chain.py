"""Launches of kernels that wait for the grids ahead by themselves: programmatic dependent launch (cuLaunchKernelEx).


The CTAs of such a kernel may be in place, waiting, while the kernel ahead of it in the stream still works: what a launch takes
is then no longer between the two. Nothing changes for whoever reads its results.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...
_LEAST_DRIVER = 12030
"""of CUDA whose graphs have such launches"""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_ATTRIBUTES = (_Attribute * 1)(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1))


@functools.lru_cache(1)
def chains() -> bool:
    """Whether the driver launches so, in graphs too."""
    from cupy.cuda import runtime

    return int(runtime.driverGetVersion()) >= _LEAST_DRIVER


@functools.lru_cache(1)
def _launch() -> Any:
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    return launch


@functools.lru_cache(1024)
def _config(grid: tuple[int, int, int], block: tuple[int, int, int], smem_bytes: int, stream: int) -> tuple[_Config, int]:
    """What the driver reads of a launch, and its address. Nobody writes it once it is made."""
    made = _Config(grid, block, smem_bytes, stream, _ATTRIBUTES, len(_ATTRIBUTES))
    return made, ctypes.addressof(made)


class ChainedFunction:
    """Called as `cupy.cuda.Function` is, with what `arguments` gives."""

    def __init__(self, function: Any) -> None:
        self._function, self._handle, self._launch = function, function.ptr, _launch()

    @staticmethod
    def arguments(address: int) -> Any:
        """Those of a kernel with one struct, which stays at `address`."""
        return (ctypes.c_void_p * 1)(address)

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Any, smem_bytes: int, stream: Any
    ) -> None:
        config = _config(grid, block, smem_bytes, stream.ptr)
        status = self._launch(config[1], self._handle, arguments, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx: error {status} for a grid of {grid} CTAs of {block[0]} threads")
