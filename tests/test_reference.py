"""The oracle against the formula of the contract written out in plain Python, element by element; and the dropout bits."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuattn import dropout, reference
from cuattn.masks import BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow, Tile
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

EXACT = 1e-12
"""Between two orders of the same float64 operations on a handful of numbers."""


def inputs(
    *, batch: int = 2, seqlen_q: int = 5, seqlen_k: int = 7, heads: int = 4, heads_kv: int = 2, dim: int = 3, dim_v: int = 2
) -> Any:
    rng = np.random.default_rng(seqlen_q * 31 + seqlen_k)
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_k, heads_kv, dim), (batch, seqlen_k, heads_kv, dim_v))
    return tuple(rng.standard_normal(shape) for shape in shapes)


def row_by_hand(
    q: Any, keys: Any, values: Any, scale: float, score: Any, kept: Any, sink: float | None
) -> tuple[list[float], float]:
    """One row: `score(s, j)` gives the modified score or None where masked, `kept(j)` the factor of dropout."""
    scores = {}
    for j, key in enumerate(keys):
        s = score(scale * math.fsum(float(a) * float(b) for a, b in zip(q, key, strict=True)), j)
        if s is not None:
            scores[j] = s
    total = math.fsum(math.exp(s) for s in scores.values()) + (0 if sink is None else math.exp(sink))
    lse = math.log(total) if total else -math.inf
    dims = len(values[0]) if len(values) else 0
    return [math.fsum(math.exp(s - lse) * kept(j) * float(values[j][d]) for j, s in scores.items()) for d in range(dims)], lse


def check(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    mask: Mask = Full(),  # noqa: B008 -- immutable
    mods: tuple[ScoreMod, ...] = (),
    formula: Any = lambda s, b, h, i, j: s,
    sinks: Any = None,
    p: float = 0.0,
    seed: int = 0,
) -> None:
    """Compare a dense call with `row_by_hand`; `formula` is what `mods` should compute."""
    (batch, seqlen_q, heads, dim), seqlen_k = q.shape, k.shape[1]
    scale, group = dim**-0.5, heads // k.shape[2]
    out, lse = reference.forward(q, k, v, scale=scale, mask=mask, mods=mods, sinks=sinks, dropout=p, seed=seed)
    factors = dropout.dropout_mask(seed, p, batch, heads, seqlen_q, seqlen_k) / (1 - p)
    for b, h, i in np.ndindex(batch, heads, seqlen_q):
        visible = mask.materialize(seqlen_q, seqlen_k, heads, b)[h, i]
        expected, expected_lse = row_by_hand(
            q[b, i, h],
            k[b, :, h // group],
            v[b, :, h // group],
            scale,
            lambda s, j, at=(b, h, i), visible=visible: formula(s, *at, j) if visible[j] else None,
            lambda j, at=(b, h, i): factors[(*at, j)],
            None if sinks is None else float(sinks[h]),
        )
        assert np.allclose(out[b, i, h], expected or 0, rtol=EXACT, atol=EXACT)
        assert lse[b, h, i] == expected_lse or math.isclose(lse[b, h, i], expected_lse, rel_tol=EXACT, abs_tol=EXACT)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5), (1, 4), (4, 1)], ids=str)
def test_plain(seqlens: tuple[int, int], heads_kv: int) -> None:
    check(*inputs(seqlen_q=seqlens[0], seqlen_k=seqlens[1], heads_kv=heads_kv))


MASKS = {
    "causal": Causal(),
    "top-left": Causal(top_left=True),
    "window": SlidingWindow(1, 1),
    "boolean": BooleanMask(np.random.default_rng(0).random((2, 4, 5, 7)) < 0.5),
    "no-key": BooleanMask(np.zeros((5, 1), np.bool_)),
    "blocks": BlockSparse(np.array([[1, 0, 2, 3]] * 3), 2, 2, np.random.default_rng(1).random((2, 2, 2)) < 0.5),
    "composed": SlidingWindow(2, 2) & BooleanMask(np.random.default_rng(2).random((4, 1, 7)) < 0.7),
}


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 2.0, -np.inf])], ids=["", "sinks"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, sinks: Any) -> None:
    check(*inputs(), mask=MASKS[name], sinks=sinks)


def test_mods_apply_in_order() -> None:
    slopes, bias = np.array([0.5, 1.0, 2.0, 0.25]), np.random.default_rng(3).standard_normal((2, 1, 5, 7))

    def capped_first(s: float, b: int, h: int, i: int, j: int) -> float:
        return 2 * math.tanh(s / 2) - slopes[h] * abs(i + 2 - j) + bias[b, 0, i, j]

    def capped_last(s: float, b: int, h: int, i: int, j: int) -> float:
        return 2 * math.tanh((s + bias[b, 0, i, j]) / 2)

    check(*inputs(), mods=(SoftCap(2.0), Alibi(slopes), Bias(bias)), formula=capped_first)
    check(*inputs(), mods=(Bias(bias), SoftCap(2.0)), formula=capped_last, mask=Causal())


def test_user_mod() -> None:
    mod = UserMod("s * w[h] + Real(i * 10 + j) / 100 + b", params={"w": np.array([0.5, 1.0, 2.0, 0.25])})
    check(*inputs(), mods=(mod,), formula=lambda s, b, h, i, j: s * [0.5, 1.0, 2.0, 0.25][h] + (i * 10 + j) / 100 + b)


def test_a_modification_of_constant_shape() -> None:
    check(*inputs(), mods=(UserMod("2.0f"), SoftCap(1.0)), formula=lambda s, b, h, i, j: math.tanh(2))


def test_dropout_acts_on_probabilities_alone() -> None:
    check(*inputs(), p=0.4, seed=2**63 + 5, mask=Causal(), sinks=np.zeros(4))
    plain, dropped = (reference.forward(*inputs(), scale=1.0, mask=Full(), dropout=p)[1] for p in (0.0, 0.4))
    assert np.array_equal(plain, dropped)


# Sequences -----------------------------------------------------------------------------------------------------------------

LENS_Q, LENS_K = np.array([5, 0, 3, 2], np.int32), np.array([7, 4, 0, 6], np.int32)


def ragged(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each sequence on its own, through a dense call of batch 1."""
    parts = [
        reference.forward(q[b : b + 1, :m], k[b : b + 1, :n], v[b : b + 1, :n], scale=0.7, **options)
        for b, (m, n) in enumerate(zip(LENS_Q, LENS_K, strict=True))
    ]
    return [out[0] for out, _ in parts], [lse[0] for _, lse in parts]


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(1, 0)], ids=str)
def test_padded_and_packed_equal_each_sequence_alone(mask: Mask) -> None:
    q, k, v = inputs(batch=4)
    options: dict[str, Any] = {"mask": mask, "mods": (Alibi(np.ones(4)),), "sinks": np.zeros(4)}
    outs, lses = ragged(q, k, v, **options)
    for b, (m, n) in enumerate(zip(LENS_Q, LENS_K, strict=True)):
        q[b, m:], k[b, n:], v[b, n:] = np.nan, np.nan, np.inf
    out, lse = reference.forward(q, k, v, scale=0.7, q_lens=LENS_Q, kv_lens=LENS_K, **options)
    for b, m in enumerate(LENS_Q):
        assert np.array_equal(out[b, :m], outs[b]) and not out[b, m:].any()
        assert np.array_equal(lse[b, :, :m], lses[b]) and np.isneginf(lse[b, :, m:]).all()
    cu_seqlens = {f"cu_seqlens_{s}": np.concatenate([[0], np.cumsum(n)]) for s, n in (("q", LENS_Q), ("k", LENS_K))}
    rest = np.full((3, 4, 3), np.nan), np.full((2, 2, 3), np.nan), np.full((2, 2, 2), np.nan)
    packed = [
        np.concatenate([*(x[b, :n] for b, n in enumerate(lens)), tail])
        for x, lens, tail in zip((q, k, v), (LENS_Q, LENS_K, LENS_K), rest, strict=True)
    ]
    out, lse = reference.forward(*packed, scale=0.7, **cu_seqlens, **options)
    assert np.array_equal(out, np.concatenate([*outs, np.zeros((3, 4, 2))]))
    assert np.array_equal(lse, np.concatenate([*lses, np.full((4, 3), -np.inf)], axis=1))


