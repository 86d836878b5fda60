"""`python -m bench ablation`: single choices of the Hopper forward turned off or replaced, in one interleaved run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

from bench.cases import Case
from bench.forward import free_memory, l2_bytes, ours
from bench.inputs import Inputs, best_arrays
from bench.progress import within
from bench.timing import Contender, Deadline, first_line, measure
from cuattn import call, registry
from cuattn.plan import Plan, make_plan
from cuattn.problem import Problem
from cuattn.registry import Device

VARIANTS: dict[str, dict[str, Any]] = {
    "as planned": {},
    "one stage of K and V": {"stages": 1},
    "no overlap of two tiles": {"overlap": False},
    "warpgroups take turns": {"ping_pong": True},
    "a CTA for each query tile": {"persistent": False},
    "no sections for L2": {"section": 1},
    "one buffer for Q": {"q_stages": 1},
    "maxima of every tile": {"keep_maxima": False},
    "tiles drawn when loads end": {"draws_early": False},
    "waits as the compiler likes": {"late_wait": False},
    "mma.sync and cp.async": {"kernel": "forward_sm80"},
}
"""What each replaces: fields of the plan's tiles, the section of its schedule, or the kernel."""


def replanned(problem: Problem, device: Device, section: int = 0, kernel: str = "", **tiles: Any) -> Plan:
    """The plan of a problem with some choices made differently."""
    if kernel:
        rest = tuple(spec for spec in registry.FORWARD if spec.name == kernel)
        with mock.patch("cuattn.plan.FORWARD", rest):
            return make_plan(problem, device)
    plan = make_plan(problem, device)
    if section:
        kind = type("Plan", (Plan,), {"section": property(lambda self: section)})
        plan = kind(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})
    changed = dataclasses.replace(plan.tiles, **tiles)
    spec = next(spec for spec in registry.FORWARD if spec.name == plan.kernel)
    smem_bytes = spec.smem_bytes(problem, changed, device)
    if smem_bytes > device.smem_per_block:
        raise ValueError(f"{smem_bytes} bytes of shared memory do not fit")
    return dataclasses.replace(plan, tiles=changed, smem_bytes=smem_bytes)


def contender(name: str, changes: dict[str, Any], inputs: Inputs) -> Contender:
    """The public call, for which a plan with `changes` has been prepared."""
    call._prepared.clear()
    with mock.patch.object(call, "make_plan", lambda problem, device: replanned(problem, device, **changes)):
        ours(inputs)()
    prepared = dict(call._prepared)

    def prepared_call(attend: Any) -> Any:
        def run() -> Any:
            call._prepared.update(prepared)
            return attend()

        return run

    return Contender(name, [prepared_call(attend) for attend in ours(inputs).calls])


def run(cases: Sequence[Case], rounds: int, deadline: Deadline) -> None:
    """Print TFLOP/s of each variant of each case, and relative to the plan."""
    arrays = best_arrays()
    for case in within(deadline, cases):
        inputs = Inputs.of(case, arrays, l2_bytes())
        contenders = []
        for name, changes in VARIANTS.items():
            try:
                contenders.append(contender(name, changes, inputs))
            except Exception as error:
                print(f"  ! {name}: {first_line(error)}")
        times = measure(contenders, rounds)
        planned = times["as planned"].us
        print(case)
        for name, timing in times.items():
            print(f"  {name:28} {case.flops() * 1e-6 / timing.us:7.1f} TFLOP/s  x{planned / timing.us:.2f}")
        call._prepared.clear()
        free_memory(arrays)
