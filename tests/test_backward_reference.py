"""The oracle's backward: against finite differences of its forward, against identities, and at the edges of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuattn import reference
from cuattn.masks import BooleanMask, Causal, Full, Mask, SlidingWindow
from cuattn.reference import Gradients
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod
from tests.cases import CORNERS, FEATURES, MASKS, MODS, Case, _inputs

Array = Any

STEP = 2.0**-23
"""Of the finite differences: truncation is below 1e-12, rounding near 1e-9 of a result of size 1."""
TOLERANCE = 1e-7
"""Of a finite difference, relative to the product of the norms whose inner product it is."""
EXACT = 1e-12
"""Between two orders of the same float64 operations on a few hundred numbers of size 1."""

SHRINK = {"window": 2, "window_left": 2, "causal_window": 2, "block_sparse": 2}
"""By what lengths are divided, where a fifth would leave nothing for the mask to hide."""


def small(case: Case) -> Case:
    """The same features in float64, at sizes at which a test can afford many evaluations of the oracle."""
    lengths = {n: -(-getattr(case, n) // SHRINK.get(case.mask, 5)) for n in ("seqlen_q", "seqlen_k")}
    dims = {"head_dim": min(case.head_dim, 7), "head_dim_v": 5 if case.head_dim_v else 0}
    heads = {"num_heads": 6, "num_heads_kv": 2} if case.num_heads > 6 else {}
    plain = {"dtype": "float64", "precision": "ieee", "layout": "contiguous", "magnitude": min(case.magnitude, 3.0)}
    return replace(case, **plain, **lengths, **dims, **heads)


SMALL = tuple(dict.fromkeys(small(c) for c in (*FEATURES, *CORNERS) if not c.nonfinite and c.seqlen_k < 1000))


class Problem:
    """Arguments of one call of the oracle, as functions of everything that has a gradient."""

    def __init__(self, q: Array, k: Array, v: Array, **options: Any) -> None:
        self.qkv = tuple(np.asarray(x, np.float64) for x in (q, k, v))
        self.options = {"scale": 0.5, "mask": Full(), "mods": (), **options}
        self.mods: tuple[ScoreMod, ...] = tuple(self.options.pop("mods"))
        self.sinks = self.options.pop("sinks", None)

    @staticmethod
    def of(case: Case) -> Problem:
        """Without a batch axis the oracle is not called."""
        inputs = _inputs(case)
        qkv = (inputs.q, inputs.k, inputs.v)
        return Problem(*(qkv if case.batch_axis else (x[None] for x in qkv)), **inputs.oracle)

    def inputs(self) -> dict[str, Array]:
        """Everything that has a gradient, by name, in float64."""
        named = dict(zip("qkv", self.qkv, strict=True))
        for m, mod in enumerate(self.mods):
            named.update({f"mod {m} array {n}": np.asarray(mod.arrays[n], np.float64) for n in mod.differentiable})
        return named if self.sinks is None else {**named, "sinks": np.asarray(self.sinks, np.float64)}

    def forward(self, **changed: Array) -> tuple[Array, Array]:
        named = {**self.inputs(), **changed}
        mods = [
            mod.bind([named.get(f"mod {m} array {n}", a) for n, a in enumerate(mod.arrays)]) if mod.arrays else mod
            for m, mod in enumerate(self.mods)
        ]
        return reference.forward(*(named[n] for n in "qkv"), mods=mods, sinks=named.get("sinks"), **self.options)

    def backward(self, dout: Array, dlse: Array | None = None, **extra: Any) -> Gradients:
        return reference.backward(dout, *self.qkv, mods=self.mods, sinks=self.sinks, dlse=dlse, **self.options, **extra)

    def cotangents(self) -> tuple[Array, Array]:
        """Random (dout, dlse)."""
        rng = np.random.default_rng(1)
        out, lse = self.forward()
        return rng.standard_normal(out.shape), rng.standard_normal(lse.shape)


def named_gradients(gradients: Gradients) -> dict[str, Array]:
    """By the names of `Problem.inputs`."""
    named = dict(zip("qkv", gradients[:3], strict=True))
    named.update({f"mod {m} array {n}": x for m, xs in enumerate(gradients.dmods) for n, x in enumerate(xs)})
    return named if gradients.dsinks is None else {**named, "sinks": gradients.dsinks}


def check_by_differences(problem: Problem) -> None:
    """Along a random direction of each input, for dout alone, dlse alone and both; padding and its NaN included."""
    rng = np.random.default_rng(2)
    dout, dlse = problem.cotangents()
    zero = np.zeros_like(dout)
    found = [named_gradients(problem.backward(*cotangents)) for cotangents in ((dout, None), (zero, dlse), (dout, dlse))]
    positions = {name: key for name, key in zip(problem.inputs(), found[0], strict=True)}
    for name, x in problem.inputs().items():
        u = rng.standard_normal(x.shape)
        (out_up, lse_up), (out_down, lse_down) = (problem.forward(**{name: x + t * u}) for t in (STEP, -STEP))
        seen = np.isfinite(lse_up)
        along_out = (out_up - out_down) / (2 * STEP)
        along_lse = np.where(seen, np.subtract(lse_up, lse_down, where=seen, out=np.zeros_like(lse_up)) / (2 * STEP), 0)
        parts = (dout * along_out).sum(), (dlse * along_lse).sum()
        norms = [max(1.0, np.linalg.norm(a) * np.linalg.norm(b)) for a, b in ((dout, along_out), (dlse, along_lse))]
        for gradients, expected, norm in zip(found, (*parts, sum(parts)), (*norms, sum(norms)), strict=True):
            gradient = gradients[positions[name]]
            assert gradient.shape == x.shape and np.isfinite(gradient).all(), name
            assert abs((u * gradient).sum() - expected) <= TOLERANCE * norm, name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_finite_differences(case: Case) -> None:
    check_by_differences(Problem.of(case))


def test_a_modification_without_a_gradient() -> None:
    problem = Problem(*inputs(), mods=(SoftCap(1.0), UserMod("s * 2")))
    with pytest.raises(NotImplementedError, match="without a gradient"):
        problem.backward(*problem.cotangents())


def test_the_small_cases_keep_their_features() -> None:
    """Every mask still hides something and shows something, and every modification and kind of sequence is there."""
    hiding = set()
    for case in SMALL:
        mask = _inputs(case).oracle["mask"]
        pairs = case.num_heads * case.seqlen_q * case.seqlen_k
        if 0 < mask.visible(case.seqlen_q, case.seqlen_k, case.num_heads) < pairs:
            hiding.add(case.mask)
    assert hiding == set(MASKS) - {"full"}
    assert {name for case in SMALL for name in case.mods} == set(MODS)
    assert {case.sequences for case in SMALL} == {"dense", "kv_lens", "q_lens", "lens", "packed"}
    for of in (lambda c: c.sinks, lambda c: c.dropout > 0, lambda c: c.head_dim_v > 0, lambda c: c.num_heads > c.num_heads_kv):
        assert {of(case) for case in SMALL} == {False, True}


# Modifications -------------------------------------------------------------------------------------------------------------

BATCH, HEADS, SEQLEN_Q, SEQLEN_K = 2, 4, 5, 7


def inputs(
    *,
    batch: int = BATCH,
    seqlen_q: int = SEQLEN_Q,
    seqlen_k: int = SEQLEN_K,
    heads: int = HEADS,
    heads_kv: int = 2,
    dim: int = 3,
    dim_v: int = 2,
) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seqlen_q * 31 + seqlen_k)
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_k, heads_kv, dim), (batch, seqlen_k, heads_kv, dim_v))
    return tuple(rng.standard_normal(shape) for shape in shapes)  # type: ignore[return-value]


def broadcast_shapes() -> Iterator[tuple[int, ...]]:
    """Every shape that broadcasts to the scores: axes of length 1 anywhere, leading axes left out."""
    full = (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    for bits in np.ndindex(2, 2, 2, 2):
        shape = tuple(n if bit else 1 for bit, n in zip(bits, full, strict=True))
        yield shape
        while shape and shape[0] == 1:
            shape = shape[1:]
            yield shape


@pytest.mark.parametrize("shape", tuple(dict.fromkeys(broadcast_shapes())), ids=str)
def test_bias_gradient_has_the_shape_of_the_bias(shape: tuple[int, ...]) -> None:
    """The sum of the gradient of the whole bias over the axes along which it was repeated."""
    bias = np.random.default_rng(3).standard_normal(shape)
    whole = np.broadcast_to(bias, (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)).copy()
    options: dict[str, Any] = {"mask": Causal(), "sinks": np.ones(4), "dropout": 0.3, "seed": 5}
    narrow, wide = (Problem(*inputs(), mods=(SoftCap(2.0), Bias(b), SoftCap(3.0)), **options) for b in (bias, whole))
    cotangents = narrow.cotangents()
    found, full = (p.backward(*cotangents).dmods[1][0] for p in (narrow, wide))
    padded = (1,) * (4 - len(shape)) + shape
    expected = full.sum(axis=tuple(axis for axis, n in enumerate(padded) if n == 1), keepdims=True).reshape(shape)
    assert found.shape == shape and np.abs(found - expected).max() <= EXACT * max(1, np.abs(full).sum())
    assert np.abs(full).max() > TOLERANCE


SLOPE = UserMod(
    "s - slope[h] * fabs(Real(i - j))",
    "1",
    {"slope": np.linspace(0.1, 0.8, HEADS)},
    {"slope": ("h", "-fabs(Real(i - j))")},
)
PARAMS: dict[str, tuple[ScoreMod, ...]] = {
    "head": (SLOPE,),
    "float32": (SLOPE.bind([SLOPE.arrays[0].astype(np.float32)]),),
    "relative position": (
        UserMod("s + t[j - i + 4]", "1", {"t": np.linspace(-1, 1, SEQLEN_Q + SEQLEN_K)}, {"t": ("j - i + 4", "1")}),
    ),
    "table of indices": (
        UserMod(
            "s * w[bucket[j]] + w0",
            "w[bucket[j]]",
            {"w": np.array([0.5, 1.5]), "bucket": np.array([0, 1, 1, 0, 0, 1, 0]), "w0": 0.25},
            {"w": ("bucket[j]", "s")},
        ),
    ),
    "batch": (UserMod("tanh(s * t[b])", "t[b] * (1 - tanh(s * t[b]) * tanh(s * t[b]))", {"t": np.array([0.5, 2.0])},
                      {"t": ("b", "s * (1 - tanh(s * t[b]) * tanh(s * t[b]))")}),),
    "constant": (UserMod("s + t[0] + u[2]", "1", {"t": np.ones(1), "u": np.ones(3)}, {"u": ("2", "1"), "t": ("0", "1.0f")}),),
    "index of the score": (UserMod("s * t[s > 0]", "t[s > 0]", {"t": np.array([0.5, 2.0])}, {"t": ("s > 0", "s")}),),
    "clipped": (UserMod("s + t[i + j - 3]", "1", {"t": np.arange(5.0)}, {"t": ("i + j - 3", "1")}),),
    "some arrays": (
        UserMod("s * t[h] + u[i] * w[j]", "t[h]", {"t": np.ones(4), "u": np.arange(5.0), "w": np.arange(7.0)},
                {"u": ("i", "w[j]")}),
    ),
    "between others": (
        SoftCap(2.0),
        UserMod("s * t[h]", "t[h]", {"t": np.linspace(0.5, 2, 4)}, {"t": ("h", "s")}),
        Bias(np.linspace(-1, 1, SEQLEN_K)),
        SoftCap(1.5),
        SLOPE,
    ),
}  # fmt: skip
"""Modifications that have gradients of their own arrays."""


@pytest.mark.parametrize("name", PARAMS)
def test_gradients_of_user_parameters(name: str) -> None:
    for options in ({}, {"mask": Causal(), "sinks": np.zeros(4), "dropout": 0.4, "seed": 3}):
        problem = Problem(*inputs(), mods=PARAMS[name], **options)
        check_by_differences(problem)
        gradients = problem.backward(*problem.cotangents())
        assert [[x.shape for x in xs] for xs in gradients.dmods] == [
            [np.shape(mod.arrays[n]) for n in mod.differentiable] for mod in PARAMS[name]
        ]
        assert any(np.abs(x).max() > TOLERANCE for xs in gradients.dmods for x in xs)


def test_a_derivative_that_is_infinite_where_nothing_is_visible() -> None:
    """1 / (i - j) on the diagonal, which the mask hides, of the score and of the parameter."""
    mod = UserMod(
        "s * t[h] / Real(i - j)", "t[h] / Real(i - j)", {"t": np.array([1.0, 2.0, 0.5, 1.5])}, {"t": ("h", "s / Real(i - j)")}
    )
    mask = BooleanMask(~np.eye(SEQLEN_Q, SEQLEN_K, dtype=np.bool_))
    check_by_differences(Problem(*inputs(), mods=(mod,), mask=mask))


# Identities ----------------------------------------------------------------------------------------------------------------


def test_a_shift_of_all_scores_moves_lse_alone() -> None:
    """One bias for each head: out does not depend on it, and d lse / d bias is 1."""
    problem = Problem(*inputs(), mods=(Bias(np.zeros((HEADS, 1, 1))),), mask=Causal(top_left=True))
    dout, dlse = problem.cotangents()
    dbias = problem.backward(dout, dlse).dmods[0][0]
    assert np.abs(dbias[:, 0, 0] - dlse.sum(axis=(0, 2))).max() <= EXACT * np.abs(dlse).sum()


def test_a_sink_is_a_key_without_a_value() -> None:
    """As many heads as KV heads: the gradients with a sink are those with one more key whose score is the sink's."""
    q, k, v = inputs(heads_kv=HEADS)
    sinks = np.array([0.5, -1.0, 2.0, 0.0])
    with_sinks = Problem(q, k, v, sinks=sinks)
    longer = [np.concatenate([x, np.zeros_like(x[:, :1])], axis=1) for x in (k, v)]
    bias = np.zeros((1, HEADS, 1, SEQLEN_K + 1))
    bias[0, :, 0, -1] = sinks
    with_key = Problem(q, *longer, mods=(Bias(bias),))
    cotangents = with_sinks.cotangents()
    a, b = with_sinks.backward(*cotangents), with_key.backward(*cotangents)
    for x, y in ((a.dq, b.dq), (a.dk, b.dk[:, :-1]), (a.dv, b.dv[:, :-1]), (a.dsinks, b.dmods[0][0][0, :, 0, -1])):
        assert np.abs(x - y).max() <= EXACT * max(1, np.abs(y).max())


