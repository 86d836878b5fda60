"""Score modifications against their formulas, their gradients against finite differences, and user expressions against C."""

from __future__ import annotations

import math
import operator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuattn.expressions import evaluate, names
from cuattn.fields import Operand
from cuattn.masks import Tile
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

BATCH, HEADS, SEQLEN_Q, SEQLEN_K = 2, 3, 5, 7
TILE = Tile.of(1, range(HEADS), range(1, SEQLEN_Q), range(2, SEQLEN_K), SEQLEN_Q, SEQLEN_K)
SHAPE = (HEADS, SEQLEN_Q - 1, SEQLEN_K - 2)
STEP = 2.0**-13
"""Of the finite differences: the error of a fourth-order stencil and of its rounding are both far below TOLERANCE."""
TOLERANCE = 1e-9


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


MODS: dict[str, ScoreMod] = {
    "softcap": SoftCap(1.5),
    "softcap-tight": SoftCap(0.25),
    "alibi-heads": Alibi(rng().random(HEADS, np.float32)),
    "alibi-batch": Alibi(rng().random((BATCH, HEADS))),
    "bias-full": Bias(rng().standard_normal((BATCH, HEADS, SEQLEN_Q, SEQLEN_K))),
    "bias-keys": Bias(rng().standard_normal((HEADS, 1, SEQLEN_K), np.float32)),
    "bias-bfloat16": Bias(rng().standard_normal((SEQLEN_Q, SEQLEN_K)).astype(ml_dtypes.bfloat16)),
    "bias-scalar": Bias(np.float64(0.5)),
    "user-constant": UserMod("s", "1"),
    "user-power": UserMod("s * s * s / Real(3) + h", "s * s"),
    "user-branches": UserMod(
        "(i + j) % 2 == 0 && j > 0 ? tanh(s) : s * slope[h] + shift",
        "(i + j) % 2 == 0 && j > 0 ? 1 - tanh(s) * tanh(s) : Real(slope[h])",
        {"slope": np.array([0.5, -1.0, 2.0]), "shift": 3.0},
    ),
    "user-functions": UserMod("exp(-s * s) + log(Real(1) + s * s)", "-2 * s * exp(-s * s) + 2 * s / (1 + s * s)"),
    "user-lookup": UserMod("s * weight[b * 3 + h] - i / 2", "weight[b * 3 + h]", {"weight": np.linspace(-1, 1, 6)}),
    "user-parameters": UserMod(
        "tanh(s * gain[h]) + table[i - j + 6] * shift",
        "gain[h] * (1 - tanh(s * gain[h]) * tanh(s * gain[h]))",
        {"gain": np.array([0.5, 1.0, 2.0]), "shift": 3.0, "left": np.ones(4), "table": np.linspace(-1, 1, 12)},
        {"table": ("i - j + 6", "shift"), "gain": ("h", "s * (1 - tanh(s * gain[h]) * tanh(s * gain[h]))")},
    ),
}


