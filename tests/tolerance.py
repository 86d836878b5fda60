"""The one tolerance: how far a result may be from the oracle.

A result passes when its error is at most twice the error of the same mathematics done naively in the input dtype, plus a
rounding floor; non-finite values must sit at the same positions first. Numbers live here, never in a test body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tests.cases import Case

Array = npt.NDArray[Any]

FACTOR = 2.0
"""How much worse than naive arithmetic in the same dtype a result may be."""

ABSOLUTE = {"float32": 1e-5, "float64": 1e-12}
"""Error that is always allowed."""

RELATIVE = {"bfloat16": 1e-3, "float16": 1e-3, "tf32": 1e-3, "statistics": 5e-5}
"""Error that is always allowed, relative to the largest output. `statistics`: lse of 16-bit inputs, whose products are exact in
float32 and whose sums are kept in it, though a tensor core truncates where an addition would round."""

TWO_ORDERS = 4e-3
"""Float16 gradients of two kernels that add in different orders, relative to the largest: some eight roundings of 2^-11, of P,
of dS and of the result in either and of what their sums carry over. A missing share of a key tile is ten times as much."""

SHIFT = 0.3
"""Adding and subtracting a number of the outputs' size shows how coarse the output dtype is there."""


def rounding(exact: Array, dtype: npt.DTypeLike) -> float:
    """2 * max|((exact + 0.3) - 0.3) - exact|, computed in `dtype`."""
    x = exact.astype(dtype)
    shift = np.asarray(SHIFT, dtype)
    with np.errstate(invalid="ignore"):
        difference = ((x + shift).astype(dtype) - shift).astype(np.float64) - x.astype(np.float64)
    return 2 * largest(difference)


def largest(x: Array) -> float:
    """The largest finite magnitude; 0 when there is none."""
    return float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0))


def limit(exact: Array, naive: Array, dtype: npt.DTypeLike, arithmetic: str, least_scale: float = 0.0) -> float:
    """The error allowed for a result of `dtype` computed in `arithmetic` (a key of ABSOLUTE or RELATIVE)."""
    with np.errstate(all="ignore"):
        naive_error = largest(naive.astype(np.float64) - exact)
    floor = max(ABSOLUTE.get(arithmetic, 0.0), RELATIVE.get(arithmetic, 0.0) * max(largest(exact), least_scale))
    return max(FACTOR * naive_error + rounding(exact, dtype), floor)


