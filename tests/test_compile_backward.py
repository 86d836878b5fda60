"""The compile test of the gradients: as tests/test_compile.py."""

from __future__ import annotations

import pytest

from cuattn import jit
from cuattn.backward import make_backward_plan
from cuattn.catalogue import COMMON_DIMS, backward_plans, backward_problem_of, problem_of
from cuattn.codegen import backward_units
from cuattn.registry import DEVICES
from tests.test_compile import complaints

pytest.importorskip("cupy")


@pytest.mark.parametrize("arch", DEVICES)
def test_every_plan_compiles_without_spills(arch: str) -> None:
    jobs = {unit.source: plan for plan in backward_plans(arch, everything=True) for unit in backward_units(plan).values()}
    assert len(jobs) > 100
    built = jit.compile_many((source, arch) for source in jobs)
    failures = [f"{plan}: {c}" for cubin, plan in zip(built, jobs.values(), strict=True) for c in complaints(cubin.log)]
    assert not failures, "\n".join(failures)


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