def test_groups_sum_over_their_query_heads() -> None:
    q, k, v = inputs(heads_kv=2)
    grouped, repeated = Problem(q, k, v), Problem(q, k.repeat(2, axis=2), v.repeat(2, axis=2))
    a, b = (p.backward(*grouped.cotangents()) for p in (grouped, repeated))
    assert np.array_equal(a.dq, b.dq)
    for x, y in ((a.dk, b.dk), (a.dv, b.dv)):
        assert np.abs(x - y.reshape(BATCH, SEQLEN_K, 2, 2, -1).sum(axis=3)).max() <= EXACT


def test_every_element_by_differences() -> None:
    """One small call, each element of each input on its own."""
    problem = Problem(*inputs(batch=1, seqlen_q=2, seqlen_k=3, dim=2), mods=(SoftCap(2.0), Bias(np.ones((2, 1)))),
                      sinks=np.zeros(4), mask=SlidingWindow(1, 0))  # fmt: skip
    dout, dlse = problem.cotangents()
    gradients = named_gradients(problem.backward(dout, dlse))
    for (name, x), gradient in zip(problem.inputs().items(), gradients.values(), strict=True):
        for at in np.ndindex(*x.shape):
            unit = np.zeros_like(x)
            unit[at] = STEP
            (out_up, lse_up), (out_down, lse_down) = (problem.forward(**{name: x + sign * unit}) for sign in (1, -1))
            expected = ((dout * (out_up - out_down)).sum() + (dlse * (lse_up - lse_down)).sum()) / (2 * STEP)
            assert abs(gradient[at] - expected) <= TOLERANCE * max(1, np.linalg.norm(dout) + np.linalg.norm(dlse)), name


