"""The NumPy backend called directly: its blocks against the oracle, what it visits, what it allocates, what it leaves alone."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuattn import cpu, reference
from cuattn.masks import BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow, Tile
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod
from tests.cases import DTYPES
from tests.tolerance import assert_close, limit

Array = Any


@pytest.fixture(params=["whole", "tiny"])
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sizes in use, and ones so small that short sequences have many blocks of every kind."""
    if request.param == "tiny":
        shrink(monkeypatch)
    return str(request.param)


def shrink(patch: pytest.MonkeyPatch) -> None:
    for name, value in (("BLOCK_K", 5), ("BLOCK_SCORES", 30), ("MIN_ROWS", 3)):
        patch.setattr(cpu, name, value)


def inputs(
    dtype: Any = np.float64, *, batch: int = 2, seqlen_q: int = 13, seqlen_k: int = 19, heads: int = 4, heads_kv: int = 2,
    dim: int = 8, dim_v: int = 6,
) -> tuple[Array, Array, Array]:  # fmt: skip
    rng = np.random.default_rng(seqlen_q * 31 + seqlen_k)
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_k, heads_kv, dim), (batch, seqlen_k, heads_kv, dim_v))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


def check(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """Compare with the oracle; returns what the backend gave."""
    options = {"scale": 0.5, "mask": Full(), **options}
    out, lse = cpu.forward(q, k, v, **options)
    exact, naive = (reference.forward(q, k, v, **options, dtype=dtype) for dtype in (np.float64, q.dtype))
    name = q.dtype.name
    assert out.dtype == q.dtype and lse.dtype == (np.float64 if name == "float64" else np.float32)
    assert_close("out", out, exact[0], limit(exact[0], naive[0], q.dtype, name))
    assert_close("lse", lse, exact[1], limit(exact[1], naive[1], lse.dtype, name, least_scale=1.0))
    return out, lse


MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "top-left": Causal(top_left=True),
    "window": SlidingWindow(3, 2),
    "window-beside": SlidingWindow(9, -5),
    "boolean": BooleanMask(np.random.default_rng(0).random((2, 4, 13, 19)) < 0.3),
    "keys": BooleanMask(np.random.default_rng(1).random((2, 1, 1, 19)) < 0.3),
    "nothing": BooleanMask(np.zeros((1, 1), np.bool_)),
    "blocks": BlockSparse(
        np.random.default_rng(2).integers(0, 4, (4, 5, 5)), 3, 4, np.eye(4, dtype=np.bool_)[None, :3].repeat(2, 0)
    ),
    "composed": SlidingWindow(6, 6) & BooleanMask(np.random.default_rng(3).random((13, 19)) < 0.6) & Causal(),
}
MODS: dict[str, tuple[ScoreMod, ...]] = {
    "none": (),
    "softcap": (SoftCap(2.0),),
    "alibi": (Alibi(np.array([0.5, 0.25, 1.0, 2.0], np.float32)),),
    "bias": (Bias(np.random.default_rng(4).standard_normal((2, 4, 13, 19))),),
    "bias-hides": (Bias(np.where(np.random.default_rng(5).random((2, 1, 13, 1)) < 0.5, 0, -np.inf)),),
    "constant": (UserMod("1"),),
    "several": (
        SoftCap(2.0),
        Bias(np.linspace(0, 1, 19)),
        UserMod("i > j ? s * Real(h) : s - t[b]", params={"t": np.array([1.0, 2.0])}),
    ),
}


