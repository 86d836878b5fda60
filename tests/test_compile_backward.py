"""The compile test of the gradients: as tests/test_compile.py."""

from __future__ import annotations

import pytest

from cuattn import jit
from cuattn.catalogue import backward_plans, backward_problem_of, problem_of
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


def test_sizes_do_not_reach_the_source() -> None:
    from cuattn.backward import make_backward_plan

    sources = set()
    for seqlens in ((4096, 4096), (4096, 8192), (10000, 3333)):
        plan = make_backward_plan(backward_problem_of(problem_of("bfloat16", seqlens=seqlens)), DEVICES["sm_90a"])
        sources.add(backward_units(plan)["backward"].source)
    assert len(sources) == 1
