"""A plan as the text of translation units: one kernel each, its variant spelled out as a struct of names.

Sizes never enter the text: two calls that differ in batch or length share their cubins.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from cuattn.fields import CTYPES
from cuattn.launch import parameter_bytes
from cuattn.plan import SPLIT_THREADS, WARPS_PER_COMBINE, WARPS_PER_TILE_MAP, Plan


class Unit(NamedTuple):
    """One translation unit and what a launch of its kernel needs."""

    entry: str
    source: str
    threads: int
    smem_bytes: int


def units(plan: Plan) -> dict[str, Unit]:
    """By role, in launch order: magnitude and split (if inputs become pairs of fp16 numbers), tile_map (if the mask needs one),
    forward, combine (if keys are split).
    """
    result = {}
    if plan.split_inputs:
        result["magnitude"] = _unit(plan, "magnitude", SPLIT_THREADS, 0)
        result["split"] = _unit(plan, "split", SPLIT_THREADS, 0)
    if plan.map_words:
        result["tile_map"] = _unit(plan, "tile_map", 32 * WARPS_PER_TILE_MAP, 0)
    result["forward"] = _unit(plan, plan.kernel, plan.threads, plan.smem_bytes)
    if plan.num_splits > 1:
        result["combine"] = _unit(plan, "combine", 32 * WARPS_PER_COMBINE, 0)
    return result


def _flag(value: bool) -> str:
    return "true" if value else "false"


def mod_type(plan: Plan) -> str:
    """C++ type of a plan's score modifications, applied in order."""
    types = [m.cuda_type([op.dtype for op in ops]) for m, ops in zip(plan.problem.mods, plan.problem.mod_operands, strict=True)]
    if not types:
        return "NoScoreMod"
    return functools.reduce(lambda rest, first: f"Chain<{first}, {rest}>", reversed(types))


def _unit(plan: Plan, kernel: str, threads: int, smem_bytes: int) -> Unit:
    p, t = plan.problem, plan.tiles
    attends = kernel == plan.kernel
    sinks = p.operand("sinks")
    definitions = [m.cuda_source([op.dtype for op in ops]) for m, ops in zip(p.mods, p.mod_operands, strict=True)]
    lens = p.operand("q_lens") is not None or p.operand("kv_lens") is not None
    vectors = (16, 16, 16, p.vectors[3]) if attends and plan.split_inputs else p.vectors  # the workspace is aligned
    constants = {
        "kHeadDim": plan.head_dim,
        "kHeadDimV": plan.head_dim_v,
        "kBlockM": t.block_m,
        "kBlockN": t.block_n,
        "kStages": t.stages,
        "kThreads": threads,
        "kMinBlocks": t.min_blocks if attends else 1,
        "kSmemBytes": smem_bytes,
        **{f"kVec{name}": n for name, n in zip(("Q", "K", "V", "Out"), vectors, strict=True)},
    }
    flags = {
        "kPacked": p.packed,
        "kLens": lens,
        "kOneChunk": plan.dv_chunks == 1,
        "kSplit": plan.num_splits > 1,
        "kFoldScale": not p.mods and p.scale > 0,
        "kDropout": p.dropout > 0,
        "kSinks": sinks is not None,
    }
    tma = attends and plan.uses_tma
    if tma:
        constants |= {"kBiasStages": plan.bias_stages, "kQStages": t.q_stages}
        flags |= {"kOverlap": t.overlap, "kPingPong": t.ping_pong, "kPersistent": t.persistent, "kLateWait": t.late_wait}
    mods = mod_type(plan) if attends else "NoScoreMod"
    lines = [
        f'#include "{kernel}.cu"',
        "namespace cuattn {",
        f"using Real = {CTYPES[p.real]};",
        *(dict.fromkeys(text for text in definitions if text) if attends else ()),
        "struct Config {",
        f"    using Element = {CTYPES[p.dtype]};",
        "    using Real = cuattn::Real;",
        f"    using Sink = {CTYPES[sinks.dtype if sinks else p.real]};",
        *([f"    using Mma = {plan.mma};"] if attends and plan.mma else []),
        f"    using Mask = {p.mask.cuda_type([op.dtype for op in p.mask_operands])};",
        f"    using ScoreMod = {mods};",
        *(f"    static constexpr int {name} = {value};" for name, value in constants.items()),
        *(f"    static constexpr bool {name} = {_flag(value)};" for name, value in flags.items()),
        "};",
        "}  // namespace cuattn",
        f"using Arguments = cuattn::{'TmaArguments' if tma else 'ForwardArguments'}<cuattn::Config>;",
        f"static_assert(sizeof(Arguments) == {parameter_bytes(plan, attends)},",
        '              "launch.py lays the parameters out differently");',
        'extern "C" __global__ void __launch_bounds__(cuattn::Config::kThreads, cuattn::Config::kMinBlocks)',
        f"cuattn_{kernel}(const __grid_constant__ Arguments arguments) {{ cuattn::{kernel}<cuattn::Config>(arguments); }}",
    ]
    return Unit(f"cuattn_{kernel}", "\n".join(lines) + "\n", threads, smem_bytes)