@pytest.mark.parametrize("mods", MODS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_mods(block_sizes: str, mask: str, mods: str) -> None:
    check(*inputs(), mask=MASKS[mask], mods=MODS[mods], sinks=np.array([0.5, -np.inf, 3.0, -2.0]), dropout=0.3, seed=2**40)
    check(*inputs(np.float32), mask=MASKS[mask], mods=MODS[mods])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_dtypes_and_groups(block_sizes: str, dtype: str, heads_kv: int) -> None:
    q, k, v = inputs(DTYPES[dtype], seqlen_q=37, seqlen_k=53, heads_kv=heads_kv, dim=33)
    check(q, k, v, mask=Causal(), sinks=np.ones(4, np.float32), dropout=0.1)


@pytest.mark.parametrize("dims", [(1, 1), (1, 7), (7, 1), (64, 128), (256, 32)], ids=str)
def test_head_dims(block_sizes: str, dims: tuple[int, int]) -> None:
    check(*inputs(np.float32, dim=dims[0], dim_v=dims[1]), scale=dims[0] ** -0.5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_lengths(data: st.DataObject) -> None:
    """Padded and packed, lengths of 0 and 1 included; padding and tokens past the end hold NaN."""
    batch = data.draw(st.integers(0, 3))
    lens_q, lens_k = (np.array(data.draw(st.lists(st.integers(0, 14), min_size=batch, max_size=batch)), np.int32) for _ in "qk")
    mask = data.draw(
        st.sampled_from([Full(), Causal(), Causal(top_left=True), SlidingWindow(2, 3), SlidingWindow(0, None) & Causal()])
    )
    options: dict[str, Any] = {"mask": mask, "mods": (Alibi(np.ones(4)),), "dropout": data.draw(st.sampled_from([0.0, 0.5]))}
    options["sinks"] = data.draw(st.sampled_from([None, np.zeros(4)]))
    q, k, v = inputs(batch=batch, seqlen_q=14, seqlen_k=14)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        if data.draw(st.booleans()):
            for b in range(batch):
                q[b, lens_q[b] :], k[b, lens_k[b] :], v[b, lens_k[b] :] = np.nan, np.nan, np.inf
            out, lse = check(q, k, v, q_lens=lens_q, kv_lens=lens_k, **options)
        else:
            q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            q[lens_q.sum() :], k[lens_k.sum() :], v[lens_k.sum() :] = np.nan, np.nan, np.inf
            cu_seqlens = {f"cu_seqlens_{s}": np.concatenate([[0], np.cumsum(n)]) for s, n in (("q", lens_q), ("k", lens_k))}
            out, lse = check(q, k, v, **cu_seqlens, **options)
    assert np.isfinite(out).all() and not np.isnan(lse).any()


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0}], ids=str)
def test_empty_calls(sizes: dict[str, int], sinks: Any) -> None:
    out, lse = check(*inputs(**sizes), sinks=sinks, mask=Causal(), mods=(SoftCap(1.0),), dropout=0.5)
    assert not out.any()
    assert np.array_equal(lse, np.broadcast_to(-np.inf if sinks is None else sinks[:, None], lse.shape))


