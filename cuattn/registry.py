"""The kernels, what each serves, and the tiles each may use. The first kernel of `FORWARD` that serves a problem runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from cuattn.fields import ITEMSIZE, Operand
from cuattn.masks import And, BooleanMask, Full, SlidingWindow
from cuattn.problem import Problem
from cuattn.score_mods import Alibi, Bias, SoftCap, UserMod
from cuattn.tma import tma_bias, tma_obstacles

if TYPE_CHECKING:
    from cuattn.decode import DecodeProblem


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
    """CTAs an SM must hold, which bounds the registers of a thread"""
    max_weight: int = 100
    """of the masks and modifications (`register_weight`) under which no register spills"""
    reason: str = ""
    archs: tuple[int, ...] = ()
    """compute capabilities for which the compiler keeps this tile in registers; empty: all"""
    overlap: bool = True
    """forward_sm90: the products of two tiles of keys are in flight together"""
    ping_pong: bool = False
    """forward_sm90: warpgroups take turns at the tensor cores"""
    persistent: bool = False
    """forward_sm90: one CTA per slot of the GPU works through the query tiles, where there are more of them"""
    q_stages: int = 1
    """forward_sm90: buffers for q; with two, the next query tile's has come before this one's is free"""
    keep_maxima: bool = False
    """forward_sm90: a row keeps the maximum of its first keys until its probabilities outgrow it"""
    nearest_first: bool = False
    """forward_sm90: the keys next to a query tile are visited first, then those behind them, then those before them"""
    bounded: bool = False
    """forward_sm90: scores are so close to 0 that exponentials need no maximum"""
    late_wait: bool = True
    """forward_sm90: the compiler may not wait for the output before the maxima of the next scores"""
    draws_early: bool = False
    """forward_sm90: the next query tile is drawn when the loads of this one begin, not when they end"""
    scale_first: bool = False
    """forward_sm90: the output is scaled before its product is issued, not among the exponentials"""
    bulk: bool = False
    """backward_sm90: dq is added by the copy engine, through shared memory"""
    runs: bool = False
    """backward_sm90: a CTA takes several key tiles one after the other"""
    dq_buffers: int = 1
    """backward_sm90: buffers through which the copy engine adds dq"""
    seeded: bool = False
    """backward_sm90: products start from the row statistics"""
    alternate: bool = False
    """backward_sm90: each of two warpgroups multiplies dq of every other query tile, neither waits for the other's dS"""
    stores: bool = False
    """backward_sm90: the copy engine stores dk and dv, through the shared memory that `bulk` needs too"""


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
    smem_bytes: Callable[[Problem, Tiles, Device], int]


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


# wgmma and TMA --------------------------------------------------------------------------------------------------------

FEW_QUERIES = 64
"""Queries up to which a query tile of forward_sm90 is mostly empty."""


