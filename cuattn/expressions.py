"""CUDA C expressions over NumPy arrays: the NumPy side of a user's score modification.

An expression is evaluated with the types that C++ gives it, so that 7 / 2 is 3, 0.5 is a double and i - j wraps like an int.
Both sides of a ternary are computed for every lane; indices are clipped, so that a lane which is not selected reads nothing
outside its array.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DType = np.dtype[Any]

BOOL, INT, FLOAT, DOUBLE = (np.dtype(t) for t in (np.bool_, np.int32, np.float32, np.float64))

PROLOGUE = "typedef float Real; typedef _Bool bool; Real expression(void) { return\n"
EPILOGUE = "\n;}"
CAST = "__cast_"
"""Prefix of the function that stands for a cast written as T(x) or static_cast<T>(x), which C does not have."""
FUNCTIONAL_CAST = re.compile(r"\b(Real|float|double|bool|char|short|int|long|unsigned)\s*\(")
STATIC_CAST = re.compile(r"\bstatic_cast\s*<\s*(\w[\w ]*?)\s*>\s*\(")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def evaluate(expression: str, variables: Mapping[str, Any], dtype: npt.DTypeLike) -> Array:
    """Value of a CUDA C expression, with the shape that its variables broadcast to and the dtype that C++ would give it.

    variables: one-dimensional arrays are parameters to be indexed, table[h], and keep their dtype; every other array or number
      is a value that broadcasts. Integer values are of type int, Python floats of type Real.
    dtype: what `Real` names: float64, else float32 (16-bit scores are computed in float32).
    Raises ValueError, naming score_mod, the expression and the culprit, for anything outside the language of expressions:
    arithmetic, comparison, logical and bit operators, ternaries, casts, indexing and the functions of CUDA's math library.

    >>> evaluate("s > 0 ? s : s * slope[h] / 2", {"s": np.float32(-4), "slope": np.ones(2, np.float32), "h": 1}, np.float32)
    array(-2., dtype=float32)
    """
    real = DOUBLE if np.dtype(dtype) == DOUBLE else FLOAT
    with np.errstate(all="ignore"):
        return _Evaluation(expression, variables, real).value(_parse(expression))


def names(expression: str) -> frozenset[str]:
    """The variables and parameters that an expression reads; functions and types are left out.

    Raises ValueError, naming score_mod, for a syntax error.

    >>> sorted(names("min(i - j, 3) + table[h]"))
    ['h', 'i', 'j', 'table']
    """
    return frozenset(_names(_parse(expression)))


def _names(node: Any) -> Iterator[str]:
    if type(node).__name__ == "ID":
        yield node.name
    for edge, child in node.children():
        if not (type(node).__name__ == "FuncCall" and edge == "name"):
            yield from _names(child)


def _error(expression: str, problem: str) -> ValueError:
    return ValueError(f"score_mod: expression {expression!r}: {problem}")


@functools.lru_cache(maxsize=256)
def _parse(expression: str) -> Any:
    """Syntax tree of one expression."""
    from pycparser import c_parser

    text = COMMENT.sub(" ", expression)
    text = STATIC_CAST.sub(lambda match: f"{CAST}{'_'.join(match[1].split())}(", text)
    text = FUNCTIONAL_CAST.sub(rf"{CAST}\1(", text)
    try:
        tree = c_parser.CParser().parse(PROLOGUE + text + EPILOGUE)
    except c_parser.ParseError as error:
        raise _error(expression, f"syntax error ({str(error).strip(': ')})") from None
    statements = tree.ext[-1].body.block_items
    if len(tree.ext) != 3 or len(statements) != 1 or statements[0].expr is None:
        raise _error(expression, "expected one expression, without statements or ';'")
    return statements[0].expr


def _promoted(dtype: DType) -> DType:
    """The type in which an operand takes part in arithmetic: at least int, at least float."""
    if dtype.kind in "bui":
        return INT if dtype.itemsize < INT.itemsize else dtype
    return DOUBLE if dtype == DOUBLE else FLOAT


def _common(*dtypes: DType) -> DType:
    """The usual arithmetic conversions of C: the widest float, else the widest integer, unsigned at equal width."""
    promoted = [_promoted(t) for t in dtypes]
    floats = [t for t in promoted if t.kind == "f"]
    return max(floats or promoted, key=lambda t: (t.itemsize, t.kind == "u"))


def _round(x: Array) -> Array:
    """Halves away from zero, as C rounds."""
    whole = np.trunc(x)
    return np.asarray(whole + np.copysign((np.abs(x - whole) >= 0.5).astype(x.dtype), x))


def _special(name: str, x: Array) -> Array:
    import scipy.special

    return np.asarray(getattr(scipy.special, name)(x))


FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    **{name: (1, getattr(np, name)) for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt")},
    **{
        name: (1, getattr(np, name)) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "floor", "ceil", "trunc", "rint")
    },
    **{"asin": (1, np.arcsin), "acos": (1, np.arccos), "atan": (1, np.arctan), "atan2": (2, np.arctan2)},
    **{"asinh": (1, np.arcsinh), "acosh": (1, np.arccosh), "atanh": (1, np.arctanh), "fabs": (1, np.abs)},
    **{name: (2, getattr(np, name)) for name in ("fmin", "fmax", "fmod", "hypot", "copysign")},
    "pow": (2, np.power),
    "nearbyint": (1, np.rint),
    "round": (1, _round),
    "rsqrt": (1, lambda x: 1 / np.sqrt(x)),
    "exp10": (1, lambda x: np.power(x.dtype.type(10), x)),
    "erf": (1, functools.partial(_special, "erf")),
    "erfc": (1, functools.partial(_special, "erfc")),
    "fdim": (2, lambda x, y: np.where(x <= y, x.dtype.type(0), x - y)),
    "fma": (3, lambda x, y, z: x * y + z),
}
"""Argument count and NumPy form of each function that C++ overloads for float and double; with an f appended, for float."""
INTRINSICS = ("exp", "exp10", "log", "log2", "log10", "sin", "cos", "tan", "pow")
"""Functions with a fast float version, spelled __expf."""
CLASSIFIERS = {"isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite, "signbit": np.signbit}
SELECTORS = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}
"""Functions of two integers or two floats: NumPy form of each; the float form prefers a number to a NaN."""

COMPARISONS = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal}
LOGICAL = {"&&": np.logical_and, "||": np.logical_or}
ARITHMETIC = {"+": np.add, "-": np.subtract, "*": np.multiply}
BITWISE = {"&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor}
SHIFTS = {"<<": np.left_shift, ">>": np.right_shift}


class _Evaluation:
    """One evaluation; each method named after a node of the syntax tree returns that node's value."""

    def __init__(self, expression: str, variables: Mapping[str, Any], real: DType) -> None:
        self.expression, self.variables, self.real = expression, variables, real

    def fail(self, problem: str) -> ValueError:
        return _error(self.expression, problem)

    def value(self, node: Any) -> Array:
        kind = type(node).__name__
        method = getattr(self, f"_{kind.lower()}", None)
        if method is None:
            raise self.fail(f"{kind} is not supported in an expression")
        return np.asarray(method(node))

    def _variable(self, name: str) -> Array:
        if name not in self.variables:
            raise self.fail(f"unknown name {name!r}, expected one of {', '.join(self.variables)}")
        return np.asarray(self.variables[name])

    def _id(self, node: Any) -> Array:
        if node.name in ("true", "false") and node.name not in self.variables:
            return np.asarray(node.name == "true")
        array = self._variable(node.name)
        if array.ndim == 1:
            raise self.fail(f"{node.name!r} is an array: index it, {node.name}[...]")
        if array.dtype.kind in "ui":
            return array.astype(INT, copy=False)
        return array.astype(self.real) if isinstance(self.variables[node.name], float) else array

    def _constant(self, node: Any) -> Array:
        text = node.value.replace("'", "").lower()
        if node.type in ("char", "string"):
            raise self.fail(f"literal {node.value} is not a number")
        hexadecimal = text.startswith("0x")
        if "." in text or "p" in text or ("e" in text and not hexadecimal):
            number = text.rstrip("fl")
            value = float.fromhex(number) if hexadecimal else float(number)
            return np.asarray(value, FLOAT if text.endswith("f") else DOUBLE)
        digits = text.rstrip("ul")
        octal = len(digits) > 1 and digits.isdigit() and digits.startswith("0")
        return self._integer(int(digits, 8 if octal else 0), text[len(digits) :], decimal=digits.isdigit() and not octal)

    def _integer(self, value: int, suffix: str, *, decimal: bool) -> Array:
        """An integer literal in the first type that holds it; a decimal one is unsigned only if its suffix says so."""
        kinds = "u" if "u" in suffix else "i" if decimal else "iu"
        for bits in (64,) if "l" in suffix else (32, 64):
            for kind in kinds:
                if value < 1 << (bits - (kind == "i")):
                    return np.asarray(value, f"{kind}{bits // 8}")
        raise self.fail(f"integer literal {value} does not fit 64 bits")

    def _ternaryop(self, node: Any) -> Array:
        condition, yes, no = self.value(node.cond), self.value(node.iftrue), self.value(node.iffalse)
        dtype = yes.dtype if yes.dtype == no.dtype else _common(yes.dtype, no.dtype)
        return np.where(condition.astype(BOOL), yes.astype(dtype), no.astype(dtype))

    def _unaryop(self, node: Any) -> Array:
        if node.op not in ("+", "-", "!", "~"):
            raise self.fail(f"operator {node.op!r} is not supported")
        operand = self.value(node.expr)
        if node.op == "!":
            return ~operand.astype(BOOL)
        operand = operand.astype(_promoted(operand.dtype), copy=False)
        if node.op == "~":
            return ~self._whole(operand, "~")
        return np.negative(operand) if node.op == "-" else operand

    def _binaryop(self, node: Any) -> Array:
        op, left, right = node.op, self.value(node.left), self.value(node.right)
        if op in LOGICAL:
            return np.asarray(LOGICAL[op](left.astype(BOOL), right.astype(BOOL)))
        dtype = _promoted(left.dtype) if op in SHIFTS else _common(left.dtype, right.dtype)
        if op in BITWISE or op in SHIFTS or op == "%":
            self._whole(left, op), self._whole(right, op)
        x, y = left.astype(dtype, copy=False), right.astype(dtype, copy=False)
        if op in ("/", "%"):
            return self._divide(op, x, y)
        function = {**COMPARISONS, **ARITHMETIC, **BITWISE, **SHIFTS}.get(op)
        if function is None:
            raise self.fail(f"operator {op!r} is not supported")
        return np.asarray(function(x, y))

    def _whole(self, x: Array, op: str) -> Array:
        if x.dtype.kind not in "bui":
            raise self.fail(f"operator {op!r} needs integers, got {x.dtype}")
        return x

    @staticmethod
    def _divide(op: str, x: Array, y: Array) -> Array:
        """Quotient or remainder; integers truncate towards zero."""
        if x.dtype.kind == "f":
            return np.asarray(x / y)
        remainder = np.fmod(x, y)
        return np.asarray(remainder if op == "%" else (x - remainder) // y)

    def _arrayref(self, node: Any) -> Array:
        if type(node.name).__name__ != "ID":
            raise self.fail("only a parameter can be indexed")
        array, index = self._variable(node.name.name), self.value(node.subscript)
        if array.ndim != 1:
            raise self.fail(f"{node.name.name!r} cannot be indexed: it is not a one-dimensional array")
        self._whole(index, "[]")
        if not array.size:
            return np.zeros(index.shape, array.dtype)
        return np.asarray(array[np.clip(index.astype(np.intp), 0, array.size - 1)])

    def _cast(self, node: Any) -> Array:
        names = getattr(getattr(node.to_type.type, "type", None), "names", None)
        if names is None:
            raise self.fail("only casts to arithmetic types are supported")
        return self.value(node.expr).astype(self._type(names))

    def _type(self, words: list[str]) -> DType:
        """The dtype of a C type, given as its words: ["unsigned", "int"]."""
        simple: dict[str, npt.DTypeLike] = {"Real": self.real, "float": FLOAT, "double": DOUBLE, "bool": BOOL, "_Bool": BOOL}
        if len(words) == 1 and words[0] in simple:
            return np.dtype(simple[words[0]])
        sign = "u" if "unsigned" in words else "i"
        size = tuple(sorted(w for w in words if w not in ("signed", "unsigned", "int")))
        bytes_of = {(): 4, ("char",): 1, ("short",): 2, ("long",): 8, ("long", "long"): 8}
        if size not in bytes_of:
            raise self.fail(f"type {' '.join(words)!r} is not supported")
        return np.dtype(f"{sign}{bytes_of[size]}")

    def _funccall(self, node: Any) -> Array:
        name = getattr(node.name, "name", None)
        if not isinstance(name, str):
            raise self.fail("only functions can be called")
        arguments = [self.value(a) for a in (node.args.exprs if node.args is not None else [])]
        if name.startswith(CAST):
            (x,) = self._expect(name, arguments, 1)
            return x.astype(self._type(name.removeprefix(CAST).split("_")))
        if name in CLASSIFIERS:
            return np.asarray(CLASSIFIERS[name](self._expect(name, arguments, 1)[0]))
        if name == "abs":
            (x,) = self._expect(name, arguments, 1)
            return np.asarray(np.abs(x.astype(_promoted(x.dtype))))
        if name in SELECTORS:
            dtype = _common(*(x.dtype for x in self._expect(name, arguments, 2)))
            return np.asarray(SELECTORS[name][dtype.kind == "f"](*(x.astype(dtype) for x in arguments)))
        return self._math(name, arguments)

    def _math(self, name: str, arguments: list[Array]) -> Array:
        """A function of CUDA's math library: by overload, where an integer argument counts as a double, or the float one."""
        base, overloaded = name, name in FUNCTIONS
        if not overloaded:
            base = name[:-1] if name.endswith("f") else ""
            if name.startswith("__") and base[2:] in INTRINSICS:
                base = base[2:]
        if base not in FUNCTIONS:
            raise self.fail(f"unknown function {name.removeprefix(CAST)!r}")
        count, function = FUNCTIONS[base]
        types = [DOUBLE if x.dtype.kind in "bui" else x.dtype for x in self._expect(name, arguments, count)]
        dtype = _common(*types) if overloaded else FLOAT
        return np.asarray(function(*(x.astype(dtype) for x in arguments)))

    def _expect(self, name: str, arguments: list[Array], count: int) -> list[Array]:
        if len(arguments) != count:
            raise self.fail(f"{name.removeprefix(CAST)} takes {count} argument{'s' * (count > 1)}, got {len(arguments)}")
        return arguments
