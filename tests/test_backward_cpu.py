"""The NumPy backend's backward called directly: against the oracle by the tolerance rule, its edges, its memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuattn import cpu, reference
from cuattn.masks import BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow, Tile
from cuattn.reference import Gradients
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod
from tests.cases import CORNERS, DTYPES, FEATURES, REGULAR, Case, _inputs, place
from tests.tolerance import verify_named_gradients

Array = Any

SOFTCAP_FACTOR = 1.5
"""The contract allows a gradient of softcap three times the error of naive arithmetic, others twice."""

FEW = 64
"""Elements below which a gradient's naive error is a matter of chance: the naive error of dq, dk and dv, relative to their
largest element, is then a yardstick too."""


@pytest.fixture(params=["whole", "tiny"])
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sizes in use, and ones so small that short sequences have many blocks of every kind."""
    if request.param == "tiny":
        shrink(monkeypatch)
    return str(request.param)


def shrink(patch: pytest.MonkeyPatch, columns: int = 5) -> None:
    for name, value in (("BLOCK_K", columns), ("BLOCK_SCORES", 6 * columns), ("MIN_ROWS", 3)):
        patch.setattr(cpu, name, value)


class Call(NamedTuple):
    """Arguments of one call of the forward, and cotangents of its results."""

    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array | None
    options: dict[str, Any]

    @staticmethod
    def of(q: Array, k: Array, v: Array, *, with_dlse: bool = True, **options: Any) -> Call:
        rng = np.random.default_rng(7)
        real = np.float64 if q.dtype == np.float64 else np.float32
        dout = rng.standard_normal((*q.shape[:-1], v.shape[-1])).astype(q.dtype)
        dlse = rng.standard_normal((*q.shape[:-3], q.shape[-2], q.shape[-3])).astype(real)
        return Call(q, k, v, dout, dlse if with_dlse else None, {"scale": 0.5, "mask": Full(), **options})

    def forward(self) -> tuple[Array, Array]:
        return cpu.forward(self.q, self.k, self.v, **self.options)

    def run(self) -> Gradients:
        """Of the NumPy backend."""
        out, lse = self.forward()
        return cpu.backward(self.dout, self.q, self.k, self.v, out, lse, dlse=self.dlse, **self.options)

    def oracle(self, dtype: Any) -> Gradients:
        return reference.backward(self.dout, self.q, self.k, self.v, dlse=self.dlse, dtype=dtype, **self.options)


def flat(gradients: Gradients) -> dict[str, Array]:
    named = {"dq": gradients.dq, "dk": gradients.dk, "dv": gradients.dv}
    named.update({f"array {n} of mod {m}": x for m, xs in enumerate(gradients.dmods) for n, x in enumerate(xs)})
    return named if gradients.dsinks is None else {**named, "dsinks": gradients.dsinks}


def check(call: Call) -> Gradients:
    """Compare with the oracle; returns what the backend gave."""
    found, (_, lse), name = call.run(), call.forward(), call.q.dtype.name
    mods = call.options.get("mods", ())
    dtypes = [call.q.dtype] * 3 + [np.asarray(mod.arrays[n]).dtype for mod in mods for n in mod.differentiable]
    dtypes += [] if found.dsinks is None else [call.options["sinks"].dtype]
    factor = SOFTCAP_FACTOR if any(isinstance(mod, SoftCap) for mod in mods) else 1.0
    exact, naive = (flat(call.oracle(dtype)) for dtype in (np.float64, call.q.dtype))
    assert list(exact) == list(flat(found))
    for (which, x), dtype in zip(flat(found).items(), dtypes, strict=True):
        assert x.dtype == dtype, f"{which}: dtype {x.dtype}, expected {dtype}"
    verify_named_gradients(flat(found), exact, naive, lse, name, factor)
    return found


# The cases -----------------------------------------------------------------------------------------------------------------


