"""`cuattn.attention_with_kvcache` where values are the first columns of the keys, as tests/test_decode.py does the rest."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import arrays, call, jit
from cuattn.arrays import Library, numpy_dtype
from cuattn.codegen import decode_units
from cuattn.decode import DecodePlan, LatentPlan, Scalars, make_decode_plan, make_decode_problem
from cuattn.problem import parse_mask, parse_mods
from cuattn.registry import DEVICES, Device
from tests import test_decode
from tests.test_decode import OPTIONS, Decode, arguments, put
from tests.tolerance import assert_close, limit

Array = np.ndarray


def case_of(dtype: str = "bfloat16", cache: str = "", **options: Any) -> Decode:
    return Decode(dtype, cache, **{"dims": (576, 512), "heads": (128, 1), "page": 64, **options})


HOPPER = (
    case_of(),
    case_of("float16", heads=(16, 1), page=16),
    case_of(lengths=(1300, 64, 65)),
    case_of(lengths=(1300, 64, 65), heads=(16, 1), deterministic=True),
    case_of(lengths=(700, 130), heads=(64, 1), splits=5),
    case_of(lengths=(5003,), heads=(16, 1)),
    case_of(lengths=(0, 5, 0), page=8),
    case_of(lengths=(0,), mask="full"),
    case_of(lengths=(777, 12), heads=(32, 1), seqlen_q=3),
    case_of(lengths=(70, 300), seqlen_q=2),
    case_of(lengths=(333, 12), seqlen_q=2, new=2, page=16),
    case_of("float16", lengths=(333, 12), heads=(64, 1), page=0, leftpad=True, batch_idx=True, mask="full"),
    case_of(lengths=(500, 33), heads=(127, 1), mask="window", batch_idx=True),
    case_of(lengths=(200, 33), heads=(6, 3), page=256),
    case_of(lengths=tuple(range(1, 450, 9)), heads=(16, 1)),
    case_of(lengths=()),
)
"""Served by decode_latent_sm90.cu where that runs."""
PORTABLE = (
    case_of(page=1, lengths=(65, 3)),
    case_of("float16", page=7, lengths=(65, 3, 0), heads=(16, 1)),
    case_of(lengths=(100, 33), heads=(16, 1), packed=True, seqlen_q=5, new=1),
    case_of(lengths=(300, 33), heads=(16, 1), mods=("softcap",), sinks=True),
    case_of(lengths=(300, 33), heads=(16, 1), leftpad=True, seqlen_q=2),
    case_of("bfloat16", "float8_e4m3fn", scales=1, lengths=(300, 33), heads=(16, 1), new=1),
    case_of("float32", precision="tf32", lengths=(100, 33), heads=(16, 1)),
    case_of("float32", lengths=(100, 33), heads=(16, 1), new=1),
    case_of("float64", dims=(96, 64), heads=(4, 1), lengths=(100, 33)),
    case_of("float64", dims=(256, 200), heads=(8, 1), lengths=(100, 33), seqlen_q=2),
    case_of(dims=(80, 64), heads=(8, 2), lengths=(100, 33)),
    case_of("float16", dims=(520, 300), heads=(8, 2), lengths=(100, 33), splits=3),
    case_of(lengths=(100, 33), heads=(16, 1), aligned=False),
)
CASES = (*HOPPER, *PORTABLE)


@functools.cache
def latent(case: Decode) -> dict[str, Any]:
    """The arguments of a call: those of tests/test_decode.py without values."""
    given = {name: x for name, x in arguments(case).items() if name not in ("v_cache", "v", "v_scale")}
    return {**given, "head_dim_v": case.dims[1]}


def with_values(given: dict[str, Any]) -> dict[str, Any]:
    """What the oracle takes: keys and values apart."""
    dim = given["head_dim_v"]
    values = {f"v{name[1:]}": given[name][..., :dim] for name in ("k_cache", "k") if name in given}
    values |= {"v_scale": given["k_scale"]} if "k_scale" in given else {}
    return {name: x for name, x in {**given, **values}.items() if name != "head_dim_v"}


def reference_of(case: Decode, given: dict[str, Any], dtype: str) -> tuple[Array, Array, Array, Array]:
    return test_decode.reference_of(case, with_values(given), dtype)


@functools.cache
def oracle(case: Decode, dtype: str) -> tuple[Array, Array, Array, Array]:
    return reference_of(case, latent(case), dtype)


def verify(case: Decode, backend: Any, out: Any, lse: Any, cache: Any) -> None:
    exact, naive = oracle(case, "float64"), oracle(case, case.dtype)
    out, lse, cache = backend.get(out), backend.get(lse), backend.get(cache)
    dtype, arithmetic = numpy_dtype(case.dtype), "tf32" if case.precision == "tf32" else case.dtype
    assert out.dtype == dtype
    assert_close("out", out, exact[0], limit(exact[0], naive[0], dtype, arithmetic))
    statistics = "statistics" if dtype.itemsize == 2 else arithmetic
    assert_close("lse", lse, exact[1], limit(exact[1], exact[1], lse.dtype, statistics, least_scale=1.0))
    found, wanted = (np.ascontiguousarray(x).view(np.uint8) for x in (cache, exact[2]))
    assert (found == wanted).all(), "k_cache"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(backend: Any, guarded: Any, case: Decode) -> None:
    made = put(backend, latent(case))
    target = guarded((*latent(case)["q"].shape[:-1], case.dims[1]), numpy_dtype(case.dtype))
    with backend.poisoned():
        out, lse = cuattn.attention_with_kvcache(**made, return_lse=True, out=target.array)
    assert out is target.array
    verify(case, backend, out, lse, made["k_cache"])
    target.check()


def plan_of(library: Library, given: dict[str, Any], case: Decode, device: Device) -> DecodePlan:
    """What runs a case on a GPU."""
    given = dict(given)
    options = {n: given.pop(n) for n in OPTIONS if n in given}
    longest, dim = given.pop("max_seqlen_q", None), given.pop("head_dim_v")
    take = options.get
    mask = parse_mask(take("causal", False), take("window"), take("mask"))
    mods = parse_mods(take("softcap"), take("alibi_slopes"), take("bias"), take("score_mod"))
    views = {name: library.view(x) for name, x in given.items()}
    scalars = Scalars(None, True, case.deterministic, case.splits, True, longest, case.precision, dim)
    return make_decode_plan(make_decode_problem(views, mask, mods, [], scalars), device)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all cases at once, where they will be asked for."""
    if any("gpu" in item.keywords for item in request.session.items) and arrays.gpu_available()[0]:
        from tests.conftest import CuPyBackend

        given = ((case, put(CuPyBackend(), latent(case))) for case in CASES)
        plans = [plan_of(arrays.CUPY, made, case, call.device_of(0)) for case, made in given]
        jit.compile_many(dict.fromkeys((u.source, plan.device.arch) for plan in plans for u in decode_units(plan).values()))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_kernel_of_a_case(arch: str, case: Decode) -> None:
    plan = plan_of(arrays.NUMPY, latent(case), case, DEVICES[arch])
    assert isinstance(plan, LatentPlan) == (case in HOPPER and arch == "sm_90a")


