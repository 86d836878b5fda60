"""Merged attention over disjoint keys against attention over all of them, and the gradients of the merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn.arrays import numpy_dtype
from tests.tolerance import assert_close, limit

Array = np.ndarray
STEP = 1e-3
TOLERANCE = 1e-8
"""Of the finite differences: the error of a fourth-order stencil and of its rounding are both far below TOLERANCE."""


def random_states(count: int = 3, empty: bool = True) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(0)
    states = [(rng.standard_normal((2, 5, 3, 8)), 2 * rng.standard_normal((2, 3, 5))) for _ in range(count)]
    for n, (out, lse) in enumerate(states):
        if empty:
            out[0, n], lse[0, :, n] = 0, -np.inf
            out[1, 4], lse[1, :, 4] = 0, -np.inf
    return states


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_make_the_whole(backend: Any, dtype: str, packed: bool) -> None:
    if backend.name == "cupy" and dtype == "bfloat16":
        pytest.skip("CuPy has no arithmetic of its own on bfloat16 in every version")
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1 if packed else 2, n, h, 16)) for n, h in ((7, 4), (50, 2), (50, 2)))
    if packed:
        q, k, v = q[0], k[0], v[0]
    inputs = [x.astype(numpy_dtype(dtype)) for x in (q, k, v)]
    exact, exact_lse = cuattn.attention(*(x.astype(np.float64) for x in inputs), return_lse=True)
    states = []
    for part in (slice(0, 20), slice(20, 49), slice(49, 50), slice(50, 50)):
        arrays = [
            backend.put(np.ascontiguousarray(x)) for x in (inputs[0], inputs[1][..., part, :, :], inputs[2][..., part, :, :])
        ]
        states.append(cuattn.attention(*arrays, return_lse=True))
    out, lse = (backend.get(x) for x in cuattn.merge_states(states))
    naive = exact.astype(numpy_dtype(dtype)).astype(np.float64)
    assert out.dtype == numpy_dtype(dtype)
    assert_close("out", out, exact, limit(exact, naive, out.dtype, dtype))
    arithmetic = dtype if dtype.startswith("float") and dtype != "float16" else "statistics"
    assert_close("lse", lse, exact_lse, limit(exact_lse, exact_lse, lse.dtype, arithmetic, least_scale=1.0))


def test_rows_without_keys() -> None:
    states = random_states()
    out, lse = cuattn.merge_states(states)
    assert np.isneginf(lse[1, :, 4]).all() and not out[1, 4].any()
    finite = ~np.isneginf(lse)
    assert finite.sum() == lse.size - 3 and np.isfinite(out).all()


def test_gradients_are_differences() -> None:
    states, rng = random_states(), np.random.default_rng(2)
    dout, dlse = rng.standard_normal((2, 5, 3, 8)), rng.standard_normal((2, 3, 5))

    def loss(changed: list[tuple[Array, Array]]) -> float:
        out, lse = cuattn.merge_states(changed)
        return float((out * dout).sum() + np.where(np.isneginf(lse), 0, lse * dlse).sum())

    gradients = cuattn.merge_states_backward(dout, dlse, states)
    for n, pair in enumerate(states):
        for m, x in enumerate(pair):
            direction = rng.standard_normal(x.shape)
            values = []
            for sign in (1, -1, 2, -2):
                changed = [list(p) for p in states]
                changed[n][m] = x + sign * STEP * direction
                values.append(loss([(a, b) for a, b in changed]))
            found = np.array((gradients[n][m] * direction).sum())
            exact = np.array((8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * STEP))
            assert_close(f"state {n}, {m}", found, exact, TOLERANCE * max(1.0, abs(float(exact))))


def test_pytorch_differentiates_it() -> None:
    torch = pytest.importorskip("torch")
    states, rng = random_states(), np.random.default_rng(3)
    dout, dlse = rng.standard_normal((2, 5, 3, 8)), rng.standard_normal((2, 3, 5))
    tensors = [tuple(torch.tensor(x, requires_grad=True) for x in pair) for pair in states]
    out, lse = cuattn.merge_states(tensors)
    alive = ~torch.isneginf(lse)
    ((out * torch.tensor(dout)).sum() + (lse[alive] * torch.tensor(dlse)[alive]).sum()).backward()
    expected = cuattn.merge_states_backward(dout, dlse, states)
    for pair, wanted in zip(tensors, expected, strict=True):
        for x, exact in zip(pair, wanted, strict=True):
            assert_close("gradient", x.grad.numpy(), exact, limit(exact, exact, np.float64, "float64"))


def test_jax_differentiates_it() -> None:
    jax = pytest.importorskip("jax")
    states, rng = random_states(empty=False), np.random.default_rng(4)
    states = [tuple(x.astype(np.float32) for x in pair) for pair in states]
    dout, dlse = rng.standard_normal((2, 5, 3, 8)).astype(np.float32), rng.standard_normal((2, 3, 5)).astype(np.float32)
    _, pull = jax.vjp(lambda s: cuattn.merge_states(s), [tuple(jax.numpy.asarray(x) for x in pair) for pair in states])
    (found,) = pull((jax.numpy.asarray(dout), jax.numpy.asarray(dlse)))
    expected = cuattn.merge_states_backward(dout, dlse, states)
    for pair, wanted in zip(found, expected, strict=True):
        for x, exact in zip(pair, wanted, strict=True):
            assert_close("gradient", np.asarray(x), exact, limit(exact, exact, np.float32, "float32"))


def test_errors_name_the_argument() -> None:
    (out, lse), *_ = random_states()
    for states in ([], [(out, lse[:1])], [(out, lse), (out[:1], lse[:1])]):
        with pytest.raises(ValueError, match="states"):
            cuattn.merge_states(states)
    with pytest.raises(TypeError, match="window"):
        cuattn.attention_cascade(out, out, out, out, out, cache_seqlens=1, window=(1, 0))


@pytest.mark.parametrize("packed", [False, True])
def test_cascade_is_attention_over_prefix_and_cache(backend: Any, packed: bool) -> None:
    rng = np.random.default_rng(5)
    lengths, prefix, heads, heads_kv, dim = np.array([9, 3, 0], np.int32), 40, 4, 2, 32
    queries = [2, 1, 2] if packed else [2, 2, 2]
    new = np.float16
    total = sum(queries)
    q = rng.standard_normal((total, heads, dim)).astype(new)
    k, v = (rng.standard_normal((total, heads_kv, dim)).astype(new) for _ in range(2))
    k_prefix, v_prefix = (rng.standard_normal((prefix, heads_kv, dim)).astype(new) for _ in range(2))
    caches = [rng.standard_normal((3, 16, heads_kv, dim)).astype(new) for _ in range(2)]
    whole = [
        np.concatenate([np.broadcast_to(p, (3, *p.shape)), c], 1) for p, c in zip((k_prefix, v_prefix), caches, strict=True)
    ]
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    options: dict[str, Any] = {"cu_seqlens_q": starts, "max_seqlen_q": 2} if packed else {}
    options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    if not packed:
        q, k, v = (x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v))

    def put(x: Any) -> Any:
        return backend.put(x) if isinstance(x, np.ndarray) else x

    given = [backend.put(x) for x in (q, k_prefix, v_prefix, *caches, k, v)]
    placed = {name: put(x) for name, x in options.items()}
    found, found_lse = (
        backend.get(x)
        for x in cuattn.attention_cascade(
            *given, cache_seqlens=put(lengths), causal=True, softcap=3.0, return_lse=True, **placed
        )
    )
    wide = [x.astype(np.float64) for x in (q, *whole, k, v)]
    options["sinks"] = options["sinks"].astype(np.float64)
    exact, exact_lse = cuattn.attention_with_kvcache(
        *wide, cache_seqlens=lengths + prefix, causal=True, softcap=3.0, return_lse=True, **options
    )
    naive = exact.astype(np.float16).astype(np.float64)
    assert_close("out", found, exact, limit(exact, naive, np.float16, "float16"))
    assert_close("lse", found_lse, exact_lse, limit(exact_lse, exact_lse, np.float32, "statistics", least_scale=1.0))
