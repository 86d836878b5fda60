"""Tensor maps: how the copy engine of sm_90 is told of an array (CUDA driver API, tensor map object management)."""

from __future__ import annotations

import ctypes
import functools
import struct

from cuattn.fields import ITEMSIZE, Operand

MAP_BYTES = 128
MAP_ALIGNMENT = 64
MAX_STRIDE_BYTES = 1 << 40

_WORD = struct.Struct("<Q")

# Values of the driver's enumerations CUtensorMap...
_DATA_TYPES = {"uint8": 0, "int8": 0, "float8_e4m3fn": 0, "float16": 6, "float32": 7, "bfloat16": 9}
_NO_INTERLEAVE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_OUT_OF_BOUNDS_ZERO = 0


def tma_obstacles(name: str, operand: Operand | None, alignment: int) -> list[str]:
    """Why the copy engine cannot load an array (batch, row, head, column), nothing if it can.

    alignment: of the start of every row, in bytes.
    """
    assert operand is not None
    reasons = [f"TMA needs rows of {name} aligned to 16 bytes, got {alignment}"] if alignment < 16 else []
    for axis, n, stride in zip(("batch", "row", "head"), operand.shape, operand.strides, strict=False):
        if n > 1 and not 0 < 2 * stride < MAX_STRIDE_BYTES:
            reasons.append(f"TMA needs a positive stride, got {stride} along the {axis} axis of {name}")
    return reasons


def tma_bias(operand: Operand) -> Operand | None:
    """A bias that broadcasts to (batch, head, query, key) as (batch, query, head, key); None where TMA cannot load it."""
    shape = (1,) * (4 - len(operand.shape)) + operand.shape
    strides = operand.broadcast_strides(4)
    outer = [(n, s) for n, s in zip(shape[:3], strides[:3], strict=True) if n > 1]
    if ITEMSIZE[operand.dtype] != 2 or operand.alignment < 16 or min(shape[2:]) < 2 or strides[3] != 1:
        return None
    if any(not 0 < 2 * s < MAX_STRIDE_BYTES or 2 * s % 16 for _, s in outer):
        return None
    order = (0, 2, 1, 3)
    return operand._replace(shape=tuple(shape[n] for n in order), strides=tuple(strides[n] for n in order))


@functools.lru_cache(1)
def _encode() -> ctypes._NamedFuncPointer:
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    encode.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        *[ctypes.c_void_p] * 4,
        *[ctypes.c_int] * 4,
    ]
    return encode


def encode(operand: Operand, box: tuple[int, ...], address: int) -> bytes:
    """The tensor map of an array (batch, row, head, column) at `address`, over (column, row, head, batch).

    box: elements of one copy along (column, row, head, batch).
    """
    batch, rows, heads, columns = operand.shape
    # An axis of one element may have any stride; the copy engine wants a valid one.
    size = ITEMSIZE[operand.dtype]
    strides = [size * s if n > 1 else 16 for n, s in zip(operand.shape[:3], operand.strides[:3], strict=True)]
    rank = 4
    sizes = (ctypes.c_uint64 * rank)(columns, rows, heads, batch)
    steps = (ctypes.c_uint64 * (rank - 1))(strides[1], strides[2], strides[0])
    extent = (ctypes.c_uint32 * rank)(*box)
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    start = -ctypes.addressof(memory) % MAP_ALIGNMENT
    status = _encode()(
        ctypes.addressof(memory) + start,
        _DATA_TYPES[operand.dtype],
        rank,
        address,
        ctypes.addressof(sizes),
        ctypes.addressof(steps),
        ctypes.addressof(extent),
        ctypes.addressof(ones),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _OUT_OF_BOUNDS_ZERO,
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {status} for {operand}, box {box}, address {address:#x}")
    return memory.raw[start : start + MAP_BYTES]


class TensorMap:
    """The map of one array of a plan, for whatever address a call brings."""

    def __init__(self, operand: Operand, box: tuple[int, ...]) -> None:
        self.operand, self.box = operand, box
        self.movable = False
        """whether the address is known to be the map's first word, and nothing else to depend on it"""

    def at(self, address: int) -> bytes:
        """The map of the array at `address`."""
        encoded = encode(self.operand, self.box, address)
        if not self.movable:
            other = address ^ (1 << 20)
            moved = _WORD.pack(other) + encoded[8:]
            self.movable = encoded[:8] == _WORD.pack(address) and encode(self.operand, self.box, other) == moved
        return encoded