def small(case: Case) -> Case:
    """The same features and dtype at sizes at which the oracle is quick; a GPU's precisions mean nothing here."""
    lengths = {n: -(-getattr(case, n) // 4) for n in ("seqlen_q", "seqlen_k")}
    dims = {"head_dim": min(case.head_dim, 24), "head_dim_v": min(case.head_dim_v, 17)}
    return replace(case, precision="ieee", **lengths, **dims)


def call_of(case: Case) -> Call:
    inputs = _inputs(case)
    layouts = ("heads_first", "offset", "interleaved") if case.layout == "mixed" else (case.layout,) * 3
    tensors = [place(x, layout) for x, layout in zip(inputs[:3], layouts, strict=True)]
    return Call.of(*(tensors if case.batch_axis else [x[None] for x in tensors]), **inputs.oracle)


@pytest.mark.parametrize("case", dict.fromkeys(small(c) for c in FEATURES), ids=str)
def test_features(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks small enough for the lengths to have several."""
    shrink(monkeypatch, columns=20)
    check(call_of(case))


@pytest.mark.parametrize("case", dict.fromkeys(small(c) for c in CORNERS), ids=str)
def test_corners(case: Case) -> None:
    check(call_of(case))


LARGE = tuple(c for c in REGULAR if c.precision == "ieee" and 1 << 10 < c.seqlen_q * c.seqlen_k <= 1 << 20)[::5]
WHOLE = (*LARGE, *[c for c in FEATURES if c.precision == "ieee"][::16])


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole_cases(case: Case) -> None:
    """As they are, in the block sizes in use."""
    check(call_of(case))


# Blocks --------------------------------------------------------------------------------------------------------------------


def inputs(
    dtype: Any = np.float64, *, batch: int = 2, seqlen_q: int = 13, seqlen_k: int = 19, heads: int = 4, heads_kv: int = 2,
    dim: int = 8, dim_v: int = 6,
) -> tuple[Array, Array, Array]:  # fmt: skip
    rng = np.random.default_rng(seqlen_q * 31 + seqlen_k)
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_k, heads_kv, dim), (batch, seqlen_k, heads_kv, dim_v))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "window": SlidingWindow(3, 2),
    "window-beside": SlidingWindow(9, -5),
    "boolean": BooleanMask(np.random.default_rng(0).random((2, 4, 13, 19)) < 0.3),
    "nothing": BooleanMask(np.zeros((1, 1), np.bool_)),
    "blocks": BlockSparse(
        np.random.default_rng(2).integers(0, 4, (4, 5, 5)), 3, 4, np.eye(4, dtype=np.bool_)[None, :3].repeat(2, 0)
    ),
    "composed": SlidingWindow(6, 6) & BooleanMask(np.random.default_rng(3).random((13, 19)) < 0.6) & Causal(),
}
SLOPE = UserMod(
    "s - slope[h] * fabs(Real(i - j))",
    "1",
    {"slope": np.linspace(0.1, 0.4, 4, dtype=np.float32)},
    {"slope": ("h", "-fabs(Real(i - j))")},
)
RELATIVE = UserMod("s * t[i - j + 18]", "t[i - j + 18]", {"t": np.linspace(0.5, 1.5, 31)}, {"t": ("i - j + 18", "s")})
MODS: dict[str, tuple[ScoreMod, ...]] = {
    "none": (),
    "softcap": (SoftCap(2.0),),
    "alibi": (Alibi(np.array([0.5, 0.25, 1.0, 2.0], np.float32)),),
    "bias": (Bias(np.random.default_rng(4).standard_normal((2, 4, 13, 19))),),
    "bias-hides": (Bias(np.where(np.random.default_rng(5).random((2, 1, 13, 1)) < 0.5, 0, -np.inf)),),
    "constant": (UserMod("1", "0"),),
    "parameters": (SLOPE, RELATIVE),
    "several": (SoftCap(2.0), RELATIVE, Bias(np.linspace(0, 1, 19)), SLOPE, SoftCap(4.0), Bias(np.zeros((4, 13, 1)))),
}


@pytest.mark.parametrize("mods", MODS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_mods(block_sizes: str, mask: str, mods: str) -> None:
    options: dict[str, Any] = {"mask": MASKS[mask], "mods": MODS[mods]}
    check(Call.of(*inputs(), **options, sinks=np.array([0.5, -np.inf, 3.0, -2.0]), dropout=0.3, seed=2**40))
    check(Call.of(*inputs(np.float32), **options, with_dlse=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_dtypes_and_groups(block_sizes: str, dtype: str, heads_kv: int) -> None:
    q, k, v = inputs(DTYPES[dtype], seqlen_q=37, seqlen_k=53, heads_kv=heads_kv, dim=33)
    bias = np.random.default_rng(8).standard_normal((4, 1, 53)).astype(DTYPES[dtype])
    options: dict[str, Any] = {"mask": Causal(), "sinks": np.ones(4, np.float32), "dropout": 0.1, "mods": (Bias(bias), SLOPE)}
    check(Call.of(q, k, v, **options))


@pytest.mark.parametrize("zero", ["dout", "dlse"])
def test_each_cotangent_alone(block_sizes: str, zero: str) -> None:
    call = Call.of(*inputs(), mask=Causal(), sinks=np.ones(4), mods=(SoftCap(2.0), Bias(np.zeros((13, 19)))))
    found = check(call._replace(**{zero: np.zeros_like(getattr(call, zero))}))
    assert bool(found.dv.any()) == (zero == "dlse") and all(x.any() for x in (found.dq, found.dk, found.dsinks))
    if zero == "dlse":
        without = check(call._replace(dlse=None))
        assert all(np.array_equal(x, y) for x, y in zip(flat(found).values(), flat(without).values(), strict=True))


@dataclass(frozen=True)
class Recorder(ScoreMod):
    """Leaves scores as they are and notes the tiles it was asked about."""

    tiles: list[Tile] = field(default_factory=list)

    def apply(self, s: Array, tile: Tile) -> Array:
        self.tiles.append(tile)
        return s

    def grad(self, s: Array, tile: Tile) -> Array:
        return np.ones((), s.dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_blocks_cover_what_is_visible_once_and_skip_what_is_not(block_sizes: str, mask: str) -> None:
    recorder, model = Recorder(), MASKS[mask]
    call = Call.of(*inputs(batch=1), mask=model, mods=(recorder,))
    out, lse = call.forward()
    recorder.tiles.clear()
    cpu.backward(call.dout, call.q, call.k, call.v, out, lse, **call.options)
    visible, visits = model.materialize(13, 19, num_heads=4), np.zeros((4, 13, 19), np.intp)
    for tile in recorder.tiles:
        assert visible[tile.head, tile.row, tile.col].any()
        visits[tile.head, tile.row, tile.col] += 1
    assert visits.max(initial=0) <= 1 and (visits[visible] == 1).all()


# Sequences and edges -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_lengths(data: st.DataObject) -> None:
    """Padded and packed, lengths of 0 and 1 included; padding and tokens past the end hold NaN and get gradients 0."""
    batch = data.draw(st.integers(0, 3))
    lens_q, lens_k = (np.array(data.draw(st.lists(st.integers(0, 14), min_size=batch, max_size=batch)), np.int32) for _ in "qk")
    mask = data.draw(
        st.sampled_from([Full(), Causal(), Causal(top_left=True), SlidingWindow(2, 3), SlidingWindow(0, None) & Causal()])
    )
    options: dict[str, Any] = {"mask": mask, "mods": (SLOPE,), "dropout": data.draw(st.sampled_from([0.0, 0.5]))}
    options["sinks"] = data.draw(st.sampled_from([None, np.zeros(4)]))
    q, k, v = inputs(batch=batch, seqlen_q=14, seqlen_k=14)
    packed = data.draw(st.booleans())
    if packed:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        options.update({f"cu_seqlens_{s}": np.concatenate([[0], np.cumsum(n)]) for s, n in (("q", lens_q), ("k", lens_k))})
    else:
        options.update(q_lens=lens_q, kv_lens=lens_k)
    call = Call.of(q, k, v, **options)
    assert call.dlse is not None
    for x, lens, bad in ((q, lens_q, np.nan), (k, lens_k, np.nan), (v, lens_k, np.inf), (call.dout, lens_q, np.nan)):
        padding(x, lens, packed)[...] = bad
    padding(call.dlse.swapaxes(-2, -1), lens_q, packed)[...] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        found = check(call)
    for x, lens in ((found.dq, lens_q), (found.dk, lens_k), (found.dv, lens_k)):
        assert np.isfinite(x).all() and not padding(x, lens, packed).any()


class _Padding(NamedTuple):
    """The rows of `array` that are padding, to be written or looked at."""

    array: Array
    rows: Array

    def __setitem__(self, key: Any, value: Any) -> None:  # type: ignore[override]
        self.array[self.rows] = value

    def any(self) -> bool:
        return bool(self.array[self.rows].any())


def padding(x: Array, lens: Array, packed: bool) -> _Padding:
    """Of an array (batch, tokens, ...) or packed (tokens, ...)."""
    tokens = np.arange(x.shape[0 if packed else 1])
    return _Padding(x, tokens >= lens.sum() if packed else tokens[None, :] >= lens[:, None])


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0}], ids=str)
def test_empty_calls(sizes: dict[str, int], sinks: Any) -> None:
    mods = (SoftCap(1.0), Bias(np.ones((4, 1, 1))), SLOPE)
    found = check(Call.of(*inputs(**sizes), sinks=sinks, mask=Causal(), mods=mods, dropout=0.5))
    assert not any(x.any() for name, x in flat(found).items() if name != "dsinks")
    assert sinks is None or found.dsinks.any() == ("seqlen_k" in sizes and "seqlen_q" not in sizes)


@pytest.mark.parametrize("hidden", ["mask", "bias"])
def test_rows_and_keys_that_meet_nothing_get_exactly_0(block_sizes: str, hidden: str) -> None:
    keep = np.random.default_rng(4).random((13, 19)) < 0.7
    keep[[0, 3, 12]], keep[:, [1, 16]] = False, False
    options = {"mask": BooleanMask(keep)} if hidden == "mask" else {"mods": (Bias(np.where(keep, 0, -np.inf)),)}
    call = Call.of(*inputs(), sinks=np.full(4, -np.inf), **options)
    found = check(call)
    assert not found.dq[:, [0, 3, 12]].any() and not found.dk[:, [1, 16]].any() and not found.dv[:, [1, 16]].any()
    assert found.dq[:, 1].all() and found.dk[:, 0].all() and found.dv[:, 0].all()
    assert not any(xs[0][~keep].any() for xs in found.dmods)
    assert call.dlse is not None
    call.dout[:, [0, 3, 12]], call.dlse[..., [0, 3, 12]] = np.nan, np.inf  # nor do they pass on what is asked of them
    assert all(np.array_equal(x, y) for x, y in zip(flat(found).values(), flat(call.run()).values(), strict=True))
    assert found.dsinks is not None and not found.dsinks.any()


@pytest.mark.parametrize(
    "mask",
    [Full(), Causal(), SlidingWindow(3, 2), BooleanMask(np.arange(19) % 3 != 1)],
    ids=["full", "causal", "window", "keys"],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
def test_nonfinite_inputs_propagate_as_in_the_oracle(block_sizes: str, name: str, value: float, mask: Mask) -> None:
    for sinks in (None, np.zeros(4)):
        call = Call.of(*inputs(), mask=mask, mods=(Bias(np.zeros((13, 19))),), sinks=sinks)
        getattr(call, name)[(1, slice(None), 7) if name == "dlse" else (slice(None), 7, 1, 2)] = value
        found = check(call)
        assert not all(np.isfinite(x).all() for x in flat(found).values()) or isinstance(mask, BooleanMask)


def test_a_derivative_that_is_infinite_where_nothing_is_visible(block_sizes: str) -> None:
    mod = UserMod("s * t[h] / Real(i - j)", "t[h] / Real(i - j)", {"t": np.ones(4)}, {"t": ("h", "s / Real(i - j)")})
    found = check(Call.of(*inputs(), mods=(mod,), mask=BooleanMask(~np.eye(13, 19, dtype=np.bool_))))
    assert all(np.isfinite(x).all() for x in flat(found).values())


def test_a_modification_without_a_gradient() -> None:
    with pytest.raises(NotImplementedError, match="without a gradient"):
        Call.of(*inputs(), mods=(SoftCap(1.0), UserMod("s * 2"))).run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(block_sizes: str, dtype: str) -> None:
    """Scores of magnitude 1e4: finite, and P follows from lse as well as from the running maximum.

    float64 is its own oracle, with a rounding that grows with the scores: there they are smaller.
    """
    q, k, v = inputs(np.float32, dim=16)
    large = 10 if dtype == "float64" else 50
    q, k, v = ((x * m).astype(DTYPES[dtype]) for x, m in ((q, large), (k, large), (v, 1)))
    scores = 0.5 * np.einsum("bihd,bjhd->bhij", q[:, :, ::2].astype(np.float64), k.astype(np.float64))
    assert np.abs(scores).max() > 4 * large**2
    assert all(np.isfinite(x.astype(np.float64)).all() for x in flat(check(Call.of(q, k, v))).values())


# What it leaves alone ------------------------------------------------------------------------------------------------------


def test_inputs_of_any_strides_and_none_written(block_sizes: str) -> None:
    q, k, v = inputs(ml_dtypes.bfloat16)
    call = Call.of(q, k, v, mask=Causal())
    out, lse = call.forward()
    arrays = {"dout": call.dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": call.dlse}
    plain = cpu.backward(**arrays, **call.options)
    others = {name: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for name, x in arrays.items()}
    for x in others.values():
        x.flags.writeable = False
    before = {name: x.tobytes() for name, x in others.items()}
    found = cpu.backward(**others, **call.options)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(found[:3], plain[:3], strict=True))
    assert before == {name: x.tobytes() for name, x in others.items()}


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding rows are 0 even when memory arrives as NaN."""
    call = Call.of(*inputs(np.float32), mask=Causal(), q_lens=np.array([0, 4]), sinks=np.zeros(4))
    empty, empty_like = np.empty, np.empty_like
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: np.full_like(empty(*args, **kwargs), np.nan))
    monkeypatch.setattr(np, "empty_like", lambda *args, **kwargs: np.full_like(empty_like(*args, **kwargs), np.nan))
    found = call.run()
    assert all(np.isfinite(x).all() for x in flat(found).values())
    assert not found.dq[0].any() and not found.dq[1, 4:].any() and found.dq[1, :4].all()


@pytest.mark.parametrize("mask", [Full(), SlidingWindow(64, 64)], ids=["full", "window"])
def test_memory_is_linear_in_the_length(mask: Mask) -> None:
    """Far below the S of a single head, and no more than the arrays themselves plus a few blocks."""
    seqlen = 4096
    q, k, v = inputs(np.float32, batch=1, seqlen_q=seqlen, seqlen_k=seqlen, heads=2, heads_kv=1, dim=8, dim_v=8)
    mods = (Bias(np.zeros((2, 1, seqlen), np.float32)), SLOPE)
    options: dict[str, Any] = {"scale": 0.3, "mask": mask, "mods": mods}
    out, lse = cpu.forward(q, k, v, **options)
    tracemalloc.start()
    cpu.backward(out, q, k, v, out, lse, dlse=lse, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    arrays = 2 * (q.nbytes + k.nbytes + v.nbytes + out.nbytes)
    assert peak < 4 * arrays + 14 * 4 * cpu.BLOCK_SCORES < seqlen * seqlen * 4 // 2


def test_reruns_are_bitwise_equal() -> None:
    call = Call.of(*inputs(np.float32, seqlen_q=300, seqlen_k=700), mask=Causal(), dropout=0.2, seed=9, mods=(SLOPE,))
    first, *others = (flat(call.run()) for _ in range(5))
    assert all(np.array_equal(x, other[name]) for other in others for name, x in first.items())


def test_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    q, k, v = inputs()
    q[0, 0, 0, 0], v[0, 0, 0, 0] = np.inf, np.nan
    for mask in MASKS.values():
        Call.of(q, k, v, scale=1e3, mask=mask, sinks=np.full(4, -np.inf)).run()
    assert not list(recwarn)
