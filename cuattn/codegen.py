"""A plan as the text of translation units: one kernel each, its variant spelled out as a struct of names.

Sizes never enter the text: two calls that differ in batch or length share their cubins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cuattn.backward import CELLS, COLUMNS, COPIES, STORE, BackwardPlan, one_row
from cuattn.decode import APPEND_THREADS, CACHE_DTYPES, COMBINED, DecodePlan, LatentPlan
from cuattn.fields import CTYPES, ITEMSIZE, Operand
from cuattn.launch import backward_struct, decode_struct, forward_struct
from cuattn.plan import SPLIT_THREADS, TILE_MAP_THREADS, WARPS_PER_COMBINE, Plan
from cuattn.score_mods import ScoreMod


class Unit(NamedTuple):
    """One translation unit and what a launch of its kernel needs."""

    entry: str
    source: str
    threads: int
    smem_bytes: int
    chained: bool = False
    """whether it waits for the grids ahead by itself (kernels/ptx/griddepcontrol.cuh)"""


def units(plan: Plan) -> dict[str, Unit]:
    """By role, in launch order: magnitude and split (if inputs become pairs of fp16 numbers), tile_map (if the mask needs one),
    forward, combine (if keys are split).
    """
    result = {}
    if plan.split_inputs:
        result["magnitude"] = _unit(plan, "magnitude", SPLIT_THREADS, 0)
        result["split"] = _unit(plan, "split", SPLIT_THREADS, 0)
    if plan.map_words:
        result["tile_map"] = _unit(plan, "tile_map", TILE_MAP_THREADS, 0)
    result["forward"] = _unit(plan, plan.kernel, plan.threads, plan.smem_bytes)
    if plan.num_splits > 1:
        result["combine"] = _unit(plan, "combine", 32 * WARPS_PER_COMBINE, 0)
    return result


def _flag(value: bool) -> str:
    return "true" if value else "false"


def mod_type(plan: Plan | BackwardPlan | DecodePlan) -> str:
    """C++ type of a plan's score modifications, applied in order."""
    types = [mod.cuda_type(operands, uniform) for mod, operands, uniform in _mods(plan)]
    if not types:
        return "NoScoreMod"
    return functools.reduce(lambda rest, first: f"Chain<{first}, {rest}>", reversed(types))


def _mods(plan: Plan | BackwardPlan | DecodePlan) -> Iterator[tuple[ScoreMod, Sequence[Operand], int | None]]:
    """Each modification, its operands, and what `ScoreMod.cuda_type` wants to know of the backward."""
    p = plan.problem
    wanted = plan.backward.wanted if isinstance(plan, BackwardPlan) else (False,) * len(p.mods)
    uniforms = 0
    for mod, operands, gradient in zip(p.mods, p.mod_operands, wanted, strict=True):
        yield mod, operands, uniforms if gradient else None
        uniforms += mod.uniforms if gradient else 0


def _definitions(plan: Plan | BackwardPlan | DecodePlan, kernel: str) -> list[str]:
    """What the types of a plan's score modifications refer to."""
    sources = [mod.cuda_source(operands, uniform) for mod, operands, uniform in _mods(plan)]
    if not sources:
        return []
    functions = "FastFunctions" if plan.problem.dtype in ("float16", "bfloat16") else "LibraryFunctions"
    # Fewer MUFU operations, at the expense of registers that wider outputs need.
    narrow = kernel == "forward_sm90" and plan.problem.head_dim_v <= 128
    tanh = "RationalTanh" if narrow else "ExponentialTanh"
    return [f"using Functions = {functions};", f"using Tanh = {tanh};", *sources]


