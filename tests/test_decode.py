"""`cuattn.attention_with_kvcache` against the oracle: the same bodies on the NumPy backend and on the GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import reference
from cuattn.arrays import numpy_dtype
from cuattn.problem import parse_mask, parse_mods
from tests.tolerance import assert_close, limit

Array = np.ndarray


@dataclass(frozen=True)
class Decode:
    """One call: sizes, what the cache is like, and options."""

    dtype: str = "bfloat16"
    cache: str = ""
    """dtype of the cache; default: that of q"""
    lengths: tuple[int, ...] = (200, 1, 77)
    """tokens in the cache before the call, padding on the left included"""
    seqlen_q: int = 1
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (64, 64)
    page: int = 16
    """0: contiguous"""
    new: int = 0
    """tokens appended; of a packed call, as many as there are queries if it is not 0"""
    packed: bool = False
    rotary: int = 0
    interleaved: bool = True
    leftpad: bool = False
    batch_idx: bool = False
    mask: str = "causal"
    mods: tuple[str, ...] = ()
    sinks: bool = False
    scales: int = 0
    """axes of k_scale and v_scale"""
    splits: int = 0
    deterministic: bool = False
    precision: str = "ieee"
    aligned: bool = True

    def __str__(self) -> str:
        parts = [
            self.dtype,
            self.cache,
            f"L{'-'.join(map(str, self.lengths))}",
            f"q{self.seqlen_q}",
            f"h{self.heads[0]}-{self.heads[1]}",
        ]
        parts += [f"d{self.dims[0]}-{self.dims[1]}", f"p{self.page}", f"n{self.new}", self.mask, *self.mods]
        parts += [n for n in ("packed", "leftpad", "batch_idx", "sinks", "deterministic") if getattr(self, n)]
        parts += [f"r{self.rotary}{'i' if self.interleaved else 'h'}"] * bool(self.rotary)
        parts += [f"scales{self.scales}"] * bool(self.scales) + [f"splits{self.splits}"] * bool(self.splits)
        parts += ["misaligned"] * (not self.aligned)
        return "_".join(p for p in parts if p)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        room = max(self.lengths, default=0) + max(self.new, self.seqlen_q) + 5
        return room if not self.page else -(-room // self.page) * self.page

    def queries(self) -> list[int]:
        """of each sequence"""
        return [(3 * b + 1) % (self.seqlen_q + 1) if self.packed else self.seqlen_q for b in range(self.batch)]


def poisoned(shape: tuple[int, ...], dtype: str) -> Array:
    """Memory that nobody may read into a result: NaN where the dtype has one."""
    x = np.empty(shape, numpy_dtype(dtype))
    x.view(np.uint8)[...] = 0x7F
    return x


@functools.cache
def arguments(case: Decode) -> dict[str, Any]:
    """NumPy arguments of a call; caches are NaN wherever the call may not look."""
    rng = np.random.default_rng(sum(map(ord, str(case))))
    dtype, cache_dtype = numpy_dtype(case.dtype), case.cache or case.dtype
    (heads, heads_kv), (dim, dim_v) = case.heads, case.dims
    queries = case.queries()
    tail = 3 if case.packed else 0
    lead = (sum(queries) + tail,) if case.packed else (case.batch, case.seqlen_q)
    extra = 0 if case.aligned else 1

    def random(*shape: int) -> Array:
        x = rng.standard_normal((*shape[:-1], shape[-1] + extra)).astype(dtype)
        return x[..., extra:]

    result: dict[str, Any] = {"q": random(*lead, heads, dim)}
    rows = case.batch + 2 if case.batch_idx else case.batch
    index = rng.permutation(rows)[: case.batch].astype(np.int32) if case.batch_idx else np.arange(case.batch)
    if case.page:
        each = case.capacity // case.page
        pages = rows * each + 3
        table = rng.permutation(pages)[: rows * each].reshape(rows, each).astype(np.int32)
        shape = (pages, case.page)
        result["page_table"] = table
    else:
        shape = (rows, case.capacity)
    pads = [min(n, 3 + 2 * b) if case.leftpad else 0 for b, n in enumerate(case.lengths)]
    for name, d in (("k_cache", dim), ("v_cache", dim_v)):
        cache = poisoned((*shape, heads_kv, d + extra), cache_dtype)[..., extra:]
        for b, n in enumerate(case.lengths):
            for j in range(pads[b], n):
                at = (index[b], j) if not case.page else (result["page_table"][index[b], j // case.page], j % case.page)
                number = rng.standard_normal((heads_kv, d)).astype(np.float32)
                cache[at] = reference.stored(number, np.float32(1 / 32), cache.dtype)
        result[name] = cache
    result["cache_seqlens"] = np.array(case.lengths, np.int32)
    if case.batch_idx:
        result["cache_batch_idx"] = index
    if case.leftpad:
        result["cache_leftpad"] = np.array(pads, np.int32)
    if case.packed:
        result["cu_seqlens_q"] = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        result["max_seqlen_q"] = case.seqlen_q
    if case.new:
        lead_new = lead if case.packed else (case.batch, case.new)
        result["k"], result["v"] = random(*lead_new, heads_kv, dim), random(*lead_new, heads_kv, dim_v)
    if case.rotary:
        angles = rng.uniform(-3, 3, (case.capacity, case.rotary // 2))
        result["rotary_cos"], result["rotary_sin"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        result["rotary_interleaved"] = case.interleaved
    if case.scales or cache_dtype != case.dtype:
        axes = (heads_kv,) if case.scales < 2 else (case.batch, heads_kv)
        for name in ("k_scale", "v_scale"):
            result[name] = rng.uniform(1 / 40, 1 / 30, axes).astype(np.float32)
    if case.sinks:
        result["sinks"] = rng.standard_normal(heads).astype(np.float32)
    result.update(_options(case, rng))
    return result


def _options(case: Decode, rng: np.random.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {"num_splits": case.splits, "deterministic": case.deterministic, "precision": case.precision}
    if case.mask == "causal":
        options["causal"] = True
    elif case.mask == "window":
        options.update(causal=True, window=(37, 0))
    elif case.mask == "boolean":
        options["mask"] = rng.random((case.batch, 1, case.seqlen_q, case.capacity)) < 0.6
    elif case.mask == "tree":
        options["mask"] = cuattn.TreeMask(rng.random((case.batch, 1, case.seqlen_q, case.seqlen_q)) < 0.6)
    for mod in case.mods:
        if mod == "softcap":
            options["softcap"] = 2.0
        elif mod == "alibi":
            options["alibi_slopes"] = rng.uniform(0.01, 0.2, case.heads[0]).astype(np.float32)
        elif mod == "bias":
            options["bias"] = rng.standard_normal((1, case.heads[0], case.seqlen_q, case.capacity)).astype(np.float32)
        elif mod == "user":
            options["score_mod"] = "s + Real(0.01) * Real(j - i) * Real(h + 1)"
    return options


OPTIONS = (
    "causal",
    "window",
    "mask",
    "softcap",
    "alibi_slopes",
    "bias",
    "score_mod",
    "num_splits",
    "deterministic",
    "precision",
)


@functools.cache
def oracle(case: Decode, dtype: str) -> tuple[Array, Array, Array, Array]:
    given = dict(arguments(case))
    options = {n: given.pop(n) for n in OPTIONS if n in given}
    given.pop("max_seqlen_q", None)
    take = options.get
    return reference.with_kvcache(
        **given,
        scale=case.dims[0] ** -0.5,
        mask=parse_mask(take("causal", False), take("window"), take("mask")),
        mods=parse_mods(take("softcap"), take("alibi_slopes"), take("bias"), take("score_mod")),
        dtype=numpy_dtype(dtype),
    )


def put(backend: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arrays of the backend's kind, copies all of them; e4m3 as the bits that CuPy can hold."""

    def one(x: Any) -> Any:
        if isinstance(x, cuattn.Mask):
            return x.bind([backend.put(a) for a in x.arrays])
        if not isinstance(x, np.ndarray):
            return x
        x = x.view(np.uint8) if x.dtype == numpy_dtype("float8_e4m3fn") else x
        return backend.put(x.copy()) if x.flags.c_contiguous else _strided(backend, x)

    return {name: one(x) for name, x in given.items()}


