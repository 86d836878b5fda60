"""The compile test: every plan of the catalogue, on every architecture, without a GPU and without a spill."""

from __future__ import annotations

import re

import pytest

from cuattn import jit
from cuattn.catalogue import plans
from cuattn.codegen import units
from cuattn.registry import DEVICES

pytest.importorskip("cupy")


def _complaints(log: str) -> list[str]:
    """What a compiler's log must not hold."""
    found = [f"{n} bytes spilled" for n in re.findall(r"(\d+) bytes spill stores", log) if int(n)]
    found += re.findall(r".*warning.*", log)
    return found + re.findall(r".*(?:serialized|setmaxnreg.*ignored).*", log)


@pytest.mark.parametrize("arch", DEVICES)
def test_every_plan_compiles_without_spills(arch: str) -> None:
    jobs = {unit.source: plan for plan in plans(arch, everything=True) for unit in units(plan).values()}
    assert len(jobs) > 100
    built = jit.compile_many((source, arch) for source in jobs)
    failures = [f"{plan}: {c}" for cubin, plan in zip(built, jobs.values(), strict=True) for c in _complaints(cubin.log)]
    assert not failures, "\n".join(failures)


def test_shared_memory_fits() -> None:
    for arch, device in DEVICES.items():
        for plan in plans(arch, everything=True):
            assert plan.smem_bytes <= device.smem_per_block, str(plan)


def test_sizes_do_not_reach_the_source() -> None:
    """Calls that differ in batch and length share their cubins."""
    from cuattn.catalogue import problem_of
    from cuattn.plan import make_plan

    sources = {
        units(make_plan(problem_of("bfloat16", seqlens=seqlens), DEVICES["sm_90a"]))["forward"].source
        for seqlens in ((4096, 4096), (4096, 8192), (10000, 333))
    }
    assert len(sources) == 1