def _translation_unit(
    plan: Plan | BackwardPlan,
    kernel: str,
    arguments: str,
    size: int,
    types: dict[str, str],
    constants: dict[str, int],
    flags: dict[str, bool],
    with_mods: bool,
) -> Unit:
    """The text around `struct Config`. `arguments`: name of the parameter struct in kernels/params.cuh, of so many bytes."""
    p = plan.problem
    definitions = _definitions(plan, kernel) if with_mods else []
    sinks = p.operand("sinks")
    lens = p.operand("q_lens") is not None or p.operand("kv_lens") is not None
    types = {
        "Element": CTYPES[p.dtype],
        "Real": "cuattn::Real",
        "Sink": CTYPES[sinks.dtype if sinks else p.real],
        **types,
        "Mask": p.mask.cuda_type([op.dtype for op in p.mask_operands]),
        "ScoreMod": mod_type(plan) if with_mods else "NoScoreMod",
    }
    flags = {
        "kPacked": p.packed,
        "kLens": lens,
        "kFoldScale": not p.mods and p.scale > 0,
        "kPositiveScale": p.scale > 0,
        "kDropout": p.dropout > 0,
        "kSinks": sinks is not None,
        **flags,
    }
    return _source(kernel, arguments, size, CTYPES[p.real], definitions, types, constants, flags)


def _source(
    kernel: str,
    arguments: str,
    size: int,
    real: str,
    definitions: Sequence[str],
    types: dict[str, str],
    constants: dict[str, int],
    flags: dict[str, bool],
) -> Unit:
    lines = [
        f'#include "{kernel}.cu"',
        "namespace cuattn {",
        f"using Real = {real};",
        *dict.fromkeys(text for text in definitions if text),
        "struct Config {",
        *(f"    using {name} = {value};" for name, value in types.items()),
        *(f"    static constexpr int {name} = {value};" for name, value in constants.items()),
        *(f"    static constexpr bool {name} = {_flag(value)};" for name, value in flags.items()),
        "};",
        "}  // namespace cuattn",
        f"using Arguments = cuattn::{arguments}<cuattn::Config>;",
        f"static_assert(sizeof(Arguments) == {size},",
        '              "launch.py lays the parameters out differently");',
        'extern "C" __global__ void __launch_bounds__(cuattn::Config::kThreads, cuattn::Config::kMinBlocks)',
        f"cuattn_{kernel}(const __grid_constant__ Arguments arguments) {{ cuattn::{kernel}<cuattn::Config>(arguments); }}",
    ]
    return Unit(f"cuattn_{kernel}", "\n".join(lines) + "\n", constants["kThreads"], constants["kSmemBytes"])


def _constants(plan: Plan | BackwardPlan, threads: int, smem_bytes: int, min_blocks: int) -> dict[str, int]:
    t = plan.tiles
    return {
        "kHeadDim": plan.head_dim,
        "kHeadDimV": plan.head_dim_v,
        "kBlockM": t.block_m,
        "kBlockN": t.block_n,
        "kStages": t.stages,
        "kThreads": threads,
        "kMinBlocks": min_blocks,
        "kSmemBytes": smem_bytes,
    }


def _unit(plan: Plan, kernel: str, threads: int, smem_bytes: int) -> Unit:
    """A kernel of the forward."""
    p = plan.problem
    attends = kernel == plan.kernel
    vectors = (16, 16, 16, p.vectors[3]) if attends and plan.split_inputs else p.vectors  # the workspace is aligned
    constants = {
        **_constants(plan, threads, smem_bytes, plan.tiles.min_blocks if attends else 1),
        **{f"kVec{name}": n for name, n in zip(("Q", "K", "V", "Out"), vectors, strict=True)},
    }
    types = {"Mma": plan.mma} if attends and plan.mma else {}
    flags = {"kOneChunk": plan.dv_chunks == 1, "kSplit": plan.num_splits > 1, "kPairRuns": False}
    tma = attends and plan.uses_tma
    if tma:
        t = plan.tiles
        constants |= {"kBiasStages": plan.bias_stages, "kQStages": t.q_stages}
        flags |= {"kOverlap": t.overlap, "kPingPong": t.ping_pong, "kPersistent": t.persistent, "kLateWait": t.late_wait}
        flags |= {"kKeepsMaxima": t.keep_maxima, "kBounded": t.bounded, "kScalesFirst": t.scale_first}
        flags |= {"kDrawsEarly": t.draws_early, "kNearestFirst": t.nearest_first}
        flags["kWholeRows"] = p.head_dim_v == plan.head_dim_v
    arguments = "TmaArguments" if tma else "ForwardArguments"
    size = len(forward_struct(plan, attends).image)
    return _translation_unit(plan, kernel, arguments, size, types, constants, flags, attends)