def _strided(backend: Any, x: Array) -> Any:
    """A copy whose rows stay as far apart and as misaligned as they are."""
    assert x.base is not None
    base = np.empty((*x.shape[:-1], x.shape[-1] + 1), x.dtype)
    base[..., 1:] = x
    return backend.put(base)[..., 1:]


def verify(case: Decode, backend: Any, out: Any, lse: Any, made: dict[str, Any]) -> None:
    exact, naive = oracle(case, "float64"), oracle(case, case.dtype)
    out, lse = backend.get(out), backend.get(lse)
    dtype = numpy_dtype(case.dtype)
    arithmetic = "tf32" if case.precision == "tf32" else case.dtype
    assert out.dtype == dtype
    assert_close("out", out, exact[0], limit(exact[0], naive[0], dtype, arithmetic))
    statistics = "statistics" if dtype.itemsize == 2 else arithmetic
    allowed = limit(exact[1], naive[1] if case.rotary else exact[1], lse.dtype, statistics, least_scale=1.0)
    assert_close("lse", lse, exact[1], allowed)
    for name, expected in (("k_cache", exact[2]), ("v_cache", exact[3])):
        found, before = backend.get(made[name]), arguments(case)[name]
        found = found.view(before.dtype) if before.dtype.itemsize == 1 else found
        kept = before.view(np.uint8).reshape(-1) if before.flags.c_contiguous else None
        bits = np.uint8 if before.dtype.itemsize == 1 else {2: np.uint16, 4: np.uint32, 8: np.uint64}[before.dtype.itemsize]
        old, new, wanted = (np.ascontiguousarray(x).view(bits) for x in (before, found, expected))
        untouched = old == wanted
        assert (new[untouched] == old[untouched]).all(), f"{name}: written where nothing belongs"
        del kept
        # A rotated key may round to either neighbour: its sums are fused or not.
        if not case.rotary:
            assert (new == wanted).all(), name
        else:
            a, b = (x.astype(np.float64)[~untouched] for x in (found, expected))
            spacing = np.abs(b) * 2.0 ** -{2: 7, 4: 20, 8: 48, 1: 2}[before.dtype.itemsize] + 2.0**-9 * (
                before.dtype.itemsize == 1
            )
            assert (np.abs(a - b) <= spacing + (before.dtype == np.int8)).all(), name


