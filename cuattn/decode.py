"""Problem and plan of attention over a KV cache: what problem.py, registry.py and plan.py are for the forward.

Kernels: kernels/append.cu writes new keys and values into the cache, kernels/decode.cu attends, or decode_latent_sm90.cu where
values are columns of the keys. All find lengths and pages on the device; nothing here depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from cuattn.arrays import View
from cuattn.fields import CTYPES, ITEMSIZE, Field, Operand
from cuattn.masks import Mask
from cuattn.problem import (
    FLOATS,
    canonical,
    check_mask_arrays,
    check_mod_arrays,
    check_scalars,
    check_vector,
    given,
    max_seqlen_of,
    out_view,
    vector_bytes,
)
from cuattn.registry import Device, round_up
from cuattn.score_mods import ScoreMod
from cuattn.tma import tma_obstacles

POINTERS = (
    "q",
    "k_cache",
    "v_cache",
    "out",
    "lse",
    "sinks",
    "cache_seqlens",
    "page_table",
    "cache_batch_idx",
    "cache_leftpad",
    "cu_seqlens_q",
    "k",
    "v",
    "rotary_cos",
    "rotary_sin",
    "k_scale",
    "v_scale",
    "partial_out",
    "partial_lse",
    "tickets",
    "call",
    "cache_seqlen",
)
"""The first words of DecodeParams, rewritten on every call; arrays of masks and score modifications take the slots after."""
SLOT = {name: slot for slot, name in enumerate(POINTERS)}
WORKSPACE = ("partial_out", "partial_lse", "tickets")
SHARED = {"v_cache": "k_cache", "v": "k", "v_scale": "k_scale"}
"""What is the same array as what, where values are the first columns of the keys."""

CACHE_DTYPES = {"float8_e4m3fn": "E4M3", "uint8": "E4M3", "int8": "Int8"}
"""8-bit elements of a cache and their names in kernels/; CuPy has no e4m3, so uint8 holds its bits."""
APPEND_THREADS = 128


class Scalars(NamedTuple):
    """Options of a call that take part in its plan."""

    scale: float | None
    return_lse: bool
    deterministic: bool
    num_splits: int
    rotary_interleaved: bool
    max_seqlen_q: int | None
    precision: str
    head_dim_v: int | None = None
    """values are the first columns of the keys, so many"""


@dataclass(frozen=True)
class DecodeProblem:
    """One call in canonical form: q 4-D (packed: a batch axis of stride 0), caches (pages, page_size, heads, dim).

    A cache without a page table has one page per sequence. Lengths are in tokens, strides (inside `operands`) in elements.
    """

    dtype: str
    cache_dtype: str
    precision: str
    batch: int
    seqlen_q: int
    total_q: int
    seqlen_new: int
    """of a dense call that appends; packed calls append as many tokens as they have queries"""
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    latent: bool
    """values are the first head_dim_v columns of the keys"""
    packed: bool
    pages: int
    page_size: int
    table_rows: int
    max_pages: int
    """of a sequence"""
    rotary_dim: int
    rotary_len: int
    rotary_interleaved: bool
    scale: float
    mask: Mask
    mods: tuple[ScoreMod, ...]
    return_lse: bool
    deterministic: bool
    num_splits: int
    operands: tuple[Operand | None, ...]
    """by slot: the named pointers, then the mask's arrays, then those of each score modification"""
    vectors: tuple[int, int, int, int]
    """bytes of the widest access that the alignment of q, k_cache, v_cache, out allows"""

    @property
    def real(self) -> str:
        """dtype of scores and statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def group(self) -> int:
        return self.num_heads // self.num_heads_kv

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.max_pages * self.page_size

    @property
    def appends(self) -> bool:
        return self.operand("k") is not None

    @property
    def paged(self) -> bool:
        return self.operand("page_table") is not None

    @property
    def mask_operands(self) -> tuple[Operand, ...]:
        start = len(POINTERS)
        return tuple(op for op in self.operands[start : start + len(self.mask.arrays)] if op is not None)

    @property
    def mod_operands(self) -> list[tuple[Operand, ...]]:
        start, parts = len(POINTERS) + len(self.mask.arrays), []
        for mod in self.mods:
            stop = start + len(mod.arrays)
            parts.append(tuple(op for op in self.operands[start:stop] if op is not None))
            start = stop
        return parts

    def operand(self, name: str) -> Operand | None:
        return self.operands[SLOT[name]]

    def __str__(self) -> str:
        cache = f"{self.pages} pages of {self.page_size}" if self.paged else f"{self.page_size} tokens"
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        dims += " latent" if self.latent else ""
        kind = self.dtype + (f" over {self.cache_dtype}" if self.cache_dtype != self.dtype else "")
        kind += " packed" if self.packed else ""
        extras = [str(self.mask), *(type(m).__name__ for m in self.mods)]
        extras += [n for n in ("sinks", "cache_leftpad", "k", "rotary_cos") if self.operand(n) is not None]
        sizes = f"b{self.batch} sq{self.seqlen_q} h{self.num_heads}/{self.num_heads_kv}"
        return f"DecodeProblem({kind}, {sizes}, {dims}, {cache}, {', '.join(extras)})"


# Arrays -> problem ----------------------------------------------------------------------------------------------------


def make_decode_problem(
    views: dict[str, View], mask: Mask, mods: tuple[ScoreMod, ...], own_views: Sequence[View], scalars: Scalars
) -> DecodeProblem:
    """Check a call and bring it into canonical form. views: by name in `POINTERS`; own_views: of the mask, then of mods."""
    packed = "cu_seqlens_q" in views
    latent = scalars.head_dim_v is not None
    if latent:
        views = _with_values(views, scalars.head_dim_v)
    q = canonical("q", views["q"], packed)
    if q.dtype not in FLOATS:
        raise TypeError(f"q: got dtype {q.dtype}, expected one of {', '.join(FLOATS)}")
    caches = {name: _cache(name, given(views, name), q) for name in ("k_cache", "v_cache")}
    k_cache, v_cache = caches["k_cache"], caches["v_cache"]
    _check_caches(q, k_cache, v_cache)
    check_scalars(scalars.scale, 0.0, scalars.precision)
    if scalars.precision != "ieee" and q.dtype != "float32":
        raise ValueError(f"precision: got {scalars.precision!r} with {q.dtype} inputs, expected it with float32 only")
    splits = scalars.num_splits
    if isinstance(splits, bool) or not isinstance(splits, int) or not 0 <= splits <= 256:
        raise ValueError(f"num_splits: got {splits!r}, expected an integer from 0 (chosen for you) to 256")
    batch, seqlen_q = q.shape[0], q.shape[1]
    if packed:
        cumulative = views["cu_seqlens_q"]
        if len(cumulative.shape) != 1 or cumulative.shape[0] < 1:
            raise ValueError(f"cu_seqlens_q: got shape {cumulative.shape}, expected (batch + 1,)")
        check_vector("cu_seqlens_q", cumulative, cumulative.shape[0], ("int32",))
        batch, seqlen_q = cumulative.shape[0] - 1, max_seqlen_of("max_seqlen_q", scalars.max_seqlen_q)
    elif scalars.max_seqlen_q is not None:
        raise ValueError("max_seqlen_q: got it without cu_seqlens_q, expected None for a dense q")
    pages, page_size, table_rows, max_pages = _pages(views, k_cache, batch)
    if max_pages * page_size >= 2**31 - 2**12:
        raise ValueError(f"page_table: got room for {max_pages * page_size} tokens, expected less than {2**31 - 2**12}")
    new = {name: _new_tokens(name, views, q, cache, batch, packed) for name, cache in (("k", k_cache), ("v", v_cache))}
    if ("k" in views) != ("v" in views):
        raise ValueError("k, v: got one without the other, expected both or neither")
    if new["k"] is not None and new["v"] is not None and new["k"].shape[:2] != new["v"].shape[:2]:
        raise ValueError(f"v: got {new['v'].shape[1]} new tokens, expected {new['k'].shape[1]} as k has")
    rotary_dim, rotary_len = _rotary(views, q)
    num_heads, num_heads_kv = q.shape[2], k_cache.shape[2]
    if "sinks" in views:
        check_vector("sinks", views["sinks"], num_heads, FLOATS)
    for name in ("k_scale", "v_scale"):
        if name in views:
            _check_scale(name, views[name], k_cache.dtype, batch, num_heads_kv)
    count = len(mask.arrays)
    full_shape = (batch, num_heads, seqlen_q, max_pages * page_size)
    check_mask_arrays(mask, own_views[:count], full_shape)
    check_mod_arrays(mods, own_views[count:], full_shape)
    out = canonical("out", out_view(views, (*views["q"].shape[:-1], v_cache.shape[3])), packed)
    named = {**views, "q": q, "out": out, "k_cache": k_cache, "v_cache": v_cache}
    named.update({name: view for name, view in new.items() if view is not None})
    dense_new = new["k"].shape[1] if new["k"] is not None and not packed else 0
    return DecodeProblem(
        dtype=q.dtype,
        cache_dtype=k_cache.dtype,
        precision=scalars.precision if q.dtype == "float32" else "ieee",
        batch=batch,
        seqlen_q=seqlen_q,
        total_q=q.shape[1],
        seqlen_new=dense_new,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        head_dim=q.shape[3],
        head_dim_v=v_cache.shape[3],
        latent=latent,
        packed=packed,
        pages=pages,
        page_size=page_size,
        table_rows=table_rows,
        max_pages=max_pages,
        rotary_dim=rotary_dim,
        rotary_len=rotary_len,
        rotary_interleaved=scalars.rotary_interleaved,
        scale=1.0 / math.sqrt(q.shape[3]) if scalars.scale is None else float(scalars.scale),
        mask=mask,
        mods=mods,
        return_lse=scalars.return_lse,
        deterministic=scalars.deterministic,
        num_splits=splits,
        operands=_operands(named, own_views),
        vectors=(vector_bytes(q), vector_bytes(k_cache), vector_bytes(v_cache), vector_bytes(out)),
    )


def _with_values(views: dict[str, View], head_dim_v: Any) -> dict[str, View]:
    """The views with those of values, which are columns of what holds the keys."""
    for name, source in SHARED.items():
        if name in views:
            raise ValueError(f"{name}: got it with head_dim_v, expected None: values are columns of {source}")
    if "rotary_cos" in views:
        raise ValueError("rotary_cos: got it with head_dim_v, expected None: it would rotate the columns that are values")
    dim = views["k_cache"].shape[-1] if views["k_cache"].shape else 0
    if isinstance(head_dim_v, bool) or not isinstance(head_dim_v, int) or not 1 <= head_dim_v <= dim:
        raise ValueError(f"head_dim_v: got {head_dim_v!r}, expected an integer from 1 to {dim}, the head_dim of k_cache")
    values = {}
    for name, source in SHARED.items():
        if source in views:
            view = views[source]
            values[name] = view if source == "k_scale" else view._replace(shape=(*view.shape[:-1], head_dim_v))
    return {**views, **values}


def _cache(name: str, view: View, q: View) -> View:
    expected = "(batch, seqlen, heads, head_dim) or (pages, page_size, heads, head_dim)"
    if len(view.shape) != 4:
        raise ValueError(f"{name}: got shape {view.shape}, expected {expected}")
    if view.dtype != q.dtype and (view.dtype not in CACHE_DTYPES or q.dtype not in ("float16", "bfloat16")):
        kinds = q.dtype + (" or " + ", ".join(CACHE_DTYPES) if q.dtype in ("float16", "bfloat16") else "")
        raise TypeError(f"{name}: got dtype {view.dtype}, expected {kinds} with {q.dtype} queries")
    if view.shape[-1] > 1 and view.strides[-1] != 1 and 0 not in view.shape:
        raise ValueError(f"{name}: got stride {view.strides[-1]} along the last axis, expected it to be contiguous (1)")
    return view


def _check_caches(q: View, k: View, v: View) -> None:
    if v.dtype != k.dtype:
        raise TypeError(f"v_cache: got dtype {v.dtype}, expected {k.dtype} as k_cache has")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v_cache: got shape {v.shape}, expected {k.shape[:3]} as k_cache has before the last axis")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache: got head_dim {k.shape[3]}, expected {q.shape[3]} as q has")
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(f"{'q' if q.shape[3] == 0 else 'v_cache'}: got head_dim 0, expected at least 1")
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"q: got {q.shape[2]} heads, expected a positive multiple of the {k.shape[2]} heads of the cache")


def _pages(views: dict[str, View], k_cache: View, batch: int) -> tuple[int, int, int, int]:
    """(pages, page_size, rows of the page table, pages of a sequence)."""
    pages, page_size = k_cache.shape[:2]
    index, table = views.get("cache_batch_idx"), views.get("page_table")
    if index is not None:
        check_vector("cache_batch_idx", index, batch, ("int32",))
    for name in ("cache_seqlens", "cache_leftpad"):
        if name in views:
            check_vector(name, views[name], batch, ("int32",))
    if table is None:
        if index is None and pages != batch:
            raise ValueError(f"k_cache: got {pages} sequences, expected {batch} as q has (or cache_batch_idx or page_table)")
        return pages, page_size, pages, 1
    if table.dtype != "int32":
        raise TypeError(f"page_table: got dtype {table.dtype}, expected int32")
    if len(table.shape) != 2 or (index is None and table.shape[0] != batch):
        raise ValueError(f"page_table: got shape {table.shape}, expected ({batch}, max_pages)")
    if table.shape[1] > 1 and table.strides[1] != 1 and 0 not in table.shape:
        raise ValueError(f"page_table: got stride {table.strides[1]} along its rows, expected contiguous rows")
    if page_size == 0:
        raise ValueError("k_cache: got pages of 0 tokens, expected at least 1")
    return pages, page_size, table.shape[0], table.shape[1]


def _new_tokens(name: str, views: dict[str, View], q: View, cache: View, batch: int, packed: bool) -> View | None:
    if name not in views:
        return None
    view = canonical(name, views[name], packed)
    if view.dtype != q.dtype:
        raise TypeError(f"{name}: got dtype {view.dtype}, expected {q.dtype} as q has")
    tokens = q.shape[1] if packed else view.shape[1]
    expected = (1 if packed else batch, tokens, *cache.shape[2:])
    if view.shape != expected:
        shape = ("total_q", *cache.shape[2:]) if packed else (batch, "any", *cache.shape[2:])
        raise ValueError(f"{name}: got shape {views[name].shape}, expected {shape}")
    return view


def _rotary(views: dict[str, View], q: View) -> tuple[int, int]:
    """(dimensions that are rotated, positions); (0, 0) without rotary embeddings."""
    cosine, sine = views.get("rotary_cos"), views.get("rotary_sin")
    if (cosine is None) != (sine is None):
        raise ValueError("rotary_cos, rotary_sin: got one without the other, expected both or neither")
    if cosine is None or sine is None:
        return 0, 0
    for name, view in (("rotary_cos", cosine), ("rotary_sin", sine)):
        if view.dtype not in FLOATS or view.dtype != cosine.dtype:
            raise TypeError(f"{name}: got dtype {view.dtype}, expected a float dtype, the same for both")
        if len(view.shape) != 2 or view.shape != cosine.shape or not view.shape[0]:
            raise ValueError(f"{name}: got shape {view.shape}, expected (positions, rotary_dim / 2), the same for both")
        if view.strides != cosine.strides or (view.shape[1] > 1 and view.strides[1] != 1):
            raise ValueError(f"{name}: got strides {view.strides}, expected contiguous rows, laid out alike")
    if 2 * cosine.shape[1] > q.shape[3]:
        raise ValueError(f"rotary_cos: got {cosine.shape[1]} angles, expected at most {q.shape[3] // 2}, half of head_dim")
    return 2 * cosine.shape[1], cosine.shape[0]


def _check_scale(name: str, view: View, cache_dtype: str, batch: int, heads: int) -> None:
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(
            f"{name}: got it with a {cache_dtype} cache, expected it with an 8-bit one ({', '.join(CACHE_DTYPES)})"
        )
    if view.dtype != "float32":
        raise TypeError(f"{name}: got dtype {view.dtype}, expected float32")
    if view.shape not in ((heads,), (batch, heads)):
        raise ValueError(f"{name}: got shape {view.shape}, expected ({heads},) or {(batch, heads)}")


def _operands(views: dict[str, View], own_views: Sequence[View]) -> tuple[Operand | None, ...]:
    operands: list[Operand | None] = [
        Operand(slot, views[name].shape, views[name].strides, views[name].dtype) if name in views else None
        for slot, name in enumerate(POINTERS)
    ]
    for view in own_views:
        operands.append(Operand(len(operands), view.shape, view.strides, view.dtype, math.gcd(16, view.ptr)))
    return tuple(operands)


# Problem -> plan ------------------------------------------------------------------------------------------------------

MIN_KEYS = 128
"""Keys that make up for what a CTA costs, its share of merging parts included."""
PART_KEYS = 256
"""Least keys in a part where parts depend on their own sequence's length alone."""
PARTS = 16
"""Most parts there."""
ALONE_PARTS = 32
"""Most parts of an item of one sequence: one CTA merges them."""
COMBINED = 16
"""Parts that it asks for at once."""
IDLE = 0.96
"""Least share of the CTAs that must have work."""