# Backward -------------------------------------------------------------------------------------------------------------

PREPARE_THREADS = 256
PREPARE_SM90_THREADS = 512
SINKS_THREADS = 512
BIAS_THREADS = 256
COMBINE_THREADS = 128


def backward_units(plan: BackwardPlan) -> dict[str, Unit]:
    """By role, in launch order: magnitude and split (if inputs become pairs of fp16 numbers), tile_map (if the mask needs one),
    prepare, backward, sinks (if there are), convert, combine (if CTAs shared queries), bias (unless there is none, or it is
    stored as it comes). In one pass there is neither prepare nor convert.
    """
    p, bias = plan.problem, plan.backward.bias
    result = {}
    if plan.split_inputs:
        result["magnitude"] = _backward_unit(plan, "magnitude", SPLIT_THREADS, 0)
        result["split"] = _backward_unit(plan, "split", SPLIT_THREADS, 0)
    if plan.map_words:
        constants = {
            **_constants(plan, TILE_MAP_THREADS, 0, 1),
            **{f"kVec{name}": 16 for name in ("Q", "K", "V", "Out")},
        }
        size = len(forward_struct(plan, False).image)
        flags = {"kOneChunk": True, "kSplit": False}
        result["tile_map"] = _translation_unit(plan, "tile_map", "ForwardArguments", size, {}, constants, flags, False)
    if not plan.in_one_pass:
        beside = plan.prepared_units > 0
        threads = PREPARE_SM90_THREADS if beside else PREPARE_THREADS
        result["prepare"] = _backward_unit(plan, "backward_prepare_sm90" if beside else "backward_prepare", threads, 0)
    result["backward"] = _backward_unit(plan, plan.kernel, plan.threads, plan.smem_bytes)
    if p.operand("sinks") is not None:
        result["sinks"] = _backward_unit(plan, "backward_sinks", SINKS_THREADS, 0)
    if not plan.in_one_pass:
        staged = plan.tiles.block_m * (plan.head_dim * ITEMSIZE[p.dtype] + 16)
        result["convert"] = _backward_unit(plan, "backward_convert", plan.slab_threads, staged)
    if plan.q_splits > 1:
        result["combine"] = _backward_unit(plan, "backward_combine", COMBINE_THREADS, 0)
    if bias is not None and plan.bias_kind is not STORE:
        result["bias"] = _backward_unit(plan, "backward_bias", BIAS_THREADS, 0)
    return result


_SPLIT_NEEDS = ("kHeadDim", "kHeadDimV", "kVecQ", "kVecK", "kVecV", "kVecDout", "kPairRuns")
NEEDS = {
    "magnitude": _SPLIT_NEEDS,
    "split": _SPLIT_NEEDS,
    "backward_prepare": ("kPrepareLanes", "kVecOut", "kVecDout", "kTf32", "kChained"),
    "backward_prepare_sm90": ("kPrepareLanes", "kHeadDim", "kHeadDimV", "kBlockM", "kVecOut", "kVecDout", "kTf32"),
    "backward_sinks": ("Sink",),
    "backward_convert": (
        *("Gemm", "kHeadDim", "kBlockM", "kBlockN", "kSlabThreads", "kVecDq", "kVectorRed", "kWarpSlabs"),
        *("kChained", "kCountPairs"),
    ),
    "backward_combine": (),
    "backward_bias": ("BiasElement", "BiasTarget", "kBiasKind", "kWide"),
}
"""What of Config the kernels around backward.cu read besides the names that all have: no mask and no modification reaches them,
so most calls share them."""


