"""Score modifications: what happens to a scaled score before the mask and the softmax.

One frozen dataclass here, one struct in kernels/attention/score_mod.cuh (or generated, for user code). `grad` is the
derivative of the modified score with respect to the score, at the unmodified score; `accumulate` sums the gradient of the
modification's own arrays. A call's modifications apply in order, their derivatives in the reverse order.
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

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions in `arrays`, ascending, of the arrays whose gradient the backward gives."""
        return ()

    def apply(self, s: Array, tile: Tile) -> Array:
        """Modified scores of one tile; `s` broadcasts over (heads, rows, columns)."""
        raise NotImplementedError

    def grad(self, s: Array, tile: Tile) -> Array:
        """d apply(s) / d s, broadcastable to the shape of `s`."""
        raise NotImplementedError

    def accumulate(self, s: Array, ds: Array, tile: Tile, totals: Sequence[Array]) -> None:
        """Add one tile's part of the gradients of the differentiable arrays to `totals`, in place.

        s: the modification's own input, ds: the gradient at its output, 0 where a key is invisible; both (heads, rows,
          columns). totals[n] has the shape of arrays[differentiable[n]] and is C-contiguous, float32 or float64.
        """

    def bind(self, arrays: Sequence[Any]) -> ScoreMod:
        """The same modification over other arrays."""
        return self

    def key(self) -> Hashable:
        """Everything about the modification except the contents of its arrays."""
        return self

    @property
    def uniforms(self) -> int:
        """Differentiable arrays of which one element serves all scores of a head: the kernel sums those in registers."""
        return 0

    def cuda_type(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        """C++ type; `operands` describe `arrays`. `Real` names the type of scores: float or double.

        uniform: None, or, where the gradients of arrays are wanted, how many `uniforms` the modifications before have.
        """
        raise NotImplementedError

    def cuda_source(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        """Definitions that the type needs beyond kernels/attention/score_mod.cuh."""
        return ""

    def fields(self, operands: Sequence[Operand], gradients: Sequence[int] = ()) -> tuple[Field, ...]:
        """Members of the C++ struct; `gradients`: slots of the pointers to the gradients of arrays, where they are wanted."""
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

    def cuda_type(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        return "SoftCap<Real, Tanh>"

    def fields(self, operands: Sequence[Operand], gradients: Sequence[int] = ()) -> tuple[Field, ...]:
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

    def cuda_type(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        return f"Alibi<Real, {CTYPES[operands[0].dtype]}>"

    def fields(self, operands: Sequence[Operand], gradients: Sequence[int] = ()) -> tuple[Field, ...]:
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

    @property
    def differentiable(self) -> tuple[int, ...]:
        return (0,)

    def grad(self, s: Array, tile: Tile) -> Array:
        return np.ones_like(s)

    def accumulate(self, s: Array, ds: Array, tile: Tile, totals: Sequence[Array]) -> None:
        shape = (1,) * (4 - totals[0].ndim) + totals[0].shape
        total = totals[0].reshape(shape)  # a view
        part = ds.sum(axis=tuple(axis for axis, n in enumerate(shape[1:]) if n == 1), keepdims=True)
        coordinates = (tile.head, tile.row, tile.col)
        head, row, col = (x if n > 1 else np.zeros_like(x[:1, :1, :1]) for x, n in zip(coordinates, shape[1:], strict=True))
        total[tile.batch if shape[0] > 1 else 0, head, row, col] += part

    def cuda_type(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        wanted, pairs = (str(flag).lower() for flag in (uniform is not None, operands[0].in_pairs))
        return f"Bias<Real, {CTYPES[operands[0].dtype]}, {wanted}, {pairs}>"

    def fields(self, operands: Sequence[Operand], gradients: Sequence[int] = ()) -> tuple[Field, ...]:
        return (Field.ptr(operands[0]), *Field.ints(operands[0].broadcast_strides(4)))


USER_VARIABLES = ("s", "b", "h", "i", "j", "seqlen_q", "seqlen_k")
"""Names an expression may use besides its parameters: score (of type Real), batch, query head, query, key, lengths."""
FLOAT_PARAMS = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of a parameter that can have a gradient."""


@dataclass(frozen=True, eq=False)
class UserMod(ScoreMod):
    """A score modification written in CUDA C: one expression for the score, one for its derivative with respect to `s`.

    expression, gradient: C expressions over s, b, h, i, j, seqlen_q, seqlen_k and the parameters. `Real` names the type of
      the scores (float, or double for float64 inputs); use overloaded functions (tanh, exp, fabs, min) and write
      constants as Real(0.5): a bare 0.5 makes float kernels compute in double. Beside float16 and bfloat16 arrays, exp, exp2,
      log, log2 and tanh are short forms in float, whose error is about 2^-21 of the result or of 1.
    params: Python floats (of type Real in the expression) or one-dimensional arrays (indexed in the expression: slope[h]).
    param_gradients: for each float vector of `params` whose gradient is wanted, a pair of expressions (index, derivative): the
      element of the vector that the score reads, an integer, and d expression / d that element. `expression` may read such
      a vector at that one index only.
    Raises ValueError or TypeError for a parameter that is not a number or a vector, and for a gradient of anything but a float
    vector.

    >>> slope = np.ones(8, np.float32)
    >>> mod = UserMod("s - slope[h] * fabs(Real(i - j))", "1", {"slope": slope}, {"slope": ("h", "-fabs(Real(i - j))")})
    >>> mod.differentiable, mod.index_varies("slope")
    ((0,), False)
    """

    expression: str
    gradient: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    param_gradients: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.params.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in (*USER_VARIABLES, "Real"):
                raise ValueError(f"score_mod: parameter name {name!r} is not a free C identifier")
            if hasattr(value, "shape") and hasattr(value, "dtype"):
                if len(value.shape) > 1:
                    raise ValueError(f"score_mod: parameter {name} has shape {value.shape}, expected a number or a vector")
            elif not isinstance(value, (int, float)):
                raise TypeError(f"score_mod: got parameter {name} = {value!r}, expected a number or a vector")
        for name, pair in self.param_gradients.items():
            if name not in self.params:
                raise ValueError(f"score_mod: got a gradient for {name!r}, expected one of the parameters {list(self.params)}")
            # A dtype of NumPy or JAX, of PyTorch (torch.float32), or its name.
            dtype = str(self.params[name].dtype).rpartition(".")[2] if name in self._array_names else "a number"
            if dtype not in FLOAT_PARAMS:
                raise TypeError(f"score_mod: got a gradient for {name!r}, which is {dtype}, expected a vector of floats")
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise TypeError(
                    f"score_mod: got {pair!r} as gradient of {name!r}, expected (index, derivative), two expressions"
                )

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
        return UserMod(self.expression, self.gradient, {**self.params, **replaced}, self.param_gradients)

    def key(self) -> Hashable:
        scalars = tuple((n, float(self.params[n])) for n in self._scalar_names)
        return (UserMod, self.expression, self.gradient, self._array_names, scalars, self._param_gradients)

    @property
    def differentiable(self) -> tuple[int, ...]:
        return tuple(n for n, name in enumerate(self._array_names) if name in self.param_gradients)

    @property
    def _param_gradients(self) -> tuple[tuple[str, str, str], ...]:
        """(name, index, derivative) of each differentiable array, in the order of `differentiable`."""
        return tuple((n, *self.param_gradients[n]) for n in self._array_names if n in self.param_gradients)

    @property
    def differentiable_names(self) -> tuple[str, ...]:
        """Of the arrays in `differentiable`."""
        return tuple(name for name, _, _ in self._param_gradients)

    def index_varies(self, name: str) -> bool:
        """Whether the index of a differentiable parameter depends on the score, the query or the key, not on the head alone."""
        from cuattn.expressions import names

        return not names(self.param_gradients[name][0]).isdisjoint(("s", "i", "j"))

    def _evaluate(self, expression: str, s: Array, tile: Tile) -> Array:
        """Value of an expression in the types of C, broadcastable to the shape of `s`."""
        from cuattn.expressions import evaluate

        scalars = {n: s.dtype.type(self.params[n]) for n in self._scalar_names}
        arrays = {n: np.asarray(self.params[n]) for n in self._array_names}
        coordinates = (s, tile.batch, tile.head, tile.row, tile.col, tile.seqlen_q, tile.seqlen_k)
        variables = dict(zip(USER_VARIABLES, coordinates, strict=True))
        return np.asarray(evaluate(expression, {**variables, **scalars, **arrays}, s.dtype))

    def apply(self, s: Array, tile: Tile) -> Array:
        return self._evaluate(self.expression, s, tile).astype(s.dtype, copy=False)

    def grad(self, s: Array, tile: Tile) -> Array:
        if self.gradient is None:
            raise NotImplementedError(f"score_mod {self.expression!r} was given without a gradient expression")
        return self._evaluate(self.gradient, s, tile).astype(s.dtype, copy=False)

    def accumulate(self, s: Array, ds: Array, tile: Tile, totals: Sequence[Array]) -> None:
        for (_, position, derivative), total in zip(self._param_gradients, totals, strict=True):
            index = self._evaluate(position, s, tile)
            if index.dtype.kind not in "bui":
                raise ValueError(f"score_mod: index {position!r} is of type {index.dtype}, expected an integer")
            if not total.size:
                continue
            # Clipped as a read is. Where ds is 0, as at an invisible key, the derivative may be anything.
            index = np.clip(index.astype(np.intp), 0, total.size - 1).reshape((1,) * (3 - index.ndim) + index.shape)
            part = np.where(ds == 0, 0, ds * self._evaluate(derivative, s, tile).astype(ds.dtype, copy=False))
            part = part.sum(axis=tuple(axis for axis, n in enumerate(index.shape) if n == 1), keepdims=True)
            np.add.at(total, index, part)

    def _type_name(self, dtypes: Sequence[str]) -> str:
        import hashlib

        names = (self._scalar_names, self._array_names, self._param_gradients)
        text = repr((self.expression, self.gradient, names, tuple(dtypes)))
        return "UserMod_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def uniforms(self) -> int:
        return sum(not self.index_varies(name) for name, _, _ in self._param_gradients)

    def cuda_type(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        return self._type_name([op.dtype for op in operands]) + ("" if uniform is None else f"_{uniform}")

    def cuda_source(self, operands: Sequence[Operand], uniform: int | None = None) -> str:
        """The struct: apply, grad, and where gradients are wanted pull and flush (kernels/attention/score_mod.cuh)."""
        gradients = () if uniform is None else self._param_gradients
        dtypes = [op.dtype for op in operands]
        members = [f"    const {CTYPES[t]}* {n};" for n, t in zip(self._array_names, dtypes, strict=True)]
        members += [f"    alignas(8) Real {n};" for n in self._scalar_names]
        members += [f"    double* gradient_of_{n};" for n, _, _ in gradients]
        where = "(Real s, const Coord& at, int i, int j)"
        methods = [self._method("Real apply" + where, f"return {_cuda('apply', self.expression)};")]
        if self.gradient is not None:
            methods.append(self._method("Real grad" + where, f"return {_cuda('grad', self.gradient)};"))
            pull, flush, count = [], [], uniform or 0
            for name, index, derivative in gradients:
                value = f"ds == Real(0) ? Real(0) : ds * {_cuda(name, derivative)}"
                if self.index_varies(name):
                    pull.append(f"sums.scatter(gradient_of_{name}, ({index}), {value});")
                else:
                    pull.append(f"sums.uniform[{count}] += {value};")
                    flush.append(f"sums.hand_over({count}, gradient_of_{name}, ({index}));")
                    count += 1
            pull.append("return ds == Real(0) ? Real(0) : ds * grad(s, at, i, j);")
            sums = "template <class Sums>\n    "
            signature = "Real pull(Real s, Real ds, const Coord& at, int i, int j, Sums& sums)"
            methods.append(self._method(signature, "\n        ".join(pull), sums))
            methods.append(self._method("void flush(Sums& sums, const Coord& at)", "\n        ".join(flush), sums))
        return (
            f"struct alignas(8) {self.cuda_type(operands, uniform)} : Functions {{\n"
            + "\n".join(members or ["    long long unused;"])
            + f"\n    static constexpr bool kIdentity = false, kReadsMemory = {'true' if self._array_names else 'false'};\n"
            + "\n".join(methods)
            + "\n};\n"
        )

    def _method(self, signature: str, body: str, template: str = "") -> str:
        return (
            f"    {template}__device__ __forceinline__ {signature} const {{\n"
            "        const int b = at.batch, h = at.head, seqlen_q = at.seqlen_q, seqlen_k = at.seqlen_k;\n"
            "        (void)b; (void)h; (void)seqlen_q; (void)seqlen_k;\n"
            f"        {body}\n    }}"
        )

    def fields(self, operands: Sequence[Operand], gradients: Sequence[int] = ()) -> tuple[Field, ...]:
        pointers = tuple(Field.ptr(op) for op in operands)
        scalars = tuple(Field("real", float(self.params[n])) for n in self._scalar_names)
        return pointers + scalars + tuple(Field("ptr", slot) for slot in gradients) or (Field("int", 0),)


def _cuda(label: str, expression: str) -> str:
    """A user's expression as a value of type Real, on lines of its own that a compiler error refers to by the label."""
    return f'Real(\n#line 1 "score_mod {label}"\n{expression}\n        )'
