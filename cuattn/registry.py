"""The kernels, what each serves, and the tiles each may use. The first kernel of `FORWARD` that serves a problem runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cuattn.problem import ITEMSIZE, Problem


class Device(NamedTuple):
    """What a plan needs to know of a GPU."""

    arch: str
    """NVRTC's exact architecture: sm_80, sm_90a, ..."""
    smem_per_block: int
    """bytes of shared memory that one block may use"""
    smem_per_sm: int
    num_sms: int

    @property
    def number(self) -> int:
        return int(self.arch.removeprefix("sm_").rstrip("af"))


DEVICES = {
    "sm_80": Device("sm_80", 166912, 167936, 108),
    "sm_86": Device("sm_86", 101376, 102400, 84),
    "sm_89": Device("sm_89", 101376, 102400, 128),
    "sm_90a": Device("sm_90a", 232448, 233472, 132),
    "sm_100": Device("sm_100", 232448, 233472, 148),
    "sm_120": Device("sm_120", 101376, 102400, 170),
}
"""One GPU of each architecture, for plans made where there is none (CUDA C++ programming guide, compute capabilities)."""


@dataclass(frozen=True)
class Tiles:
    """The choices a kernel leaves open."""

    block_m: int
    block_n: int
    stages: int
    warps: int
    min_blocks: int = 1
    reason: str = ""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel file: which problems it serves, with which tiles, in how much shared memory."""

    name: str
    """of kernels/<name>.cu and of the entry function"""
    unsupported: Callable[[Problem, Device], list[str]]
    """reasons to decline, none if it serves the problem"""
    mma: Callable[[Problem, Device], str]
    """C++ type of the warp products, "" where the kernel has none"""
    padded_dims: Callable[[Problem], tuple[int, int]]
    """compiled head_dim and columns of out per CTA"""
    candidates: Callable[[Problem, Device], Sequence[Tiles]]
    """best first"""
    smem_bytes: Callable[[Problem, Tiles], int]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# Tensor cores through mma.sync ----------------------------------------------------------------------------------------


def _declines_sm80(problem: Problem, device: Device) -> list[str]:
    reasons = []
    if device.number < 80:
        reasons.append(f"needs sm_80 or newer, got {device.arch}")
    if max(problem.head_dim, problem.head_dim_v) > 512:
        reasons.append(f"serves head dimensions to 512, got {problem.head_dim} and {problem.head_dim_v}")
    if problem.dtype == "float32" and problem.precision == "ieee":
        reasons.append("tensor cores have no ieee float32 product")
    return reasons


def _mma_sm80(problem: Problem, device: Device) -> str:
    if problem.dtype == "float64":
        return f"MmaWide<ProductFp64<{'true' if device.number == 90 else 'false'}>>"
    if problem.dtype == "float32":
        return f"MmaWide<Product{ {'tf32': 'Tf32', 'tf32x3': 'Tf32x3'}[problem.precision] }>"
    return f"MmaHalf<{ {'float16': '__half', 'bfloat16': '__nv_bfloat16'}[problem.dtype] }>"


def _dims_sm80(problem: Problem) -> tuple[int, int]:
    """Depth and width in whole fragments. Columns of out beyond what the registers of a warp hold go to further CTAs."""
    step_v = 32 if problem.dtype == "float32" else 16
    widest = 128 if problem.dtype == "float64" else 256
    dim_v = round_up(problem.head_dim_v, step_v)
    chunks = -(-dim_v // widest)
    return round_up(problem.head_dim, 16), round_up(-(-dim_v // chunks), step_v)


def _tiles_sm80(problem: Problem, device: Device) -> Sequence[Tiles]:
    dim, dim_v = _dims_sm80(problem)
    widest = max(dim, dim_v)
    if problem.dtype == "float64":
        return _TILES_FP64[widest > 64]
    if problem.dtype == "float32":
        return _TILES_TF32[(widest > 64) + (widest > 128)]
    return _TILES_16BIT[(widest > 64) + (widest > 128)]


_TILES_16BIT = (
    (
        Tiles(128, 64, 2, 4, 2, "32 rows a warp read each key fragment for two products; two CTAs hide each other's softmax"),
        Tiles(64, 64, 1, 4, 1, "fits 99 KB"),
    ),
    (
        Tiles(128, 48, 1, 4, 2, "64 keys spill by a few registers"),
        Tiles(64, 64, 1, 4, 1, "fits 99 KB"),
    ),
    (
        Tiles(128, 64, 1, 8, 1, "one CTA of eight warps: 256 columns of out leave room for 16 rows a warp"),
        Tiles(64, 64, 1, 4, 1, "head_dim 256 on 163 KB"),
        Tiles(64, 32, 1, 4, 1, "fits 99 KB to head_dim 256"),
        Tiles(64, 16, 1, 4, 1, "fits 99 KB beyond"),
    ),
)
_TILES_TF32 = (
    (Tiles(128, 32, 1, 4, 2), Tiles(64, 32, 1, 4, 2, "fits 99 KB")),
    (
        Tiles(128, 64, 1, 8, 1),
        Tiles(64, 32, 1, 4, 1, "fits 99 KB"),
    ),
    (
        Tiles(64, 32, 1, 4, 1),
        Tiles(64, 16, 1, 4, 1),
        Tiles(32, 16, 1, 2, 1, "fits 163 KB at head_dim 512"),
        Tiles(16, 8, 1, 1, 1, "fits 99 KB at head_dim 512"),
    ),
)
_TILES_FP64 = (
    (Tiles(64, 32, 1, 4, 2), Tiles(32, 16, 1, 2, 2, "fits 99 KB")),
    (
        Tiles(64, 32, 1, 4, 1),
        Tiles(64, 16, 1, 4, 1),
        Tiles(32, 16, 1, 2, 1, "fits 99 KB at head_dim 128"),
        Tiles(16, 8, 1, 1, 1, "fits 99 KB at head_dim 256"),
        Tiles(16, 8, 1, 1, 1, "fits 163 KB at head_dim 512"),
    ),
)


def _smem_sm80(problem: Problem, tiles: Tiles) -> int:
    """kernels/mainloop/forward_sm80.cuh: sQ, then sK and sV for each stage. The kernel asserts that it suffices."""
    dim, dim_v = _dims_sm80(problem)
    per_unit = 16 // ITEMSIZE[problem.dtype]
    units, units_v = dim // per_unit, dim_v // per_unit
    odd, half = 1 - units % 2, (12 - units % 8) % 8
    pitch_qk = 16 * (units + (odd if problem.dtype in ("float16", "bfloat16") else half))
    pitch_v = 16 * (units_v + 1 - units_v % 2)
    staged_out = 16 * tiles.block_m * (units_v + 1)
    return max(tiles.block_m * pitch_qk + tiles.stages * tiles.block_n * (pitch_qk + pitch_v), staged_out)


FORWARD: tuple[KernelSpec, ...] = (
    KernelSpec("forward_sm80", _declines_sm80, _mma_sm80, _dims_sm80, _tiles_sm80, _smem_sm80),
)
