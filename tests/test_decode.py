"""`cuattn.attention_with_kvcache` against the oracle: the same bodies on the NumPy backend and on the GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import cuattn
from cuattn import arrays, call, jit, reference
from cuattn.arrays import numpy_dtype
from cuattn.codegen import decode_units
from cuattn.decode import DecodePlan, Scalars, make_decode_plan, make_decode_problem
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
    magnitudes: tuple[int, ...] = ()
    """powers of two that the heads of q are multiplied with, in turn"""

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
        parts += ["misaligned"] * (not self.aligned) + ["magnitudes"] * bool(self.magnitudes)
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
    if case.magnitudes:
        powers = np.ldexp(1.0, np.resize(case.magnitudes, heads)).astype(np.float32)
        result["q"] = (result["q"].astype(np.float32) * powers[:, None]).astype(dtype)
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


def reference_of(case: Decode, given: dict[str, Any], dtype: str) -> tuple[Array, Array, Array, Array]:
    """What the oracle says of a call's arguments, keys and values apart; changes `given`."""
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


@functools.cache
def oracle(case: Decode, dtype: str) -> tuple[Array, Array, Array, Array]:
    return reference_of(case, dict(arguments(case)), dtype)


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
        bits = np.uint8 if before.dtype.itemsize == 1 else {2: np.uint16, 4: np.uint32, 8: np.uint64}[before.dtype.itemsize]
        old, new, wanted = (np.ascontiguousarray(x).view(bits) for x in (before, found, expected))
        untouched = old == wanted
        assert (new[untouched] == old[untouched]).all(), f"{name}: written where nothing belongs"
        # A rotated key may round to either neighbour: its sums are fused or not.
        if not case.rotary:
            assert (new == wanted).all(), name
        else:
            a, b = (x.astype(np.float64)[~untouched] for x in (found, expected))
            spacing = np.abs(b) * 2.0 ** -{2: 7, 4: 20, 8: 48, 1: 2}[before.dtype.itemsize] + 2.0**-9 * (
                before.dtype.itemsize == 1
            )
            # Both terms of a sum that cancels are as large as the row, and so is what fusing changes: 2 ulp of it.
            row = np.broadcast_to(np.abs(expected.astype(np.float64)).max(-1, keepdims=True), expected.shape)[~untouched]
            spacing = spacing + row * 2.0 ** -(51 if before.dtype.itemsize == 8 else 22)
            assert (np.abs(a - b) <= spacing + (before.dtype == np.int8)).all(), name