def test_packed_sequences_shortened_by_lengths() -> None:
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in inputs(batch=2, seqlen_q=4, seqlen_k=4))
    cu_seqlens, lens = np.array([0, 4, 8], np.int32), np.array([2, 3], np.int32)
    call = {"scale": 1.0, "mask": Causal(), "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    out, lse = reference.forward(q, k, v, kv_lens=lens, q_lens=lens, **call)
    for b, n in enumerate(lens):
        at = slice(4 * b, 4 * b + n)
        alone = reference.forward(q[None, at], k[None, at], v[None, at], scale=1.0, mask=Causal())
        assert np.array_equal(out[at], alone[0][0]) and np.array_equal(lse[:, at], alone[1][0])
    assert not out[2:4].any() and not out[7:].any()


def test_bias_and_mask_follow_the_sequence() -> None:
    """In a packed call they are indexed by sequence and by coordinates inside it."""
    rng = np.random.default_rng(4)
    bias, keep = rng.standard_normal((2, 4, 5, 7)), rng.random((2, 1, 5, 7)) < 0.6
    q, k, v = inputs()
    options = {"scale": 1.0, "mask": BooleanMask(keep), "mods": (Bias(bias),)}
    dense = reference.forward(q, k, v, **options)
    cu_seqlens = {"cu_seqlens_q": np.array([0, 5, 10]), "cu_seqlens_k": np.array([0, 7, 14])}
    packed = reference.forward(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), **options, **cu_seqlens)
    assert np.array_equal(dense[0].reshape(packed[0].shape), packed[0])
    assert np.array_equal(dense[1].transpose(1, 0, 2).reshape(4, 10), packed[1])


