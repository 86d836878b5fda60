"""The compile test: every plan of the catalogue, on every architecture, without a GPU and without a spill."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuattn import jit
from cuattn.catalogue import COMMON_DIMS, backward_plans, decode_plans, kernels, plans, problem_of, view
from cuattn.codegen import units
from cuattn.masks import SlidingWindow
from cuattn.plan import make_plan
from cuattn.registry import DEVICES
from cuattn.score_mods import Alibi, ScoreMod, SoftCap

pytest.importorskip("cupy")


def complaints(log: str) -> list[str]:
    """What a compiler's log must not hold."""
    found = [f"{n} bytes spilled" for n in re.findall(r"(\d+) bytes spill stores", log) if int(n)]
    found += re.findall(r".*warning.*", log)
    return found + re.findall(r".*(?:serialized|setmaxnreg.*ignored|\(C75\d\d\)).*", log)


@pytest.mark.parametrize("arch", DEVICES)
def test_every_plan_compiles_without_spills(arch: str) -> None:
    jobs = kernels(arch, everything=True)
    assert min(len(made(arch, True)) for made in (plans, backward_plans, decode_plans)) > 50
    built = jit.compile_many((source, arch) for source in jobs)
    failures = [f"{plan}: {c}" for cubin, plan in zip(built, jobs.values(), strict=True) for c in complaints(cubin.log)]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("arch", DEVICES)
def test_what_is_compiled_ahead_serves_gradients_and_caches(arch: str) -> None:
    found = set(re.findall(r'#include "(\w+)\.cu"', "\n".join(kernels(arch))))
    assert {"forward_sm80", "forward_simt", "backward", "backward_prepare", "decode", "append"} <= found
    assert ({"forward_sm90", "backward_sm90"} <= found) == (arch == "sm_90a")


def sass(image: bytes, folder: Path) -> str:
    """A cubin disassembled, or a skip where there is no disassembler."""
    tool = shutil.which("nvdisasm") or next(
        (str(p) for site in sys.path for p in sorted(Path(site).glob("nvidia/*/bin/nvdisasm"))), None
    )
    if tool is None:
        pytest.skip("nvdisasm is not installed")
    path = folder / "kernel.cubin"
    path.write_bytes(image)
    return subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", COMMON_DIMS, ids=str)
def test_hopper_kernels_hold_hopper_instructions(dims: tuple[int, int], causal: bool, tmp_path: Path) -> None:
    """wgmma, TMA loads and register hand-over are in the machine code."""
    problem = problem_of("bfloat16", dims=dims, mask=SlidingWindow(None, 0) if causal else None)
    plan = make_plan(problem, DEVICES["sm_90a"])
    assert plan.kernel == "forward_sm90"
    text = sass(jit.build(units(plan)["forward"].source, "sm_90a").image, tmp_path)
    for instruction in ("HGMMA", "UTMALDG", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC", "SYNCS", "MUFU.EX2"):
        assert instruction in text, f"{plan}: no {instruction}"
    # Of mma.sync only where warps go back to a tile, since their rows have outgrown the maximum that they keep.
    assert ("HMMA" in text.replace("HGMMA", "")) == plan.tiles.keep_maxima


def test_shared_memory_fits() -> None:
    for arch, device in DEVICES.items():
        for plan in plans(arch, everything=True):
            assert plan.smem_bytes <= device.smem_per_block, str(plan)


def test_sizes_do_not_reach_the_source() -> None:
    """Calls that differ in batch and length share their cubins, as long as the plan gives them the same tiles."""
    sources = {
        units(make_plan(problem_of("bfloat16", seqlens=seqlens), DEVICES["sm_90a"]))["forward"].source
        for seqlens in ((4096, 4096), (4096, 8000), (10000, 3333))
    }
    assert len(sources) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_who_keeps_first_maxima(dtype: str) -> None:
    """float16 not where dropout hides from the division what a sum counts, nor in wide or packed calls; none where maxima cost
    nothing: three warpgroups without overlap.
    """
    wider = dtype == "bfloat16"
    for dims, seqlen, heads, packed, dropout, keeps in (
        (64, 512, 16, False, 0.0, True),
        (64, 4096, 16, False, 0.0, True),
        (128, 512, 64, False, 0.0, False),
        (128, 4096, 16, False, 0.0, True),
        (128, 4096, 16, False, 0.3, wider),
        (128, 4096, 16, True, 0.0, wider),
        (256, 512, 64, False, 0.0, wider),
        (256, 4096, 16, False, 0.0, wider),
        (192, 4096, 16, False, 0.0, False),
    ):
        shape = {"dims": (dims, dims), "seqlens": (seqlen, seqlen), "heads": (heads, 8)}
        plan = make_plan(problem_of(dtype, **shape, packed=packed, dropout=dropout), DEVICES["sm_90a"])
        assert plan.kernel == "forward_sm90" and plan.tiles.keep_maxima == keeps, (dims, seqlen, packed, dropout)


@pytest.mark.parametrize(
    ("dtype", "mods", "bounded"),
    [
        ("bfloat16", (SoftCap(30.0),), True),
        ("bfloat16", (SoftCap(55.0),), True),
        ("bfloat16", (SoftCap(60.0),), False),  # exponentials too large for sums of them times values
        ("bfloat16", (SoftCap(0.05),), False),  # queries in units of the cap too large
        ("bfloat16", (SoftCap(30.0), Alibi(view((16,), "float32"))), False),
        ("float16", (SoftCap(30.0),), False),
    ],
)
def test_softcaps_that_need_no_maximum(dtype: str, mods: tuple[ScoreMod, ...], bounded: bool) -> None:
    for dims in ((64, 64), (128, 128)):
        plan = make_plan(problem_of(dtype, dims=dims, mods=mods), DEVICES["sm_90a"])
        assert plan.kernel == "forward_sm90" and plan.tiles.bounded == bounded