@pytest.mark.parametrize("case", [c for c in CASES if c.deterministic], ids=str)
def test_bits_do_not_depend_on_other_sequences(backend: Any, case: Decode) -> None:
    given = latent(case)
    together = [backend.get(x) for x in cuattn.attention_with_kvcache(**put(backend, given), return_lse=True)]
    for b in range(case.batch):
        own = {n: given[n][[b]] for n in ("q", "page_table", "cache_seqlens")}
        alone = cuattn.attention_with_kvcache(**put(backend, {**given, **own}), return_lse=True)
        for x, whole in zip(alone, together, strict=True):
            assert backend.get(x)[0].tobytes() == whole[b].tobytes()


@pytest.mark.parametrize("case", (HOPPER[2], HOPPER[8]), ids=str)
def test_bitwise_reruns(backend: Any, case: Decode) -> None:
    made = put(backend, latent(case))
    first, *others = (
        tuple(backend.get(x).tobytes() for x in cuattn.attention_with_kvcache(**made, return_lse=True)) for _ in range(20)
    )
    assert all(other == first for other in others)


def test_values_that_are_columns_of_the_keys(backend: Any) -> None:
    """A v_cache that lies in the keys' memory means the same."""
    case = case_of("float16", lengths=(70, 200), heads=(16, 1))
    made = put(backend, latent(case))
    cache = made["k_cache"]
    made.pop("head_dim_v")
    out, lse = cuattn.attention_with_kvcache(**made, v_cache=cache[..., :512], return_lse=True)
    verify(case, backend, out, lse, cache)