KINDS = (
    Decode(),
    Decode("float16", dims=(128, 128)),
    Decode("float64", dims=(48, 80)),
    Decode("float32", precision="tf32", dims=(64, 96)),
    Decode("float32", dims=(64, 96)),
    Decode("float32", precision="tf32x3", dims=(64, 96)),
)
WIDE = tuple(  # the same of both
    Decode(dtype, **options)
    for dtype in ("float32", "float64")
    for options in (
        {"lengths": (1000, 3000, 5, 64), "heads": (16, 2), "dims": (128, 128), "page": 64},
        {"lengths": (5003,), "heads": (32, 8), "dims": (128, 128), "sinks": True},
        {"lengths": (300, 20, 0), "heads": (20, 1), "seqlen_q": 4, "new": 4, "page": 7},
        {"lengths": (30, 200), "heads": (6, 2), "seqlen_q": 70, "new": 70, "dims": (32, 32), "page": 0},
        {"lengths": (500, 33), "heads": (8, 2), "dims": (256, 256)},
        {"lengths": (100, 33), "heads": (32, 2), "dims": (256, 200), "seqlen_q": 3, "mods": ("softcap",)},
        {"lengths": (100, 33), "heads": (4, 2), "dims": (512, 400), "page": 16},
        {"lengths": (100, 33), "dims": (100, 36), "aligned": False},
        {"lengths": (100, 33), "dims": (72, 40), "page": 1},
        {"new": 3, "seqlen_q": 3, "rotary": 32, "interleaved": False, "page": 5},
        {"leftpad": True, "batch_idx": True, "page": 16, "new": 2, "seqlen_q": 2, "rotary": 64},
        {"packed": True, "seqlen_q": 5, "new": 1, "lengths": (100, 20, 7, 300), "batch_idx": True},
        {"mask": "window", "lengths": (500, 33, 2), "seqlen_q": 3},
        {"mask": "tree", "lengths": (300, 33), "seqlen_q": 7, "new": 7},
        {
            "mods": ("softcap", "alibi", "bias", "user"),
            "mask": "boolean",
            "lengths": (300, 33),
            "seqlen_q": 5,
            "sinks": True,
            "packed": True,
        },
        {"deterministic": True, "lengths": (1500, 33, 600), "sinks": True},
        {"splits": 7, "lengths": (1500, 33, 0), "mods": ("softcap",)},
    )
)
LONG = (
    Decode(page=64, lengths=(1000, 3000, 5, 64), heads=(16, 2), dims=(128, 128)),
    Decode(lengths=(5003,), heads=(64, 8), dims=(128, 128)),
    Decode(lengths=(1500, 20), heads=(20, 1), dims=(128, 128), seqlen_q=4),
    WIDE[0],
)
CASES = (
    *KINDS,
    *LONG[:-1],
    *WIDE,
    Decode(page=0),
    Decode(page=1, lengths=(65, 3)),
    Decode(page=7, lengths=(65, 3, 0)),
    Decode(page=256, lengths=(0,), mask="full"),
    Decode(lengths=(0, 5, 0), sinks=True),
    Decode(lengths=(5003,), heads=(4, 4), dims=(128, 128), page=0),
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
    Decode("bfloat16", "float8_e4m3fn", scales=1, lengths=(300, 33), dims=(128, 128), magnitudes=(-100, -12, 0, 4)),
    Decode("bfloat16", "int8", scales=2, lengths=(300, 33), heads=(8, 8), magnitudes=(-100, -12, 0, 4)),
    # One sequence: dealt out to the warps of all CTAs, on Hopper, where the copy engine can load its pages.
    Decode(lengths=(0,), heads=(16, 8), sinks=True),
    Decode(lengths=(700,), heads=(64, 8), seqlen_q=4, sinks=True, mask="window", dims=(128, 64)),
    Decode(lengths=(300,), heads=(32, 32), new=1, rotary=64, mods=("softcap", "alibi")),
    Decode("bfloat16", "int8", lengths=(3000,), heads=(32, 8), scales=1, dims=(128, 128)),
    Decode("float64", lengths=(300,), heads=(16, 8), seqlen_q=9),
    Decode(lengths=(3000,), heads=(16, 8), dims=(128, 128), page=24, mask="window", sinks=True),
    Decode("float16", lengths=(1234,), heads=(8, 8), dims=(96, 80), page=0, leftpad=True, seqlen_q=2, new=2),
    Decode(lengths=(2100,), heads=(8, 2), dims=(256, 256), page=64, batch_idx=True),
    Decode("bfloat16", "float8_e4m3fn", lengths=(5000,), heads=(16, 1), scales=2, dims=(128, 64), page=8),
    Decode(lengths=(1000,), heads=(8, 2), page=5),
    Decode(lengths=(1000,), heads=(8, 2), leftpad=True),
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


def plan_of(backend: Any, case: Decode) -> DecodePlan:
    """What runs a case on this machine's GPU."""
    given = put(backend, arguments(case))
    options = {n: given.pop(n) for n in OPTIONS if n in given}
    longest, interleaved = given.pop("max_seqlen_q", None), given.pop("rotary_interleaved", True)
    take = options.get
    mask = parse_mask(take("causal", False), take("window"), take("mask"))
    mods = parse_mods(take("softcap"), take("alibi_slopes"), take("bias"), take("score_mod"))
    own = [arrays.CUPY.view(x) for x in (*mask.arrays, *(a for mod in mods for a in mod.arrays))]
    views = {name: arrays.CUPY.view(x) for name, x in given.items()}
    scalars = Scalars(None, True, case.deterministic, case.splits, interleaved, longest, case.precision)
    return make_decode_plan(make_decode_problem(views, mask, mods, own, scalars), call.device_of(0))


_NO_CASE = SimpleNamespace(params={})


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all cases that run, at once: one by one they would take most of a run's time."""
    items = [item for item in request.session.items if "gpu" in item.keywords and item.path == request.path]
    cases = {item.callspec.params["case"] for item in items if "case" in getattr(item, "callspec", _NO_CASE).params}
    if cases and arrays.gpu_available()[0]:
        from tests.conftest import CuPyBackend

        plans = [plan_of(CuPyBackend(), case) for case in cases]
        jit.compile_many(dict.fromkeys((u.source, plan.device.arch) for plan in plans for u in decode_units(plan).values()))


@pytest.mark.parametrize("case", [c for c in CASES if c.deterministic], ids=str)
def test_bits_do_not_depend_on_other_sequences(backend: Any, case: Decode) -> None:
    """deterministic=True: each sequence of a batch alone, and among copies of itself."""
    if case.packed:
        case = Decode(**{**vars(case), "packed": False})
    given = arguments(case)
    together = [backend.get(x) for x in cuattn.attention_with_kvcache(**put(backend, given), return_lse=True)]
    for b in range(case.batch):
        for rows in ([b], [b] * 9):
            own = {n: given[n][rows] for n in ("q", "page_table", "cache_seqlens")}
            alone = cuattn.attention_with_kvcache(**put(backend, {**given, **own}), return_lse=True)
            for x, whole in zip(alone, together, strict=True):
                found = backend.get(x)
                assert all(found[n].tobytes() == whole[b].tobytes() for n in range(len(rows)))


@pytest.mark.parametrize("case", LONG, ids=str)
def test_bitwise_reruns(backend: Any, case: Decode) -> None:
    made = put(backend, arguments(case))
    first, *others = (
        tuple(backend.get(x).tobytes() for x in cuattn.attention_with_kvcache(**made, return_lse=True)) for _ in range(20)
    )
    assert all(other == first for other in others)


def test_one_length_for_all(backend: Any) -> None:
    case = Decode(lengths=(70, 70), new=1)
    made = put(backend, {**arguments(case), "cache_seqlens": 70})
    out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)
    verify(case, backend, out, lse, made)


