"""`cuattn.attention` against the oracle: the same bodies on the NumPy backend and on the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn import reference
from cuattn.masks import Causal
from cuattn.score_mods import Alibi, SoftCap
from tests.cases import CORNERS, DTYPES, FEATURES, KINDS, LAYOUTS, MASKS, MODS, NONFINITE, REGULAR, SMALL, Case
from tests.tolerance import assert_close, limit, verify, without_zero_products

DENSE = tuple(c for c in (*REGULAR, *FEATURES, *CORNERS) if not c.packed)
RERUNS = (
    Case("bfloat16", "ieee", 2, 300, 333, 4, 2, 64, mask="causal"),
    Case("bfloat16", "ieee", 1, 1, 5003, 2, 1, 64),
    Case("float16", "ieee", 4, 130, 250, 6, 2, 128, mask="boolean", sequences="lens", dropout=0.2),
    Case("float32", "ieee", 1, 5, 5003, 2, 1, 64, mask="causal", mods=("softcap", "alibi"), sinks=True, dropout=0.2),
    Case("float64", "ieee", 1, 70, 190, 2, 1, 64, mask="window"),
)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_matches_the_oracle(backend: Any, guarded: Any, case: Case) -> None:
    target = guarded(case.out_shape, case.numpy_dtype)
    with backend.poisoned():
        out, lse = case.run(backend.put, return_lse=True, out=target.array)
    assert out is target.array
    verify(case, backend.get(out), backend.get(lse))
    target.check()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in NONFINITE if "dout" not in c.nonfinite], ids=str)
def test_what_a_mask_hides_is_not_spoilt(cupy_backend: Any, case: Case) -> None:
    """The NumPy backend is held to it in tests/test_cpu.py."""
    out, lse = (cupy_backend.get(x) for x in case.run(cupy_backend.put, return_lse=True))
    verify(case, without_zero_products(case, "out", out, case.exact()[0]), lse)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_allocates_its_output(backend: Any, case: Case) -> None:
    with backend.poisoned():
        out = case.run(backend.put)
    assert type(out) is type(backend.put(np.empty(1)))
    verify(case, backend.get(out))


@pytest.mark.parametrize("case", [replace(c, sequences="dense") for c in SMALL], ids=str)
def test_strided_output(backend: Any, guarded: Any, case: Case) -> None:
    target = guarded(case.out_shape, case.numpy_dtype, strided=True)
    with backend.poisoned():
        case.run(backend.put, out=target.array)
    verify(case, backend.get(target.array))
    target.check()


@pytest.mark.parametrize(
    "case", [Case("bfloat16", layout=layout, mask="causal") for layout in (*LAYOUTS, "broadcast")], ids=str
)
def test_inputs_are_not_changed(backend: Any, case: Case) -> None:
    arguments = case.arguments(backend.put)
    before = {name: backend.get(arguments[name]).copy() for name in "qkv"}
    cuattn.attention(**arguments)
    for name, x in before.items():
        assert backend.get(arguments[name]).tobytes() == x.tobytes(), name


@pytest.mark.parametrize("case", RERUNS, ids=str)
def test_bitwise_reruns(backend: Any, case: Case) -> None:
    arguments = case.arguments(backend.put)
    call = cuattn.attention_varlen if case.packed else cuattn.attention
    first, *others = (
        tuple(backend.get(x).tobytes() for x in call(**arguments, return_lse=True, deterministic=True)) for _ in range(20)
    )
    assert all(other == first for other in others)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_empty_rows_are_zero(backend: Any, dtype: str) -> None:
    """Rows without a visible key: out 0 and lse -inf exactly, or lse = sink with a sink."""
    case = Case(dtype, seqlen_q=203, seqlen_k=40, mask="causal")
    hidden = case.seqlen_q - case.seqlen_k
    for sinks in (False, True):
        case = replace(case, sinks=sinks)
        out, lse = (backend.get(x) for x in case.run(backend.put, return_lse=True))
        assert not out[:, :hidden].astype(np.float64).any()
        sink = case.arguments()["sinks"][:, None] if sinks else -np.inf
        assert np.allclose(lse[..., :hidden], np.broadcast_to(sink, lse[..., :hidden].shape))
        verify(case, out, lse)


SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap50": {"softcap": 50.0},
    "softcap100": {"softcap": 100.0},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.01, 1e-3], np.float32)},
    "user": {"score_mod": "s + Real(0.01) * Real(j)"},
}
"""Options of a call with four heads: each has its own way with maxima and exponentials."""


def own_rows(case: Case) -> dict[str, Any]:
    """Which tokens of q and k (v too) belong to a sequence; of a packed case to the first, so that others follow it."""
    arguments = case.arguments()
    own = {}
    for name, n in (("q", case.seqlen_q), ("k", case.seqlen_k)):
        lens = n if case.packed else arguments["q_lens" if name == "q" else "kv_lens"][:, None]
        own[name] = np.arange(arguments[name].shape[-3]) < lens
    return {**own, "v": own["k"]}


@pytest.mark.parametrize("sequences", ["lens", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_padding_never_reaches_a_result(backend: Any, dtype: str, scores: str, head_dim: int, sequences: str) -> None:
    """Bitwise the same whatever the padding, or another sequence, holds."""
    case = Case(dtype, "ieee", 4, 150, 500, 4, 2, head_dim, mask="causal", sequences=sequences)
    arguments, own = case.arguments(), own_rows(case)
    call = cuattn.attention_varlen if case.packed else cuattn.attention
    rows = own["q"] if case.packed else ...  # those of other sequences hold what these do
    results = []
    for value in (0.0, 1.0, 100.0, float(ml_dtypes.finfo(case.numpy_dtype).max), np.inf, np.nan):
        filled = {n: np.where(own[n][..., None, None], arguments[n], case.numpy_dtype.type(value)) for n in "qkv"}
        moved = {n: backend.put(x) if isinstance(x, np.ndarray) else x for n, x in {**arguments, **filled}.items()}
        moved.update({n: backend.put(x) if isinstance(x, np.ndarray) else x for n, x in SCORES[scores].items()})
        out, lse = (backend.get(x) for x in call(**moved, return_lse=True))
        results.append((out[rows].tobytes(), np.moveaxis(lse, -1, -2)[rows].tobytes()))
    assert all(result == results[0] for result in results)


def test_dropout_depends_on_the_seed_alone(backend: Any) -> None:
    case = Case("float32", dropout=0.5)
    arguments = case.arguments(backend.put)
    again, other = (backend.get(cuattn.attention(**{**arguments, "seed": seed})) for seed in (arguments["seed"], 1))
    assert again.tobytes() == backend.get(case.run(backend.put)).tobytes()
    assert again.tobytes() != other.tobytes()


def test_dropout_replay(backend: Any) -> None:
    """`dropout_mask` gives the very bits: with V the identity, the zeros of the output are the dropped probabilities."""
    p, seed, (batch, heads, sq, sk) = 0.4, 2**40 + 7, (2, 3, 37, 64)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((batch, n, heads, 16), np.float32) for n in (sq, sk))
    v = np.broadcast_to(np.eye(sk, dtype=np.float32)[None, :, None], (batch, sk, heads, sk))
    out = cuattn.attention(*(backend.put(np.ascontiguousarray(x)) for x in (q, k, v)), dropout=p, seed=seed)
    kept = cuattn.dropout_mask(seed, p, batch, heads, sq, sk)
    assert np.array_equal(backend.get(out).transpose(0, 2, 1, 3) != 0, kept)
    assert abs(kept.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / kept.size)


@pytest.mark.parametrize(("dtype", "precision"), KINDS)
def test_defaults(backend: Any, dtype: str, precision: str) -> None:
    """Options at their neutral value change nothing."""
    case = Case(dtype, precision, sequences="dense")
    neutral = {"causal": False, "window": (None, None), "dropout": 0.0, "scale": case.head_dim**-0.5}
    full = np.full(case.batch, case.seqlen_q, np.int32), np.full(case.batch, case.seqlen_k, np.int32)
    plain = backend.get(case.run(backend.put))
    assert plain.tobytes() == backend.get(case.run(backend.put, **neutral)).tobytes()
    verify(case, backend.get(case.run(backend.put, q_lens=backend.put(full[0]), kv_lens=backend.put(full[1]))))


@pytest.mark.parametrize("end", [-1, 0, 1])
@pytest.mark.parametrize("cap", [2.0, 50.0, 100.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sizes_of_a_softcap(backend: Any, dtype: str, cap: float, end: int) -> None:
    """Scores far below the cap, around it, and all of them close to one of its ends."""
    rng = np.random.default_rng(0)
    for head_dim, magnitude in ((64, 1.0), (128, 1.0), (128, 5.0)):
        q, k, v = (rng.standard_normal((1, n, 2, head_dim), np.float32) for n in (140, 390, 390))
        q, k = (0.1 * q + 8, 0.1 * k + 8 * end) if end else (q * magnitude, k * magnitude)
        q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
        out, lse = cuattn.attention(*map(backend.put, (q, k, v)), softcap=cap, causal=True, return_lse=True)
        options: dict[str, Any] = {"scale": head_dim**-0.5, "mask": Causal(), "mods": (SoftCap(cap),)}
        exact, exact_lse = reference.forward(q, k, v, **options)
        naive = reference.forward(q, k, v, **options, dtype=DTYPES[dtype])[0]
        naive_lse = reference.forward(q, k, v, **options, dtype=np.float32)[1]
        assert_close("out", backend.get(out), exact, limit(exact, naive, DTYPES[dtype], dtype))
        assert_close("lse", backend.get(lse), exact_lse, limit(exact_lse, naive_lse, np.float32, "statistics", 1.0))


@pytest.mark.parametrize("magnitude", [1.0, 6.0])
@pytest.mark.parametrize("causal", [False, True, "top-left"])
@pytest.mark.parametrize(
    ("seqlens", "num_heads", "head_dim"),
    [
        pytest.param((140, 390), 3, 64, id="short"),
        pytest.param((390, 140), 3, 128, id="more-queries"),
        pytest.param((300, 700), 4, 128, id="tiles"),
        pytest.param((130, 2200), 54, 128, id="many-keys", marks=pytest.mark.slow),
        pytest.param((150, 2200), 54, 64, id="three-warpgroups", marks=pytest.mark.slow),
    ],
)
def test_sizes_of_alibi(
    backend: Any, seqlens: tuple[int, int], num_heads: int, head_dim: int, causal: bool | str, magnitude: float
) -> None:
    """Slopes so steep that next to no key counts, so small that all do, and negative; small scores and large ones."""
    rng, kind = np.random.default_rng(1), DTYPES["bfloat16"]
    slopes = np.resize(np.array([0.7, 4.0, 0.01, -0.3, 0.0, 0.15, 1e-3], np.float32), num_heads)
    q, k, v = (rng.standard_normal((1, n, num_heads, head_dim), np.float32) for n in (*seqlens, seqlens[1]))
    q, k, v = (q * magnitude).astype(kind), (k * magnitude).astype(kind), v.astype(kind)
    out, lse = cuattn.attention(*map(backend.put, (q, k, v)), alibi_slopes=backend.put(slopes), causal=causal, return_lse=True)
    mask = Causal(top_left=causal == "top-left") if causal else cuattn.Full()
    options: dict[str, Any] = {"scale": head_dim**-0.5, "mask": mask, "mods": (Alibi(slopes),)}
    exact, exact_lse = reference.forward(q, k, v, **options)
    naive = reference.forward(q, k, v, **options, dtype=kind)[0]
    naive_lse = reference.forward(q, k, v, **options, dtype=np.float32)[1]
    assert_close("out", backend.get(out), exact, limit(exact, naive, kind, "bfloat16"))
    assert_close("lse", backend.get(lse), exact_lse, limit(exact_lse, naive_lse, np.float32, "statistics", 1.0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sizes_of_user_scores(backend: Any, dtype: str, causal: bool) -> None:
    """Scores that grow from key to key so fast that no tile's maximum serves the next one, and slowly, in different heads."""
    rng, kind = np.random.default_rng(2), DTYPES[dtype]
    q, k, v = (rng.standard_normal((1, n, 3, 128), np.float32).astype(kind) for n in (300, 700, 700))
    mod = cuattn.UserMod("s + Real(h * h) * Real(0.25) * Real(j)")
    out, lse = cuattn.attention(*map(backend.put, (q, k, v)), score_mod=mod, causal=causal, return_lse=True)
    options: dict[str, Any] = {"scale": 128**-0.5, "mask": Causal() if causal else cuattn.Full(), "mods": (mod,)}
    exact, exact_lse = reference.forward(q, k, v, **options)
    naive = reference.forward(q, k, v, **options, dtype=kind)[0]
    naive_lse = reference.forward(q, k, v, **options, dtype=np.float32)[1]
    assert_close("out", backend.get(out), exact, limit(exact, naive, kind, dtype))
    assert_close("lse", backend.get(lse), exact_lse, limit(exact_lse, naive_lse, np.float32, "statistics", 1.0))


