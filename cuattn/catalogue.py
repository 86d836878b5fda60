"""A catalogue of calls: what `compile` prewarms and what the compile test builds for every architecture, without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from cuattn.arrays import View, contiguous_strides
from cuattn.backward import BackwardPlan, BackwardProblem, declines, make_backward_plan, make_backward_problem
from cuattn.codegen import backward_units, decode_units, units
from cuattn.decode import DecodePlan, DecodeProblem, Scalars, declines_decode, make_decode_plan, make_decode_problem
from cuattn.masks import BlockSparse, BooleanMask, Full, Mask, SlidingWindow, TreeMask
from cuattn.plan import Plan, make_plan
from cuattn.problem import Problem, make_problem
from cuattn.registry import DEVICES, FORWARD, Device
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

PRECISIONS = (
    ("float16", "ieee"),
    ("bfloat16", "ieee"),
    ("float32", "ieee"),
    ("float32", "tf32x3"),
    ("float32", "tf32"),
    ("float64", "ieee"),
)
"""Every (dtype, precision) that a call may have."""

COMMON_DIMS = ((64, 64), (128, 128), (256, 256))
OTHER_DIMS = ((8, 8), (40, 72), (80, 80), (96, 96), (192, 128), (192, 192), (64, 512), (512, 512))


def view(shape: tuple[int, ...], dtype: str, ptr: int = 0) -> View:
    """A contiguous array that need not exist."""
    return View(ptr, shape, contiguous_strides(shape), dtype)


def problem_of(
    dtype: str,
    precision: str = "ieee",
    dims: tuple[int, int] = (128, 128),
    *,
    mask: Mask | None = None,
    mods: tuple[ScoreMod, ...] = (),
    seqlens: tuple[int, int] = (4096, 4096),
    heads: tuple[int, int] = (16, 8),
    packed: bool = False,
    extras: tuple[str, ...] = (),
    dropout: float = 0.0,
    misaligned: bool = False,
) -> Problem:
    """A problem over arrays that need not exist. `extras`: of sinks, q_lens, kv_lens; `mask` and `mods` are over Views."""
    batch = 4
    lead_q, lead_k = ((batch * seqlens[0],), (batch * seqlens[1],)) if packed else ((batch, seqlens[0]), (batch, seqlens[1]))
    ptr = 2 if misaligned else 0
    views = {
        "q": view((*lead_q, heads[0], dims[0]), dtype, ptr),
        "k": view((*lead_k, heads[1], dims[0]), dtype, ptr),
        "v": view((*lead_k, heads[1], dims[1]), dtype, ptr),
    }
    small = {"sinks": view((heads[0],), "float32"), "q_lens": view((batch,), "int32"), "kv_lens": view((batch,), "int32")}
    views.update({name: small[name] for name in extras})
    if packed:
        views.update({name: view((batch + 1,), "int32") for name in ("cu_seqlens_q", "cu_seqlens_k")})
    mask = mask or Full()
    own = [a for mod in mods for a in mod.arrays]
    return make_problem(
        views,
        mask,
        mask.arrays,
        mods,
        own,
        max_seqlen_q=seqlens[0] if packed else None,
        max_seqlen_k=seqlens[1] if packed else None,
        scale=None,
        dropout=dropout,
        precision=precision,
        return_lse=True,
    )


def _features(dtype: str) -> list[dict[str, Any]]:
    """One call for each mask, modification and option, and some of several together."""
    boolean = BooleanMask(view((4, 1, 4096, 4096), "bool"))
    blocks = BlockSparse(view((64, 64), "int32"), 64, 64, view((3, 64, 64), "bool"))
    bias = Bias(view((1, 16, 4096, 4096), dtype))
    alibi = Alibi(view((16,), "float32"))
    slope = view((16,), "float32")
    user = UserMod("s + w * slope[h] * Real(j - i)", "1", {"w": 0.5, "slope": slope}, {"slope": ("h", "w * Real(j - i)")})
    causal = SlidingWindow(None, 0)
    return [
        {"mask": causal, "packed": True, "extras": ("kv_lens",)},
        {"mask": SlidingWindow(128, 0), "extras": ("sinks",)},
        {"mask": boolean},
        {"mask": blocks & causal, "extras": ("q_lens", "kv_lens")},
        {"mods": (bias,)},
        {"mods": (SoftCap(30.0),), "mask": causal},
        {"mods": (SoftCap(30.0), alibi, bias, user), "mask": causal & boolean, "extras": ("sinks", "kv_lens"), "dropout": 0.1},
        {"mods": (user,)},
        {"dropout": 0.1, "mask": causal},
        {"seqlens": (1, 65536), "heads": (8, 8), "extras": ("sinks",)},
        {"seqlens": (3, 65536), "heads": (8, 8), "packed": True},
    ]


def problems(everything: bool) -> Iterator[Problem]:
    """The common calls, or with `everything` also every option, head dimension and alignment."""
    for (dtype, precision), dims in itertools.product(PRECISIONS, COMMON_DIMS):
        yield problem_of(dtype, precision, dims)
        yield problem_of(dtype, precision, dims, mask=SlidingWindow(None, 0))
    if not everything:
        return
    for dtype, precision in PRECISIONS:
        for dims in OTHER_DIMS:
            yield problem_of(dtype, precision, dims, mask=SlidingWindow(None, 0))
        yield problem_of(dtype, precision, (100, 100), misaligned=dtype in ("float16", "bfloat16"))
        features = _features(dtype)
        for dims, options in itertools.product(((128, 128),), features):
            yield problem_of(dtype, precision, dims, **options)
        for dims in ((64, 64), (256, 256), (512, 512)):  # the heaviest combination, with every tile
            yield problem_of(dtype, precision, dims, **features[6])
        if dtype in ("float16", "bfloat16"):  # Hopper has tiles of their own for short rows
            short: dict[str, Any] = {"mask": SlidingWindow(None, 0), "heads": (96, 96)}
            for dims in COMMON_DIMS:
                yield problem_of(dtype, precision, dims, seqlens=(512, 512), heads=(96, 96))
                yield problem_of(dtype, precision, dims, seqlens=(512, 512), **short)
                yield problem_of(dtype, precision, dims, seqlens=(1000, 1000), **short)
                for mask in (None, short["mask"]):  # a CTA for each query tile
                    yield problem_of(dtype, precision, dims, mask=mask, seqlens=(1000, 1000), heads=(4, 4))
            for options in (features[0], features[1], features[5], features[8]):
                yield problem_of(dtype, precision, (128, 128), seqlens=(1000, 1000), **{**short, **options})


def backward_problem_of(problem: Problem, deterministic: bool = False) -> BackwardProblem:
    """The gradients of a problem by everything, from dout and dlse that need not exist."""
    lead = (problem.total_q,) if problem.packed else (problem.batch, problem.seqlen_q)
    out = view((*lead, problem.num_heads, problem.head_dim_v), problem.dtype)
    lse = view((*lead[:-1], problem.num_heads, lead[-1]), problem.real)
    wanted = tuple(bool(mod.differentiable) for mod in problem.mods)
    return make_backward_problem(problem, out, lse, lse, out, wanted, deterministic)


def backward_plans(arch: str, everything: bool = False) -> list[BackwardPlan]:
    """As `plans`, of the gradients: the common calls, or also the options that need the most of a kernel."""
    device = DEVICES[arch]
    wanted = []
    for dtype, precision in PRECISIONS:
        for dims, n in itertools.product(COMMON_DIMS, (4096, 8192)):  # few queries, and more
            wanted.append((problem_of(dtype, precision, dims, mask=SlidingWindow(None, 0), seqlens=(n, n)), False))
        if everything:
            features = _features(dtype)
            wanted += [(problem_of(dtype, precision, dims), False) for dims in ((40, 72), (192, 128), (512, 512))]
            wanted += [(problem_of(dtype, precision, (128, 128), **features[n]), n == 4) for n in (0, 4, 6)]
            wanted += [(problem_of(dtype, precision, dims, **features[6]), False) for dims in ((64, 64), (256, 256))]
            keys = Bias(view((16, 1, 4096), dtype))
            wanted.append((problem_of(dtype, precision, (64, 64), mods=(keys,), extras=("sinks",)), True))
            wanted.append((problem_of(dtype, precision, (100, 100), misaligned=True, dropout=0.1), False))
    made = [
        make_backward_plan(backward_problem_of(problem, deterministic), device)
        for problem, deterministic in wanted
        if not declines(problem, device)
    ]
    return made + [plan for plan in _hopper_plans(device) if everything and plan.uses_tma]


def _hopper_plans(device: Device) -> Iterator[BackwardPlan]:
    """Every option at every width of backward_sm90, and deterministic calls."""
    for dtype, dims in itertools.product(("float16", "bfloat16"), ((64, 64), (128, 128), (256, 256), (192, 128))):
        causal, shapes = SlidingWindow(None, 0), ((1, 16, 4096, 4096), (4, 16, 4096, 4096), (16, 1, 4096))
        biases = [Bias(view(shape, dtype)) for shape in shapes]
        more: list[dict[str, Any]] = []
        more += [{"mods": (bias,), "mask": mask, "extras": ("kv_lens",)} for bias in biases for mask in (Full(), causal)]
        more += [{"mods": (SoftCap(30.0), bias)} for bias in biases] + [{"mods": (biases[2],)}]
        # One that is not aligned is read element by element.
        more += [{"mods": (Bias(view(shapes[0], dtype, 2)),)}, {"mask": SlidingWindow(1024, 0)}]
        boolean = BooleanMask(view((4, 1, 4096, 4096), "bool"))
        problems = [(problem_of(dtype, dims=dims, mask=mask), True) for mask in (Full(), causal, boolean)]
        more += [{"mask": boolean, "packed": True}]
        problems += [(problem_of(dtype, dims=dims, **options), False) for options in ({}, *_features(dtype), *more)]
        for problem, deterministic in problems:
            if not declines(problem, device):
                yield make_backward_plan(backward_problem_of(problem, deterministic), device)


def plans(arch: str, everything: bool = False) -> list[Plan]:
    """Plans of the catalogue for a typical GPU of an architecture (a key of `registry.DEVICES`)."""
    if arch not in DEVICES:
        raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(DEVICES)}")
    device = DEVICES[arch]
    # What every kernel declines by rule is not a plan; a problem that fits no tile still raises.
    return [
        make_plan(problem, device)
        for problem in problems(everything)
        if not all(spec.unsupported(problem, device) for spec in FORWARD)
    ]


def decode_problem_of(
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    dims: tuple[int, int] = (128, 128),
    *,
    batch: int = 4,
    seqlen_q: int = 1,
    heads: tuple[int, int] = (64, 8),
    page_size: int = 16,
    mask: Mask | None = None,
    mods: tuple[ScoreMod, ...] = (),
    appends: bool = False,
    packed: bool = False,
    rotary_dim: int = 0,
    sinks: bool = False,
    misaligned: bool = False,
    latent: bool = False,
    **options: Any,
) -> DecodeProblem:
    """A call over a cache that need not exist: sequences of up to 4096 tokens, contiguous where page_size is 0.

    latent: values are columns of the keys.
    """
    length, ptr = 4096, 2 if misaligned else 0
    cache = (batch * length // page_size, page_size) if page_size else (batch, length)
    lead = (batch * seqlen_q,) if packed else (batch, seqlen_q)
    views = {
        "q": view((*lead, heads[0], dims[0]), dtype, ptr),
        "k_cache": view((*cache, heads[1], dims[0]), cache_dtype or dtype, ptr),
        "cache_seqlens": view((batch,), "int32"),
    }
    if not latent:
        views["v_cache"] = view((*cache, heads[1], dims[1]), cache_dtype or dtype, ptr)
    if page_size:
        views["page_table"] = view((batch, length // page_size), "int32")
    if packed:
        views["cu_seqlens_q"] = view((batch + 1,), "int32")
    if appends:
        new = ("k",) if latent else ("k", "v")
        views.update({name: view((*lead, heads[1], dim), dtype) for name, dim in zip(new, dims, strict=False)})
    if rotary_dim:
        views.update({name: view((length, rotary_dim // 2), "float32") for name in ("rotary_cos", "rotary_sin")})
    if sinks:
        views["sinks"] = view((heads[0],), "float32")
    mask = mask or SlidingWindow(None, 0)
    own = [*mask.arrays, *(a for mod in mods for a in mod.arrays)]
    scalars = Scalars(None, True, False, 0, True, seqlen_q if packed else None, "ieee")
    scalars = scalars._replace(head_dim_v=dims[1] if latent else None, **options)
    return make_decode_problem(views, mask, mods, own, scalars)


def decode_plans(arch: str, everything: bool = False) -> list[DecodePlan]:
    """As `plans`, over a KV cache: one query token, or also several, other caches and options."""
    device = DEVICES[arch]
    problems = [decode_problem_of(dims=dims, appends=True) for dims in COMMON_DIMS]
    if everything:
        alibi, bias = Alibi(view((64,), "float32")), Bias(view((4, 64, 8, 4096), "bfloat16"))
        tree = TreeMask(view((4, 1, 8, 8), "bool")) & SlidingWindow(512, None)
        problems += [
            decode_problem_of(batch=1),
            decode_problem_of(
                "float16", batch=1, dims=(256, 256), heads=(16, 2), page_size=0, sinks=True, mods=(SoftCap(30.0),)
            ),
            decode_problem_of("bfloat16", "float8_e4m3fn", batch=1, seqlen_q=2, mods=(SoftCap(30.0),)),
            decode_problem_of(deterministic=True),
            decode_problem_of("float16", page_size=0, seqlen_q=4, appends=True, rotary_dim=64),
            decode_problem_of(seqlen_q=8, mask=tree, mods=(SoftCap(30.0), alibi, bias), sinks=True, packed=True),
            decode_problem_of("float16", "int8", rotary_dim=32, appends=True, packed=True),
            decode_problem_of("bfloat16", "float8_e4m3fn", seqlen_q=8, appends=True),
            decode_problem_of("bfloat16", "float8_e4m3fn", (256, 256), heads=(32, 8)),
            decode_problem_of(dims=(256, 256), heads=(32, 8), seqlen_q=16),
            decode_problem_of(dims=(100, 72), misaligned=True),
        ]
        for dtype, precision in PRECISIONS[2:]:
            kind: dict[str, Any] = {"dtype": dtype, "precision": precision}
            problems += [decode_problem_of(dims=dims, **kind) for dims in COMMON_DIMS]
            problems += [
                decode_problem_of(batch=1, rotary_dim=64, appends=True, **kind),
                decode_problem_of(seqlen_q=4, deterministic=True, **kind),
                decode_problem_of(dims=(256, 256), seqlen_q=8, **kind),
                decode_problem_of(seqlen_q=8, mask=tree, mods=(SoftCap(30.0), alibi, bias), sinks=True, packed=True, **kind),
                decode_problem_of(dims=(100, 72), page_size=0, misaligned=True, **kind),
                decode_problem_of(dims=(512, 512), heads=(32, 8), **kind),
                decode_problem_of(dims=(576, 512), heads=(128, 1), latent=True, **kind),
            ]
        for dtype, page_size, heads in (("bfloat16", 64, 128), ("float16", 16, 16), ("bfloat16", 1, 128), ("float16", 0, 64)):
            options: dict[str, Any] = {"page_size": page_size, "heads": (heads, 1), "mask": SlidingWindow(1024, 0)}
            problems.append(decode_problem_of(dtype, dims=(576, 512), latent=True, **options))
        problems += [
            decode_problem_of(dims=(576, 512), page_size=64, heads=(32, 1), mask=Full(), latent=True, appends=True),
            decode_problem_of(dims=(576, 512), heads=(16, 1), seqlen_q=4, latent=True, packed=True, mods=(SoftCap(30.0),)),
            decode_problem_of("float16", "int8", (576, 512), heads=(128, 1), latent=True),
            decode_problem_of(dims=(512, 512), heads=(32, 8)),
        ]
    return [make_decode_plan(problem, device) for problem in problems if not declines_decode(problem, device)]


def kernels(arch: str, everything: bool = False) -> dict[str, Plan | BackwardPlan | DecodePlan]:
    """Every kernel of all of these plans: its source, and the first plan that needs it."""
    found: dict[str, Plan | BackwardPlan | DecodePlan] = {}
    for plan in plans(arch, everything):
        found |= {unit.source: found.get(unit.source, plan) for unit in units(plan).values()}
    for gradients in backward_plans(arch, everything):
        found |= {unit.source: found.get(unit.source, gradients) for unit in backward_units(gradients).values()}
    for decode in decode_plans(arch, everything):
        found |= {unit.source: found.get(unit.source, decode) for unit in decode_units(decode).values()}
    return found