def test_large_scores(backend: Any) -> None:
    """Maxima that grow by far from block to block, which both halves of the output must follow."""
    case = case_of("float16", lengths=(700, 300), heads=(64, 1))
    given = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in latent(case).items()}
    table, page = given["page_table"], case.page
    for b, n in enumerate(case.lengths):
        for j in range(n):
            given["k_cache"][table[b, j // page], j % page] *= np.float16(1 + j / 100)
    found = cuattn.attention_with_kvcache(**put(backend, given), return_lse=True)
    exact, naive = (reference_of(case, given, dtype) for dtype in ("float64", "float16"))
    for name, x, wanted, rough in zip(("out", "lse"), found, exact, naive, strict=False):
        x = backend.get(x)
        assert_close(name, x, wanted, limit(wanted, rough, x.dtype, "float16", least_scale=1.0))


@pytest.mark.gpu
def test_pages_outside_the_cache_are_not_touched(cupy_backend: Any) -> None:
    """Their keys count as zeros; lengths past the cache end with it."""
    case = case_of("float16", lengths=(300, 130), page=64, heads=(64, 1))
    given = dict(latent(case))
    pages, table = len(given["k_cache"]), given["page_table"].copy()
    table[0, 1], table[0, 3], table[1, 0] = pages, -1, 2**31 - 1
    around = np.full((pages + 8, *given["k_cache"].shape[1:]), 7, np.float16)
    around[4:-4] = given["k_cache"]
    pool = cupy_backend.put(around)
    made = {**put(cupy_backend, {**given, "page_table": table}), "k_cache": pool[4:-4]}
    found = cupy_backend.get(cuattn.attention_with_kvcache(**made))
    zeros = np.concatenate([given["k_cache"], np.zeros((3, *given["k_cache"].shape[1:]), np.float16)])
    table[0, 1], table[0, 3], table[1, 0] = pages, pages + 1, pages + 2
    expected = {**given, "k_cache": zeros, "page_table": table}
    exact, naive = (reference_of(case, expected, dtype)[0] for dtype in ("float64", "float16"))
    assert_close("out", found, exact, limit(exact, naive, np.float16, "float16"))
    made["cache_seqlens"] = cupy_backend.put(np.array([2**31 - 1, -5], np.int32))
    cuattn.attention_with_kvcache(**made)
    assert (cupy_backend.get(pool).view(np.uint16) == around.view(np.uint16)).all()  # tokens past the lengths are NaN


@pytest.mark.gpu
def test_a_graph_serves_any_lengths(cupy_backend: Any) -> None:
    import cupy

    cases = [case_of("float16", lengths=lengths) for lengths in ((600, 5, 70), (1, 64, 600), (0, 0, 600))]
    made = put(cupy_backend, latent(cases[0]))
    made["out"] = cupy.empty((*made["q"].shape[:-1], 512), np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        cuattn.attention_with_kvcache(**made)
        stream.begin_capture()
        cuattn.attention_with_kvcache(**made)
        graph = stream.end_capture()
        for case in cases:
            for name in ("k_cache", "page_table", "cache_seqlens", "q"):
                made[name][...] = cupy.asarray(latent(case)[name])
            for _ in range(3):
                made["out"][...] = 0
                graph.launch(stream)
                stream.synchronize()
                exact, naive = oracle(case, "float64")[0], oracle(case, "float16")[0]
                assert_close("out", cupy_backend.get(made["out"]), exact, limit(exact, naive, np.float16, "float16"))


BAD = (
    ("head_dim_v", ValueError, {"head_dim_v": 577}),
    ("head_dim_v", ValueError, {"head_dim_v": 0}),
    ("head_dim_v", ValueError, {"head_dim_v": 512.0}),
    ("v_cache", TypeError, {"head_dim_v": None}),
    ("v_cache", ValueError, {"v_cache": np.zeros((1, 64, 1, 512), np.float32)}),
    ("v", ValueError, {"v": np.zeros((3, 1, 1, 512), np.float32)}),
    ("rotary_cos", ValueError, {n: np.ones((500, 8), np.float32) for n in ("rotary_cos", "rotary_sin")}),
    ("out", ValueError, {"out": np.ones((3, 1, 16, 576), np.float32)}),
)


@pytest.mark.parametrize(("name", "error", "change"), BAD, ids=[f"{n}-{name}" for n, (name, *_) in enumerate(BAD)])
def test_errors_name_the_argument(numpy_backend: Any, name: str, error: type[Exception], change: dict[str, Any]) -> None:
    given = put(numpy_backend, latent(case_of("float32", new=1, heads=(16, 1))))
    before = given["k_cache"].copy()
    with pytest.raises(error, match=f"^{name}: "):
        cuattn.attention_with_kvcache(**{**given, **change})
    assert before.tobytes() == given["k_cache"].tobytes()