def scores(dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(6).standard_normal(SHAPE).astype(dtype)


@pytest.mark.parametrize("name", MODS)
def test_grad_is_the_derivative_of_apply(name: str) -> None:
    mod, s, h = MODS[name], scores(), STEP
    near, far = (mod.apply(s + d, TILE) - mod.apply(s - d, TILE) for d in (h, 2 * h))
    difference = (8 * near - far) / (12 * h)
    grad = np.broadcast_to(mod.grad(s, TILE), SHAPE)
    assert np.abs(grad - difference).max() <= TOLERANCE * max(1, np.abs(difference).max())


def totals_of(mod: ScoreMod, dtype: Any = np.float64) -> list[np.ndarray]:
    return [np.zeros(np.shape(mod.arrays[n]), dtype) for n in mod.differentiable]


def accumulated(mod: ScoreMod, s: np.ndarray, ds: np.ndarray, tile: Tile = TILE) -> list[np.ndarray]:
    totals = totals_of(mod, ds.dtype)
    mod.accumulate(s, ds, tile, totals)
    return totals


DIFFERENTIABLE = {name: mod for name, mod in MODS.items() if mod.differentiable}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_accumulate_is_the_derivative_of_apply_by_the_arrays(name: str) -> None:
    """Each element of each array on its own, for a random gradient at the output."""
    mod, ds = MODS[name], np.random.default_rng(8).standard_normal(SHAPE)
    arrays = [np.asarray(a, np.float64) for a in mod.arrays]
    for n, total in zip(mod.differentiable, accumulated(mod, scores(), ds), strict=True):
        assert total.shape == np.shape(mod.arrays[n])
        expected = np.zeros(total.shape)
        for at in np.ndindex(*total.shape):
            moved = []
            for step in (STEP, -STEP, 2 * STEP, -2 * STEP):
                array = arrays[n].copy()
                array[at] += step
                moved.append(mod.bind([*arrays[:n], array, *arrays[n + 1 :]]).apply(scores(), TILE))
            difference = (8 * (moved[0] - moved[1]) - (moved[2] - moved[3])) / (12 * STEP)
            expected[at] = (ds * difference).sum()
        assert np.abs(total - expected).max() <= TOLERANCE * max(1, np.abs(ds).sum())
        assert expected.any()


@pytest.mark.parametrize("name", MODS)
def test_accumulate_adds_one_tile_after_the_other(name: str) -> None:
    mod, s, ds = MODS[name], scores(), np.random.default_rng(8).standard_normal(SHAPE)
    before = s.copy(), ds.copy()
    whole, parts = accumulated(mod, s, ds), totals_of(mod)
    assert len(whole) == len(mod.differentiable) and list(mod.differentiable) == sorted(mod.differentiable)
    for h, rows, cols in ((range(0, 1), slice(0, 4), slice(0, 5)), (range(1, 3), slice(0, 1), slice(0, 5)),
                          (range(1, 3), slice(1, 4), slice(0, 2)), (range(1, 3), slice(1, 4), slice(2, 5))):  # fmt: skip
        at = (slice(h.start, h.stop), rows, cols)
        tile = Tile.of(1, h, range(1 + rows.start, 1 + rows.stop), range(2 + cols.start, 2 + cols.stop), SEQLEN_Q, SEQLEN_K)
        mod.accumulate(s[at], ds[at], tile, parts)
    for x, y in zip(whole, parts, strict=True):
        assert np.abs(x - y).max() <= TOLERANCE
    assert np.array_equal(s, before[0]) and np.array_equal(ds, before[1])
    for x, y in zip(accumulated(mod, s.astype(np.float32), ds.astype(np.float32)), whole, strict=True):
        assert x.dtype == np.float32 and np.abs(x - y).max() <= np.finfo(np.float32).eps * np.abs(ds).sum() * 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MODS)
def test_dtype_of_the_scores_is_kept(name: str, dtype: Any) -> None:
    mod, s = MODS[name], scores(dtype)
    before = s.copy()
    for x in (mod.apply(s, TILE), mod.grad(s, TILE)):
        assert x.dtype == dtype and np.broadcast_shapes(x.shape, SHAPE) == SHAPE
    assert np.array_equal(s, before)


@pytest.mark.parametrize("name", MODS)
def test_a_tile_is_that_part_of_the_whole(name: str) -> None:
    mod = MODS[name]
    whole_tile = Tile.of(1, range(HEADS), range(SEQLEN_Q), range(SEQLEN_K), SEQLEN_Q, SEQLEN_K)
    whole = np.zeros((HEADS, SEQLEN_Q, SEQLEN_K))
    whole[:, 1:, 2:] = scores()
    part = np.broadcast_to(mod.apply(whole, whole_tile), whole.shape)[:, 1:, 2:]
    assert np.array_equal(np.broadcast_to(mod.apply(scores(), TILE), SHAPE), part)


