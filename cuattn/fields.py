"""How the members of a device struct are described by the Python class that owns it.

A mask or score modification is one Python dataclass and one C++ struct. The dataclass names the struct's members, in order,
as `Field` values; `launch.py` lays them out. Every member is 8-byte aligned on the device (`alignas(8)`), so a layout is the
plain concatenation of its members and needs no knowledge of C alignment rules.
"""

from __future__ import annotations

import math
from typing import NamedTuple

CTYPES = {
    "bool": "unsigned char",
    "uint8": "unsigned char",
    "int32": "int",
    "int64": "long long",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
"""C++ element type of each dtype name that an operand may have."""
ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}


class Operand(NamedTuple):
    """A device array as a kernel sees it: `slot` is its index among the call's pointers, strides are in elements."""

    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    alignment: int = 1
    """bytes, at most 16, to which its start is known to be aligned"""

    @property
    def in_pairs(self) -> bool:
        """Whether elements 2 n and 2 n + 1 of every row may be loaded at once."""
        rows = [s for n, s in zip(self.shape[:-1], self.strides[:-1], strict=True) if n > 1]
        whole = len(self.shape) > 0 and self.shape[-1] % 2 == 0 and self.strides[-1] == 1
        return whole and self.alignment % (2 * ITEMSIZE[self.dtype]) == 0 and all(s % 2 == 0 for s in rows)

    @property
    def vector_bytes(self) -> int:
        """Bytes of the widest access, 16 at most, to which the start of every row is aligned."""
        size = ITEMSIZE[self.dtype]
        return math.gcd(self.alignment, *(s * size for n, s in zip(self.shape[:-1], self.strides[:-1], strict=True) if n > 1))

    def broadcast_strides(self, ndim: int) -> tuple[int, ...]:
        """Strides over `ndim` leading-padded axes, 0 along every axis of length 1."""
        pad = (0,) * (ndim - len(self.shape))
        return pad + tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True))


class Field(NamedTuple):
    """One member of a device struct: `kind` is ptr (value: slot), int (64-bit) or real (float or double, as the scores)."""

    kind: str
    value: float

    @staticmethod
    def ptr(operand: Operand) -> Field:
        return Field("ptr", operand.slot)

    @staticmethod
    def ints(values: tuple[int, ...]) -> tuple[Field, ...]:
        return tuple(Field("int", v) for v in values)