def _backward_unit(plan: BackwardPlan, kernel: str, threads: int, smem_bytes: int) -> Unit:
    p, backward = plan.problem, plan.backward
    attends = kernel == plan.kernel
    size = ITEMSIZE[p.dtype]
    ours = [math.gcd(16, dim * size) for dim in (p.head_dim, p.head_dim, p.head_dim_v)]  # contiguous, at an aligned address
    theirs = (*p.vectors, backward.vector_dout)
    if attends and plan.split_inputs:
        theirs = (16, 16, 16, p.vectors[3], 16)  # the workspace is aligned
    vectors = (*theirs, *ours)
    constants = {
        **_constants(plan, threads, smem_bytes, plan.tiles.min_blocks if attends else _residents(plan, kernel)),
        "kSlabThreads": plan.slab_threads,
        "kPrepareLanes": plan.prepare_lanes,
        "kDqBuffers": plan.tiles.dq_buffers,
        "kBiasKind": plan.bias_kind.number,
        "kVecBias": plan.staged_bias.vector_bytes if plan.staged_bias is not None else 16,
        "kUniform": sum(mod.uniforms for mod, wanted in zip(p.mods, backward.wanted, strict=True) if wanted),
        **{f"kVec{name}": n for name, n in zip(("Q", "K", "V", "Out", "Dout", "Dq", "Dk", "Dv"), vectors, strict=True)},
    }
    bias = plan.backward.bias or plan.staged_bias
    element = CTYPES[bias.dtype] if bias is not None else "Real"
    types = {
        "Gemm": plan.gemm.cuda,
        "BiasElement": element,
        "BiasTarget": element if plan.bias_kind is STORE else CTYPES[p.dtype] if plan.bias_kind is COPIES else "Real",
    }
    flags = {
        "kTf32": p.precision == "tf32",
        "kPairRuns": True,
        "kDeterministic": backward.deterministic,
        "kQuerySplit": plan.q_splits > 1,
        "kVectorRed": plan.device.number >= 90,
        "kWarpSlabs": plan.uses_tma,
        "kBiasPairs": _bias_in_pairs(plan),
        "kStageBias": plan.staged_bias is not None,
        "kBiasRow": plan.staged_bias is not None and one_row(plan.staged_bias),
        "kWide": bias_is_wide(plan),
        "kChained": plan.chained,
        "kCountPairs": plan.counts_pairs,
        "kPreparesAhead": plan.prepares_ahead,
        "kOneByOne": plan.one_by_one,
    }
    size = len(backward_struct(plan, plan.launches[0], attends).image)
    if attends:
        if plan.uses_tma:
            flags |= {"kEarly": plan.early, "kBulkDq": plan.tiles.bulk, "kRuns": plan.tiles.runs, "kSendDs": plan.sends_ds}
            flags |= {"kAlternate": plan.tiles.alternate}
            flags |= {"kSeeded": plan.tiles.seeded, "kStoreTma": bool(plan.tma_gradients), "kInOnePass": plan.in_one_pass}
        arguments = "BackwardTmaArguments" if plan.uses_tma else "BackwardArguments"
        unit = _translation_unit(plan, kernel, arguments, size, types, constants, flags, True)
        return unit._replace(chained=plan.chained)
    sinks = p.operand("sinks")
    types = {**types, "Sink": CTYPES[sinks.dtype if sinks else p.real]}
    common = {"Element": CTYPES[p.dtype], "Real": "cuattn::Real", "Mask": "FullMask", "ScoreMod": "NoScoreMod"}
    types = common | {name: types[name] for name in NEEDS[kernel] if name in types}
    constants = {
        name: constants[name] for name in ("kThreads", "kMinBlocks", "kSmemBytes", *NEEDS[kernel]) if name in constants
    }
    lens = p.operand("q_lens") is not None or p.operand("kv_lens") is not None
    flags = {"kPacked": p.packed, "kLens": lens} | {name: flags[name] for name in NEEDS[kernel] if name in flags}
    unit = _source(kernel, "BackwardArguments", size, CTYPES[p.real], (), types, constants, flags)
    return unit._replace(chained=plan.chained and kernel == "backward_convert")