@pytest.mark.parametrize("name", MODS)
def test_bind_keeps_the_meaning_and_the_key(name: str) -> None:
    mod = MODS[name]
    again = mod.bind([a.copy() for a in mod.arrays])
    assert type(again) is type(mod) and again.key() == mod.key() and hash(again.key()) == hash(mod.key())
    assert np.array_equal(again.apply(scores(), TILE), mod.apply(scores(), TILE))


@pytest.mark.parametrize("name", MODS)
def test_device_struct_names_every_array(name: str) -> None:
    mod = MODS[name]
    operands = [Operand(n, np.shape(a), (0,) * np.ndim(a), str(a.dtype)) for n, a in enumerate(mod.arrays)]
    fields = mod.fields(operands)
    assert [f.value for f in fields if f.kind == "ptr"] == list(range(len(operands)))
    assert fields and mod.cuda_type(operands)
    assert isinstance(mod, UserMod) == bool(mod.cuda_source(operands))


def coordinates() -> list[tuple[tuple[int, int, int], int, int, int]]:
    return [(at, at[0], at[1] + 1, at[2] + 2) for at in np.ndindex(*SHAPE)]


def test_softcap_formula() -> None:
    out = SoftCap(1.5).apply(scores(), TILE)
    for at, *_ in coordinates():
        assert math.isclose(out[at], 1.5 * math.tanh(scores()[at] / 1.5), rel_tol=1e-14)
    assert np.abs(SoftCap(30.0).apply(np.float32([[[-1e9, 1e9, np.inf]]]), TILE)).max() == 30