@pytest.mark.parametrize("function", ["exp", "exp2", "log", "log2", "tanh"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_functions_in_user_code(backend: Any, dtype: str, function: str) -> None:
    """lse shows their accuracy, as it is not rounded to 16 bits."""
    rng, kind = np.random.default_rng(5), Case(dtype).numpy_dtype
    q, k, v = (rng.standard_normal((2, n, 4, 64), np.float32).astype(kind) for n in (150, 200, 200))
    mod = cuattn.UserMod(f"s + {function}(Real(0.01) + fabs(Real(i - j)) * Real(0.02))")
    out, lse = cuattn.attention(*map(backend.put, (q, k, v)), score_mod=mod, return_lse=True)
    exact, naive, single = (
        reference.forward(q, k, v, scale=0.125, mask=cuattn.Full(), mods=(mod,), dtype=t)
        for t in (np.float64, kind, np.float32)
    )
    assert_close("out", backend.get(out), exact[0], limit(exact[0], naive[0], kind, dtype))
    arithmetic = "statistics" if kind.itemsize == 2 else dtype
    assert_close("lse", backend.get(lse), exact[1], limit(exact[1], single[1], np.float32, arithmetic, least_scale=1.0))


def test_every_feature_has_a_case() -> None:
    """FEATURES is what makes one line in cases.py enough for a new mask or modification."""
    assert {c.mask for c in FEATURES} == set(MASKS)
    assert {name for c in FEATURES for name in c.mods} == set(MODS)
    for kind in KINDS:
        masks = {c.mask for c in FEATURES if (c.dtype, c.precision) == kind}
        assert masks == set(MASKS), kind


def test_case_names_are_unique() -> None:
    cases = {*REGULAR, *FEATURES, *CORNERS}
    assert len({str(c) for c in cases}) == len(cases)


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_cpu_arrays_of_other_libraries(numpy_backend: Any, kind: str) -> None:
    """Tensors on the CPU are computed there and come back as the same kind."""
    library = pytest.importorskip(kind)
    put = library.from_numpy if kind == "torch" else library.numpy.asarray
    case = Case("float32", batch=4, sequences="kv_lens", mask="boolean", mods=("alibi",))
    out, lse = case.run(lambda x: put(np.ascontiguousarray(x)), return_lse=True)
    assert type(out) is type(put(np.zeros(1, np.float32))) is type(lse)
    verify(case, np.asarray(out), np.asarray(lse))
