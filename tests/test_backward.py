"""`attention_backward`, `attention_varlen_backward` and `vjp`, against the oracle and against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import backward, call
from cuattn.masks import SlidingWindow
from tests.cases import CORNERS, FEATURES, KINDS, MASKS, MOD_SETS, NONFINITE, REGULAR, SMALL, Case, Feature
from tests.tolerance import TWO_ORDERS, excused, verify_gradients, without_zero_products

CASES = (*REGULAR, *FEATURES, *CORNERS)
RERUNS = (
    Case("bfloat16", "ieee", 2, 300, 1333, 4, 2, 64, mask="causal"),
    Case("bfloat16", "ieee", 1, 600, 700, 6, 1, 128, mods=("bias_pairs",)),
    Case("bfloat16", "ieee", 3, 300, 520, 4, 2, 128, mask="causal", mods=("bias_pairs",)),
    Case("float16", "ieee", 4, 130, 650, 6, 2, 128, mask="boolean", sequences="lens", dropout=0.2),
    Case("float16", "ieee", 3, 300, 500, 4, 2, 64, mods=("bias_keys",), sinks=True),
    Case("float32", "ieee", 2, 260, 303, 2, 1, 64, mask="causal", mods=("softcap", "alibi"), sinks=True, dropout=0.2),
    Case("float32", "tf32x3", 3, 260, 303, 4, 2, 64, mods=("bias_pairs",)),
    Case("float64", "ieee", 2, 170, 190, 2, 1, 64, mask="window", mods=("bias_queries",)),
    Case("bfloat16", "ieee", 5, 400, 500, 4, 2, 96, mask="causal", sequences="packed", mods=("bias_queries",)),
    Case("bfloat16", "ieee", 4, 400, 500, 6, 2, 64, mask="causal", sequences="lens"),
    Case("bfloat16", "ieee", 2, 300, 700, 4, 1, 128, mask="block_sparse"),
    Case("float16", "ieee", 2, 500, 600, 4, 2, 256, mask="causal"),
)
"""Several key tiles, shared heads, and every way in which a bias is summed."""


def run(backend: Any, case: Case, **extra: Any) -> tuple[cuattn.Gradients, np.ndarray]:
    """Gradients, and the lse they were computed from."""
    with backend.poisoned():
        out, lse = case.run(backend.put, return_lse=True)
        return case.run_backward(backend.put, out, lse, **extra), backend.get(lse)


def check(backend: Any, case: Case, **extra: Any) -> cuattn.Gradients:
    gradients, lse = run(backend, case, **extra)
    verify_gradients(case, gradients, lse, backend.get)
    return gradients


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_oracle(cupy_backend: Any, case: Case) -> None:
    check(cupy_backend, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", NONFINITE, ids=str)
def test_what_a_mask_hides_is_not_spoilt(cupy_backend: Any, case: Case) -> None:
    """As the NumPy backend in tests/test_backward_cpu.py. out and lse are the oracle's: those of a forward would have
    NaN of v where its products of 0 take them. Where tiles with a mask's edge replace rows, what they see becomes NaN: in
    place of infinities, too, and in all of dv where dk is not finite.
    """
    exact, (out, lse) = case.exact_gradients(), case.exact()
    lse = lse.astype(np.float64 if case.dtype == "float64" else np.float32)
    gradients = case.run_backward(cupy_backend.put, cupy_backend.put(out.astype(case.numpy_dtype)), cupy_backend.put(lse))
    named = {n: cupy_backend.get(getattr(gradients, n)) for n in ("dq", "dk", "dv")}
    named = {n: without_zero_products(case, n, x, getattr(exact, n)) for n, x in named.items()}
    plan = cuattn.explain(**case.arguments(cupy_backend.put), backward=True)
    if plan.tiles.seeded and not plan.tiles.alternate and case.head_dim <= 128:
        named["dv"] = excused(named["dv"], exact.dv, ~np.isfinite(exact.dk).all(axis=-1, keepdims=True))
        named = {
            n: np.where(np.isnan(x) & np.isinf(getattr(exact, n)), getattr(exact, n).astype(x.dtype), x)
            for n, x in named.items()
        }
    assert case.mask == "boolean" or any(not np.isfinite(x.astype(np.float64)).all() for x in named.values())
    verify_gradients(case, gradients._replace(**named), lse, lambda x: x if isinstance(x, np.ndarray) else cupy_backend.get(x))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_public_call(backend: Any, case: Case) -> None:
    """Results are of the caller's kind, shape and dtype."""
    gradients = check(backend, case)
    arguments = case.arguments()
    for name in "qkv":
        gradient = getattr(gradients, f"d{name}")
        assert type(gradient) is type(backend.put(np.empty(1)))
        assert gradient.shape == arguments[name].shape and gradient.dtype == case.numpy_dtype


