"""Score modifications: what happens to a scaled score before the mask and the softmax.

One frozen dataclass here, one struct in kernels/attention/score_mod.cuh (or generated, for user code). `grad` is the
derivative of the modified score with respect to the score, at the unmodified score. A call's modifications apply in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cuattn.fields import CTYPES, Field, Operand
from cuattn.masks import Tile, gather

Array = npt.NDArray[Any]


class ScoreMod:
    """Base of all score modifications."""

    arrays: tuple[Any, ...] = ()
    """Arrays the modification reads, in the order in which `fields` receives them as operands."""

    def apply(self, s: Array, tile: Tile) -> Array:
        """Modified scores of one tile; `s` broadcasts over (heads, rows, columns)."""
        raise NotImplementedError

    def grad(self, s: Array, tile: Tile) -> Array:
        """d apply(s) / d s, broadcastable to the shape of `s`."""
        raise NotImplementedError

    def bind(self, arrays: Sequence[Any]) -> ScoreMod:
        """The same modification over other arrays."""
        return self

    def key(self) -> Hashable:
        """Everything about the modification except the contents of its arrays."""
        return self

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        """C++ type; `dtypes` are those of `arrays`. `Real` names the type of scores: float or double."""
        raise NotImplementedError

    def cuda_source(self, dtypes: Sequence[str]) -> str:
        """Definitions that the type needs beyond kernels/attention/score_mod.cuh."""
        return ""

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        """Members of the C++ struct."""
        return (Field("int", 0),)


@dataclass(frozen=True)
class SoftCap(ScoreMod):
    """cap * tanh(s / cap): scores stay inside (-cap, cap)."""

    cap: float

    def __post_init__(self) -> None:
        if not isinstance(self.cap, (int, float)) or isinstance(self.cap, bool) or not 0 < self.cap < math.inf:
            raise ValueError(f"softcap: got {self.cap!r}, expected a positive finite number or None")

    def apply(self, s: Array, tile: Tile) -> Array:
        cap = s.dtype.type(self.cap)
        return np.asarray(cap * np.tanh(s / cap))

    def grad(self, s: Array, tile: Tile) -> Array:
        return np.asarray(1 - np.tanh(s / s.dtype.type(self.cap)) ** 2)

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return "SoftCap<Real>"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        return (Field("real", self.cap), Field("real", 1 / self.cap))


@dataclass(frozen=True, eq=False)
class Alibi(ScoreMod):
    """s - slope[head] * |i + seqlen_k - seqlen_q - j|; slopes (num_heads,) or (batch, num_heads), float32 or float64.

    Source: Press et al., "Train short, test long", section 3, with a distance that is symmetric for keys after the query.
    """

    slopes: Any = field(repr=False)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.slopes,)

    def bind(self, arrays: Sequence[Any]) -> ScoreMod:
        return Alibi(arrays[0])

    def key(self) -> Hashable:
        return Alibi

    def apply(self, s: Array, tile: Tile) -> Array:
        slopes = np.asarray(self.slopes)
        slope = gather(slopes[..., None, None], tile.batch, tile.head, np.zeros_like(tile.head), np.zeros_like(tile.head))
        distance = np.abs(tile.row + tile.seqlen_k - tile.seqlen_q - tile.col)
        return np.asarray(s - slope.astype(s.dtype) * distance.astype(s.dtype))

    def grad(self, s: Array, tile: Tile) -> Array:
        return np.ones_like(s)

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return f"Alibi<Real, {CTYPES[dtypes[0]]}>"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        return (Field.ptr(operands[0]), *Field.ints(operands[0].broadcast_strides(2)))


@dataclass(frozen=True, eq=False)
class Bias(ScoreMod):
    """s + array[batch, head, i, j]; the array broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""

    array: Any = field(repr=False)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.array,)

    def bind(self, arrays: Sequence[Any]) -> ScoreMod:
        return Bias(arrays[0])

    def key(self) -> Hashable:
        return Bias

    def apply(self, s: Array, tile: Tile) -> Array:
        return np.asarray(s + gather(np.asarray(self.array), tile.batch, tile.head, tile.row, tile.col).astype(s.dtype))

    def grad(self, s: Array, tile: Tile) -> Array:
        return np.ones_like(s)

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return f"Bias<Real, {CTYPES[dtypes[0]]}>"

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        return (Field.ptr(operands[0]), *Field.ints(operands[0].broadcast_strides(4)))


USER_VARIABLES = ("s", "b", "h", "i", "j", "seqlen_q", "seqlen_k")
"""Names an expression may use besides its parameters: score (of type Real), batch, query head, query, key, lengths."""


