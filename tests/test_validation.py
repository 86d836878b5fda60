"""Every kind of bad input: a ValueError or TypeError that names the argument, what it got and what is expected.

Nothing may be launched or written: each call gets an output full of sentinels, which must survive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import cuattn
from cuattn.masks import BlockSparse, BooleanMask, Mask, SlidingWindow
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

BATCH, SQ, SK, HQ, HKV, D, DV = 2, 6, 10, 4, 2, 16, 8


class Bad(NamedTuple):
    """One mistake: the argument that the message must name, and what the call gets instead of valid arguments."""

    argument: str
    name: str
    changes: dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]
    on_host: bool = False
    """The mistake shows only in the values of an array, which are not read back from a GPU."""

    def __str__(self) -> str:
        return f"{self.argument}-{self.name}"


class View(NamedTuple):
    """An array that is a view of another one, taken after that one has moved to the library under test."""

    base: np.ndarray
    view: Callable[[Any], Any]


def valid() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"q": (BATCH, SQ, HQ, D), "k": (BATCH, SK, HKV, D), "v": (BATCH, SK, HKV, DV)}
    tensors: dict[str, Any] = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    return {**tensors, "out": _sevens(BATCH, SQ, HQ, DV)}


def valid_packed() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"q": (2 * SQ, HQ, D), "k": (2 * SK, HKV, D), "v": (2 * SK, HKV, DV)}
    tensors: dict[str, Any] = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    starts = {"cu_seqlens_q": np.array([0, 4, 2 * SQ], np.int32), "cu_seqlens_k": np.array([0, SK, 2 * SK], np.int32)}
    return {**tensors, **starts, "max_seqlen_q": 8, "max_seqlen_k": SK, "out": _sevens(2 * SQ, HQ, DV)}


def _sevens(*shape: int) -> np.ndarray:
    """An output that no call may touch."""
    return np.full(shape, 7, np.float32)


def _zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def _cast(name: str, dtype: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda a: {name: a[name].astype(dtype)}


TENSORS = (
    Bad("q", "list", {"q": [[1.0]]}),
    Bad("q", "none", {"q": None}),
    Bad("k", "none", {"k": None}),
    Bad("v", "none", {"v": None}),
    Bad("k", "scalar", {"k": 1.0}),
    Bad("q", "rank2", {"q": _zeros(SQ, D)}),
    Bad("q", "rank5", {"q": _zeros(1, BATCH, SQ, HQ, D)}),
    Bad("k", "rank", {"k": _zeros(SK, HKV, D)}),
    Bad("v", "rank", {"v": _zeros(SK, HKV, DV)}),
    Bad("q", "int", _cast("q", np.int32)),
    Bad("q", "bool", _cast("q", np.bool_)),
    Bad("q", "complex", _cast("q", np.complex64)),
    Bad("k", "dtype", _cast("k", np.float64)),
    Bad("v", "dtype", _cast("v", ml_dtypes.bfloat16)),
    Bad("k", "batch", {"k": _zeros(BATCH + 1, SK, HKV, D)}),
    Bad("v", "batch", {"v": _zeros(BATCH + 1, SK, HKV, DV)}),
    Bad("k", "head_dim", {"k": _zeros(BATCH, SK, HKV, D + 1)}),
    Bad("q", "heads", lambda a: {"k": _zeros(BATCH, SK, 3, D), "v": _zeros(BATCH, SK, 3, DV)}),
    Bad("q", "no_heads", lambda a: {"k": _zeros(BATCH, SK, 0, D), "v": _zeros(BATCH, SK, 0, DV)}),
    Bad("v", "heads", {"v": _zeros(BATCH, SK, HQ, DV)}),
    Bad("v", "seqlen", {"v": _zeros(BATCH, SK + 1, HKV, DV)}),
    Bad("q", "head_dim_0", lambda a: {"q": _zeros(BATCH, SQ, HQ, 0), "k": _zeros(BATCH, SK, HKV, 0)}),
    Bad("v", "head_dim_v_0", {"v": _zeros(BATCH, SK, HKV, 0)}),
    Bad("q", "last_axis", {"q": View(_zeros(BATCH, SQ, HQ, 2 * D), lambda x: x[..., ::2])}),
    Bad("k", "last_axis", {"k": View(_zeros(BATCH, SK, D, HKV), lambda x: x.swapaxes(2, 3))}),
    Bad("v", "last_axis", {"v": View(_zeros(BATCH, SK, HKV, DV), lambda x: x[..., ::-1])}),
)
OPTIONS = (
    Bad("scale", "text", {"scale": "1"}),
    Bad("scale", "list", {"scale": [1.0]}),
    Bad("scale", "nan", {"scale": float("nan")}),
    Bad("scale", "inf", {"scale": float("inf")}),
    Bad("causal", "text", {"causal": "bottom"}),
    Bad("causal", "number", {"causal": 3}),
    Bad("window", "number", {"window": 5}),
    Bad("window", "one_side", {"window": (5,)}),
    Bad("window", "three_sides", {"window": (5, 5, 5)}),
    Bad("window", "negative", {"window": (-1, 0)}),
    Bad("window", "float", {"window": (1.5, 0)}),
    Bad("window", "text", {"window": ("a", None)}),
    Bad("mask", "object", {"mask": object()}),
    Bad("mask", "text", {"mask": "causal"}),
    Bad("mask", "float", {"mask": _zeros(SQ, SK)}),
    Bad("mask", "shape", {"mask": _zeros(SQ, SK + 1, dtype=np.bool_)}),
    Bad("mask", "heads", {"mask": _zeros(1, 3, SQ, SK, dtype=np.bool_)}),
    Bad("mask", "rank", {"mask": _zeros(1, BATCH, HQ, SQ, SK, dtype=np.bool_)}),
    Bad("mask", "inside_and", {"mask": SlidingWindow(1, 1) & BooleanMask(_zeros(SQ, 3, dtype=np.bool_))}),
    Bad("mask", "blocks_shape", {"mask": BlockSparse(_zeros(5, 5, dtype=np.int32), 4, 4)}),
    Bad("mask", "blocks_dtype", {"mask": BlockSparse(_zeros(2, 3), 4, 4)}),
    Bad("mask", "block_size", {"mask": BlockSparse(_zeros(2, 3, dtype=np.int32), 0, 4)}),
    Bad("mask", "partial_shape", {"mask": BlockSparse(_zeros(2, 3, dtype=np.int32), 4, 4, _zeros(1, 3, 4, dtype=np.bool_))}),
    Bad("bias", "shape", {"bias": _zeros(SQ, SK + 1)}),
    Bad("bias", "rank", {"bias": _zeros(1, BATCH, HQ, SQ, SK)}),
    Bad("bias", "int", {"bias": _zeros(SQ, SK, dtype=np.int32)}),
    Bad("bias", "number", {"bias": 1.0}),
    Bad("alibi_slopes", "shape", {"alibi_slopes": _zeros(HQ + 1)}),
    Bad("alibi_slopes", "batch", {"alibi_slopes": _zeros(BATCH + 1, HQ)}),
    Bad("alibi_slopes", "dtype", {"alibi_slopes": _zeros(HQ, dtype=np.int32)}),
    Bad("alibi_slopes", "list", {"alibi_slopes": [0.5] * HQ}),
    Bad("softcap", "zero", {"softcap": 0.0}),
    Bad("softcap", "negative", {"softcap": -1.0}),
    Bad("softcap", "nan", {"softcap": float("nan")}),
    Bad("softcap", "text", {"softcap": "30"}),
    Bad("score_mod", "number", {"score_mod": 5}),
    Bad("score_mod", "function", {"score_mod": lambda s, b, h, i, j: s}),
    Bad("score_mod", "list_of_numbers", {"score_mod": [SoftCap(1.0), 5]}),
    Bad("softcap", "object", lambda a: {"score_mod": SoftCap(0.0)}),
    Bad("bias", "object", {"score_mod": Bias(_zeros(SQ, SK + 1))}),
    Bad("alibi_slopes", "object", {"score_mod": Alibi(_zeros(HQ + 1))}),
    Bad("score_mod", "param_rank", lambda a: {"score_mod": UserMod("s + t[h]", None, {"t": _zeros(2, 2)})}),
    Bad("score_mod", "param_text", lambda a: {"score_mod": UserMod("s + t", None, {"t": "x"})}),
    Bad("sinks", "shape", {"sinks": _zeros(HQ + 1)}),
    Bad("sinks", "rank", {"sinks": _zeros(BATCH, HQ)}),
    Bad("sinks", "int", {"sinks": _zeros(HQ, dtype=np.int32)}),
    Bad("kv_lens", "shape", {"kv_lens": _zeros(BATCH + 1, dtype=np.int32)}),
    Bad("kv_lens", "float", {"kv_lens": _zeros(BATCH)}),
    Bad("kv_lens", "list", {"kv_lens": [1, 2]}),
    Bad("kv_lens", "negative", {"kv_lens": np.array([0, -1], np.int32)}, on_host=True),
    Bad("kv_lens", "too_long", {"kv_lens": np.array([0, SK + 1], np.int32)}, on_host=True),
    Bad("q_lens", "shape", {"q_lens": _zeros(BATCH, 1, dtype=np.int32)}),
    Bad("q_lens", "int64", {"q_lens": _zeros(BATCH, dtype=np.int64)}),
    Bad("q_lens", "too_long", {"q_lens": np.array([0, SQ + 1], np.int32)}, on_host=True),
    Bad("dropout", "one", {"dropout": 1.0}),
    Bad("dropout", "negative", {"dropout": -0.1}),
    Bad("dropout", "list", {"dropout": [0.1]}),
    Bad("dropout", "nan", {"dropout": float("nan")}),
    Bad("dropout", "text", {"dropout": "0.1"}),
    Bad("seed", "text", {"seed": "a", "dropout": 0.1}),
    Bad("seed", "float", {"seed": 1.5, "dropout": 0.1}),
    Bad("seed", "negative", {"seed": -1, "dropout": 0.1}),
    Bad("seed", "too_large", {"seed": 2**64, "dropout": 0.1}),
    Bad("precision", "none", {"precision": None}),
    Bad("precision", "list", {"precision": ["ieee"]}),
    Bad("precision", "unknown", {"precision": "fp32"}),
    Bad(
        "precision", "float64", lambda a: {**{n: a[n].astype(np.float64) for n in ("q", "k", "v", "out")}, "precision": "tf32"}
    ),
)
OUTPUTS = (
    Bad("out", "shape", {"out": _sevens(BATCH, SQ, HQ, D)}),
    Bad("out", "rank", {"out": _sevens(BATCH * SQ, HQ, DV)}),
    Bad("out", "dtype", {"out": _sevens(BATCH, SQ, HQ, DV).astype(np.float64)}),
    Bad("out", "list", {"out": [7.0]}),
    Bad("out", "last_axis", {"out": View(_sevens(BATCH, SQ, HQ, 2 * DV), lambda x: x[..., ::2])}),
    Bad("out", "broadcast", {"out": View(_sevens(1, SQ, HQ, DV), lambda x: np.broadcast_to(x, (BATCH, SQ, HQ, DV)))}),
)
PACKED = (
    Bad("q", "rank", {"q": _zeros(1, 2 * SQ, HQ, D)}),
    Bad("v", "tokens", {"v": _zeros(2 * SK + 1, HKV, DV)}),
    Bad("cu_seqlens_q", "none", {"cu_seqlens_q": None}),
    Bad("cu_seqlens_q", "rank", {"cu_seqlens_q": _zeros(1, 3, dtype=np.int32)}),
    Bad("cu_seqlens_q", "int64", _cast("cu_seqlens_q", np.int64)),
    Bad("cu_seqlens_q", "float", _cast("cu_seqlens_q", np.float32)),
    Bad("cu_seqlens_k", "list", {"cu_seqlens_k": [0, SK, 2 * SK]}),
    Bad("cu_seqlens_k", "length", {"cu_seqlens_k": np.array([0, 2 * SK], np.int32)}),
    Bad("cu_seqlens_q", "empty", {"cu_seqlens_q": _zeros(0, dtype=np.int32)}),
    Bad("cu_seqlens_q", "first", {"cu_seqlens_q": np.array([1, 4, 2 * SQ], np.int32)}, on_host=True),
    Bad("cu_seqlens_k", "decreasing", {"cu_seqlens_k": np.array([0, SK, SK - 1], np.int32)}, on_host=True),
    Bad("cu_seqlens_k", "past_the_end", {"cu_seqlens_k": np.array([0, SK, 2 * SK + 1], np.int32)}, on_host=True),
    Bad("max_seqlen_q", "too_small", {"max_seqlen_q": 7}, on_host=True),
    Bad("max_seqlen_k", "too_small", {"max_seqlen_k": SK - 1}, on_host=True),
    Bad("max_seqlen_q", "negative", {"max_seqlen_q": -1}),
    Bad("max_seqlen_k", "list", {"max_seqlen_k": [10]}),
    Bad("max_seqlen_k", "float", {"max_seqlen_k": 10.5}),
    Bad("bias", "shape", {"bias": _zeros(SQ, SK)}),
    Bad("out", "shape", {"out": _sevens(2 * SQ + 1, HQ, DV)}),
)


def _refused(call: Any, arguments: dict[str, Any], bad: Bad, backend: Any) -> None:
    """`call` must raise, name the argument first, and leave the output alone."""
    moved = {n: _move(x, backend) for n, x in arguments.items()}
    with pytest.raises((ValueError, TypeError), match=rf"(?s)^{bad.argument}: .*(got|has) .*expected"):
        changes = bad.changes(arguments) if callable(bad.changes) else bad.changes
        moved.update({n: _move(x, backend) for n, x in changes.items()})
        call(**moved)
    if not isinstance(moved["out"], list):
        assert (backend.get(moved["out"]) == 7).all()


def _move(x: Any, backend: Any) -> Any:
    """An argument in the library of `backend`."""
    if isinstance(x, np.ndarray):
        return backend.put(x)
    if isinstance(x, View):
        return x.view(backend.put(x.base))
    if isinstance(x, (Mask, ScoreMod)) and x.arrays:
        return x.bind([backend.put(a) for a in x.arrays])
    return x


@pytest.mark.parametrize("bad", [*TENSORS, *OPTIONS, *OUTPUTS], ids=str)
def test_dense(backend: Any, bad: Bad) -> None:
    if bad.on_host and backend.name != "numpy":
        pytest.skip("the values of a device array are not read back")
    _refused(cuattn.attention, valid(), bad, backend)


@pytest.mark.parametrize("bad", [*PACKED, *(b for b in OPTIONS if b.argument in ("causal", "dropout", "softcap"))], ids=str)
def test_packed(backend: Any, bad: Bad) -> None:
    if bad.on_host and backend.name != "numpy":
        pytest.skip("the values of a device array are not read back")
    _refused(cuattn.attention_varlen, valid_packed(), bad, backend)


def test_the_valid_arguments_are_valid(backend: Any) -> None:
    """Otherwise every test above would pass for the wrong reason."""
    for call, arguments in ((cuattn.attention, valid()), (cuattn.attention_varlen, valid_packed())):
        out = call(**{n: _move(x, backend) for n, x in arguments.items()})
        assert np.isfinite(backend.get(out)).all()
        assert not (backend.get(out) == 7).any()


def test_read_only_output(numpy_backend: Any) -> None:
    arguments = valid()
    arguments["out"].setflags(write=False)
    with pytest.raises(ValueError, match=r"^out: got .*expected"):
        cuattn.attention(**arguments)


@pytest.mark.parametrize("name", ["k", "v", "out", "mask", "bias", "sinks", "kv_lens", "alibi_slopes"])
def test_mixed_kinds(numpy_backend: Any, name: str) -> None:
    torch = pytest.importorskip("torch")
    arguments = valid()
    options = {
        "mask": np.ones((SQ, SK), np.bool_),
        "bias": _zeros(SQ, SK),
        "sinks": _zeros(HQ),
        "kv_lens": np.full(BATCH, SK, np.int32),
        "alibi_slopes": _zeros(HQ),
    }
    arguments[name] = torch.from_numpy(arguments.get(name, options.get(name)))
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: got .*expected"):
        cuattn.attention(**arguments)
    assert (np.asarray(arguments["out"]) == 7).all()


def test_user_expression_that_does_not_parse(numpy_backend: Any) -> None:
    for expression in ("s +", "s + unknown", "unknown(s)", "s; s"):
        with pytest.raises(ValueError, match="score_mod"):
            cuattn.attention(**valid(), score_mod=expression)


def test_unserved_combination_lists_every_kernel(numpy_backend: Any) -> None:
    """`explain` plans without a GPU; what no kernel serves says why each declined."""
    q, k, v = (_zeros(1, 8, 1, d, dtype=np.float16) for d in (1024, 1024, 64))
    with pytest.raises(NotImplementedError) as error:
        cuattn.explain(q, k, v, arch="sm_90a")
    assert "1024" in str(error.value)