@pytest.mark.parametrize(
    "mask", [Full(), Causal(), SlidingWindow(3, 2), MASKS["keys"]], ids=["full", "causal", "window", "keys"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nonfinite_inputs_propagate_as_in_the_oracle(block_sizes: str, name: str, value: float, mask: Mask) -> None:
    arrays = dict(zip("qkv", inputs(), strict=True))
    arrays[name][:, 7, 1, 2] = value
    for sinks in (None, np.zeros(4)):
        check(**arrays, mask=mask, sinks=sinks)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_sinks_and_biases(block_sizes: str, value: float) -> None:
    sinks, bias = np.array([0.0, value, 1.0, -np.inf]), np.zeros((13, 19))
    bias[4, 11] = value
    check(*inputs(), sinks=sinks)
    check(*inputs(), mods=(Bias(bias),), mask=SlidingWindow(9, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(block_sizes: str, dtype: str) -> None:
    """Scores of magnitude 1e4: finite, and the running maximum keeps every digit."""
    q, k, v = inputs(np.float32, dim=16)
    q, k, v = ((x * m).astype(DTYPES[dtype]) for x, m in ((q, 50), (k, 50), (v, 1)))
    scores = 0.5 * np.einsum("bihd,bjhd->bhij", q[:, :, ::2].astype(np.float64), k.astype(np.float64))
    assert np.abs(scores).max() > 1e4
    assert np.isfinite(check(q, k, v)[0].astype(np.float64)).all()


def test_inputs_of_any_strides(block_sizes: str) -> None:
    q, k, v = inputs(np.float32)
    plain = check(q, k, v)
    heads_first = tuple(np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v))
    assert_close("heads first", check(*heads_first)[0], plain[0].astype(np.float64), 1e-6)
    wide = np.zeros((2, 13, 4, 20), np.float32)
    wide[..., 3:11] = q
    assert_close("a slice of the last axis", check(wide[..., 3:11], k, v)[0], plain[0].astype(np.float64), 1e-6)
    one = tuple(np.broadcast_to(x[:1, :, :1], x.shape) for x in (q, k, v))
    check(*one)


def test_out_is_written_in_place(block_sizes: str) -> None:
    """Any strides, all of it and nothing around it; inputs stay as they were."""
    q, k, v = inputs(ml_dtypes.bfloat16)
    before = [x.tobytes() for x in (q, k, v)]
    base = np.full((2, 17, 6, 9), 61, q.dtype)
    out = base[:, 2:15, 1:5, 2:8]
    out[...] = np.nan
    lens = np.array([13, 6], np.int32)
    result, _ = cpu.forward(q, k, v, scale=0.5, mask=Causal(), q_lens=lens, out=out)
    assert result is out
    expected, _ = check(q, k, v, mask=Causal(), q_lens=lens)
    assert out.tobytes() == expected.tobytes()
    base[:, 2:15, 1:5, 2:8] = 61
    assert (base == 61).all()
    assert before == [x.tobytes() for x in (q, k, v)]


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding rows are 0 and -inf even when memory arrives as NaN."""
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: np.full_like(empty(*args, **kwargs), np.nan))
    out, lse = cpu.forward(*inputs(np.float32), scale=0.5, mask=Causal(), q_lens=np.array([0, 4]), sinks=np.zeros(4))
    assert np.isfinite(out).all() and not out[0].any() and not out[1, 4:].any()
    assert np.isneginf(lse[0]).all() and np.isneginf(lse[1, :, 4:]).all()


@dataclass(frozen=True)
class Recorder(ScoreMod):
    """Leaves scores as they are and notes the tiles it was asked about."""

    tiles: list[Tile] = field(default_factory=list)

    def apply(self, s: Array, tile: Tile) -> Array:
        self.tiles.append(tile)
        return s


@pytest.mark.parametrize("mask", MASKS)
def test_blocks_cover_what_is_visible_once_and_skip_what_is_not(block_sizes: str, mask: str) -> None:
    recorder, model = Recorder(), MASKS[mask]
    check(*inputs(batch=1), mask=model, mods=(recorder,))
    recorder.tiles.clear()
    cpu.forward(*inputs(batch=1), scale=0.5, mask=model, mods=(recorder,))
    visible, visits = model.materialize(13, 19, num_heads=4), np.zeros((4, 13, 19), np.intp)
    for tile in recorder.tiles:
        assert visible[tile.head, tile.row, tile.col].any()
        visits[tile.head, tile.row, tile.col] += 1
    assert visits.max(initial=0) <= 1 and (visits[visible] == 1).all()


@pytest.mark.parametrize("num_heads", [1, 3, 8, 32])
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 100000), (7, 0), (300, 70), (5000, 5000), (0, 9)], ids=str)
def test_blocks_of_work(num_heads: int, group: int, seqlens: tuple[int, int]) -> None:
    """They partition heads and rows, keep groups together and bound the memory of a block of scores."""
    heads, (seqlen_q, seqlen_k) = num_heads * group, seqlens
    seen = np.zeros((heads, seqlen_q), np.intp)
    for h, i in cpu.blocks(seqlen_q, heads, group, seqlen_k):
        seen[h.start : h.stop, i.start : i.stop] += 1
        assert h.start % group == 0 and h.stop % group == 0
        assert len(h) * len(i) * min(seqlen_k, cpu.BLOCK_K) <= cpu.BLOCK_SCORES
    assert (seen == 1).all()


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(64, 64)], ids=["full", "causal", "window"])
def test_memory_is_linear_in_the_length(mask: Mask) -> None:
    """Far below the S of a single head, and no more than the arrays themselves plus a few blocks."""
    seqlen = 4096
    q, k, v = inputs(np.float32, batch=1, seqlen_q=seqlen, seqlen_k=seqlen, heads=2, heads_kv=1, dim=8, dim_v=8)
    tracemalloc.start()
    cpu.forward(q, k, v, scale=0.3, mask=mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * (q.nbytes + k.nbytes + v.nbytes) + 8 * 4 * cpu.BLOCK_SCORES < seqlen * seqlen * 4 // 4


def test_reruns_are_bitwise_equal() -> None:
    q, k, v = inputs(np.float32, seqlen_q=300, seqlen_k=700)
    options = {"scale": 0.4, "mask": Causal(), "dropout": 0.2, "seed": 9}
    first, *others = (cpu.forward(q, k, v, **options) for _ in range(5))
    assert all(np.array_equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    q, k, v = inputs()
    q[0, 0, 0, 0], v[0, 0, 0, 0] = np.inf, np.nan
    for mask in MASKS.values():
        cpu.forward(q, k, v, scale=1e3, mask=mask, sinks=np.full(4, -np.inf))
        reference.forward(q, k, v, scale=1e3, mask=mask, sinks=np.full(4, -np.inf))
    assert not list(recwarn)