@dataclass(frozen=True)
class DecodePlan:
    """Everything that is decided before the launches of kernels/decode.cu, one for each piece of the columns of out."""

    problem: DecodeProblem
    device: Device
    mma: str
    warps_m: int
    """16 rows each"""
    warps_n: int
    """among which the keys of a block are divided"""
    block_n: int
    stages: int
    min_blocks: int
    """CTAs an SM holds"""
    head_dim: int
    """compiled"""
    head_dim_v: int
    """of a piece"""
    smem_bytes: int
    bytes_q: int
    """of them, for q"""
    min_keys: int = MIN_KEYS
    alone: bool = False
    """whether there is one sequence, whose keys are dealt out to all warps and loaded by TMA; otherwise CTAs find their work by
    the lengths of all sequences"""

    kernel: ClassVar[str] = "decode"

    @property
    def pieces(self) -> int:
        """Launches, which find the scores anew: a warp's registers hold 256 columns of out."""
        return -(-self.problem.head_dim_v // self.head_dim_v)

    @property
    def num_heads_kv(self) -> int:
        """that the kernel sees"""
        return self.problem.num_heads_kv

    @property
    def group(self) -> int:
        return self.problem.num_heads // self.num_heads_kv

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def box_rows(self) -> int:
        """Tokens that TMA loads at once, neighbours in every page; 0 without it."""
        return _box_rows(self.problem, self.block_n // self.warps_n) if self.alone else 0

    @property
    def box_columns(self) -> int:
        """of 128 bytes"""
        return 128 // ITEMSIZE[self.problem.cache_dtype]

    @property
    def rows(self) -> int:
        """of a tile: (query, head of the group)"""
        return 16 * self.warps_m

    @property
    def m_blocks(self) -> int:
        return -(-self.problem.seqlen_q * self.group // self.rows)

    @property
    def head_lanes(self) -> int:
        """KV heads that are read side by side: the most that leave few CTAs without a team."""
        if self.alone:
            return self.num_heads_kv
        slots, heads = self.device.num_sms * self.min_blocks, self.num_heads_kv
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n <= slots]
        return max(n for n in fitting if n == 1 or slots // n * n >= IDLE * slots)

    @property
    def most_teams(self) -> int:
        return self.device.num_sms * self.min_blocks // self.head_lanes

    @property
    def teams(self) -> int:
        """As many as items, a multiple or a part, where that leaves few CTAs idle: of equal lengths, none shares an item."""
        most, items = self.most_teams, max(1, self.items // self.head_lanes)
        least = math.ceil(IDLE * most)
        return next((n for n in range(most, least - 1, -1) if items % n == 0 or n % items == 0), most)

    @property
    def grid(self) -> tuple[int, int, int]:
        """CTAs: (members of a team, teams, 1), or (KV heads, parts, 1)."""
        if self.alone:
            return self.num_heads_kv, self.parts, 1
        return self.head_lanes, self.teams, 1

    @property
    def parts(self) -> int:
        """Of an item, at most, if it is alone."""
        most = min(ALONE_PARTS, self.device.num_sms // self.num_heads_kv, -(-self.problem.capacity // self.block_n))
        return max(1, most)

    @property
    def ctas(self) -> int:
        return math.prod(self.grid)

    @property
    def min_units_log2(self) -> int:
        """Least units of a team."""
        return 0 if self.max_parts else max(1, self.min_keys // self.block_n).bit_length() - 1

    @property
    def max_parts(self) -> int:
        """0: work is divided evenly over the CTAs."""
        return self.problem.num_splits or (PARTS if self.problem.deterministic else 0)

    @property
    def min_part(self) -> int:
        """Key tiles in a part."""
        return 1 if self.problem.num_splits else max(1, PART_KEYS // self.block_n)

    @property
    def items(self) -> int:
        return self.problem.batch * self.num_heads_kv * self.m_blocks

    @property
    def workspace(self) -> tuple[int, ...]:
        """Bytes of each of `WORKSPACE`, rounded up to 256."""
        size = ITEMSIZE[self.problem.real]
        if self.alone:
            slots, tickets = round_up(self.ctas, COMBINED), self.num_heads_kv
        elif self.max_parts:
            slots, tickets = (self.items * self.max_parts, self.items) if self.max_parts > 1 else (0, 0)
        else:
            slots, tickets = 2 * self.ctas, self.ctas
        sizes = (slots * self.rows * self.head_dim_v * size, slots * self.rows * size, 8 * tickets)
        return tuple(-(-n // 256) * 256 for n in sizes)

    @property
    def empty(self) -> bool:
        """Nothing to compute or write."""
        return self.problem.batch * self.problem.seqlen_q == 0 and not (self.problem.packed and self.problem.total_q)

    def __str__(self) -> str:
        return (
            f"{type(self).__name__}({self.device.arch}: {self.rows} rows x {self.block_n} keys x {self.stages}, "
            f"d{self.head_dim}/{self.head_dim_v}{f' x {self.pieces}' if self.pieces > 1 else ''}, "
            f"{self.warps_m}x{self.warps_n} warps, {self.smem_bytes} B shared, "
            f"grid {self.grid}{' alone' * self.alone}, workspace {sum(self.workspace)} B)"
        )


LATENT_DIMS = (576, 512)
"""Columns of keys and of values that decode_latent_sm90.cu is compiled for."""
LATENT_MIN_KEYS = 512


@dataclass(frozen=True)
class LatentPlan(DecodePlan):
    """Everything that is decided before a launch of kernels/decode_latent_sm90.cu."""

    kernel: ClassVar[str] = "decode_latent_sm90"

    @property
    def num_heads_kv(self) -> int:
        """The heads of one latent count as several KV heads in one place, so that a team reads it at the same time."""
        heads = self.problem.num_heads
        return heads // self.rows if self.problem.num_heads_kv == 1 and heads % self.rows == 0 else self.problem.num_heads_kv

    @property
    def teams(self) -> int:
        return self.most_teams

    @property
    def threads(self) -> int:
        return 3 * 128  # a warpgroup loads, two multiply

    @property
    def box_rows(self) -> int:
        return _box_rows(self.problem, self.block_n)


def _box_rows(problem: DecodeProblem, rows: int) -> int:
    """Of `rows` tokens, as many as are neighbours in every page."""
    return math.gcd(problem.page_size, rows) if problem.paged else rows


def declines_latent(problem: DecodeProblem, device: Device) -> list[str]:
    """Reasons why decode_latent_sm90.cu does not serve a problem, none if it does."""
    p, reasons = problem, []
    if device.arch != "sm_90a":
        reasons.append(f"needs sm_90a, got {device.arch}")
    if not p.latent:
        reasons.append("reads values from the columns of keys, got a v_cache")
    if p.dtype not in ("float16", "bfloat16") or p.cache_dtype != p.dtype:
        reasons.append(f"multiplies float16 and bfloat16, got {p.dtype} over {p.cache_dtype}")
    if (p.head_dim, p.head_dim_v) != LATENT_DIMS:
        dims = f"{p.head_dim} and {p.head_dim_v}"
        reasons.append(f"serves {LATENT_DIMS[0]} columns of keys and {LATENT_DIMS[1]} of values, got {dims}")
    if p.mods or p.mask.arrays or p.operand("sinks") is not None:
        reasons.append("has no score modification, sinks or mask that reads memory")
    if p.packed:
        reasons.append("takes queries with a batch axis, got packed ones")
    if p.paged and p.operand("cache_leftpad") is not None:
        reasons.append("begins at the start of a page, got cache_leftpad with a page_table")
    if p.paged and math.gcd(p.page_size, LATENT_BLOCK) < LEAST_BOX:
        reasons.append(f"loads {LEAST_BOX} tokens of a page at once, got pages of {p.page_size}")
    if p.vectors[0] < 16:
        reasons.append(f"needs rows of q aligned to 16 bytes, got {p.vectors[0]}")
    cache = p.operand("k_cache")
    assert cache is not None
    if 0 in cache.shape:
        reasons.append(f"needs a cache with tokens, got {cache.shape}")
    return reasons + tma_obstacles("k_cache", cache, p.vectors[1])


LATENT_BLOCK = 64
LEAST_BOX = 8
"""Least tokens of a copy: the rows of a swizzle's period."""
LATENT_SLACK = 3072
"""Shared memory beside q and two blocks: barriers, statistics, alignment."""


def _latent_plan(problem: DecodeProblem, device: Device) -> LatentPlan:
    head_dim, head_dim_v = LATENT_DIMS
    tile = 2 * LATENT_BLOCK * head_dim
    return LatentPlan(
        problem,
        device,
        mma="",
        warps_m=4,
        warps_n=1,
        block_n=LATENT_BLOCK,
        stages=2,
        min_blocks=1,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        smem_bytes=3 * tile + LATENT_SLACK,
        bytes_q=tile,
        min_keys=LATENT_MIN_KEYS,
    )


def declines_decode(problem: DecodeProblem, device: Device) -> list[str]:
    """Reasons why no kernel serves a problem, none if one does."""
    reasons = []
    if device.number < 80:
        reasons.append(f"needs sm_80 or newer, got {device.arch}")
    widest = WIDEST
    if problem.dtype == "float64":
        widest = max(n for n, smem in WIDEST_FLOAT64 if smem <= device.smem_per_block)
    if max(problem.head_dim, problem.head_dim_v) > widest:
        dims = f"{problem.head_dim} and {problem.head_dim_v}"
        reasons.append(f"serves head dimensions to {widest} of {problem.dtype}, got {dims}")
    return reasons


WIDEST = 576
WIDEST_FLOAT64 = ((256, 0), (512, 160 * 1024), (WIDEST, 224 * 1024))
"""(head_dim, bytes of shared memory that it needs): q and two blocks of eight keys."""


class Products(NamedTuple):
    """How warps multiply: a policy of kernels/tile/mma_*.cuh and what it asks of the tiles."""

    cuda: str
    multiple: int
    """of head_dim"""
    multiple_v: int
    step: int
    """keys of a fragment"""
    rest: int | None
    """of the 16-byte units of a row of q and k in shared memory, divided by 8; None: any odd number"""
    piece: int
    """most columns of out that the registers of a warp hold"""


def _products(problem: DecodeProblem, device: Device) -> Products:
    if problem.dtype == "float64":
        return Products(f"MmaWide<ProductFp64<{'true' if device.number == 90 else 'false'}>>", 16, 16, 8, 4, 128)
    if problem.dtype == "float32":
        if problem.precision == "tf32":
            return Products("MmaWide<ProductTf32>", 16, 32, 8, 4, 256)
        halves = 1 if problem.seqlen_q * problem.group <= 8 else 2
        # From sm_100 on, some kernels spill beside 256 columns.
        return Products(f"MmaSimt<{halves}>", 16, 16, 8, None, 256 if device.number < 100 else 128)
    if problem.cache_dtype in CACHE_DTYPES:
        converts = "true" if device.number >= 89 else "false"
        return Products(f"MmaByte<{CACHE_DTYPES[problem.cache_dtype]}, {converts}>", 32, 32, 16, 0, 256)
    return Products(f"MmaHalf<{CTYPES[problem.dtype]}>", 16, 16, 16, 0, 256)


def _pitches(problem: DecodeProblem, products: Products, head_dim: int, head_dim_v: int) -> tuple[int, int, int]:
    """Bytes of a row of q, k and v in shared memory."""
    size, cache_size = ITEMSIZE[problem.dtype], ITEMSIZE[problem.cache_dtype]
    if size == 2:
        return round_up(size * head_dim, 128), round_up(cache_size * head_dim, 128), round_up(cache_size * head_dim_v, 128)
    units, units_v = (n * size // 16 for n in (head_dim, head_dim_v))
    pitch = 16 * (units + (1 - units % 2 if products.rest is None else (8 + products.rest - units % 8) % 8))
    return pitch, pitch, 16 * (units_v + 1 - units_v % 2)


STATIC_BYTES = 3328
"""Of shared memory beside the tiles: what `Decode::Shared` holds and what the system reserves."""
STAGE_BYTES = 32768
"""Of keys and values that are waited for at once."""
MAX_STAGES = 8
MAX_BLOCK = 128
TILES = tuple(
    (warps_m, warps_n, ctas)
    for warps_m, most in ((4, 1), (2, 2), (1, 4))
    for warps_n in (4, 2, 1)
    if warps_n <= most
    for ctas in (2, 1)
)
"""(warps_m, warps_n, CTAs an SM holds), best first. Of two CTAs, one computes while the other waits."""
BOX_ALIGNMENT = 1024
"""Of tiles that TMA swizzles."""
ALONE_TILES = ((1, 8, 1), (1, 4, 1))
"""As TILES, of one sequence."""
ALONE_STAGES = 3


def _alone(problem: DecodeProblem, device: Device, keys: int) -> bool:
    """Whether one sequence is dealt out to all warps, `keys` keys at a time that TMA can load."""
    p = problem
    if device.arch != "sm_90a" or p.batch != 1 or p.packed or p.deterministic or p.num_splits or p.latent:
        return False
    if p.seqlen_q * p.group > 16 or 2 * p.num_heads_kv > device.num_sms or p.head_dim_v > 256:
        return False
    if ITEMSIZE[p.cache_dtype] > 2 or _box_rows(p, keys) < LEAST_BOX:
        return False
    if p.paged and p.operand("cache_leftpad") is not None:
        return False
    caches = [(name, p.operand(name), p.vectors[n]) for n, name in ((1, "k_cache"), (2, "v_cache"))]
    return all(op is not None and 0 not in op.shape and not tma_obstacles(name, op, v) for name, op, v in caches)


def make_decode_plan(problem: DecodeProblem, device: Device) -> DecodePlan:
    """The plan of a call. Raises NotImplementedError with the kernel's reasons when it does not serve the problem."""
    latent = declines_latent(problem, device)
    if not latent:
        return _latent_plan(problem, device)
    declined = declines_decode(problem, device)
    if declined:
        reasons = [f"decode: {'; '.join(declined)}"] + [f"decode_latent_sm90: {'; '.join(latent)}"] * problem.latent
        raise NotImplementedError("\n  ".join([f"no kernel serves {problem} on {device.arch}:", *reasons]))
    products = _products(problem, device)
    head_dim = round_up(problem.head_dim, products.multiple)
    # Beside wide keys in little shared memory, one warp does all the loads, and has registers for half as many columns.
    one_warp = problem.head_dim > 256 and device.smem_per_block < 2**17 and problem.seqlen_q * problem.group <= 16
    pieces = -(-problem.head_dim_v // (products.piece // 2 if one_warp else products.piece))
    head_dim_v = round_up(-(-problem.head_dim_v // pieces), products.multiple_v)
    rows = max(1, problem.seqlen_q * problem.group)
    pitch_q, pitch_k, pitch_v = _pitches(problem, products, head_dim, head_dim_v)
    step = products.step
    tiles = [*((True, tile) for tile in ALONE_TILES), *((False, tile) for tile in TILES)]
    for alone, (warps_m, warps_n, ctas) in tiles:
        if warps_m > 1 and rows <= 8 * warps_m:  # half as many warps hold them
            continue
        # Beside 256 columns of out there are registers for the scores of one step alone.
        wide = head_dim_v * ITEMSIZE[problem.real] > 512
        most = step * warps_n * (1 if wide else 2 if problem.mods or problem.mask.tiled else 8)
        block_n = max(
            step * warps_n, min(most, MAX_BLOCK, STAGE_BYTES // (pitch_k + pitch_v) // (step * warps_n) * step * warps_n)
        )
        if alone and not _alone(problem, device, block_n // warps_n):
            continue
        bytes_q, stage = 16 * warps_m * pitch_q, block_n * (pitch_k + pitch_v)
        beside = BOX_ALIGNMENT * alone
        budget = min(device.smem_per_block, device.smem_per_sm // ctas) - STATIC_BYTES - bytes_q - beside
        merged = warps_n * 16 * warps_m * (head_dim_v + 8) * ITEMSIZE[problem.real]
        stages = min(ALONE_STAGES if alone else MAX_STAGES, budget // stage)
        if stages >= 2 and merged <= budget:
            smem = bytes_q + max(stages * stage, merged) + beside
            sizes = (warps_m, warps_n, block_n, stages, ctas, head_dim, head_dim_v, smem, bytes_q)
            return DecodePlan(problem, device, products.cuda, *sizes, alone=alone)
    raise NotImplementedError(f"no tile of {problem} fits the {device.smem_per_block} bytes of shared memory of a block")


# Plan -> parameters ---------------------------------------------------------------------------------------------------


def divisor(n: int) -> tuple[int, int]:
    """(multiplier, shift) with x // n == x * multiplier >> shift for 0 <= x < 2^31 (kernels/attention/divisor.cuh)."""
    shift = 31 + (max(1, n) - 1).bit_length()
    return -(-(1 << shift) // max(1, n)), shift


def decode_fields(plan: DecodePlan, attends: bool, piece: int = 0) -> list[tuple[str, int | float]]:
    """Members of DecodeParams after its pointers, in order, as (struct code, value).

    `piece` of the columns of out, if the kernel attends.
    """
    p = plan.problem
    heads_kv, group, dim_v = p.num_heads_kv, p.group, p.head_dim_v
    if attends:
        heads_kv, group, dim_v = plan.num_heads_kv, plan.group, min(plan.head_dim_v, dim_v - piece * plan.head_dim_v)

    def rows(name: str) -> list[int]:  # batch or page, row, head
        operand = p.operand(name)
        if operand is None:
            return [0, 0, 0]
        batch, row, head = operand.strides[:3]
        if "cache" in name:
            return [batch, row, head if heads_kv == p.num_heads_kv else 0]  # one head of the cache may count as several
        return [0 if p.packed else batch, row, head]

    def scales(name: str) -> list[int]:  # batch, head
        operand = p.operand(name)
        return [0, 0] if operand is None else [0, *operand.strides][-2:]

    table, rotary = p.operand("page_table"), p.operand("rotary_cos")
    lse_rows = p.total_q if p.packed else p.seqlen_q
    longs = [
        *(n for name in ("q", "k_cache", "v_cache", "out") for n in rows(name)),
        0 if p.packed else p.num_heads * lse_rows,
        lse_rows,
        *rows("k"),
        *rows("v"),
        rotary.strides[0] if rotary is not None else 0,
        table.strides[0] if table is not None else 0,
        *scales("k_scale"),
        *scales("v_scale"),
    ]
    (group_multiplier, group_shift), (page_multiplier, page_shift) = divisor(group), divisor(p.page_size)
    sizes: list[tuple[str, int | float]] = [("i4x", n) for n in (p.batch, p.seqlen_q, p.total_q, p.seqlen_new)]
    sizes += [("i4x", n) for n in (p.num_heads, heads_kv, group)]
    sizes += [("I4x", group_multiplier), ("i4x", group_shift)]
    sizes += [("i4x", n) for n in (p.head_dim, dim_v, p.pages, p.page_size)]
    sizes += [("I4x", page_multiplier), ("i4x", page_shift)]
    sizes += [("i4x", n) for n in (p.table_rows, p.max_pages, p.rotary_dim, p.rotary_len, plan.m_blocks, plan.head_lanes)]
    sizes += [("i4x", n) for n in (heads_kv // plan.head_lanes, plan.min_units_log2, plan.max_parts, plan.min_part)]
    return [*(("q", n) for n in longs), ("d", p.scale), *sizes]


def decode_variant(plan: DecodePlan, attends: bool) -> list[Field]:
    """Members of the mask and of the modifications; append.cu has neither."""
    p = plan.problem
    if not attends:
        return [Field("int", 0), Field("int", 0)]
    fields = list(p.mask.fields(p.mask_operands))
    for mod, operands in zip(p.mods, p.mod_operands, strict=True):
        fields += mod.fields(operands)
    return fields if p.mods else [*fields, Field("int", 0)]


def lse_shape(problem: DecodeProblem, shape_q: tuple[int, ...]) -> tuple[int, ...]:
    """Of lse, from the shape of q as the caller gave it."""
    return (shape_q[1], shape_q[0]) if problem.packed or len(shape_q) == 3 else (shape_q[0], shape_q[2], shape_q[1])