# Sequences -----------------------------------------------------------------------------------------------------------------

LENS_Q, LENS_K = np.array([5, 0, 3, 2], np.int32), np.array([7, 4, 0, 6], np.int32)


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(1, 0)], ids=str)
def test_padded_and_packed_equal_each_sequence_alone(mask: Mask) -> None:
    """Whatever the padding of any input holds; its gradients are exactly 0."""
    q, k, v = inputs(batch=4)
    mods = (Alibi(np.ones(4)), Bias(np.zeros((HEADS, 1, SEQLEN_K))))
    options: dict[str, Any] = {"scale": 0.7, "mask": mask, "sinks": np.zeros(4)}
    dout, dlse = Problem(q, k, v, **options).cotangents()
    alone = []
    for b, (m, n) in enumerate(zip(LENS_Q, LENS_K, strict=True)):
        one = slice(b, b + 1)
        parts, lse_part = (dout[one, :m], q[one, :m], k[one, :n], v[one, :n]), dlse[one, :, :m]
        bound = (mods[0], Bias(mods[1].arrays[0][..., :n]))
        alone.append(reference.backward(*parts, dlse=lse_part, mods=bound, **options))
    dbias = sum(np.pad(g.dmods[1][0], ((0, 0), (0, 0), (0, SEQLEN_K - n))) for g, n in zip(alone, LENS_K, strict=True))
    dsinks = sum(g.dsinks for g in alone)
    for b, (m, n) in enumerate(zip(LENS_Q, LENS_K, strict=True)):
        q[b, m:], k[b, n:], v[b, n:], dout[b, m:], dlse[b, :, m:] = np.nan, np.nan, np.inf, np.nan, np.nan
    found = reference.backward(dout, q, k, v, dlse=dlse, q_lens=LENS_Q, kv_lens=LENS_K, mods=mods, **options)
    for x, name, lens in ((found.dq, "dq", LENS_Q), (found.dk, "dk", LENS_K), (found.dv, "dv", LENS_K)):
        for b, n in enumerate(lens):
            assert np.array_equal(x[b, :n], getattr(alone[b], name)[0]) and not x[b, n:].any()
    assert np.abs(found.dmods[1][0] - dbias).max() <= EXACT and np.abs(found.dsinks - dsinks).max() <= EXACT

    def pack(x: Array, lens: Array, tail: int) -> Array:
        return np.concatenate([*(x[b, :n] for b, n in enumerate(lens)), np.full((tail, *x.shape[2:]), np.nan)])

    cu_seqlens = {f"cu_seqlens_{s}": np.concatenate([[0], np.cumsum(n)]) for s, n in (("q", LENS_Q), ("k", LENS_K))}
    arrays = (pack(dout, LENS_Q, 3), pack(q, LENS_Q, 3), pack(k, LENS_K, 2), pack(v, LENS_K, 2))
    packed = reference.backward(*arrays, dlse=pack(dlse.transpose(0, 2, 1), LENS_Q, 3).T, mods=mods, **cu_seqlens, **options)
    for name, lens in (("dq", LENS_Q), ("dk", LENS_K), ("dv", LENS_K)):
        x, expected = getattr(packed, name), np.concatenate([getattr(g, name)[0] for g in alone])
        assert np.array_equal(x[: lens.sum()], expected) and not x[lens.sum() :].any()
    assert np.array_equal(packed.dmods[1][0], found.dmods[1][0]) and np.array_equal(packed.dsinks, found.dsinks)


