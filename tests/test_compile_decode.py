"""The compile test of the kernels over a KV cache: as tests/test_compile.py."""

from __future__ import annotations

from typing import Any

import pytest

from cuattn.catalogue import decode_plans, decode_problem_of
from cuattn.codegen import decode_units
from cuattn.decode import ALONE_PARTS, divisor, make_decode_plan
from cuattn.registry import DEVICES

pytest.importorskip("cupy")


def test_shared_memory_fits() -> None:
    for arch, device in DEVICES.items():
        for plan in decode_plans(arch, everything=True):
            assert plan.smem_bytes + 1024 <= device.smem_per_block, str(plan)


def test_sizes_do_not_reach_the_source() -> None:
    sources = set()
    for page_size, heads in ((16, (64, 8)), (64, (8, 2)), (48, (16, 16))):
        plan = make_decode_plan(decode_problem_of(page_size=page_size, heads=heads), DEVICES["sm_90a"])
        sources.add(decode_units(plan)["decode"].source)
    assert len(sources) == 1


def test_of_equal_lengths_no_item_is_shared_where_that_leaves_few_idle() -> None:
    device = DEVICES["sm_90a"]
    for batch in (2, 8, 32, 64, 128, 256):
        plan = make_decode_plan(decode_problem_of(batch=batch), device)
        items = plan.items // plan.head_lanes
        assert (items % plan.teams == 0 or plan.teams % items == 0) and plan.teams >= 0.96 * plan.most_teams
    assert make_decode_plan(decode_problem_of(batch=37), device).teams == device.num_sms * 2 // 8


def test_one_sequence_is_dealt_out_to_all_multiprocessors() -> None:
    device = DEVICES["sm_90a"]
    plan = make_decode_plan(decode_problem_of(batch=1, heads=(64, 8)), device)
    assert plan.alone and plan.grid == (8, device.num_sms // 8, 1) and plan.box_rows == 16
    # Of few heads, no more parts than one CTA may merge.
    assert make_decode_plan(decode_problem_of(batch=1, heads=(8, 1)), device).parts == ALONE_PARTS


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 2},
        {"page_size": 7},
        {"deterministic": True},
        {"packed": True},
        {"seqlen_q": 3},
        {"dims": (100, 72), "misaligned": True},
        {"dims": (512, 512), "heads": (32, 8)},
    ],
    ids=str,
)
def test_what_is_not_dealt_out(options: dict[str, Any]) -> None:
    assert not make_decode_plan(decode_problem_of(**{"batch": 1, **options}), DEVICES["sm_90a"]).alone
    assert not make_decode_plan(decode_problem_of(batch=1), DEVICES["sm_80"]).alone


@pytest.mark.parametrize(
    ("dtype", "precision", "seqlen_q", "products"),
    [
        ("float32", "ieee", 1, "MmaSimt<1>"),
        ("float32", "tf32x3", 2, "MmaSimt<2>"),
        ("float32", "tf32", 1, "MmaWide<ProductTf32>"),
        ("float64", "ieee", 1, "MmaWide<ProductFp64<true>>"),
    ],
)
def test_products_are_those_of_the_precision(dtype: str, precision: str, seqlen_q: int, products: str) -> None:
    plan = make_decode_plan(decode_problem_of(dtype, precision=precision, seqlen_q=seqlen_q), DEVICES["sm_90a"])
    assert plan.mma == products


@pytest.mark.parametrize(
    ("dtype", "arch", "widest"), [("float32", "sm_86", 576), ("float64", "sm_80", 512), ("float64", "sm_89", 256)]
)
def test_what_is_too_wide_is_declined_by_name(dtype: str, arch: str, widest: int) -> None:
    assert make_decode_plan(decode_problem_of(dtype, dims=(widest, widest)), DEVICES[arch]).head_dim == widest
    with pytest.raises(NotImplementedError, match=f"decode: serves head dimensions to {widest} of {dtype}, got {widest + 1}"):
        make_decode_plan(decode_problem_of(dtype, dims=(widest + 1, widest)), DEVICES[arch])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 16, 48, 255, 256, 257, 1000, 65537, 2**30 + 1, 2**31 - 1])
def test_division_by_a_multiplication(n: int) -> None:
    multiplier, shift = divisor(n)
    assert multiplier < 2**32 and shift < 64
    numbers = {x for k in (0, 1, 2, 3, 1000, (2**31 - 1) // n) for x in (k * n - 1, k * n, k * n + 1)} | {2**31 - 1}
    assert all(x * multiplier >> shift == x // n for x in numbers if 0 <= x < 2**31)