@dataclass(frozen=True, eq=False)
class UserMod(ScoreMod):
    """A score modification written in CUDA C: one expression for the score, one for its derivative with respect to `s`.

    expression, gradient: C expressions over s, b, h, i, j, seqlen_q, seqlen_k and the parameters. `Real` names the type of
      the scores (float, or double for float64 inputs); use overloaded functions (tanh, exp, fabs, min) and write
      constants as Real(0.5): a bare 0.5 makes float kernels compute in double.
    params: Python floats (of type Real in the expression) or one-dimensional arrays (indexed in the expression: slope[h]).

    >>> mod = UserMod("s - slope[h] * fabs(Real(i - j))", gradient="1", params={"slope": np.ones(8, np.float32)})
    """

    expression: str
    gradient: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.params.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in (*USER_VARIABLES, "Real"):
                raise ValueError(f"score_mod: parameter name {name!r} is not a free C identifier")
            if hasattr(value, "shape") and hasattr(value, "dtype"):
                if len(value.shape) > 1:
                    raise ValueError(f"score_mod: parameter {name} has shape {value.shape}, expected a number or a vector")
            elif not isinstance(value, (int, float)):
                raise TypeError(f"score_mod: got parameter {name} = {value!r}, expected a number or a vector")

    @property
    def _array_names(self) -> tuple[str, ...]:
        return tuple(n for n, p in self.params.items() if hasattr(p, "shape") and hasattr(p, "dtype") and len(p.shape))

    @property
    def _scalar_names(self) -> tuple[str, ...]:
        return tuple(n for n in self.params if n not in self._array_names)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(self.params[n] for n in self._array_names)

    def bind(self, arrays: Sequence[Any]) -> ScoreMod:
        replaced = dict(zip(self._array_names, arrays, strict=True))
        return UserMod(self.expression, self.gradient, {**self.params, **replaced})

    def key(self) -> Hashable:
        scalars = tuple((n, float(self.params[n])) for n in self._scalar_names)
        return (UserMod, self.expression, self.gradient, self._array_names, scalars)

    def _evaluate(self, expression: str, s: Array, tile: Tile) -> Array:
        from cuattn.expressions import evaluate

        scalars = {n: s.dtype.type(self.params[n]) for n in self._scalar_names}
        arrays = {n: np.asarray(self.params[n]) for n in self._array_names}
        coordinates = (s, tile.batch, tile.head, tile.row, tile.col, tile.seqlen_q, tile.seqlen_k)
        variables = dict(zip(USER_VARIABLES, coordinates, strict=True))
        return np.asarray(evaluate(expression, {**variables, **scalars, **arrays}, s.dtype)).astype(s.dtype, copy=False)

    def apply(self, s: Array, tile: Tile) -> Array:
        return self._evaluate(self.expression, s, tile)

    def grad(self, s: Array, tile: Tile) -> Array:
        if self.gradient is None:
            raise NotImplementedError(f"score_mod {self.expression!r} was given without a gradient expression")
        return self._evaluate(self.gradient, s, tile)

    def _type_name(self, dtypes: Sequence[str]) -> str:
        import hashlib

        text = repr((self.expression, self.gradient, self._scalar_names, self._array_names, tuple(dtypes)))
        return "UserMod_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def cuda_type(self, dtypes: Sequence[str]) -> str:
        return self._type_name(dtypes)

    def cuda_source(self, dtypes: Sequence[str]) -> str:
        arrays = [f"    const {CTYPES[t]}* {n};" for n, t in zip(self._array_names, dtypes, strict=True)]
        members = "\n".join(arrays + [f"    alignas(8) Real {n};" for n in self._scalar_names] or ["    long long unused;"])
        bodies = [("apply", self.expression)] + ([("grad", self.gradient)] if self.gradient is not None else [])
        methods = "\n".join(
            f"    __device__ __forceinline__ Real {name}(Real s, const Coord& at, int i, int j) const {{\n"
            "        const int b = at.batch, h = at.head, seqlen_q = at.seqlen_q, seqlen_k = at.seqlen_k;\n"
            "        (void)b; (void)h; (void)seqlen_q; (void)seqlen_k;\n"
            f'        return Real(\n#line 1 "score_mod {name}"\n{text}\n        );\n    }}'
            for name, text in bodies
        )
        return (
            f"struct alignas(8) {self._type_name(dtypes)} {{\n{members}\n"
            "    static constexpr bool kIdentity = false, kReadsMemory = true;\n"
            f"{methods}\n}};\n"
        )

    def fields(self, operands: Sequence[Operand]) -> tuple[Field, ...]:
        pointers = tuple(Field.ptr(op) for op in operands)
        scalars = tuple(Field("real", float(self.params[n])) for n in self._scalar_names)
        return pointers + scalars or (Field("int", 0),)
