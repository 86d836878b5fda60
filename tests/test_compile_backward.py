"""The compile test of the gradients: as tests/test_compile.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cuattn import jit
from cuattn.backward import CELLS, COLUMNS, COPIES, PREPARING_SMS, STORE, UNIT_ROWS, BiasKind, make_backward_plan
from cuattn.catalogue import COMMON_DIMS, backward_plans, backward_problem_of, problem_of, view
from cuattn.codegen import backward_units
from cuattn.launch import backward_struct
from cuattn.masks import Full, Mask, SlidingWindow
from cuattn.registry import DEVICES
from cuattn.score_mods import Bias
from tests.test_compile import complaints, sass

pytest.importorskip("cupy")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_hopper_kernels_hold_hopper_instructions(dims: tuple[int, int], causal: bool, tmp_path: Path) -> None:
    problem = problem_of("bfloat16", dims=dims, mask=SlidingWindow(None, 0) if causal else None)
    plan = make_backward_plan(backward_problem_of(problem), DEVICES["sm_90a"])
    assert plan.kernel == "backward_sm90"
    text = sass(jit.build(backward_units(plan)["backward"].source, "sm_90a").image, tmp_path)
    add = "UBLKRED" if plan.tiles.bulk else "REDG.E.ADD.F32x4"
    for instruction in ("HGMMA", "UTMALDG", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC", "SYNCS", "MUFU.EX2", add):
        assert instruction in text, f"{plan}: no {instruction}"
    assert "HMMA" not in text.replace("HGMMA", "")


SHAPES = ((1, 16, 4096, 4096), (4096, 4096), (4, 16, 4096, 4096), (16, 1, 4096))
PAIRS, SHARED, OWN, KEYS = (Bias(view(shape, "bfloat16")) for shape in SHAPES)
"""A bias by query and key that batches share, that heads share too, one with an element for every score, and one that queries
share.
"""


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("bias", "kind", "boxes", "sends"),
    [
        (PAIRS, COPIES, [(64, "bfloat16"), (64, "bfloat16")], "UTMASTG"),
        (SHARED, CELLS, [(64, "bfloat16"), (32, "float32")], "UTMAREDG"),
        (OWN, STORE, [(64, "bfloat16"), (64, "bfloat16")], "UTMASTG"),
        (KEYS, COLUMNS, [], ""),
    ],
)
def test_tiles_of_a_bias(
    bias: Bias, kind: BiasKind, boxes: list[tuple[int, str]], sends: str, dim: int, tmp_path: Path
) -> None:
    """The copy engine brings them and takes their gradients away, as does whoever waits for it expect."""
    problem = problem_of("bfloat16", dims=(dim, dim), mods=(bias,))
    plan = make_backward_plan(backward_problem_of(problem), DEVICES["sm_90a"])
    assert plan.kernel == "backward_sm90" and plan.bias_kind is kind and plan.early
    maps = backward_struct(plan, plan.launches[0], True).maps[4:]
    text = sass(jit.build(backward_units(plan)["backward"].source, "sm_90a").image, tmp_path)
    rows = plan.tiles.block_m
    assert [(m.box, m.operand.dtype) for m in maps] == [((columns, rows, 1, 1), dtype) for columns, dtype in boxes]
    assert [name for name in ("UTMAREDG", "UTMASTG") if name in text] == [sends] * bool(sends)


@pytest.mark.parametrize("mask", [Full(), SlidingWindow(None, 0)], ids=["full", "causal"])
@pytest.mark.parametrize(("bias", "dims"), [("pairs", (64, 128)), ("keys", (64, 128, 256))], ids=["pairs", "keys"])
def test_a_bias_without_gradient(bias: str, dims: tuple[int, ...], mask: Mask) -> None:
    for dim in dims:
        problem = problem_of("bfloat16", dims=(dim, dim), mask=mask, mods=(PAIRS if bias == "pairs" else KEYS,))
        plan = make_backward_plan(replace(backward_problem_of(problem), wanted=(False,)), DEVICES["sm_90a"])
        assert plan.kernel == "backward_sm90"
        assert len(backward_struct(plan, plan.launches[0], True).maps) == (5 if bias == "pairs" else 4)
        assert not complaints(jit.build(backward_units(plan)["backward"].source, "sm_90a").log), str(plan)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dims": (100, 100), "misaligned": True}, "TMA needs rows of q aligned to 16 bytes"),
        ({"dims": (512, 512)}, "serves head dimensions to 256, got 512 and 512"),
        ({"mask": SlidingWindow(128, 0), "dims": (192, 192)}, "does not repay its start in windows to 256 keys, got"),
        ({"mods": (Bias(view((1, 16, 4096, 4096), "bfloat16", 8)),)}, "reads a bias element by element"),
        ({"mods": (Bias(view((1, 16, 4096, 4096), "float32")),)}, "reads a bias element by element"),
        ({"mods": (PAIRS,), "dims": (256, 256)}, "has no shared memory left for tiles of a bias"),
        ({"mods": (SHARED,), "deterministic": True}, "adds up tiles of a bias in no fixed order"),
        ({"mods": (KEYS,), "dims": (256, 256)}, "sums a bias over queries for head dimensions to 128"),
    ],
)
def test_what_hopper_does_not_serve_says_so(options: dict[str, Any], reason: str) -> None:
    device = DEVICES["sm_90a"]
    rest = {name: value for name, value in options.items() if name != "deterministic"}
    plan = make_backward_plan(backward_problem_of(problem_of("bfloat16", **rest), "deterministic" in options), device)
    assert plan.kernel == "backward" and "instead of backward_sm90: " in str(plan) and reason in str(plan)
    plan = make_backward_plan(backward_problem_of(problem_of("bfloat16")), device)
    assert plan.kernel == "backward_sm90" and "instead" not in str(plan)


@pytest.mark.parametrize(
    ("seqlen", "causal", "lengths", "deterministic", "rows", "bulk"),
    [
        (4096, False, False, False, 128, True),
        (4096, False, False, True, 128, True),
        (4096, True, False, False, 128, True),
        (4096, True, True, False, 64, False),
        (4097, True, True, False, 96, False),
        (4096, True, True, True, 96, True),
        (4096, True, False, True, 128, True),
    ],
)
def test_tiles_of_64_columns(seqlen: int, causal: bool, lengths: bool, deterministic: bool, rows: int, bulk: bool) -> None:
    """Where sequences have lengths of their own, few causal queries take tiles whose rows begin with the keys'; ordered
    additions go through the copy engine.
    """
    mask = SlidingWindow(None, 0) if causal else None
    extras = ("kv_lens",) if lengths else ()
    problem = problem_of("bfloat16", dims=(64, 64), mask=mask, seqlens=(seqlen, seqlen), extras=extras)
    plan = make_backward_plan(backward_problem_of(problem, deterministic), DEVICES["sm_90a"])
    assert (plan.tiles.block_m, plan.tiles.bulk) == (rows, bulk)


@pytest.mark.parametrize(
    ("dims", "causal", "deterministic", "sections", "buffers"),
    [
        ((128, 128), False, False, (1, 0), 1),
        ((128, 128), True, False, (1, 9), 1),
        ((128, 64), True, False, (1, 9), 2),
        ((128, 128), True, True, (9, 0), 1),
        ((192, 128), False, False, (1, 0), 1),
        ((64, 64), False, False, (9, 0), 2),
    ],
)
def test_who_runs_side_by_side(
    dims: tuple[int, int], causal: bool, deterministic: bool, sections: tuple[int, int], buffers: int
) -> None:
    """Pairs of a section, and of the last one where it differs: those that wait for each other take turns."""
    mask = SlidingWindow(None, 0) if causal else None
    problem = problem_of("bfloat16", dims=dims, mask=mask, seqlens=(4096, 4096))
    plan = make_backward_plan(backward_problem_of(problem, deterministic), DEVICES["sm_90a"])
    assert ((plan.section, plan.last_section), plan.tiles.dq_buffers) == (sections, buffers)


@pytest.mark.parametrize(
    ("dims", "options", "alternate"),
    [
        ((128, 128), {}, True),
        ((128, 128), {"mask": SlidingWindow(None, 0), "packed": True}, True),
        ((96, 128), {"extras": ("kv_lens",)}, True),
        ((128, 64), {}, False),
        ((128, 128), {"mask": SlidingWindow(1024, 0)}, False),
        ((128, 128), {"dropout": 0.1}, False),
        ((64, 64), {}, False),
    ],
)
def test_who_multiplies_dq(dims: tuple[int, int], options: dict[str, Any], alternate: bool) -> None:
    """The warpgroups of tiles of 64 queries and 128 columns by turns, unless additions have an order."""
    backward = backward_problem_of(problem_of("bfloat16", dims=dims, **options))
    plan = make_backward_plan(backward, DEVICES["sm_90a"])
    assert plan.kernel == "backward_sm90" and plan.tiles.alternate == alternate
    assert not make_backward_plan(replace(backward, deterministic=True), DEVICES["sm_90a"]).tiles.alternate


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("left", "right", "dims"), [(128, 0, (64, 64)), (64, 64, (40, 64)), (129, 0, (64, 64)), (128, 0, (64, 72))]
)
def test_windows_in_one_pass(left: int, right: int, dims: tuple[int, int], deterministic: bool, tmp_path: Path) -> None:
    """Of 129 keys and 64 columns at most; no row statistics that another kernel finds, and no sums of dq, which the workspace
    would hold and a kernel would convert.
    """
    problem = problem_of("bfloat16", dims=dims, mask=SlidingWindow(left, right))
    plan = make_backward_plan(backward_problem_of(problem, deterministic), DEVICES["sm_90a"])
    served = left + right < 129 and max(dims) <= 64
    assert (plan.kernel == "backward_window_sm90") == plan.in_one_pass == served
    assert (list(backward_units(plan)) == ["backward"]) == (sum(plan.workspace) == 0) == served
    cubin = jit.build(backward_units(plan)["backward"].source, "sm_90a")
    assert not complaints(cubin.log) and (not served or "HGMMA" in sass(cubin.image, tmp_path))
    *others, _ = problem.vectors
    misaligned = replace(problem, vectors=(*others, 8))  # out, which the copy engine brings to find delta
    assert not make_backward_plan(backward_problem_of(misaligned, deterministic), DEVICES["sm_90a"]).in_one_pass


def test_shared_memory_fits() -> None:
    for arch, device in DEVICES.items():
        for plan in backward_plans(arch, everything=True):
            assert plan.smem_bytes <= device.smem_per_block, str(plan)


@pytest.mark.parametrize("arch", DEVICES)
def test_pairs_serve_what_is_large_enough(arch: str) -> None:
    """tf32x3 of every head dimension that the architecture has room for, and no element of them for each score."""
    for dims in COMMON_DIMS:
        plan, longer = (
            make_backward_plan(backward_problem_of(problem_of("float32", "tf32x3", dims, seqlens=(n, n))), DEVICES[arch])
            for n in (4096, 8192)
        )
        assert plan.split_inputs and list(backward_units(plan))[:2] == ["magnitude", "split"]
        assert sum(longer.workspace) <= 2 * sum(plan.workspace)
    few = problem_of("float32", "tf32x3", seqlens=(100, 4096), heads=(8, 8))
    assert not make_backward_plan(backward_problem_of(few), DEVICES[arch]).split_inputs


def test_sizes_do_not_reach_the_source() -> None:
    sources = set()
    for seqlens in ((4096, 4096), (4096, 8192), (10000, 3333)):
        plan = make_backward_plan(backward_problem_of(problem_of("bfloat16", seqlens=seqlens)), DEVICES["sm_90a"])
        sources.add(backward_units(plan)["backward"].source)
    assert len(sources) == 1


def test_sums_over_the_heads_of_a_group_have_one_order() -> None:
    """Heads that add to the same elements of a bias are visited by one CTA, one after the other, in deterministic mode."""
    bias = Bias(view((1, 512, 512), "bfloat16"))
    problem = problem_of("bfloat16", seqlens=(512, 512), heads=(8, 2), mods=(bias,))
    free, ordered = (make_backward_plan(backward_problem_of(problem, d), DEVICES["sm_90a"]) for d in (False, True))
    assert free.q_splits > 1
    assert ordered.q_splits == 1 and len(ordered.launches) > 1


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_the_copy_engine_brings_whole_tiles(dims: tuple[int, int]) -> None:
    """backward_sm90.cu waits for the bytes of a tile: smaller boxes would let it wait for ever."""
    plan = make_backward_plan(backward_problem_of(problem_of("bfloat16", dims=dims)), DEVICES["sm_90a"])
    boxes = [m.box for m in backward_struct(plan, plan.launches[0], True).maps]
    assert plan.uses_tma
    gradients = (16, 16) if max(dims) <= 128 else ()  # dk and dv leave in what a warp holds
    rows = (plan.tiles.block_m, *(plan.tiles.block_n,) * 2, plan.tiles.block_m, *gradients)
    assert boxes == [(64, n, 1, 1) for n in rows]


def test_who_prepares_ahead_is_counted_alike_on_both_sides() -> None:
    """The workspace holds a word for each CTA that the kernels count, and units are as many rows."""
    text = (jit.kernel_folder() / "mainloop" / "pair_counters.cuh").read_text(encoding="utf-8")
    for name, value in ("kPreparing", PREPARING_SMS), ("kUnitRows", UNIT_ROWS):
        assert f"static constexpr int {name} = {value};" in text


@pytest.mark.parametrize(
    ("options", "ordered", "counted"),
    [
        ({}, True, True),
        ({"dims": (72, 72)}, True, True),
        ({"extras": ("sinks",)}, True, True),
        ({"dims": (192, 128)}, False, False),
        ({"dims": (256, 256)}, False, False),
        ({"dims": (64, 64)}, False, True),
        ({"seqlens": (512, 512), "dims": (64, 64), "heads": (80, 80)}, False, False),
        ({"seqlens": (512, 512)}, False, True),
        ({"seqlens": (128, 128), "heads": (80, 80)}, False, True),
        ({"extras": ("kv_lens",)}, True, True),
        ({"mods": (PAIRS,)}, False, False),
        ({"packed": True}, True, True),
        ({"packed": True, "seqlens": (256, 256), "heads": (80, 80)}, False, True),
        ({"packed": True, "dims": (64, 64)}, False, False),
        ({"packed": True, "dims": (192, 128)}, False, False),
        ({"deterministic": True}, False, False),
        ({"seqlens": (2048, 256), "heads": (4, 1)}, False, False),
        ({"mask": SlidingWindow(128, 0), "dims": (64, 64)}, False, False),
        ({"mask": SlidingWindow(512, 0)}, False, False),
        ({"dims": (512, 512)}, False, False),
    ],
)
def test_who_waits_for_whom(options: dict[str, Any], ordered: bool, counted: bool) -> None:
    """A kernel that may begin before the one ahead is done waits for that by itself; for counted rows and sums alone where they
    are right: where one kernel prepares all that is read and added to, and doormen add, to one key tile a CTA.
    """
    rest = {name: value for name, value in options.items() if name != "deterministic"}
    plan = make_backward_plan(
        backward_problem_of(problem_of("bfloat16", **rest), "deterministic" in options), DEVICES["sm_90a"]
    )
    units = backward_units(plan)
    chained = {role for role, unit in units.items() if unit.chained}
    assert chained == ({"backward", "convert"} if plan.kernel == "backward_sm90" else set())
    assert (plan.prepared_units > 0, plan.counts_pairs) == (ordered, counted)
    if ordered:
        assert units["prepare"].entry == "cuattn_backward_prepare_sm90" and plan.zeroed == sum(plan.workspace[:2])
    if ordered or counted:
        words = (PREPARING_SMS + 1) * plan.problem.batch * plan.problem.num_heads_kv  # as in mainloop/pair_counters.cuh
        assert plan.workspace[0] >= 4 * words and plan.q_splits == 1
    for role in {"backward", "convert"} & units.keys():  # both, or who waits would wait for ever
        assert f"kCountPairs = {str(counted).lower()};" in units[role].source