# Edges ---------------------------------------------------------------------------------------------------------------------


def hidden_by_mask(keep: Array) -> dict[str, Any]:
    return {"mask": BooleanMask(keep)}


def hidden_by_bias(keep: Array) -> dict[str, Any]:
    return {"mods": (Bias(np.where(keep, 0, -np.inf)),)}


@pytest.mark.parametrize("hidden", [hidden_by_mask, hidden_by_bias])
def test_rows_and_keys_that_meet_nothing_get_exactly_0(hidden: Callable[[Array], dict[str, Any]]) -> None:
    keep = np.random.default_rng(4).random((SEQLEN_Q, SEQLEN_K)) < 0.7
    keep[[0, 3]], keep[:, [1, 6]] = False, False
    problem = Problem(*inputs(), sinks=np.full(4, -np.inf), **hidden(keep))
    dout, dlse = problem.cotangents()
    found = problem.backward(dout, dlse)
    assert not found.dq[:, [0, 3]].any() and not found.dk[:, [1, 6]].any() and not found.dv[:, [1, 6]].any()
    assert found.dq[:, 1].all() and found.dk[:, 0].all() and found.dv[:, 0].all()
    for xs in found.dmods:
        assert not xs[0][~keep].any()
    dout[:, [0, 3]], dlse[..., [0, 3]] = np.nan, np.inf  # nor do they pass on what is asked of them
    again = problem.backward(dout, dlse)
    assert all(np.array_equal(x, y) for x, y in zip((*found[:3], found.dsinks), (*again[:3], again.dsinks), strict=True))
    assert not found.dsinks.any()