def assert_close(name: str, actual: Array, exact: Array, allowed: float) -> None:
    """Same shape, non-finite values at the same positions (-inf exactly), finite ones within `allowed`."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    actual, exact = actual.astype(np.float64), exact.astype(np.float64)
    for kind, here, there in (
        ("non-finite", ~np.isfinite(actual), ~np.isfinite(exact)),
        ("-inf", np.isneginf(actual), np.isneginf(exact)),
    ):
        wrong = np.argwhere(here != there)
        assert not len(wrong), (
            f"{name}: {kind} at {here.sum()} positions, expected {there.sum()}; {len(wrong)} differ, the first at "
            f"{tuple(wrong[0])}: got {actual[tuple(wrong[0])]}, expected {exact[tuple(wrong[0])]}"
        )
    finite = np.isfinite(exact)
    error = np.where(finite, np.abs(np.where(finite, actual, 0) - np.where(finite, exact, 0)), 0)
    if not error.size or error.max() <= allowed:
        return
    at = tuple(int(n) for n in np.unravel_index(np.argmax(error), error.shape))
    raise AssertionError(
        f"{name}: error {error.max():.3e} exceeds {allowed:.3e} at {(error > allowed).sum()} of {error.size} elements, the "
        f"largest at {at}: got {actual[at]:.9g}, expected {exact[at]:.9g}"
    )


def verify(case: Case, out: Array, lse: Array | None = None) -> None:
    """Check a result of `case` against the oracle, its dtypes included."""
    (exact, exact_lse), (naive, _) = case.exact(), case.naive()
    arithmetic = "tf32" if case.precision == "tf32" else case.dtype
    assert out.dtype == case.numpy_dtype, f"out: dtype {out.dtype}, expected {case.numpy_dtype}"
    assert_close("out", out, exact, limit(exact, naive, case.numpy_dtype, arithmetic))
    if lse is None:
        return
    dtype = np.dtype(np.float64 if case.dtype == "float64" else np.float32)
    assert lse.dtype == dtype, f"lse: dtype {lse.dtype}, expected {dtype}"
    arithmetic = "statistics" if case.numpy_dtype.itemsize == 2 else arithmetic
    # An error e of lse is a relative error e of every probability: its natural scale is 1, however small lse itself is.
    assert_close("lse", lse, exact_lse, limit(exact_lse, case.naive_lse(), dtype, arithmetic, least_scale=1.0))


FEW = 64
"""Elements of an array below which the largest error of a naive result is luck."""


def verify_named_gradients(
    found: Mapping[str, Array],
    exact: Mapping[str, Array],
    naive: Mapping[str, Array],
    lse: Array,
    arithmetic: str,
    factor: float,
) -> None:
    """Check gradients by name, dq, dk and dv among them. lse: what the backward was given; factor: more for a softcap."""
    relative = max(largest(naive[n].astype(np.float64) - exact[n]) / max(largest(exact[n]), TINY) for n in ("dq", "dk", "dv"))
    for name, x in found.items():
        size, dtype = largest(exact[name]), x.dtype
        coarsest = max((arithmetic, dtype.name), key=lambda kind: ABSOLUTE.get(kind, 1.0))
        allowed = limit(exact[name], naive[name], dtype, coarsest)
        if x.size < FEW:
            allowed = max(allowed, FACTOR * relative * size)
        # An ulp of the largest lse is a relative error of P: naive arithmetic makes it too, but not at the same place, and for
        # float64 the oracle itself does.
        allowed += largest(lse) * float(np.finfo(lse.dtype).eps) * size
        if dtype.name != arithmetic:  # the naive result was not rounded to what this one is rounded to in the end
            allowed += size * float(ml_dtypes.finfo(dtype).eps)
        assert_close(name, x, exact[name], factor * allowed)


def without_zero_products(case: Case, name: str, x: Array, exact: Array) -> Array:
    """`x`, a result called `name`, with the oracle's elements in place of those that a tensor core's 0 * NaN makes NaN.

    A pair that a mask hides has the probability 0 and the gradient 0. In a product that other pairs need, these still meet
    what is not finite: the one column of the element in question, and nothing else, may differ from the oracle there.
    """
    spoilt = case.nonfinite.split()[1]
    column = np.arange(x.shape[-1]) == x.shape[-1] // 2
    return excused(x, exact, column & (name == {"v": "out", "q": "dk", "k": "dq", "dout": "dv"}[spoilt]))


def excused(x: Array, exact: Array, where: Array) -> Array:
    """`x` with the oracle's elements in place of NaN that it alone has, as far as `where`, which broadcasts."""
    return np.where(np.isnan(x) & np.isfinite(exact) & where, exact.astype(x.dtype), x)


TINY = float(np.finfo(np.float64).tiny)


def verify_gradients(case: Case, gradients: Any, lse: Array, get: Callable[[Any], Array]) -> None:
    """Check the public gradients of `case` (with its cotangents) against the oracle; `get` turns one into a NumPy array."""
    exact, naive = (named_gradients(case, g) for g in (case.exact_gradients(), case.naive_gradients()))
    parameters = iter([x for each in gradients.dparams for x in each.values()])
    found = {}
    for name in exact:
        x = next(parameters) if name.startswith("dparams") else getattr(gradients, name)
        found[name] = get(x)
    assert next(parameters, None) is None
    factor = 1.5 if "softcap" in case.mods else 1.0
    verify_named_gradients(found, exact, naive, lse, "tf32" if case.precision == "tf32" else case.dtype, factor)


def named_gradients(case: Case, gradients: Any) -> dict[str, Array]:
    """The oracle's gradients under the names of the public result."""
    named = {name: getattr(gradients, name) for name in ("dq", "dk", "dv")}
    for n, of_mod in enumerate(gradients.dmods):
        for x in of_mod:
            named["dbias" if case.mods[n].startswith("bias") else f"dparams[{n}]"] = x
    return named if gradients.dsinks is None else {**named, "dsinks": gradients.dsinks}