def test_no_batch_axis(backend: Any) -> None:
    case = Decode(lengths=(70,), seqlen_q=3, new=3)
    given = arguments(case)
    made = put(backend, {**given, **{n: given[n][0] for n in "qkv"}})
    out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)
    assert out.ndim == 3 and lse.ndim == 2
    verify(case, backend, out[None], lse[None], made)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["", "float8_e4m3fn"])
def test_numpy_arrays_travel_to_the_gpu_and_back(cache: str) -> None:
    """The caches too, when they have been written."""
    from tests.conftest import NumPyBackend

    case = Decode("bfloat16", cache, lengths=(30, 7), new=2)
    made = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arguments(case).items()}
    out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)
    verify(case, NumPyBackend(), out, lse, made)


@pytest.mark.gpu
def test_a_graph_serves_any_lengths(cupy_backend: Any) -> None:
    """One capture, replayed after the lengths on the device have changed."""
    import cupy

    cases = [Decode("float16", lengths=lengths) for lengths in ((600, 5, 70), (1, 64, 600), (0, 0, 600))]
    made = put(cupy_backend, arguments(cases[0]))
    made["out"] = cupy.empty_like(made["q"])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        cuattn.attention_with_kvcache(**made)
        stream.begin_capture()
        cuattn.attention_with_kvcache(**made)
        graph = stream.end_capture()
        for case in cases:
            for name in ("k_cache", "v_cache", "page_table", "cache_seqlens", "q"):
                made[name][...] = cupy.asarray(arguments(case)[name])
            for _ in range(3):
                made["out"][...] = 0
                graph.launch(stream)
                stream.synchronize()
                exact, naive = oracle(case, "float64")[0], oracle(case, "float16")[0]
                assert_close("out", cupy_backend.get(made["out"]), exact, limit(exact, naive, np.float16, "float16"))