def test_a_row_of_nothing_but_its_sink() -> None:
    """lse is the sink: all of dlse goes there."""
    problem = Problem(*inputs(), mask=BooleanMask(np.zeros((1, 1), np.bool_)), sinks=np.array([0.5, -1.0, 2.0, -np.inf]))
    dout, dlse = problem.cotangents()
    found = problem.backward(dout, dlse)
    assert not any(x.any() for x in found[:3])
    expected = np.where(np.isneginf(problem.sinks), 0, dlse.sum(axis=(0, 2)))
    assert np.abs(found.dsinks - expected).max() <= EXACT


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0}], ids=str)
def test_empty_calls(sizes: dict[str, int]) -> None:
    q, k, v = inputs(**sizes)
    mods = (SoftCap(1.0), Bias(np.ones((HEADS, 1, 1))), SLOPE)
    problem = Problem(q, k, v, mods=mods, mask=Causal(), dropout=0.5, sinks=np.zeros(4))
    found = problem.backward(np.ones((*q.shape[:3], 2)))
    assert [x.shape for x in found[:3]] == [q.shape, k.shape, v.shape]
    assert not any(x.any() for x in (*found[:3], *found.dmods[1], *found.dmods[2], found.dsinks))
    assert problem.backward(np.ones((*q.shape[:3], 2)), np.ones((q.shape[0], HEADS, q.shape[1]))).dsinks.shape == (HEADS,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["dout", "q", "k", "v", "dlse"])
