"""Masks and score modifications as text that is valid in any process, for programs that another library compiles and keeps."""

from __future__ import annotations

import ast
import functools
import importlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from cuattn.masks import Mask
from cuattn.score_mods import ScoreMod


def encode(x: Any, own: list[Any]) -> str:
    """A mask, a modification or a tuple of them as a Python literal, valid in any process; arrays are appended to `own`.

    Scalars stand for themselves, everything else is a tuple of a tag and its contents.
    """
    if x is None or isinstance(x, (bool, str)):
        return repr(x)
    if isinstance(x, int):
        return repr(operator.index(x))  # a length that torch.compile holds for variable becomes a constant
    if isinstance(x, float):
        return "('float', '" + x.hex() + "')"
    if isinstance(x, (Mask, ScoreMod)):
        kind = type(x)
        text = "('object', " + repr(kind.__module__) + ", " + repr(kind.__qualname__)
        for name in kind.__match_args__:  # type: ignore[union-attr]
            text += ", " + encode(getattr(x, name), own)
        return text + ")"
    if isinstance(x, tuple):
        text = "('tuple'"
        for item in x:
            text += ", " + encode(item, own)
        return text + ",)"
    if isinstance(x, Mapping):
        text = "('mapping'"
        for name in x:
            text += ", " + repr(name) + ", " + encode(x[name], own)
        return text + ",)"
    own.append(x)
    return "('array', " + repr(len(own) - 1) + ")"


def decode(formula: str, own: Sequence[Any]) -> Any:
    """What `encode` was given, over the arrays `own`."""
    return _build(_parse(formula), own)


_parse = functools.lru_cache(1024)(ast.literal_eval)


def _build(x: Any, own: Sequence[Any]) -> Any:
    if not isinstance(x, tuple):
        return x
    tag, *items = x
    if tag == "float":
        return float.fromhex(items[0])
    if tag == "array":
        return own[items[0]]
    if tag == "object":
        module, name, *items = items
        kind: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        if not issubclass(kind, (Mask, ScoreMod)):
            raise TypeError(f"formula: got {module}.{name}, expected a mask or a score modification")
        return kind(*[_build(item, own) for item in items])
    values = tuple(_build(item, own) for item in items)
    return values if tag == "tuple" else dict(zip(values[::2], values[1::2], strict=True))