KINDS = (
    Decode(),
    Decode("float16", dims=(128, 128)),
    Decode("float64", dims=(48, 80)),
    Decode("float32", precision="tf32", dims=(64, 96)),
)
CASES = (
    *KINDS,
    Decode(page=0),
    Decode(page=1, lengths=(65, 3)),
    Decode(page=7, lengths=(65, 3, 0)),
    Decode(page=64, lengths=(1000, 3000, 5, 64), heads=(16, 2), dims=(128, 128)),
    Decode(page=256, lengths=(0,), mask="full"),
    Decode(lengths=(0, 5, 0), sinks=True),
    Decode(lengths=(5003,), heads=(64, 8), dims=(128, 128)),
    Decode(lengths=(5003,), heads=(4, 4), dims=(128, 128), page=0),
    Decode(lengths=(1500, 20), heads=(20, 1), dims=(128, 128), seqlen_q=4),
    Decode(lengths=(300, 20), heads=(8, 1), dims=(128, 128), seqlen_q=16, new=16),
    Decode(lengths=(300, 20), heads=(8, 2), dims=(64, 64), seqlen_q=4, new=2),
    Decode(lengths=(30, 200), heads=(6, 2), seqlen_q=70, new=70, dims=(32, 32)),
    Decode(dims=(256, 256), lengths=(500, 33), heads=(8, 2)),
    Decode(dims=(256, 256), lengths=(500, 33), heads=(32, 2), seqlen_q=3),
    Decode(dims=(192, 128), lengths=(500, 33)),
    Decode(dims=(64, 128), lengths=(500, 33)),
    Decode("float16", dims=(100, 36), lengths=(100, 33), aligned=False),
    Decode(dims=(72, 40), lengths=(100, 33)),
    Decode(new=1, rotary=64),
    Decode(new=3, seqlen_q=3, rotary=32, interleaved=False, page=5),
    Decode("float16", new=1, rotary=16, interleaved=False, page=0, leftpad=True),
    Decode("float64", new=2, seqlen_q=2, rotary=32, dims=(64, 64)),
    Decode(new=0, rotary=64, seqlen_q=2),
    Decode(leftpad=True, batch_idx=True, page=0),
    Decode(leftpad=True, batch_idx=True, page=16, new=2, seqlen_q=2),
    Decode(batch_idx=True, packed=True, seqlen_q=5, lengths=(100, 20, 7, 300)),
    Decode(packed=True, seqlen_q=5, new=1, rotary=64, lengths=(100, 20, 7, 300)),
    Decode(packed=True, seqlen_q=40, new=1, sinks=True, lengths=(100, 20, 7, 300), page=0),
    Decode(mask="window", lengths=(500, 33, 2), seqlen_q=3),
    Decode(mask="boolean", lengths=(300, 33), seqlen_q=3),
    Decode(mask="tree", lengths=(300, 33), seqlen_q=7, new=7),
    Decode(mods=("softcap",), lengths=(300, 33), sinks=True),
    Decode(mods=("alibi",), lengths=(300, 33), seqlen_q=3),
    Decode(mods=("softcap", "alibi", "bias", "user"), mask="window", lengths=(300, 33), seqlen_q=5, sinks=True, packed=True),
    Decode("float64", mods=("softcap", "bias"), lengths=(300, 33), seqlen_q=5),
    Decode(deterministic=True, lengths=(1500, 33, 600), sinks=True),
    Decode(deterministic=True, lengths=(1500, 33, 600), seqlen_q=16, packed=True),
    Decode(splits=1, lengths=(1500, 33)),
    Decode(splits=7, lengths=(1500, 33, 0), mods=("softcap",)),
    Decode("bfloat16", "float8_e4m3fn", scales=1, lengths=(300, 33), dims=(128, 128)),
    Decode("float16", "float8_e4m3fn", scales=2, lengths=(300, 33), new=2, seqlen_q=2, page=0),
    Decode("bfloat16", "int8", scales=2, lengths=(300, 33), new=1, rotary=32),
    Decode("float16", "int8", scales=1, lengths=(300, 33), dims=(128, 64), seqlen_q=4),
    Decode("float16", "int8", scales=1, lengths=(300, 33), dims=(96, 80), seqlen_q=16, new=16),
    Decode("bfloat16", "float8_e4m3fn", scales=1, lengths=(2000, 33), dims=(256, 256), heads=(8, 1)),
    Decode(lengths=()),
    Decode(lengths=tuple(range(0, 300, 2)), heads=(2, 1), dims=(16, 16)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(backend: Any, guarded: Any, case: Decode) -> None:
    made = put(backend, arguments(case))
    target = guarded((*arguments(case)["q"].shape[:-1], case.dims[1]), numpy_dtype(case.dtype))
    with backend.poisoned():
        out, lse = cuattn.attention_with_kvcache(**made, return_lse=True, out=target.array)
    assert out is target.array
    verify(case, backend, out, lse, made)
    target.check()