def test_alibi_formula() -> None:
    """The distance counts from the aligned ends of both sequences and is symmetric."""
    slopes = np.array([[9.0, 9.0, 9.0], [0.5, 1.0, 2.0]])
    out = Alibi(slopes).apply(scores(), TILE)
    for at, h, i, j in coordinates():
        assert out[at] == scores()[at] - slopes[1, h] * abs(i + SEQLEN_K - SEQLEN_Q - j)


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (3, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7)], ids=str)
def test_bias_broadcasts_as_numpy_does(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(7).standard_normal(shape)
    whole = np.broadcast_to(array, (BATCH, HEADS, SEQLEN_Q, SEQLEN_K))
    assert np.array_equal(Bias(array).apply(scores(), TILE), scores() + whole[1, :, 1:, 2:])


def test_user_mod_sees_every_variable() -> None:
    mod = UserMod(
        "s + 1000000 * b + 100000 * h + 10000 * i + 1000 * j + 100 * seqlen_q + 10 * seqlen_k + extra", params={"extra": 2}
    )
    out = mod.apply(np.zeros(SHAPE), TILE)
    for at, h, i, j in coordinates():
        assert out[at] == 1e6 + 1e5 * h + 1e4 * i + 1e3 * j + 100 * SEQLEN_Q + 10 * SEQLEN_K + 2


def test_user_mod_without_a_gradient() -> None:
    with pytest.raises(NotImplementedError, match="without a gradient"):
        UserMod("s * 2").grad(scores(), TILE)


@pytest.mark.parametrize("name", ["s", "h", "Real", "1x", "a b", ""])
def test_user_mod_refuses_a_parameter_name(name: str) -> None:
    with pytest.raises(ValueError, match="score_mod"):
        UserMod("s", params={name: 1.0})


def test_user_mod_gradients_of_parameters() -> None:
    mod = MODS["user-parameters"]
    assert isinstance(mod, UserMod) and mod.differentiable == (0, 2)
    assert mod.index_varies("table") and not mod.index_varies("gain")
    again = mod.bind([a.astype(np.float32) for a in mod.arrays])
    assert isinstance(again, UserMod) and again.differentiable == (0, 2) and again.param_gradients == mod.param_gradients


@pytest.mark.parametrize(
    ("index", "varies"),
    [
        ("h", False),
        ("b * 3 + h", False),
        ("bucket[h]", False),
        ("seqlen_q - seqlen_k", False),
        ("0", False),
        ("min(h, 2)", False),
        ("i", True),
        ("j / 2", True),
        ("bucket[j]", True),
        ("(int)s", True),
        ("h > 0 ? 0 : i", True),
        ("int(fabs(s))", True),
    ],
)
def test_index_of_a_parameter_varies_inside_a_tile(index: str, varies: bool) -> None:
    params = {"t": np.ones(3), "bucket": np.zeros(9, np.int32)}
    assert UserMod("s", params=params, param_gradients={"t": (index, "1")}).index_varies("t") == varies


def test_an_index_outside_the_parameter_is_clipped_as_the_read_is() -> None:
    mod = UserMod("s + t[j - 3]", "1", {"t": np.array([1.0, 10.0])}, {"t": ("j - 3", "1")})
    ds = np.ones(SHAPE)
    assert np.array_equal(mod.apply(np.zeros(SHAPE), TILE)[0, 0], [1, 1, 10, 10, 10])
    assert accumulated(mod, scores(), ds)[0].tolist() == [2 * 12, 3 * 12]
    empty = UserMod("s", "1", {"t": np.zeros(0)}, {"t": ("j", "1")})
    assert accumulated(empty, scores(), ds)[0].shape == (0,)


def test_a_derivative_counts_only_where_a_gradient_arrives() -> None:
    """At an invisible key ds is 0 and the derivative may be anything."""
    mod = UserMod("s * t[h] / Real(j - 3)", "t[h] / Real(j - 3)", {"t": np.ones(3)}, {"t": ("h", "s / Real(j - 3)")})
    ds = np.ones(SHAPE)
    with np.errstate(all="ignore"):
        assert not np.isfinite(accumulated(mod, scores(), ds)[0]).any()
        ds[:, :, 1] = 0
        assert np.isfinite(accumulated(mod, scores(), ds)[0]).all()


@pytest.mark.parametrize(
    ("params", "param_gradients", "error", "culprit"),
    [
        ({}, {"t": ("h", "1")}, ValueError, "'t'"),
        ({"t": 1.0}, {"t": ("h", "1")}, TypeError, "a number"),
        ({"t": np.float32(1)}, {"t": ("h", "1")}, TypeError, "a number"),
        ({"t": np.ones(3, np.int32)}, {"t": ("h", "1")}, TypeError, "int32"),
        ({"t": np.ones(3, np.bool_)}, {"t": ("h", "1")}, TypeError, "bool"),
        ({"t": np.ones(3)}, {"t": "h"}, TypeError, "expected \\(index, derivative\\)"),
        ({"t": np.ones(3)}, {"t": ("h",)}, TypeError, "expected \\(index, derivative\\)"),
        ({"t": np.ones(3)}, {"t": ("h", 1)}, TypeError, "expected \\(index, derivative\\)"),
    ],
)
def test_user_mod_refuses_a_gradient(params: Any, param_gradients: Any, error: type[Exception], culprit: str) -> None:
    with pytest.raises(error, match=f"^score_mod: .*{culprit}"):
        UserMod("s", params=params, param_gradients=param_gradients)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_user_mod_takes_a_gradient_of_any_float(dtype: str) -> None:
    array = np.ones(3, np.dtype(dtype) if dtype != "bfloat16" else ml_dtypes.bfloat16)
    assert UserMod("s", params={"t": array}, param_gradients={"t": ("h", "1")}).differentiable == (0,)


def test_an_index_must_be_an_integer() -> None:
    mod = UserMod("s + t[h]", "1", {"t": np.ones(3)}, {"t": ("Real(h)", "1")})
    with pytest.raises(ValueError, match="score_mod: index 'Real\\(h\\)' is of type float64"):
        accumulated(mod, scores(), np.ones(SHAPE))


def test_user_mods_differ_by_what_decides_their_code() -> None:
    base = UserMod("s * a", "a", {"a": 2.0})
    assert base.key() == UserMod("s * a", "a", {"a": 2}).key() != UserMod("s * a", None, {"a": 2.0}).key()
    assert (
        base.cuda_type(()) == UserMod("s * a", "a", {"a": 3.0}).cuda_type(()) != UserMod("s + a", "a", {"a": 2.0}).cuda_type(())
    )
    vector = {"a": np.ones(3)}
    gradients: tuple[dict[str, tuple[str, str]], ...] = ({}, {"a": ("h", "s")}, {"a": ("h", "1")}, {"a": ("b", "s")})
    mods = [UserMod("s * a[h]", "a[h]", vector, g) for g in gradients]
    assert (
        len({mod.key() for mod in mods})
        == len({mod.cuda_type((Operand(0, (4,), (1,), "float64"),)) for mod in mods})
        == len(mods)
    )


# Expressions ---------------------------------------------------------------------------------------------------------------

VARIABLES: dict[str, Any] = {
    "s": np.array([[[-1.5, 0.25, 3.0]]], np.float32),
    "i": np.arange(4)[None, :, None],
    "j": np.arange(3)[None, None, :],
    "h": 2,
    "gain": 0.1,
    "half": np.array([0.5, 1.5], np.float16),
    "table": np.array([1.0, 2.0, 4.0, 8.0], np.float32),
    "wide": np.array([2**40, -1]),
}


def run(expression: str, dtype: Any = np.float32) -> np.ndarray:
    return evaluate(expression, VARIABLES, dtype)


@pytest.mark.parametrize(
    ("expression", "value", "dtype"),
    [
        ("7 / 2", 3, "int32"),
        ("-7 / 2", -3, "int32"),
        ("7 / -2", -3, "int32"),
        ("-7 % 3", -1, "int32"),
        ("7 % -3", 1, "int32"),
        ("7 / 2.0f", 3.5, "float32"),
        ("7 / 2.", 3.5, "float64"),
        ("1u - 2", 2**32 - 1, "uint32"),
        ("-1 < 1u", False, "bool"),
        ("2147483647 + 1", -(2**31), "int32"),
        ("2147483648", 2**31, "int64"),
        ("1L << 40", 2**40, "int64"),
        ("0xffffffff", 2**32 - 1, "uint32"),
        ("0x10 + 010 + 0b11", 27, "int32"),
        ("10ull", 10, "uint64"),
        ("1e-3", 1e-3, "float64"),
        (".5f", 0.5, "float32"),
        ("0x1p3f", 8, "float32"),
        ("1 + 2 * 3 - -4", 11, "int32"),
        ("(1, 2)[0]", None, None),
        ("5 & 3 | 8 ^ 1", 9, "int32"),
        ("~5 >> 1", -3, "int32"),
        ("!3 + !0", 1, "int32"),
        ("!0.5f", False, "bool"),
        ("true && 2 || false", True, "bool"),
        ("1 < 2 == 1", True, "bool"),
        ("1 ? 2 : 3.5f", 2, "float32"),
        ("0 ? 1 : 0 ? 2 : 3", 3, "int32"),
        ("1 ? true : false", True, "bool"),
        ("float(7) / 2", 3.5, "float32"),
        ("(float)7 / 2", 3.5, "float32"),
        ("Real(7) / 2", 3.5, "float32"),
        ("static_cast<float>(7) / 2", 3.5, "float32"),
        ("static_cast< unsigned int >(-1)", 2**32 - 1, "uint32"),
        ("(unsigned)-1", 2**32 - 1, "uint32"),
        ("(long long)1 << 40", 2**40, "int64"),
        ("(short)65537", 1, "int16"),
        ("(bool)0.5f + 1", 2, "int32"),
        ("int(-1.75f)", -1, "int32"),
        ("int(1e9f) % 7", 1000000000 % 7, "int32"),
        ("abs(-3)", 3, "int32"),
        ("abs(-3.5f)", 3.5, "float32"),
        ("fabs(-3)", 3, "float64"),
        ("min(3, 5) + max(3, 5)", 8, "int32"),
        ("min(3.5f, 5.0)", 3.5, "float64"),
        ("fmaxf(0.0f / 0.0f, 2.0f)", 2, "float32"),
        ("fmin(2.0f, 1.0f)", 1, "float32"),
        ("exp(0)", 1, "float64"),
        ("exp(0.0f)", 1, "float32"),
        ("expf(0)", 1, "float32"),
        ("__expf(0.0f)", 1, "float32"),
        ("pow(2.0f, 3.0f)", 8, "float32"),
        ("powf(2, 3)", 8, "float32"),
        ("rsqrt(4.0f)", 0.5, "float32"),
        ("exp2f(3.0f) + log2(8.0f) + exp10(1.0f)", 21, "float32"),
        ("round(2.5f) + round(-2.5f) + rint(2.5f)", 2, "float32"),
        ("round(0.49999997f)", 0, "float32"),
        ("floor(-1.5f) + ceil(-1.5f) + trunc(-1.5f)", -4, "float32"),
        ("fmod(-7.0f, 3.0f)", -1, "float32"),
        ("copysign(2.0f, -0.0f)", -2, "float32"),
        ("fma(2.0f, 3.0f, 4.0f)", 10, "float32"),
        ("fdim(3.0f, 1.0f) + fdim(1.0f, 3.0f)", 2, "float32"),
        ("isnan(0.0f / 0.0f) && isinf(-1.0f / 0.0f) && !isfinite(1.0f / 0.0f)", True, "bool"),
        ("h / 2 + table[h]", 5, "float32"),
        ("table[h + 1] * half[0]", 4, "float32"),
        ("wide[0]", 2**40, "int64"),
        ("half[1] + 1", 2.5, "float32"),
        ("2 /* a comment */ + // another\n 1", 3, "int32"),
    ],
)
def test_values_and_types_are_those_of_c(expression: str, value: Any, dtype: str | None) -> None:
    if dtype is None:
        with pytest.raises(ValueError, match="score_mod"):
            run(expression)
        return
    result = run(expression)
    assert result.dtype == np.dtype(dtype)
    assert result == value


@pytest.mark.parametrize(("dtype", "real"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_real_is_the_type_of_the_scores(dtype: str, real: str) -> None:
    for expression in ("Real(1)", "(Real)1", "gain", "gain * Real(0.5)"):
        assert run(expression, np.dtype(dtype)).dtype == real
    assert run("gain", np.dtype(dtype)) == np.dtype(real).type(0.1)


@pytest.mark.parametrize(
    ("expression", "read"),
    [
        ("1", ""),
        ("s", "s"),
        ("min(i, j) + table[h]", "h i j table"),
        ("Real(i) * static_cast<float>(b) + (int)s", "b i s"),
        ("i > 0 ? -seqlen_q : !seqlen_k", "i seqlen_k seqlen_q"),
        ("table[bucket[j - i]] // s", "bucket i j table"),
        ("fmaxf(expf(s), 1.0f)", "s"),
    ],
)
def test_names_that_an_expression_reads(expression: str, read: str) -> None:
    assert names(expression) == set(read.split())


def test_names_of_what_is_no_expression() -> None:
    with pytest.raises(ValueError, match="score_mod: expression"):
        names("i +")


LIBRARY = (
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "atan",
    "erf",
    "erfc",
    "exp",
    "expm1",
    "log",
    "log1p",
    "log10",
    "sqrt",
)


@pytest.mark.parametrize("name", LIBRARY)
def test_functions(name: str) -> None:
    reference = getattr(math, name)
    for x in (0.25, 0.5, 1.75):
        assert math.isclose(float(evaluate(f"{name}(s)", {"s": np.float64(x)}, np.float64)), reference(x), rel_tol=1e-14)
        narrow = evaluate(f"{name}f(s)", {"s": np.float64(x)}, np.float64)
        assert narrow.dtype == np.float32 and math.isclose(float(narrow), reference(x), rel_tol=1e-6)


def test_broadcasting() -> None:
    result = run("j > i ? -s : s + h")
    s, i, j = (np.broadcast_to(VARIABLES[n], (1, 4, 3)) for n in "sij")
    assert result.dtype == np.float32 and np.array_equal(result, np.where(j > i, -s, s + 2).astype(np.float32))


def test_a_lane_that_is_not_selected_reads_nothing() -> None:
    """An index outside its array on the branch not taken."""
    result = run("j < 2 ? table[j * 3] : table[-1 - 1000 * j]")
    assert np.array_equal(result[0, 0, :2], [1, 8])
    empty = evaluate("h > 5 ? table[h] : 1.0f", {"h": 2, "table": np.zeros(0, np.float32)}, np.float32)
    assert empty == 1


@pytest.mark.parametrize(
    ("expression", "culprit"),
    [
        ("s + unknown", "unknown name 'unknown'"),
        ("erfinvcube(s)", "unknown function 'erfinvcube'"),
        ("exp(s, s)", "exp takes 1 argument, got 2"),
        ("pow(s)", "pow takes 2 arguments, got 1"),
        ("exp()", "exp takes 1 argument, got 0"),
        ("Real(s, s)", "Real takes 1 argument, got 2"),
        ("s +", "syntax error"),
        ("", "expected one expression"),
        ("s; s", "expected one expression"),
        ("s;", "expected one expression"),
        ("s; } int g(void) { return 1", "expected one expression"),
        ("s = 3", "Assignment"),
        ("i++", "operator"),
        ("&s", "operator '&'"),
        ("s, i", "ExprList"),
        ("s % 2", "operator '%' needs integers"),
        ("s & 1", "operator '&' needs integers"),
        ("~s", "operator '~' needs integers"),
        ("1 << s", "operator '<<' needs integers"),
        ("table", "'table' is an array"),
        ("table + 1", "'table' is an array"),
        ("table[s]", "needs integers"),
        ("s[0]", "'s' cannot be indexed"),
        ("s.x", "StructRef"),
        ('"text"', "not a number"),
        ("'a'", "not a number"),
        ("(float*)s", "casts to arithmetic types"),
        ("static_cast<half>(s)", "type 'half'"),
        ("sizeof(int)", "sizeof"),
        ("s(1)(2)", "only functions"),
        ("99999999999999999999", "does not fit"),
        ("#define x", "syntax error"),
        ("08", "syntax error"),
    ],
)
def test_errors_name_the_culprit(expression: str, culprit: str) -> None:
    with pytest.raises(ValueError) as caught:
        run(expression)
    message = str(caught.value)
    assert message.startswith("score_mod: ") and repr(expression) in message and culprit in message


integers = st.integers(-50, 50)


@given(integers, integers.filter(bool))
def test_integer_division_truncates(x: int, y: int) -> None:
    quotient = int(x / y)
    variables = {"x": x, "y": y}
    assert evaluate("x / y", variables, np.float32) == quotient
    assert evaluate("x % y", variables, np.float32) == x - quotient * y


@given(st.lists(integers, min_size=2, max_size=6), st.data())
def test_precedence_is_that_of_c(terms: list[int], data: st.DataObject) -> None:
    """These operators bind in Python as they do in C; an int wraps."""
    ops = data.draw(st.lists(st.sampled_from("+-*&|^"), min_size=len(terms) - 1, max_size=len(terms) - 1))
    text = str(terms[0]) + "".join(f" {op} ({t})" for op, t in zip(ops, terms[1:], strict=True))
    result = evaluate(text, {}, np.float32)
    assert result.dtype == np.int32 and result == (eval(text) + 2**31) % 2**32 - 2**31


@given(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), integers, integers)
def test_comparisons(op: str, x: int, y: int) -> None:
    python = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
    assert evaluate(f"x {op} y", {"x": x, "y": np.float32(y)}, np.float32) == python[op](x, y)