# Edges ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("seqlen_k", [0, 7])
def test_rows_without_a_visible_key(seqlen_k: int, sinks: Any) -> None:
    mask = Full() if seqlen_k == 0 else BooleanMask(np.zeros((1, 1), np.bool_))
    out, lse = reference.forward(*inputs(seqlen_k=seqlen_k), scale=1.0, mask=mask, sinks=sinks)
    assert out.shape == (2, 5, 4, 2) and not out.any()
    assert np.array_equal(lse, np.broadcast_to(-np.inf if sinks is None else sinks[:, None], (2, 4, 5)))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_q": 0, "seqlen_k": 0}], ids=str)
def test_empty_calls(sizes: dict[str, int]) -> None:
    q, k, v = inputs(**sizes)
    out, lse = reference.forward(q, k, v, scale=1.0, mask=Causal(), mods=(SoftCap(1.0),), dropout=0.5)
    assert out.shape == (*q.shape[:3], 2) and lse.shape == (q.shape[0], 4, q.shape[1])


def test_scores_of_minus_infinity_count_as_masked() -> None:
    """A bias of -inf is an additive mask: a row of nothing else is a row without a visible key."""
    keep = np.random.default_rng(5).random((5, 7)) < 0.5
    keep[2] = False
    q, k, v = inputs()
    masked = reference.forward(q, k, v, scale=1.0, mask=BooleanMask(keep))
    biased = reference.forward(q, k, v, scale=1.0, mask=Full(), mods=(Bias(np.where(keep, 0, -np.inf)),))
    assert np.array_equal(masked[0], biased[0]) and np.array_equal(masked[1], biased[1])
    assert not masked[0][:, 2].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nonfinite_input_reaches_the_rows_that_see_it_and_no_other(name: str, value: float) -> None:
    arrays = dict(zip("qkv", inputs(batch=1, seqlen_q=7), strict=True))
    clean = reference.forward(**arrays, scale=1.0, mask=Causal())
    arrays[name][0, 3, 1, 1] = value
    out, lse = reference.forward(**arrays, scale=1.0, mask=Causal())
    reached = np.zeros(out.shape, np.bool_)
    if name == "q":
        reached[0, 3, 1] = True
    else:
        reached[0, 3:, 2:, 1 if name == "v" else slice(None)] = True
    assert np.array_equal(out[~reached], clean[0][~reached])
    if name == "v":
        assert np.array_equal(np.isnan(out), reached if np.isnan(value) else np.zeros_like(reached))
        assert not np.isfinite(out[reached]).any()
        assert np.array_equal(lse, clean[1])
    elif np.isnan(value):
        assert np.isnan(out[reached]).all()
        assert np.array_equal(np.isnan(lse), reached.any(-1).transpose(0, 2, 1))
    else:
        assert not np.isneginf(out).any() and not np.isposinf(out).any()


def test_zero_times_infinity_at_a_visible_key_is_nan() -> None:
    q = np.array([1e4, 0.0]).reshape(1, 2, 1, 1)
    k = np.array([1.0, -1.0]).reshape(1, 2, 1, 1)
    v = np.array([1.0, np.inf]).reshape(1, 2, 1, 1)
    out, _ = reference.forward(q, k, v, scale=1.0, mask=Full())
    assert np.isnan(out[0, 0, 0, 0]) and np.isposinf(out[0, 1, 0, 0])


@given(st.integers(0, 2**32 - 1))
def test_weighted_sum_is_the_sum_over_visible_keys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    visible = rng.random((2, 3, 4)) < 0.6
    p = np.where(visible, rng.choice([0.0, 0.25, 0.5, np.nan], (2, 3, 4), p=[0.3, 0.3, 0.3, 0.1]), 0)
    v = rng.choice([1.0, -2.0, np.nan, np.inf, -np.inf], (2, 4, 2), p=[0.4, 0.3, 0.1, 0.1, 0.1])
    with np.errstate(invalid="ignore"):
        expected = np.where(visible[..., None], p[..., None] * v[:, None], 0).sum(2)
        found = reference.weighted_sum(p, v, visible)
    assert np.array_equal(found, expected, equal_nan=True)