@pytest.mark.gpu
def test_pages_outside_the_cache_are_not_touched(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys count as zeros, and new tokens of theirs are dropped; lengths past the cache end with it."""
    case = Decode("float16", lengths=(61, 30), new=2, page=8)
    given = dict(arguments(case))
    table = given["page_table"].copy()
    pages = len(given["k_cache"])
    table[0, 2], table[0, 7], table[1, 1] = pages, -1, 2**31 - 1
    made = put(cupy_backend, {**given, "page_table": table})
    padded = {}
    for name in ("k_cache", "v_cache"):  # inside a pool that must stay as it is
        around = np.full((pages + 64, *given[name].shape[1:]), 7, np.float16)
        around[32:-32] = given[name]
        padded[name] = cupy_backend.put(around)
        made[name] = padded[name][32:-32]
    found = cupy_backend.get(cuattn.attention_with_kvcache(**made))
    for name in padded:
        around = cupy_backend.get(padded[name])
        assert (around[:32] == 7).all() and (around[-32:] == 7).all(), name
    with monkeypatch.context() as patch:
        patch.setenv("CUATTN_DEBUG", "1")
        with pytest.raises(ValueError, match=r"^page_table: "):
            cuattn.attention_with_kvcache(**made)
    zeros = {n: np.concatenate([given[n], np.zeros((3, *given[n].shape[1:]), np.float16)]) for n in ("k_cache", "v_cache")}
    table[0, 2], table[0, 7], table[1, 1] = pages, pages + 1, pages + 2
    expected = {**given, **zeros, "page_table": table}
    expected.pop("k"), expected.pop("v")
    # Tokens 61 and 62 would lie in the page at -1; of the other sequence, 30 and 31 in a page that exists.
    for name, cache in (("k", "k_cache"), ("v", "v_cache")):
        expected[cache] = expected[cache].copy()
        for n in (30, 31):
            expected[cache][table[1, n // 8], n % 8] = given[name][1, n - 30]
    expected["cache_seqlens"] = given["cache_seqlens"] + 2
    options = {n: expected.pop(n) for n in OPTIONS if n in expected}
    assert options["causal"]
    call_ = {"scale": case.dims[0] ** -0.5, "mask": parse_mask(True, None, None)}
    exact, naive = (reference.with_kvcache(**expected, **call_, dtype=t)[0] for t in (np.float64, np.float16))
    assert_close("out", found, exact, limit(exact, naive, np.float16, "float16"))
    for lengths in ([2**31 - 1, -5], [10**6, 0]):
        made["cache_seqlens"] = cupy_backend.put(np.array(lengths, np.int32))
        cuattn.attention_with_kvcache(**made)
        for name in padded:
            around = cupy_backend.get(padded[name])
            assert (around[:32] == 7).all() and (around[-32:] == 7).all(), name


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("page", [64, 0], ids=["pages", "rows"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_than_2_31_elements(cupy_backend: Any, dtype: str, page: int) -> None:
    """What lies at the end of a large cache is found and written as in a small one, which takes 64-bit offsets."""
    import cupy

    case = Decode(dtype, lengths=(61, 300), new=2, page=page, heads=(16, 8), dims=(128, 128), batch_idx=not page)
    made = put(cupy_backend, arguments(case))
    shape = made["k_cache"].shape
    offset = (1 << 31) // int(np.prod(shape[1:])) + 1
    if cupy.cuda.runtime.memGetInfo()[0] < 3 * offset * int(np.prod(shape[1:])) * made["q"].itemsize:
        pytest.skip("needs more GPU memory")
    large = dict(made)
    for name in ("k_cache", "v_cache"):
        large[name] = cupy.full((offset + shape[0], *shape[1:]), np.nan, made[name].dtype)
        large[name][offset:] = made[name]
    where = "page_table" if page else "cache_batch_idx"
    large[where] = made[where] + offset
    expected, found = (cuattn.attention_with_kvcache(**given, return_lse=True) for given in (made, large))
    verify(case, cupy_backend, *expected, made)
    for x, y in zip((*found, large["k_cache"][offset:], large["v_cache"][offset:]), (*expected, *_caches(made)), strict=True):
        assert cupy_backend.get(x).tobytes() == cupy_backend.get(y).tobytes()
    del large, found
    cupy.get_default_memory_pool().free_all_blocks()


def _caches(made: dict[str, Any]) -> tuple[Any, Any]:
    return made["k_cache"], made["v_cache"]


ANY_SIZES: dict[str, st.SearchStrategy[Any]] = {
    "lengths": st.lists(st.integers(0, 150), max_size=5).map(tuple),
    "seqlen_q": st.integers(1, 20),
    "heads": st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda n: (n[0] * n[1], n[1])),
    "page": st.sampled_from((0, 1, 5, 16, 64)),
    "new": st.integers(0, 5),
    "batch_idx": st.booleans(),
    "leftpad": st.booleans(),
    "splits": st.sampled_from((0, 0, 1, 3)),
    "deterministic": st.booleans(),
}
ANY_CASE = st.builds(
    Decode,
    st.sampled_from(("bfloat16", "float16", "float32", "float64")),
    dims=st.tuples(st.integers(4, 80), st.integers(1, 80)),
    packed=st.booleans(),
    rotary=st.sampled_from((0, 2, 4)),
    interleaved=st.booleans(),
    mask=st.sampled_from(("causal", "full", "window", "boolean", "tree")),
    mods=st.lists(st.sampled_from(("softcap", "alibi", "bias", "user")), unique=True).map(tuple),
    sinks=st.booleans(),
    **ANY_SIZES,
)
FEW_KERNELS = st.builds(
    Decode,
    st.sampled_from(("bfloat16", "float32")),
    **{
        **ANY_SIZES,
        "page": st.integers(1, 40),
        "leftpad": st.just(False),
        "splits": st.just(0),
        "deterministic": st.just(False),
    },
)
"""Sizes vary freely, what decides the code hardly does: a GPU run compiles a dozen kernels."""
ANY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@ANY
@hypothesis.given(ANY_CASE)
def test_anything_on_numpy(numpy_backend: Any, case: Decode) -> None:
    _check(numpy_backend, case)


@pytest.mark.gpu
@ANY
@hypothesis.given(FEW_KERNELS)
def test_anything_on_the_gpu(cupy_backend: Any, case: Decode) -> None:
    _check(cupy_backend, case)


def _check(backend: Any, case: Decode) -> None:
    made = put(backend, arguments(case))
    with backend.poisoned():
        out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)
    verify(case, backend, out, lse, made)


BAD = (
    ("q", TypeError, lambda g: {"q": g["q"].astype(np.int32)}),
    ("k_cache", ValueError, lambda g: {"k_cache": g["k_cache"][..., :32]}),
    ("k_cache", TypeError, lambda g: {"k_cache": g["k_cache"].astype(np.float64)}),
    ("v_cache", ValueError, lambda g: {"v_cache": g["v_cache"][:1]}),
    ("q", ValueError, lambda g: {"q": g["q"][:, :, :3]}),
    ("cache_seqlens", TypeError, lambda g: {"cache_seqlens": None}),
    ("cache_seqlens", TypeError, lambda g: {"cache_seqlens": g["cache_seqlens"].astype(np.int64)}),
    ("cache_seqlens", ValueError, lambda g: {"cache_seqlens": g["cache_seqlens"] + 1000}),
    ("cache_leftpad", ValueError, lambda g: {"cache_leftpad": g["cache_seqlens"] + 1}),
    ("page_table", TypeError, lambda g: {"page_table": g["page_table"].astype(np.int64)}),
    ("page_table", ValueError, lambda g: {"page_table": g["page_table"][:2]}),
    ("page_table", ValueError, lambda g: {"page_table": g["page_table"] + 10**6}),
    ("cache_batch_idx", ValueError, lambda g: {"cache_batch_idx": np.array([0, 1, 99], np.int32)}),
    ("k, v", ValueError, lambda g: {"k": None}),
    ("k", ValueError, lambda g: {"k": g["k"][..., :32]}),
    ("v", ValueError, lambda g: {"v": g["v"][:, :0]}),
    (
        "rotary_cos",
        ValueError,
        lambda g: {"rotary_cos": np.ones((2, 8), np.float32), "rotary_sin": np.ones((2, 8), np.float32)},
    ),
    ("rotary_cos, rotary_sin", ValueError, lambda g: {"rotary_cos": np.ones((500, 8), np.float32)}),
    ("rotary_cos", ValueError, lambda g: {n: np.ones((500, 40), np.float32) for n in ("rotary_cos", "rotary_sin")}),
    ("num_splits", ValueError, lambda g: {"num_splits": -1}),
    ("k_scale", ValueError, lambda g: {"k_scale": np.ones(2, np.float32)}),
    ("max_seqlen_q", ValueError, lambda g: {"max_seqlen_q": 1}),
    ("sinks", ValueError, lambda g: {"sinks": np.ones(3, np.float32)}),
    ("out", ValueError, lambda g: {"out": np.ones((3, 1, 8, 63), np.float32)}),
    ("precision", ValueError, lambda g: {"precision": "half"}),
)


@pytest.mark.parametrize(("name", "error", "change"), BAD, ids=[f"{n}-{name}" for n, (name, *_) in enumerate(BAD)])
def test_errors_name_the_argument(numpy_backend: Any, name: str, error: type[Exception], change: Any) -> None:
    given = {**put(numpy_backend, arguments(Decode("float32", new=1))), "precision": "ieee"}
    before = given["k_cache"].copy()
    with pytest.raises(error, match=f"^{name}: "):
        cuattn.attention_with_kvcache(**{**given, **change(given)})
    assert before.tobytes() == given["k_cache"].tobytes()


def test_a_read_only_cache_takes_no_tokens(numpy_backend: Any) -> None:
    given = put(numpy_backend, arguments(Decode("float32", new=1)))
    given["v_cache"].flags.writeable = False
    with pytest.raises(ValueError, match=r"^v_cache: "):
        cuattn.attention_with_kvcache(**given)


def test_torch_tensors_on_the_cpu() -> None:
    torch = pytest.importorskip("torch")
    case = Decode("bfloat16", "float8_e4m3fn", scales=1, lengths=(30, 7), new=2)

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        names = {2: torch.bfloat16, 1: torch.float8_e4m3fn}
        if x.dtype.kind == "V" or "float8" in x.dtype.name:
            return torch.from_numpy(x.copy().view(np.int16 if x.dtype.itemsize == 2 else np.uint8)).view(
                names[x.dtype.itemsize]
            )
        return torch.from_numpy(x.copy())

    made = {name: tensor(x) for name, x in arguments(case).items()}
    out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)

    class Backend:
        get = staticmethod(arrays.TORCH.host)

    verify(case, Backend, out, lse, made)
    made["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient"):
        cuattn.attention_with_kvcache(**made)
