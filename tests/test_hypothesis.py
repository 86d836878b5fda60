"""Random shapes and options against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases import KINDS, LAYOUTS, MASKS, MOD_SETS, Case
from tests.tolerance import verify

SETTINGS = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SIZES: dict[str, st.SearchStrategy[Any]] = {
    "batch": st.integers(0, 4),
    "seqlen_q": st.integers(0, 70),
    "seqlen_k": st.integers(0, 140),
    "num_heads_kv": st.integers(1, 3),
    "group": st.integers(1, 4),
    "sequences": st.sampled_from(("dense", "kv_lens", "q_lens", "lens", "packed")),
    "seed": st.integers(0, 3),
}


def build(kind: tuple[str, str], group: int, num_heads_kv: int, **fields: Any) -> Case:
    return Case(*kind, num_heads=group * num_heads_kv, num_heads_kv=num_heads_kv, **fields)


ANY_CASE = st.builds(
    build,
    kind=st.sampled_from(KINDS),
    head_dim=st.integers(1, 80),
    head_dim_v=st.integers(0, 40),
    mask=st.sampled_from(sorted(MASKS)),
    mods=st.sampled_from(MOD_SETS),
    layout=st.sampled_from((*LAYOUTS, "mixed")),
    sinks=st.booleans(),
    dropout=st.sampled_from((0.0, 0.0, 0.1, 0.7)),
    **SIZES,
)
FEW_KERNELS = st.builds(
    build,
    kind=st.sampled_from(KINDS[::5]),
    head_dim=st.just(64),
    mask=st.sampled_from(("full", "causal")),
    layout=st.sampled_from(("contiguous", "heads_first", "interleaved", "reversed")),
    **SIZES,
)
"""Sizes vary freely, what decides the code hardly does: a GPU run compiles a dozen kernels."""


def _check(backend: Any, case: Case) -> None:
    with backend.poisoned():
        out, lse = case.run(backend.put, return_lse=True)
    verify(case, backend.get(out), backend.get(lse))


@SETTINGS
@given(ANY_CASE)
def test_numpy(numpy_backend: Any, case: Case) -> None:
    _check(numpy_backend, case)


@pytest.mark.gpu
@SETTINGS
@given(FEW_KERNELS)
def test_gpu(cupy_backend: Any, case: Case) -> None:
    _check(cupy_backend, case)
