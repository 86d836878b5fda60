"""`cuattn.attention_varlen` against the oracle, and packed calls against padded ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuattn
from tests.cases import ALL, DTYPES, UNWRITTEN, Case
from tests.tolerance import verify

PACKED = tuple(c for c in ALL if c.packed)
EXTRA = (
    Case("bfloat16", "ieee", 9, 300, 300, 4, 2, 128, mask="causal", sequences="packed"),
    Case("float16", "ieee", 3, 1, 700, 8, 1, 64, sequences="packed"),
    Case("float32", "ieee", 3, 700, 1, 2, 2, 64, mask="causal", sequences="packed"),
    Case("float64", "ieee", 5, 90, 0, 2, 2, 32, sequences="packed"),
    Case("float32", "ieee", 1, 65, 65, 2, 1, 64, mask="window", sequences="packed"),
    Case("float32", "ieee", 0, 65, 65, 2, 1, 64, sequences="packed"),
    Case("bfloat16", "ieee", 2, 0, 65, 2, 1, 64, sequences="packed"),
)


@pytest.mark.parametrize("case", (*PACKED, *EXTRA), ids=str)
def test_matches_the_oracle(backend: Any, guarded: Any, case: Case) -> None:
    target = guarded(case.out_shape, case.numpy_dtype)
    with backend.poisoned():
        out, lse = case.run(backend.put, return_lse=True, out=target.array)
    assert out is target.array
    verify(case, backend.get(out), backend.get(lse))
    target.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_past_the_last_sequence(backend: Any, dtype: str) -> None:
    case = Case(dtype, batch=4, sequences="packed", sinks=True)
    with backend.poisoned():
        out, lse = (backend.get(x) for x in case.run(backend.put, return_lse=True))
    assert not out[-UNWRITTEN:].astype(np.float64).any()
    assert np.isneginf(lse[:, -UNWRITTEN:]).all()


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_padded_equals_packed(backend: Any, dtype: str, mask: str) -> None:
    """Alignment, ALiBi and dropout count inside a sequence: padding or packing a batch changes nothing."""
    padded = Case(dtype, "ieee", 4, 113, 203, 4, 2, 64, mask=mask, mods=("alibi",), sequences="lens", dropout=0.25)
    arguments = padded.arguments()
    lens_q, lens_k = arguments.pop("q_lens"), arguments.pop("kv_lens")
    wide_out, wide_lse = (backend.get(x) for x in padded.run(backend.put, return_lse=True))
    for name, lens in (("q", lens_q), ("k", lens_k), ("v", lens_k)):
        arguments[name] = np.concatenate([x[:n] for x, n in zip(arguments[name], lens, strict=True)])
    cu_seqlens = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (lens_q, lens_k))
    arguments.update(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=True))
    arguments.update(max_seqlen_q=padded.seqlen_q, max_seqlen_k=padded.seqlen_k)
    arguments = {n: backend.put(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    out, lse = (backend.get(x) for x in cuattn.attention_varlen(**arguments, return_lse=True))
    back, back_lse = np.zeros_like(wide_out), np.full_like(wide_lse, -np.inf)
    starts = np.concatenate([[0], np.cumsum(lens_q)])
    for b, n in enumerate(lens_q):
        back[b, :n], back_lse[b, :, :n] = out[starts[b] : starts[b + 1]], lse[:, starts[b] : starts[b + 1]]
    verify(padded, back, back_lse)
    verify(padded, wide_out, wide_lse)


@pytest.mark.parametrize("extra", [1, 100])
def test_max_seqlen_may_be_generous(backend: Any, extra: int) -> None:
    """An upper bound on the lengths is enough."""
    case = replace(EXTRA[0], batch=3)
    arguments = case.arguments(backend.put)
    arguments["max_seqlen_q"] += extra
    arguments["max_seqlen_k"] += extra
    verify(case, backend.get(cuattn.attention_varlen(**arguments)))