@pytest.mark.gpu
@pytest.mark.parametrize("case", RERUNS, ids=str)
def test_deterministic(cupy_backend: Any, case: Case) -> None:
    first, *others = (
        [cupy_backend.get(x).tobytes() for x in run(cupy_backend, case, deterministic=True)[0] if x is not None]
        for _ in range(20)
    )
    assert all(other == first for other in others)
    check(cupy_backend, case, deterministic=True)


@pytest.fixture
def fresh_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier call has prepared is not used again: its plan may be another."""
    monkeypatch.setattr(call, "_prepared", {})


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("section", [1, 3])
@pytest.mark.parametrize("case", [case for case in RERUNS if case.dtype in ("bfloat16", "float16")], ids=str)
def test_deterministic_in_sections(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch, case: Case, section: int) -> None:
    """On Hopper key tiles go from the last to the first, but in the last section."""
    monkeypatch.setattr(backward, "_q_splits", lambda *_: 1)
    monkeypatch.setattr(backward.BackwardPlan, "section", section)
    first, *others = (
        [cupy_backend.get(x).tobytes() for x in run(cupy_backend, case, deterministic=True)[0] if x is not None]
        for _ in range(5)
    )
    assert all(other == first for other in others)
    check(cupy_backend, case, deterministic=True)


CHAINS = (
    Case("bfloat16", "ieee", 8, 600, 700, 8, 4, 128),
    Case("float16", "ieee", 8, 500, 900, 8, 2, 64, mask="causal"),
    Case("bfloat16", "ieee", 8, 300, 600, 6, 6, 256, mask="causal"),
    Case("bfloat16", "ieee", 8, 400, 500, 6, 3, 192, 128, mask="causal"),
    Case("float16", "ieee", 9, 500, 900, 4, 2, 64, sequences="lens", sinks=True),
    Case("bfloat16", "ieee", 8, 300, 504, 8, 4, 64, mods=("bias_pairs",)),
    Case("bfloat16", "ieee", 9, 400, 500, 8, 4, 128, mask="causal", sequences="packed"),
    Case("float16", "ieee", 40, 130, 300, 2, 2, 128, sequences="packed"),
    Case("float16", "ieee", 5, 300, 500, 4, 2, 128, sequences="packed", sinks=True),
    Case("bfloat16", "ieee", 9, 400, 500, 8, 4, 128, mask="causal", sequences="lens"),
    Case("bfloat16", "ieee", 9, 400, 500, 4, 4, 64, mask="causal", sequences="packed"),
)
"""Several pairs of heads and sequences, of which each has several key tiles."""


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("waves", [0, 1000])
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_kernels_in_a_chain(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch, case: Case, waves: int) -> None:
    """Some add while others prepare and convert: call after call gives what kernels one after the other do, in the same memory
    too.
    """
    monkeypatch.setattr(backward, "_q_splits", lambda *_: 1)
    monkeypatch.setattr(backward, "LEAST_WAVES", waves)
    monkeypatch.setattr(backward, "LEAST_KEYS", 0)
    results = [check(cupy_backend, case) for _ in range(5)]
    (prepared,) = [made[0] for key, made in call._prepared.items() if key[0] == "backward"]
    counted = not case.mods and (case.head_dim == 128 or (case.head_dim == 64 and case.sequences == "dense"))
    assert prepared.plan.chained and prepared.plan.counts_pairs == counted
    beside = counted and case.head_dim == 128 and not case.sinks
    assert (prepared.plan.prepared_units > 0) == (beside and waves == 0)
    call._prepared.clear()
    monkeypatch.setattr(backward.BackwardPlan, "chained", False)
    apart = check(cupy_backend, case)
    for result in results:
        for name in ("dk", "dv"):
            assert cupy_backend.get(getattr(result, name)).tobytes() == cupy_backend.get(getattr(apart, name)).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [16, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_sum_of_dq_arrives(head_dim: int, heads_kv: int, causal: bool, packed: bool) -> None:
    """With all multiprocessors at work, where additions take longest: within rounding what they give in order."""
    cupy = pytest.importorskip("cupy")
    random = cupy.random.default_rng(head_dim + causal)
    lead: tuple[int, ...] = (2, 4096)
    lengths: tuple[Any, ...] = ()
    forward, gradients_of = cuattn.attention, cuattn.attention_backward
    if packed:  # two sequences have no keys, or no queries
        lead, forward, gradients_of = (8192,), cuattn.attention_varlen, cuattn.attention_varlen_backward
        ends = (1500, 2200, 6296, 6296, 7296, 8192), (1500, 1500, 5596, 5896, 7896, 8192)
        lengths = (*(cupy.array((0, *n), "int32") for n in ends), 4096, 4096)
    shape, shape_kv = (*lead, 16, head_dim), (*lead, heads_kv, head_dim)
    q, k, v, dout = (random.standard_normal(s, dtype="float32").astype("float16") for s in (shape, shape_kv, shape_kv, shape))
    out, lse = forward(q, k, v, *lengths, causal=causal, return_lse=True)
    ordered = gradients_of(dout, q, k, v, out, lse, *lengths, causal=causal, deterministic=True)
    for _ in range(5):
        gradients = gradients_of(dout, q, k, v, out, lse, *lengths, causal=causal)
        for name in ("dq", "dk", "dv"):
            exact = getattr(ordered, name).astype("float32")
            gap = cupy.abs(getattr(gradients, name).astype("float32") - exact).max() / cupy.abs(exact).max()
            assert float(gap) < TWO_ORDERS, name


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("waves", [0, 1000])
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_a_graph_of_a_chain(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch, case: Case, waves: int) -> None:
    """Replayed in the same memory, from what the inputs hold by then."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(backward, "_q_splits", lambda *_: 1)
    monkeypatch.setattr(backward, "LEAST_WAVES", waves)
    monkeypatch.setattr(backward, "LEAST_KEYS", 0)
    forward, gradients_of = (
        (cuattn.attention_varlen, cuattn.attention_varlen_backward)
        if case.packed
        else (cuattn.attention, cuattn.attention_backward)
    )
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arguments = case.arguments(cupy_backend.put)
        dout, dlse = (cupy_backend.put(x) for x in case.cotangents())
        out, lse = forward(**arguments, return_lse=True)
        kept = out.copy()
        gradients_of(dout, **arguments, out=out, lse=lse, dlse=dlse)  # whose memory the captured call takes
        out[...] = 0
        stream.synchronize()
        stream.begin_capture()
        gradients = gradients_of(dout, **arguments, out=out, lse=lse, dlse=dlse)
        graph = stream.end_capture()
        out[...] = kept
        for _ in range(3):
            for gradient in (gradients.dq, gradients.dk, gradients.dv):
                gradient.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            verify_gradients(case, gradients, cupy_backend.get(lse), cupy_backend.get)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("run_of", [0, 3])