def _residents(plan: BackwardPlan, kernel: str) -> int:
    """CTAs on a multiprocessor, of which memory needs several for its rate, though a thread holds a whole share of a slab."""
    if kernel != "backward_convert" or not plan.uses_tma:
        return 1
    sums = plan.tiles.block_m * plan.head_dim // plan.slab_threads
    return min(2048, 65536 // (sums + 16)) // plan.slab_threads


def _bias_in_pairs(plan: BackwardPlan) -> bool:
    """Whether two elements of a row of dbias, or of bias_sum, may be written at once."""
    bias = plan.backward.bias
    if plan.bias_kind is CELLS:  # rows of bias_sum are padded to pairs
        return plan.problem.real == "float32" and plan.device.number >= 90
    return bias is not None and plan.bias_kind is STORE and bias.shape[-1] % 2 == 0


def bias_is_wide(plan: BackwardPlan) -> bool:
    """Whether an element of dbias is a sum over all keys, which takes a CTA."""
    bias = plan.backward.bias
    return bias is not None and plan.bias_kind is COLUMNS and bias.shape[-1] == 1 and plan.problem.seqlen_k > 1


# KV cache -------------------------------------------------------------------------------------------------------------


def decode_units(plan: DecodePlan) -> dict[str, Unit]:
    """By role, in launch order: append (if there are new keys), decode (once for each piece of the columns)."""
    p = plan.problem
    result = {"append": _decode_unit(plan, "append", APPEND_THREADS, 0)} if p.appends else {}
    return {**result, "decode": _decode_unit(plan, plan.kernel, plan.threads, plan.smem_bytes)}


def _decode_unit(plan: DecodePlan, kernel: str, threads: int, smem_bytes: int) -> Unit:
    p, attends = plan.problem, kernel == plan.kernel
    sinks, rotary = p.operand("sinks"), p.operand("rotary_cos")
    types = {
        "Element": CTYPES[p.dtype],
        "Cache": CACHE_DTYPES.get(p.cache_dtype) or CTYPES[p.dtype],
        "Real": "cuattn::Real",
        "Rotary": CTYPES[rotary.dtype if rotary is not None else p.real],
        "Mask": p.mask.cuda_type([op.dtype for op in p.mask_operands]) if attends else "FullMask",
        "ScoreMod": mod_type(plan) if attends else "NoScoreMod",
    }
    constants = {"kThreads": threads, "kSmemBytes": smem_bytes, "kMinBlocks": plan.min_blocks if attends else 1}
    flags = {"kPacked": p.packed, "kPaged": p.paged, "kRotary": rotary is not None}
    flags["kInterleaved"] = p.rotary_interleaved and rotary is not None
    if attends:
        types |= {"Sink": CTYPES[sinks.dtype if sinks is not None else p.real]} | ({"Mma": plan.mma} if plan.mma else {})
        constants |= {
            "kHeadDim": plan.head_dim,
            "kHeadDimV": plan.head_dim_v,
            "kBlockN": plan.block_n,
            "kWarpsM": plan.warps_m,
            "kWarpsN": plan.warps_n,
            "kStages": plan.stages,
            "kBoxRows": plan.box_rows,
            "kCombined": COMBINED,
            **{f"kVec{name}": n for name, n in zip(("Q", "K", "V", "Out"), p.vectors, strict=True)},
        }
        flags["kSinks"] = sinks is not None
        flags["kWholeRows"] = (p.head_dim, p.head_dim_v) == (plan.head_dim, plan.pieces * plan.head_dim_v)
        caches = [p.operand(name) for name in ("k_cache", "v_cache")]
        flags["kNarrows"] = p.cache_dtype in CACHE_DTYPES and p.dtype == "bfloat16"
        flags["kParted"] = plan.max_parts > 0
        flags["kAlike"] = len({op.strides for op in caches if op is not None}) == 1
    arguments = "DecodeArguments"
    if attends and plan.alone:
        arguments = "BoxedArguments"
    if attends and isinstance(plan, LatentPlan):
        arguments = "LatentArguments"
        flags["kFoldScale"] = not p.mods and p.scale > 0
    definitions = _definitions(plan, kernel) if attends else []
    size = len(decode_struct(plan, attends).image)
    unit = _source(kernel, arguments, size, CTYPES[p.real], definitions, types, constants, flags)
    return unit._replace(chained=attends and plan.alone)