# Precision -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_step_is_rounded_to_the_dtype(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in inputs(seqlen_q=40, seqlen_k=50, dim=16))
    exact, exact_lse = reference.forward(q, k, v, scale=0.25, mask=Causal())
    out, lse = reference.forward(q, k, v, scale=0.25, mask=Causal(), dtype=dtype)
    assert out.dtype == lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert np.array_equal(out, out.astype(dtype).astype(out.dtype))
    eps = float(ml_dtypes.finfo(dtype).eps)
    worst = np.abs(out - exact).max()
    assert worst < 8 * eps
    assert worst > eps / 64 or dtype == np.float64
    finite = np.isfinite(exact_lse)
    assert np.array_equal(finite, np.isfinite(lse)) and np.abs(lse[finite] - exact_lse[finite]).max() < 8 * eps


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_large_scores(dtype: Any) -> None:
    """Scores of 1e4 stay finite and the largest one wins."""
    q = np.full((1, 1, 1, 1), 100.0).astype(dtype)
    k = np.array([100.0, 50.0, -100.0]).astype(dtype).reshape(1, 3, 1, 1)
    out, lse = reference.forward(q, k, np.arange(3.0).reshape(1, 3, 1, 1).astype(dtype), scale=1.0, mask=Full(), dtype=dtype)
    assert out.item() == 0 and lse.item() == float(np.float32(100 * 100).astype(dtype))


# Dropout -------------------------------------------------------------------------------------------------------------------

KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
"""Published test vectors of Philox4x32-10: counter, key, output."""


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: Any, key: Any, expected: Any) -> None:
    assert tuple(int(word) for word in dropout.philox(counter, key)) == expected


def kept_by_hand(seed: int, p: float, b: int, h: int, i: int, j: int) -> bool:
    group, slot = (j >> 5) * 4 + ((j & 7) >> 1), ((j >> 3) & 3) * 2 + (j & 1)
    word = int(dropout.philox((group, i, h, b), (seed & 0xFFFFFFFF, seed >> 32))[slot >> 1])
    return (word >> (16 * (slot & 1))) & 0xFFFF >= round(p * 65536)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1])
def test_kept_bits_are_the_documented_function(seed: int) -> None:
    kept = dropout.dropout_mask(seed, 0.3, 2, 2, 3, 70)
    for at in np.ndindex(*kept.shape):
        assert kept[at] == kept_by_hand(seed, 0.3, *at)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 90), st.integers(1, 70), st.integers(0, 2))
def test_kept_bits_do_not_depend_on_the_tile(row: int, rows: int, col: int, cols: int, head: int) -> None:
    whole = dropout.dropout_mask(11, 0.5, 2, 3, 80, 160)[1]
    tile = Tile.of(1, range(head, 3), range(row, row + rows), range(col, col + cols), 80, 160)
    assert np.array_equal(dropout.keep(11, 0.5, tile), whole[head:, row : row + rows, col : col + cols])


def test_a_key_uses_its_own_bits() -> None:
    """All 16-bit words of a block are spent once: thresholds at every value are hit with the right frequency."""
    for p in (1 / 65536, 0.1, 0.5, 0.9):
        kept = dropout.dropout_mask(3, p, 1, 4, 256, 1024)
        sigma = math.sqrt(p * (1 - p) / kept.size)
        assert abs((1 - p) - kept.mean()) < 5 * sigma
        neighbours = (kept[..., 1:] & kept[..., :-1]).mean()
        assert abs(neighbours - (1 - p) ** 2) < 10 * sigma


def test_no_dropout_keeps_everything() -> None:
    assert dropout.dropout_mask(3, 0.0, 1, 2, 3, 4).all()
    assert dropout.dropout_mask(3, 0.5, 0, 2, 3, 4).shape == (0, 2, 3, 4)
    assert dropout.dropout_mask(3, 0.5, 1, 2, 0, 0).shape == (1, 2, 0, 0)


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_dropout_mask_refuses_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match="p: got"):
        dropout.dropout_mask(0, p, 1, 1, 1, 1)


def test_dropout_mask_refuses_sizes_and_seeds() -> None:
    with pytest.raises(ValueError, match="sizes: got"):
        dropout.dropout_mask(0, 0.5, 1, 1, -1, 1)
    with pytest.raises(TypeError):
        dropout.dropout_mask(0.5, 0.5, 1, 1, 1, 1)  # type: ignore[arg-type]