@pytest.mark.parametrize(
    ("left", "right", "case"),
    [
        (128, 0, Case("bfloat16", "ieee", 3, 410, 410, 4, 2, 64)),
        (100, 28, Case("float16", "ieee", 2, 410, 523, 4, 1, 64, sinks=True)),
        (0, 128, Case("bfloat16", "ieee", 2, 523, 410, 2, 2, 40, 56)),
        (5, 3, Case("bfloat16", "ieee", 1, 900, 300, 2, 1, 64)),
        (127, 0, Case("bfloat16", "ieee", 2, 60, 1000, 4, 4, 64)),
        (0, 60, Case("bfloat16", "ieee", 2, 330, 330, 4, 4, 64)),
        (120, 8, Case("bfloat16", "ieee", 5, 410, 523, 4, 2, 64, sequences="packed")),
        (128, 0, Case("float16", "ieee", 5, 523, 410, 4, 2, 64, sequences="lens")),
    ],
    ids=str,
)
def test_windows_in_one_pass(
    cupy_backend: Any, monkeypatch: pytest.MonkeyPatch, left: int, right: int, case: Case, run_of: int
) -> None:
    """Of no more keys than three tiles hold beside any tile of queries; no sums of dq in memory, so always the same bits."""
    feature = Feature({"window": (left, right)}, SlidingWindow(left, right))
    monkeypatch.setitem(MASKS, "window", lambda *_: feature)
    if run_of:
        monkeypatch.setattr(backward, "_window_run", lambda *_: run_of)
    case = replace(case, mask="window", seed=1000 * left + right)  # inputs are kept by case
    once, again = (check(cupy_backend, case, deterministic=deterministic) for deterministic in (False, True))
    for x, y in zip(once[:3], again[:3], strict=True):
        assert cupy_backend.get(x).tobytes() == cupy_backend.get(y).tobytes()


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("run_of", [1, 2, 4])
@pytest.mark.parametrize(("seqlen_q", "heads"), [(410, 4), (200, 2)])  # whose queries two CTAs share, or one has
def test_runs_of_key_tiles(
    cupy_backend: Any, monkeypatch: pytest.MonkeyPatch, seqlen_q: int, heads: int, run_of: int, mask: str
) -> None:
    """dk and dv of a key tile are on their way while the next one's dq is added."""
    monkeypatch.setattr(backward, "_long_run", lambda *_: run_of)
    check(cupy_backend, Case("bfloat16", "ieee", 3, seqlen_q, 500 + 8 * run_of, heads, 2, 64, mask=mask))


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("head_dim", "narrow"), [(64, 0), (64, 256), (128, 0), (128, 256), (256, 0)])
def test_narrow_windows(
    cupy_backend: Any, monkeypatch: pytest.MonkeyPatch, head_dim: int, narrow: int, deterministic: bool
) -> None:
    """As wide ones, and by CTAs that take several key tiles."""
    monkeypatch.setattr(backward, "_in_one_pass", lambda _: False)
    monkeypatch.setattr(backward, "NARROW_WINDOW", narrow)
    monkeypatch.setattr(backward, "_run", lambda *_: 3)
    case = Case("bfloat16", "ieee", 3, 410, 520 + 8 * deterministic, 4, 2, head_dim, mask="window")
    check(cupy_backend, case, deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case("bfloat16", "ieee", 40, 130, 200, 2, 1, 128, mask="causal", sequences="packed"),
        Case("float16", "ieee", 33, 300, 300, 2, 2, 64, sequences="packed"),
        Case("bfloat16", "ieee", 3, 900, 1200, 4, 4, 128, mask="causal", sequences="packed"),
    ],
    ids=str,
)
def test_key_tiles_of_all_sequences(cupy_backend: Any, case: Case, deterministic: bool) -> None:
    """More sequences than a warp has lanes, and few of several key tiles."""
    check(cupy_backend, case, deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case("bfloat16", "ieee", 3, 410, 520, 4, 2, 192, 128),
        Case("float16", "ieee", 2, 517, 390, 4, 1, 192, 128, mask="causal"),
        Case("bfloat16", "ieee", 2, 300, 301, 2, 2, 160, 64, mask="causal", sinks=True),
        Case("bfloat16", "ieee", 5, 300, 333, 4, 2, 192, 128, mask="causal", sequences="packed"),
        Case("float16", "ieee", 3, 300, 333, 4, 2, 136, 128, sequences="lens"),
        Case("bfloat16", "ieee", 2, 300, 520, 2, 1, 192, 128, mask="boolean"),
        Case("bfloat16", "ieee", 2, 300, 520, 2, 1, 192, 128, mods=("softcap",), dropout=0.2),
    ],
    ids=str,
)
def test_three_panels_of_columns(cupy_backend: Any, case: Case, deterministic: bool) -> None:
    check(cupy_backend, case, deterministic=deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case("bfloat16", "ieee", 3, 410, 520, 4, 2, 128, mods=("bias_pairs",)),
        Case("float16", "ieee", 5, 130, 520, 4, 2, 128, mask="causal", mods=("bias_pairs",)),
        Case("bfloat16", "ieee", 5, 300, 264, 2, 1, 64, mask="block_sparse", mods=("bias_pairs",)),
        Case("bfloat16", "ieee", 2, 410, 520, 4, 2, 128, mask="window", mods=("bias_pairs",)),
        Case("bfloat16", "ieee", 2, 410, 520, 4, 2, 64, mask="window", mods=("softcap", "bias")),
        Case("float16", "ieee", 2, 300, 264, 4, 4, 128, mask="causal", mods=("bias",)),
        Case("bfloat16", "ieee", 2, 300, 333, 4, 1, 128, mask="causal", mods=("bias_keys",)),
        Case("bfloat16", "ieee", 2, 200, 264, 2, 1, 128, mods=("softcap", "bias_pairs")),
        Case("float16", "ieee", 3, 410, 520, 4, 2, 64, mask="causal", mods=("bias_pairs",), sequences="lens"),
        Case("bfloat16", "ieee", 4, 300, 264, 4, 2, 64, mods=("bias",), sequences="packed"),
        Case("bfloat16", "ieee", 2, 300, 520, 4, 2, 64, mods=("bias_keys",), dropout=0.2),
        Case("bfloat16", "ieee", 2, 300, 264, 2, 2, 64, mask="block_sparse", mods=("bias_pairs",)),
        Case("float16", "ieee", 2, 300, 264, 2, 2, 64, mask="boolean", mods=("bias",), dropout=0.2),
        Case("bfloat16", "ieee", 1, 65, 300, 2, 2, 96, mods=("bias_scalar",)),
    ],
    ids=str,
)
def test_staged_biases(cupy_backend: Any, case: Case) -> None:
    """Rows of whole 16 bytes, which the copy engine takes."""
    check(cupy_backend, case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_rows_without_keys_get_zero(backend: Any, dtype: str) -> None:
    case = Case(dtype, seqlen_q=203, seqlen_k=40, mask="causal")
    gradients, _ = run(backend, case)
    assert not backend.get(gradients.dq)[:, : case.seqlen_q - case.seqlen_k].astype(np.float64).any()


@pytest.mark.parametrize("which", ["dout", "dlse"])
@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_one_cotangent(backend: Any, dtype: str, precision: str, which: str) -> None:
    """Gradients are linear in (dout, dlse): each alone, and both."""
    case = Case(dtype, precision, mask="causal", sinks=True)
    out, lse = case.run(backend.put, return_lse=True)
    dout, dlse = case.cotangents()
    alone = {"dout": backend.put(dout), "dlse": backend.put(dlse), "none": backend.put(np.zeros_like(dout))}
    both = case.run_backward(backend.put, out, lse)
    arguments = {**case.arguments(backend.put), "out": out, "lse": lse}
    without_lse = cuattn.attention_backward(alone["dout"], **arguments)
    without_out = cuattn.attention_backward(alone["none"], **arguments, dlse=alone["dlse"])
    for name in ("dq", "dk", "dsinks"):
        parts = [backend.get(getattr(g, name)) for g in (without_lse, without_out, both)]
        coarse = {"bfloat16": 2.0**-5, "float16": 2.0**-8, "float32": 1e-4, "float64": 1e-12}[parts[0].dtype.name]
        coarse = max(coarse, 2.0**-8 if precision == "tf32" or dtype in ("float16", "bfloat16") else 0.0)
        parts = [x.astype(np.float64) for x in parts]
        assert np.abs(parts[0] + parts[1] - parts[2]).max() <= coarse * max(np.abs(x).max() for x in parts), name
    assert not backend.get(without_out.dv).astype(np.float64).any()


def test_vjp(backend: Any) -> None:
    for case in (Case("float32", mask="causal"), Case("float32", batch=4, sequences="packed", mods=("alibi",))):
        arguments = case.arguments(backend.put)
        (out, lse), pullback = cuattn.vjp(**arguments, return_lse=True)
        dout, dlse = (backend.put(x) for x in case.cotangents())
        verify_gradients(case, pullback(dout, dlse), backend.get(lse), backend.get)
        assert out.shape == case.out_shape and lse.shape == dlse.shape
        only_out, _ = cuattn.vjp(**arguments)
        assert backend.get(only_out).tobytes() == backend.get(out).tobytes()
    with pytest.raises(TypeError, match="out: got an array"):
        cuattn.vjp(**arguments, out=out)


def _pairs(*sizes: int, **options: Any) -> Case:
    return Case("float32", "tf32x3", *sizes, **options)


PAIRS = (
    _pairs(2, 530, 700, 4, 2, 64, mask="causal", mods=("softcap", "alibi"), dropout=0.2),
    _pairs(4, 600, 650, 4, 2, 128, mask="boolean", sequences="lens", mods=("bias",), sinks=True),
    _pairs(4, 600, 700, 2, 1, 96, mask="window", sequences="packed", mods=("bias_keys",)),
    _pairs(1, 520, 600, 2, 1, 256, mask="causal", mods=("user_params",)),
    _pairs(1, 530, 520, 2, 1, 40, 72, mask="composed", mods=("bias_pairs",), layout="mixed"),
    _pairs(1, 600, 520, 2, 2, 33, mods=("user",), layout="broadcast"),
    _pairs(1, 520, 530, 2, 1, 512),
    _pairs(1, 300, 777, 4, 1, 192, 128, mask="block_sparse"),
    _pairs(1, 600, 520, 2, 1, 64, nonfinite="nan q"),
    _pairs(1, 600, 520, 2, 1, 64, nonfinite="nan v"),
)
"""Enough queries and keys for pairs of fp16 numbers, with every option that meets them."""


@pytest.mark.gpu
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs(cupy_backend: Any, case: Case) -> None:
    plan = cuattn.explain(**case.arguments(cupy_backend.put), backward=True)
    assert plan.split_inputs
    check(cupy_backend, case)


@pytest.mark.gpu
@pytest.mark.parametrize(("of_dout", "of_q"), [(40, 0), (-60, 0), (100, 0), (0, 50), (-30, -40)])
def test_pairs_have_no_range(cupy_backend: Any, of_dout: int, of_q: int) -> None:
    """Powers of two on the cotangents, or moved from k to q, come out of the gradients as they went in, to the last bit."""
    case = _pairs(1, 600, 700, 2, 1, 64, mask="causal")
    arguments = case.arguments(cupy_backend.put)
    out, lse = case.run(cupy_backend.put, return_lse=True)
    dout, dlse = (cupy_backend.put(x) for x in case.cotangents())
    plain = cuattn.attention_backward(dout, **arguments, out=out, lse=lse, dlse=dlse, deterministic=True)
    one, other = np.float32(2.0**of_dout), np.float32(2.0**of_q)
    moved = {**arguments, "q": arguments["q"] * other, "k": arguments["k"] / other}
    scaled = cuattn.attention_backward(dout * one, **moved, out=out, lse=lse, dlse=dlse * one, deterministic=True)
    for name, power in (("dq", one / other), ("dk", one * other), ("dv", one)):
        x, y = (cupy_backend.get(getattr(g, name)) for g in (plain, scaled))
        assert x.any() and (x * power).tobytes() == y.tobytes(), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dout": np.zeros((2, 113, 4, 63), np.float32)}, ValueError, r"dout: got shape .* as out has"),
        ({"dout": np.zeros((2, 113, 4, 64), np.float64)}, TypeError, "dout: got dtype float64, expected float32"),
        ({"dout": np.zeros((2, 113, 4, 128), np.float32)[..., ::2]}, ValueError, "dout: got stride 2"),
        ({"dout": None}, TypeError, "dout: got None"),
        ({"out": None}, TypeError, "out: got None"),
        ({"lse": None}, TypeError, "lse: got None"),
        ({"lse": np.zeros((2, 4, 112), np.float32)}, ValueError, "lse: got shape"),
        ({"lse": np.zeros((2, 4, 113), np.float64)}, TypeError, "lse: got dtype float64, expected float32"),
        ({"dlse": np.zeros((2, 4), np.float32)}, ValueError, "dlse: got shape"),
        ({"score_mod": "s * 2"}, NotImplementedError, "without a gradient expression"),
    ],
)
def test_errors(numpy_backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case("float32")
    out, lse = case.run(numpy_backend.put, return_lse=True)
    arguments = {**case.arguments(), "dout": np.zeros_like(out), "out": out, "lse": lse, **change}
    with pytest.raises(error, match=message):
        cuattn.attention_backward(**arguments)


@pytest.mark.gpu
def test_strided_and_broadcast_cotangents(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """dout of stride 0 (the gradient of a sum), lse and dlse of any strides: the same bits as from contiguous arrays on the
    kernel that takes them, and close to those of any other.
    """
    import cupy

    case = Case("bfloat16", mask="causal")
    arguments = case.arguments(cupy_backend.put)
    out, lse = case.run(cupy_backend.put, return_lse=True)
    ones = cupy.broadcast_to(cupy.ones((1, 1, 1, out.shape[-1]), out.dtype), out.shape)
    plain = cuattn.attention_backward(cupy.ones_like(out), **arguments, out=out, lse=lse, dlse=cupy.ones_like(lse))
    monkeypatch.setattr(backward, "sm90_declines", lambda *_: ["as if no array were one that TMA takes"])
    turned = cupy.ascontiguousarray(lse.transpose(2, 0, 1)).transpose(1, 2, 0)
    dlse = cupy.broadcast_to(cupy.ones((1, 1, 1), lse.dtype), lse.shape)
    strided = cuattn.attention_backward(ones, **arguments, out=out, lse=turned, dlse=dlse, deterministic=True)
    again = cuattn.attention_backward(cupy.ones_like(out), **arguments, out=out, lse=lse, dlse=dlse, deterministic=True)
    for name in ("dq", "dk", "dv"):
        x, y, z = (cupy_backend.get(getattr(g, name)) for g in (strided, again, plain))
        assert x.tobytes() == y.tobytes()
        assert np.abs(x.astype(np.float32) - z.astype(np.float32)).max() <= 2.0**-6 * np.abs(x.astype(np.float32)).max()


DIFFERENCES = tuple(
    Case("float64", batch=1, seqlen_q=37, seqlen_k=50, num_heads=2, num_heads_kv=1, head_dim=24, mask=mask, mods=mods)
    for mask in ("full", "causal", "window", "boolean", "block_sparse", "composed")
    for mods in ((), ("softcap",), ("alibi",), ("bias",), ("user",), ("user_params",), ("softcap", "alibi", "bias"))
)
DIFFERENCES += tuple(  # the rest, each beside something else
    case
    for case in (
        *(replace(DIFFERENCES[0], mask=mask, mods=("softcap",)) for mask in MASKS),
        *(replace(DIFFERENCES[0], mask="causal", mods=mods) for mods in MOD_SETS),
    )
    if case not in DIFFERENCES
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DIFFERENCES, ids=str)
def test_finite_differences(cupy_backend: Any, case: Case) -> None:
    """Of a random loss along random directions, float64, on the kernels alone."""
    arguments, rng = case.arguments(), np.random.default_rng(0)
    dout, dlse = case.cotangents()

    def loss(moved: dict[str, Any]) -> float:
        call = {**case.arguments(cupy_backend.put), **{name: cupy_backend.put(x) for name, x in moved.items()}}
        out, lse = (cupy_backend.get(x) for x in cuattn.attention(**call, return_lse=True))
        return float((out * dout).sum() + (np.where(np.isfinite(lse), lse, 0) * dlse).sum())

    out, lse = case.run(cupy_backend.put, return_lse=True)
    gradients = case.run_backward(cupy_backend.put, out, lse)
    for name in ("q", "k", "v", *(["bias"] if gradients.dbias is not None else [])):
        direction = rng.standard_normal(arguments[name].shape)
        step = 1e-5
        ends = [loss({name: arguments[name] + sign * step * direction}) for sign in (1, -1)]
        slope = float((cupy_backend.get(getattr(gradients, f"d{name}")) * direction).sum())
        # Central differences: truncation step^2, rounding 1e-16 / step.
        assert abs((ends[0] - ends[1]) / (2 * step) - slope) <= 1e-7 * max(1.0, abs(slope)), name


SHAPES = tuple(
    Case(dtype, precision, batch, seqlen, seqlen, heads, heads, dim, mask="causal")
    for dtype, precision in KINDS
    for batch, seqlen, heads, dim in ((1, 32, 4, 64), (2, 128, 8, 64), (4, 512, 12, 80))
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(cupy_backend: Any, case: Case) -> None:
    check(cupy_backend, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_few_keys_share_their_queries(cupy_backend: Any, dtype: str) -> None:
    """Little parallelism over keys: several CTAs share the queries of a tile."""
    case = Case(dtype, "ieee", 1, 3000, 60, 4, 1, 64, mask="top_left", mods=("bias_keys",))
    plan = cuattn.explain(**case.arguments(cupy_backend.put), backward=True)
    assert plan.q_splits > 1
    check(cupy_backend, case)
    padded = replace(case, batch=4, sequences="lens")
    check(cupy_backend, padded)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_elements(cupy_backend: Any) -> None:
    """The last sequence's gradients are those it has alone, which takes 64-bit offsets everywhere."""
    import cupy

    shape = ((1 << 31) // (64 * 64 * 128) + 3, 64, 64, 128)
    elements = int(np.prod(shape))
    if cupy.cuda.runtime.memGetInfo()[0] < 24 * elements:
        pytest.skip("needs more GPU memory")
    # One sequence with different content everywhere, under zeros that leave no trace in sums.
    arrays = [cupy.zeros(shape, np.float16) for _ in range(4)]
    for n, x in enumerate(arrays):
        x[-1] = cupy.asarray(np.random.default_rng(n).standard_normal(shape[1:], np.float32))
    q, k, v, dout = arrays
    out, lse = cuattn.attention(q, k, v, return_lse=True)
    gradients = cuattn.attention_backward(dout, q, k, v, out, lse, deterministic=True)
    alone = [x[-1:].copy() for x in (dout, q, k, v, out, lse)]
    expected = cuattn.attention_backward(*alone, deterministic=True)
    for name in ("dq", "dk", "dv"):
        last, right = getattr(gradients, name)[-1], getattr(expected, name)[0]
        assert bool((last == right).all()) and bool(right.any()), name
    del arrays, q, k, v, dout, out, lse, gradients
    cupy.get_default_memory_pool().free_all_blocks()