def _declines_sm90(problem: Problem, device: Device) -> list[str]:
    p, reasons = problem, []
    if device.arch != "sm_90a":
        reasons.append(f"needs sm_90a, got {device.arch}")
    if p.dtype not in ("float16", "bfloat16"):
        reasons.append(f"multiplies float16 and bfloat16, got {p.dtype}")
    if max(p.head_dim, p.head_dim_v) > 256:
        reasons.append(f"serves head dimensions to 256, got {p.head_dim} and {p.head_dim_v}")
    for name, alignment in zip(("q", "k", "v"), p.vectors, strict=False):
        reasons += tma_obstacles(name, p.operand(name), alignment)
    reasons += [f"{name} is empty" for name, n in (("q", p.total_q), ("k", p.total_k)) if n == 0]
    queries, keys = min(p.seqlen_q, p.total_q), min(p.seqlen_k, p.total_k)
    ctas = -(-queries // 128) * p.num_heads * p.batch
    if queries <= FEW_QUERIES < keys:
        reasons.append(f"few queries leave most of its tiles empty, got {queries}")
    elif 5 * ctas < 4 * device.num_sms and keys >= 1024:
        reasons.append(f"{ctas} query tiles do not fill {device.num_sms} SMs, and it does not split the keys")
    return reasons


def _dims_sm90(problem: Problem) -> tuple[int, int]:
    return round_up(problem.head_dim, 16), round_up(problem.head_dim_v, 16)


BIAS_STAGES = 2
"""Tiles of a staged bias in shared memory."""


def staged_bias(problem: Problem) -> Operand | None:
    """The bias whose tiles forward_sm90 loads through TMA, as (batch, query, head, key); None where it has none such."""
    found = [ops[0] for mod, ops in zip(problem.mods, problem.mod_operands, strict=True) if isinstance(mod, Bias)]
    return tma_bias(found[0]) if len(found) == 1 else None


def _smem_sm90(problem: Problem, tiles: Tiles, device: Device) -> int:
    """kernels/mainloop/forward_sm90.cuh: q, the rings of k, v and bias, barriers, and what aligning it all may cost."""
    width, width_v = (2 * round_up(dim, 64) for dim in (problem.head_dim, problem.head_dim_v))
    rings = tiles.stages * tiles.block_n * (width + width_v)
    bias_stages = BIAS_STAGES if staged_bias(problem) else 0
    rings += bias_stages * tiles.block_m * 2 * round_up(tiles.block_n, 64)
    barriers = 6 + 2 * tiles.q_stages * tiles.block_m // 64 + 4 * tiles.stages + 2 * bias_stages
    return tiles.q_stages * tiles.block_m * width + rings + 8 * barriers + 48 + 1024


def _weight_sm90(problem: Problem) -> int:
    """As `_weight`: what masks, modifications and layouts cost a loop that TMA feeds."""
    unstaged = any(isinstance(mod, Bias) for mod in problem.mods) and staged_bias(problem) is None
    mods = sum(1 + isinstance(mod, UserMod) for mod in problem.mods)
    mods += max(0, len(problem.mods) - 1)  # what several keep in registers adds up
    mods += 2 * (problem.packed and mods > 0 and max(problem.head_dim, problem.head_dim_v) <= 64)
    return 6 * (problem.dropout > 0) + 7 * (unstaged + isinstance(problem.mask, BooleanMask)) + mods


SHORTEST = 512
"""Keys of a sequence up to which the ends of tiles are most of the time."""
SHORT = 2048
"""Keys up to which the ends of tiles count: below, they overlap where an SM holds two CTAs."""
LONG = 2048
"""Keys from which fewer, wider tiles of keys pay."""


def _keys_of_a_tile(problem: Problem) -> int:
    """Keys that 128 queries in the middle of the longest sequence may see."""
    queries, keys = min(problem.seqlen_q, problem.total_q), min(problem.seqlen_k, problem.total_k)
    middle = max(0, queries // 2 - 64)
    return len(problem.mask.kv_range(range(middle, min(queries, middle + 128)), queries, keys))


def _fills_sm90(problem: Problem, device: Device, block_m: int) -> bool:
    """Whether query tiles of `block_m` rows are mostly full, and several for each SM."""
    m_blocks = -(-problem.seqlen_q // block_m)
    ctas = m_blocks * problem.num_heads * problem.batch
    return 20 * problem.seqlen_q >= 17 * m_blocks * block_m and ctas >= 2 * device.num_sms


LARGEST_EXPONENT = 80
"""Of 2: probabilities and sums of them that a bfloat16 and a float32 hold with room for the values they are multiplied with."""


def _bounded(problem: Problem) -> bool:
    """Whether exponentials of scores, none relative to a maximum, fit bfloat16, as do queries in units of a softcap."""
    mod = problem.mods[0] if len(problem.mods) == 1 else None
    if problem.dtype != "bfloat16" or not isinstance(mod, SoftCap):
        return False
    return mod.cap * math.log2(math.e) <= LARGEST_EXPONENT and 2.0**-30 <= problem.scale / mod.cap <= 1


def _from_first_key(problem: Problem) -> bool:
    """Whether queries see all keys to some last one."""
    mask = problem.mask
    return isinstance(mask, Full) or (isinstance(mask, SlidingWindow) and mask.left is None)


def _tiles_sm90(problem: Problem, device: Device) -> Sequence[Tiles]:
    widest, weight = max(_dims_sm90(problem)), _weight_sm90(problem)
    tiles = list(next(tiles for limit, tiles in _TILES_SM90.items() if widest <= limit))
    keys = _keys_of_a_tile(problem)
    shortest = min(problem.seqlen_k, problem.total_k) <= SHORTEST
    bounded = _bounded(problem) and problem.head_dim_v <= 128
    alone = problem.mods[0] if len(problem.mods) == 1 and widest <= 128 and _from_first_key(problem) else None
    nearest = isinstance(alone, Alibi)  # its scores are the largest next to the diagonal, and mostly nowhere else
    # The others have no registers left for going back where probabilities outgrow the maximum that a row keeps.
    keeps = not problem.mods or nearest or (isinstance(alone, UserMod) and widest > 64)
    keeps = keeps and problem.scale > 0 and not 128 < problem.head_dim_v <= 192
    # float16 overflows sooner: a dropped probability, however large, counts in a sum, but is not seen where sums are divided.
    keeps = keeps and (problem.dtype == "bfloat16" or not (problem.packed or problem.dropout or problem.head_dim_v > 128))
    if widest <= 64 and keys < SHORT:
        stages = 2 if staged_bias(problem) else 3  # two CTAs an SM
        tiles.insert(0, Tiles(128, 64, stages, 12, 2, 2, persistent=True, overlap=False, q_stages=2))
    if 64 < widest <= 128 and keys >= LONG and not problem.mask.tiled:
        tiles.insert(0, Tiles(128, 176, 2, 12, persistent=True, max_weight=0))
    regular = not (problem.packed or problem.mask.tiled)
    if 64 < widest <= 128 and shortest and regular and keeps and _fills_sm90(problem, device, 192):
        tiles.insert(0, Tiles(192, 128, 2, 16, persistent=True, overlap=False, max_weight=0, q_stages=2))
    if 64 < widest <= 128 and problem.dropout > 0 and not (problem.mods or problem.mask.tiled):
        tiles.insert(0, Tiles(128, 128, 2, 12, persistent=True, max_weight=6))
    if widest > 128 >= problem.head_dim_v:
        tiles.insert(0, Tiles(128, 128, 2, 12, persistent=True, max_weight=0))
    if widest > 192 and shortest:
        tiles = tiles[1:]  # 80 keys a tile would compute a tenth of them for nothing
    # Beside more columns of out the compiler has no room for what a late wait lets it interleave.
    wide = problem.head_dim_v > 128
    scales_first = wide and weight == 0 and not keeps
    waits_late = keeps or not wide
    tiles = [
        replace(
            t,
            late_wait=waits_late,
            scale_first=scales_first and t.overlap,
            keep_maxima=keeps and (widest <= 64 or t.block_m < 192),  # nor with three consumers without overlap
            nearest_first=keeps and nearest,
            bounded=bounded,
            draws_early=keys < SHORT and t.overlap and t.q_stages == 2,
        )
        for t in tiles
    ]
    return _allowed(tiles, weight, device)


_TILES_SM90 = {  # by the wider of head_dim and head_dim_v; warps include the producer's four
    64: (
        Tiles(192, 128, 2, 16, persistent=True, max_weight=2, q_stages=2),
        Tiles(128, 128, 2, 12, persistent=True, max_weight=6),
        Tiles(128, 96, 2, 12, persistent=True, max_weight=8),
        Tiles(128, 64, 2, 12, persistent=True),
    ),
    128: (
        Tiles(128, 128, 2, 12, persistent=True, max_weight=2, q_stages=2),
        Tiles(128, 128, 2, 12, persistent=True, max_weight=2),
        Tiles(128, 96, 2, 12, persistent=True, max_weight=8),
        Tiles(128, 64, 2, 12, persistent=True),
    ),
    192: (
        Tiles(128, 112, 2, 12, persistent=True, max_weight=0),
        Tiles(128, 96, 2, 12, persistent=True, max_weight=0),
        Tiles(128, 64, 2, 12, persistent=True, max_weight=5),
        Tiles(128, 48, 2, 12, persistent=True, max_weight=8),
        Tiles(128, 32, 2, 12, persistent=True, overlap=False),
    ),
    256: (
        Tiles(128, 80, 2, 12, persistent=True, max_weight=0),
        Tiles(128, 64, 2, 12, persistent=True, max_weight=1),
        Tiles(128, 48, 2, 12, persistent=True, max_weight=7, overlap=False),
        Tiles(128, 32, 2, 12, persistent=True, overlap=False),
    ),
}

# Tensor cores through mma.sync ----------------------------------------------------------------------------------------


def _declines_sm80(problem: Problem, device: Device) -> list[str]:
    reasons = []
    if device.number < 80:
        reasons.append(f"needs sm_80 or newer, got {device.arch}")
    if max(problem.head_dim, problem.head_dim_v) > 512:
        reasons.append(f"serves head dimensions to 512, got {problem.head_dim} and {problem.head_dim_v}")
    if problem.dtype == "float32" and problem.precision != "tf32":
        reasons.append(f"multiplies float32 as tf32, got precision {problem.precision}")
    if problem.dtype == "float64" and problem.head_dim > 448 and device.smem_per_block < 110000:
        reasons.append(f"float64 at head_dim {problem.head_dim} needs more than the {device.smem_per_block} B of a block")
    return reasons


def _mma_sm80(problem: Problem, device: Device) -> str:
    if problem.dtype == "float64":
        return f"MmaWide<ProductFp64<{'true' if device.number == 90 else 'false'}>>"
    if problem.dtype == "float32":
        return "MmaWide<ProductTf32>"
    return f"MmaHalf<{ {'float16': '__half', 'bfloat16': '__nv_bfloat16'}[problem.dtype] }>"


def _dims_sm80(problem: Problem) -> tuple[int, int]:
    """Depth and width in whole fragments. Columns of out beyond what the registers of a warp hold go to further CTAs."""
    step_v = 32 if problem.dtype == "float32" else 16
    widest = 128 if problem.dtype == "float64" else 256
    dim_v = round_up(problem.head_dim_v, step_v)
    chunks = -(-dim_v // widest)
    return round_up(problem.head_dim, 16), round_up(-(-dim_v // chunks), step_v)


def register_weight(problem: Problem) -> int:
    """How many registers masks, modifications and layouts are likely to need, in steps at which the widest tiles spill."""
    parts = problem.mask.masks if isinstance(problem.mask, And) else (problem.mask,)
    weight = 6 * (problem.dropout > 0) + 2 * len(problem.mods) + 2 * problem.packed + (min(problem.vectors[:3]) < 16)
    weight += 2 * (problem.head_dim_v > problem.head_dim)
    weight += sum(problem.operand(name) is not None for name in ("sinks", "q_lens", "kv_lens"))
    for mask in parts:
        weight += 3 if mask.tiled else 0 if isinstance(mask, Full) else 1
    return weight + (isinstance(problem.mask, SlidingWindow) and None not in (problem.mask.left, problem.mask.right))


def _tiles_sm80(problem: Problem, device: Device) -> Sequence[Tiles]:
    table = {"float64": _TILES_FP64, "float32": _TILES_TF32}.get(problem.dtype, _TILES_16BIT)
    widest, weight = max(_dims_sm80(problem)), register_weight(problem)
    return _allowed(next(tiles for limit, tiles in table.items() if widest <= limit), weight, device)


def _allowed(tiles: Sequence[Tiles], weight: int, device: Device) -> list[Tiles]:
    return [t for t in tiles if weight <= t.max_weight and (not t.archs or device.number in t.archs)]


_AMPERE = (80, 86, 89)
_TILES_16BIT = {  # by the wider of head_dim and columns of out
    64: (
        Tiles(128, 112, 1, 4, 2, 1, "32 rows a warp read each key fragment for two products", archs=(*_AMPERE, 90)),
        Tiles(128, 64, 1, 4, 2, 1),
        Tiles(128, 64, 1, 4, 2, 5, archs=(90,)),
        Tiles(64, 64, 1, 4, 2),
    ),
    128: (
        Tiles(128, 64, 1, 4, 2, 1, "the most keys without a spill", archs=(90,)),
        Tiles(128, 48, 1, 4, 2, 1, archs=_AMPERE),
        Tiles(128, 32, 1, 4, 2, 5, archs=(90,)),
        Tiles(128, 32, 1, 4, 2, 1),
        Tiles(64, 64, 1, 4, 2),
        Tiles(64, 32, 1, 4, 2),
    ),
    256: (
        Tiles(128, 128, 1, 8, 1, 1, "reads q from shared memory least often", archs=(90,)),
        Tiles(128, 64, 1, 8, 1, 1, archs=(80,)),
        Tiles(64, 64, 1, 4, 1, 5, "256 columns of out leave room for 16 rows a warp"),
        Tiles(64, 32, 1, 4, 1),
        Tiles(64, 16, 1, 4, 1),
    ),
    512: (
        Tiles(64, 32, 1, 4, 1),
        Tiles(64, 16, 1, 4, 1),
        Tiles(32, 16, 1, 2, 1),
    ),
}
_TILES_TF32 = {
    64: (Tiles(128, 64, 1, 4, 2, 3), Tiles(128, 32, 1, 4, 2, 12), Tiles(64, 32, 1, 4, 2)),
    128: (
        Tiles(128, 32, 1, 4, 2, 2, archs=(80, 86, 89, 90, 120)),
        Tiles(128, 32, 1, 4, 2, 1),
        Tiles(64, 32, 1, 4, 2),
        Tiles(64, 32, 1, 4, 1),
        Tiles(64, 16, 1, 4, 1),
    ),
    256: (
        Tiles(64, 32, 1, 4, 1, archs=(80, 86, 89, 90)),
        Tiles(64, 16, 1, 4, 1),
        Tiles(32, 16, 1, 2, 1),
    ),
    512: (Tiles(64, 16, 1, 4, 1), Tiles(32, 16, 1, 2, 1), Tiles(16, 8, 1, 1, 1)),
}
_TILES_FP64 = {
    64: (Tiles(128, 32, 1, 8, 1), Tiles(64, 32, 1, 4, 1), Tiles(32, 16, 1, 2, 1)),
    128: (
        Tiles(128, 32, 1, 8, 1, 0),
        Tiles(128, 24, 1, 8, 1, 2),
        Tiles(64, 16, 1, 4, 1),
        Tiles(32, 16, 1, 2, 1),
    ),
    256: (Tiles(64, 16, 1, 4, 1), Tiles(32, 16, 1, 2, 1), Tiles(16, 8, 1, 1, 1)),
    512: (Tiles(32, 16, 1, 2, 1), Tiles(16, 16, 1, 1, 1), Tiles(16, 8, 1, 1, 1)),
}


def _smem_sm80(problem: Problem, tiles: Tiles, device: Device) -> int:
    """kernels/mainloop/forward_sm80.cuh: sQ, then sK and sV for each stage. The kernel asserts that it suffices."""
    dim, dim_v = _dims_sm80(problem)
    per_unit = 16 // ITEMSIZE[problem.dtype]
    if problem.dtype in ("float16", "bfloat16"):  # swizzled panels of 64 columns
        pitch_qk, pitch_v = 2 * round_up(dim, 64), 2 * round_up(dim_v, 64)
    else:  # padded rows, in units of 16 bytes
        units, units_v = dim // per_unit, dim_v // per_unit
        pitch_qk, pitch_v = 16 * (units + (12 - units % 8) % 8), 16 * (units_v + 1 - units_v % 2)
    staged_out = 16 * tiles.block_m * (dim_v // per_unit + 1)
    return max(tiles.block_m * pitch_qk + tiles.stages * tiles.block_n * (pitch_qk + pitch_v), staged_out)


# FFMA -----------------------------------------------------------------------------------------------------------------


def _declines_simt(problem: Problem, device: Device) -> list[str]:
    reasons = []
    if problem.dtype != "float32" or problem.precision == "tf32":
        reasons.append(f"serves float32 at precision ieee, or tf32x3 where nothing is faster, got {problem.dtype}")
    if max(problem.head_dim, problem.head_dim_v) > 512:
        reasons.append(f"serves head dimensions to 512, got {problem.head_dim} and {problem.head_dim_v}")
    if device.number < 80:
        reasons.append(f"needs sm_80 or newer, got {device.arch}")
    return reasons


def _dims_simt(problem: Problem) -> tuple[int, int]:
    dim_v = round_up(problem.head_dim_v, 16)
    chunks = -(-dim_v // 256)
    return round_up(problem.head_dim, 16), round_up(-(-dim_v // chunks), 16)


def _tiles_simt(problem: Problem, device: Device) -> Sequence[Tiles]:
    dims = _dims_simt(problem)
    widest = max(dims)
    if widest in (80, 112):
        widest = 128  # these spill on the tile of 96
    tiles = next(tiles for limit, tiles in _TILES_SIMT.items() if widest <= limit)
    return _allowed(tiles, register_weight(problem), device)


_OLD = (80, 86, 89, 90)
_TILES_SIMT = {  # warps / (block_m / 32) of them share 32 rows, which costs a barrier but no registers
    32: (Tiles(128, 32, 2, 4, 2),),
    64: (
        Tiles(128, 64, 2, 4, 2, 2, archs=_OLD),
        Tiles(128, 32, 2, 4, 2, 2),
        Tiles(64, 64, 2, 4, 2),
    ),
    96: (Tiles(128, 32, 2, 4, 2, 2), Tiles(64, 64, 2, 8, 1)),
    128: (
        Tiles(128, 128, 2, 8, 1, 1, "half the loads of 64 x 128", archs=(90,)),
        Tiles(64, 64, 2, 4, 2, 2),
        Tiles(64, 64, 2, 8, 1),
    ),
    192: (Tiles(64, 64, 2, 4, 2, 2, archs=_OLD), Tiles(64, 64, 2, 8, 1)),
    256: (Tiles(64, 128, 2, 8, 1, 2, archs=(80, 90)), Tiles(64, 64, 2, 8, 1)),
    512: (Tiles(64, 128, 2, 8, 1, 2, archs=(90,)), Tiles(64, 64, 2, 8, 1)),
}


def _smem_simt(problem: Problem, tiles: Tiles, device: Device) -> int:
    """kernels/mainloop/forward_simt.cuh: q (unless it is streamed with k), P, row statistics, a ring of chunks.

    The kernel keeps q resident and takes deep chunks when what the plan gives it suffices, so this gives it the largest layout
    of which `min_blocks` fit an SM.
    """
    dim, dim_v = _dims_simt(problem)
    m, n, sharing = tiles.block_m, tiles.block_n, 32 * tiles.warps // tiles.block_m
    columns = round_up(dim_v, 32 * sharing)

    def layout(depth: int, resident: bool) -> int:
        chunk = 4 * (depth + 4) * (n + (0 if resident else m))
        keys = 32
        while keys > 4 and (n % keys or n // keys < tiles.stages - 1 or 4 * keys * columns > chunk):
            keys //= 2
        ring = tiles.stages * max(chunk, 4 * keys * columns)
        return (4 * m * (dim + 4) if resident else 0) + 4 * m * n + 4 * sharing * m + ring

    depths = (32, 16) if dim % 32 == 0 and dim // 32 >= tiles.stages - 1 else (16,)
    layouts = [layout(depth, resident) for resident in (True, False) for depth in depths]
    budget = min(device.smem_per_block, device.smem_per_sm // tiles.min_blocks - 1024)
    return next((size for size in layouts if size <= budget), layouts[-1])


# float32 through pairs of fp16 numbers ----------------------------------------------------------------------------------

SPLIT_LEAST = 512
"""Queries per key and value, and keys per query, from which the passes that split the inputs pay; below, FFMA serves tf32x3."""


def _declines_split(problem: Problem, device: Device) -> list[str]:
    reasons = []
    if device.number < 80:
        reasons.append(f"needs sm_80 or newer, got {device.arch}")
    if max(problem.head_dim, problem.head_dim_v) > 512:
        reasons.append(f"serves head dimensions to 512, got {problem.head_dim} and {problem.head_dim_v}")
    if problem.precision != "tf32x3":
        reasons.append("serves float32 at precision tf32x3 only")
    rows = max(problem.num_heads * problem.total_q, 2 * problem.num_heads_kv * problem.total_k)
    if rows * (1 if problem.packed else problem.batch) >= 2**31:
        reasons.append("counts the rows of all heads in 32 bits")
    queries, keys = min(problem.seqlen_q, problem.total_q), min(problem.seqlen_k, problem.total_k)
    if queries * problem.group < SPLIT_LEAST or keys < SPLIT_LEAST:
        reasons.append(f"splitting the inputs pays from {SPLIT_LEAST} keys and queries per key, got {keys} and {queries}")
    return reasons


def _dims_split(problem: Problem) -> tuple[int, int]:
    """128 columns of out a CTA: with more, the sums of a tile beside the output spill."""
    dim_v = round_up(problem.head_dim_v, 16)
    return round_up(problem.head_dim, 16), round_up(-(-dim_v // -(-dim_v // 128)), 16)


def _smem_split(problem: Problem, tiles: Tiles, device: Device) -> int:
    """As `_smem_sm80`, with rows of twice head_dim fp16 numbers; out is staged as float32."""
    dim, dim_v = _dims_split(problem)
    pitch_qk, pitch_v = 4 * dim + 16, 4 * dim_v + 16
    return max(tiles.block_m * pitch_qk + tiles.stages * tiles.block_n * (pitch_qk + pitch_v), tiles.block_m * pitch_v)


def _tiles_split(problem: Problem, device: Device) -> Sequence[Tiles]:
    dim, dim_v = _dims_split(problem)
    weight = register_weight(problem) + 2 * (dim % 64 > 0 or dim_v % 64 > 0)  # loops the compiler allots worse
    fitting = next(tiles for limit, tiles in _TILES_SPLIT.items() if max(dim, dim_v) <= limit)
    # First those of which an SM holds as many CTAs as they are made for.
    able = _allowed(fitting, weight, device)
    return sorted(able, key=lambda t: t.min_blocks * (_smem_split(problem, t, device) + 1024) > device.smem_per_sm)


_TILES_SPLIT = {  # by the wider of head_dim and columns of out
    64: (
        Tiles(128, 32, 2, 4, 2, 10, "32 rows a warp read each fragment of K and V for two sets of three products"),
        Tiles(128, 32, 1, 4, 2, 10),
        Tiles(64, 32, 1, 4, 2),
    ),
    128: (
        Tiles(128, 48, 1, 8, 1, 1, "32 rows a warp are some 10 % faster and spill", archs=(90,)),
        Tiles(64, 32, 1, 4, 2, 12, "fits twice into 163 KB"),
        Tiles(128, 32, 1, 8, 1, 12, "99 KB hold one CTA"),
        Tiles(64, 32, 1, 4, 1, 12),
        Tiles(64, 16, 1, 4, 1),
    ),
    256: (Tiles(128, 32, 1, 8, 1, 12), Tiles(64, 32, 1, 4, 1, 12), Tiles(64, 16, 1, 4, 1)),
    512: (Tiles(64, 32, 1, 4, 1, 12), Tiles(32, 32, 1, 2, 1, 12), Tiles(16, 16, 1, 1, 1)),
}

FORWARD: tuple[KernelSpec, ...] = (
    KernelSpec("forward_sm90", _declines_sm90, lambda problem, device: "", _dims_sm90, _tiles_sm90, _smem_sm90),
    KernelSpec("forward_split", _declines_split, lambda problem, device: "MmaSplit", _dims_split, _tiles_split, _smem_split),
    KernelSpec("forward_sm80", _declines_sm80, _mma_sm80, _dims_sm80, _tiles_sm80, _smem_sm80),
    KernelSpec("forward_simt", _declines_simt, lambda problem, device: "", _dims_simt, _tiles_simt, _smem_simt),
)


def support_rows() -> list[dict[str, str]]:
    """What the kernels serve, asked of the kernels: one row for each dtype and precision, in order of the registry."""
    from cuattn.catalogue import PRECISIONS as KINDS
    from cuattn.catalogue import decode_problem_of, problem_of
    from cuattn.decode import declines_decode

    def cached(dtype: str, precision: str, dims: tuple[int, int]) -> DecodeProblem:
        return decode_problem_of(dtype, dims=dims, precision=precision)

    kernels: list[tuple[str, Callable[..., list[str]], Callable[..., Problem | DecodeProblem]]] = [
        *((spec.name, spec.unsupported, problem_of) for spec in FORWARD),
        ("decode", declines_decode, cached),
    ]
    rows = []
    for dtype, precision in KINDS:
        for name, unsupported, make in kernels:
            dims = [d for d in range(1, 1025) if not unsupported(make(dtype, precision, (d, d)), DEVICES["sm_90a"])]
            served = [arch for arch, gpu in DEVICES.items() if not unsupported(make(dtype, precision, (64, 64)), gpu)]
            if dims and served:
                rows.append(
                    {
                        "dtype": dtype,
                        "precision": precision if dtype == "float32" else "",
                        "kernel": name,
                        "head_dim, head_dim_v": f"{dims[0]}-{dims[-1]}",
                        "compiled for": ", ".join(served),
                    }
                )
    return rows
