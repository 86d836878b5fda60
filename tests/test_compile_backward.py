"""The compile test of the gradients: as tests/test_compile.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuattn import jit
from cuattn.backward import make_backward_plan
from cuattn.catalogue import backward_plans, backward_problem_of, problem_of
from cuattn.codegen import backward_units
from cuattn.masks import SlidingWindow
from cuattn.registry import DEVICES
from tests.test_compile import complaints, sass

pytest.importorskip("cupy")


@pytest.mark.parametrize("arch", DEVICES)
def test_every_plan_compiles_without_spills(arch: str) -> None:
    jobs = {unit.source: plan for plan in backward_plans(arch, everything=True) for unit in backward_units(plan).values()}
    assert len(jobs) > 100
    built = jit.compile_many((source, arch) for source in jobs)
    failures = [f"{plan}: {c}" for cubin, plan in zip(built, jobs.values(), strict=True) for c in complaints(cubin.log)]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_kernels_hold_hopper_instructions(dim: int, causal: bool, tmp_path: Path) -> None:
    problem = problem_of("bfloat16", dims=(dim, dim), mask=SlidingWindow(None, 0) if causal else None)
    plan = make_backward_plan(backward_problem_of(problem), DEVICES["sm_90a"])
    assert plan.kernel == "backward_sm90"
    text = sass(jit.build(backward_units(plan)["backward"].source, "sm_90a").image, tmp_path)
    add = "UBLKRED" if plan.tiles.bulk else "REDG.E.ADD.F32x4"
    for instruction in ("HGMMA", "UTMALDG", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC", "SYNCS", "MUFU.EX2", add):
        assert instruction in text, f"{plan}: no {instruction}"
    assert "HMMA" not in text.replace("HGMMA", "")


def test_what_the_copy_engine_cannot_take_says_so() -> None:
    device = DEVICES["sm_90a"]
    plan = make_backward_plan(backward_problem_of(problem_of("bfloat16", dims=(100, 100), misaligned=True)), device)
    assert plan.kernel == "backward" and "instead of backward_sm90: TMA needs rows of q aligned" in str(plan)
    plan = make_backward_plan(backward_problem_of(problem_of("bfloat16")), device)
    assert plan.kernel == "backward_sm90" and "instead" not in str(plan)


def test_shared_memory_fits() -> None:
    for arch, device in DEVICES.items():
        for plan in backward_plans(arch, everything=True):
            assert plan.smem_bytes <= device.smem_per_block, str(plan)


def test_sizes_do_not_reach_the_source() -> None:
    sources = set()
    for seqlens in ((4096, 4096), (4096, 8192), (10000, 3333)):
        plan = make_backward_plan(backward_problem_of(problem_of("bfloat16", seqlens=seqlens)), DEVICES["sm_90a"])
        sources.add(backward_units(plan)["backward"].source)
    assert len(sources) == 1