def test_a_nonfinite_input_stays_among_those_who_see_it(name: str, value: float) -> None:
    """Two groups of rows and keys that do not see each other."""
    keep = np.zeros((SEQLEN_Q, SEQLEN_K), np.bool_)
    keep[:2, :3], keep[2:, 3:] = True, True
    arrays = dict(zip("qkv", inputs(), strict=True))
    arrays["dout"], arrays["dlse"] = Problem(**arrays).cotangents()
    options: dict[str, Any] = {"scale": 0.5, "mask": BooleanMask(keep), "mods": (Bias(np.zeros((SEQLEN_Q, SEQLEN_K))),)}
    clean = reference.backward(**arrays, **options)
    arrays[name][(1, 0, 4) if name == "dlse" else (1, 4, 0, 1)] = value
    found = reference.backward(**arrays, **options)
    for x, y, other in ((found.dq, clean.dq, 2), (found.dk, clean.dk, 3), (found.dv, clean.dv, 3)):
        assert np.abs(x[:, :other] - y[:, :other]).max() <= EXACT and np.abs(x[0] - y[0]).max() <= EXACT
    dbias = found.dmods[0][0]
    assert np.isfinite(dbias[:2]).all() and not dbias[~keep].any()
    assert not all(np.isfinite(x).all() for x in found[:3])


def test_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    q, k, v = inputs()
    q[0, 0, 0, 0], v[0, 0, 0, 0] = np.inf, np.nan
    for mask in (Full(), Causal(), BooleanMask(np.zeros((1, 1), np.bool_))):
        reference.backward(np.ones((2, 5, 4, 2)), q, k, v, scale=1e3, mask=mask, sinks=np.full(4, -np.inf))
    assert not list(recwarn)


# Precision -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_step_is_rounded_to_the_dtype(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in inputs(seqlen_q=40, seqlen_k=50, dim=16))
    dout = np.random.default_rng(6).standard_normal((2, 40, 4, 2)).astype(dtype)
    options: dict[str, Any] = {"scale": 0.25, "mask": Causal(), "mods": (Bias(np.ones((40, 1))),), "sinks": np.zeros(4)}
    exact, found = (reference.backward(dout, q, k, v, **options, dtype=t) for t in (np.float64, dtype))
    eps = float(ml_dtypes.finfo(dtype).eps)
    for name, x in named_gradients(found).items():
        assert x.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert np.array_equal(x, x.astype(dtype).astype(x.dtype))
        worst = np.abs(x - named_gradients(exact)[name]).max()
        assert worst < 32 * eps
        assert worst > eps / 64 or dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_where_the_naive_backward_rounds(dtype: Any) -> None:
    """One head, step by step: the gradient of a bias for each score is dS itself."""

    def to(x: Array) -> Array:
        return x.astype(dtype).astype(np.float32)

    q, k, v = (to(x) for x in inputs(batch=1, seqlen_q=20, seqlen_k=30, heads=1, heads_kv=1, dim=16, dim_v=16))
    dout = to(np.random.default_rng(6).standard_normal(q.shape))
    arrays = (x.astype(dtype) for x in (dout, q, k, v))
    mods = (SoftCap(2.0), Bias(np.zeros((20, 30), dtype)))
    found = reference.backward(*arrays, scale=0.25, mask=Full(), mods=mods, dtype=dtype)
    dout, q, k, v = (x[0, :, 0] for x in (dout, q, k, v))
    s = to(q @ k.T * 0.25)
    capped = to(np.float32(2) * np.tanh(s / np.float32(2)))
    row_max = capped.max(axis=1, keepdims=True)
    p = to(np.exp(capped - (row_max + np.log(np.exp(capped - row_max).sum(axis=1, keepdims=True)))))
    delta = (dout * to(p @ v)).sum(axis=1, keepdims=True)
    ds = to(p * (to(dout @ v.T) - delta))
    assert np.array_equal(found.dmods[1][0], ds)
    assert np.array_equal(found.dv[0, :, 0], to(p.T @ dout))
    ds = to(ds * (1 - np.tanh(s / np.float32(2)) ** 2))
    assert np.array_equal(found.dq[0, :, 0], to(np.float32(0.25) * (ds @ k)))
    assert np.array_equal(found.dk[0, :, 0], to(np.float32(0.25) * (ds.T @ q)))
