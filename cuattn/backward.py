"""Steps 2 and 3 of the backward: what a call asks for, checked, and how kernels run it. Pure: needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cuattn.arrays import View, contiguous_strides
from cuattn.fields import ITEMSIZE, Operand
from cuattn.masks import Full, SlidingWindow
from cuattn.plan import SPLIT_PARTS
from cuattn.problem import Problem, vector_bytes
from cuattn.registry import Device, Tiles, register_weight, round_up
from cuattn.score_mods import Bias, UserMod
from cuattn.tma import tma_bias, tma_obstacles

POINTERS = (
    "dout",
    "lse",
    "dlse",
    "dq",
    "dk",
    "dv",
    "dsinks",
    "dbias",
    "row_stats",
    "dq_sum",
    "turns",
    "partial_dk",
    "partial_dv",
    "bias_sum",
    "split_dout",
)
"""The first words of BackwardParams; the gradients of the parameters of user code take the slots after."""
ZEROED = ("turns", "dq_sum", "bias_sum")
"""Parts of the workspace that kernels add to."""
SPLIT = ("split_q", "split_k", "split_v", "split_dout", "magnitudes")
WORKSPACE = (*ZEROED, "row_stats", "partial_dk", "partial_dv", "tile_map", *SPLIT)
"""Parts of the workspace, in order."""


class BiasKind(NamedTuple):
    """How the gradient of a bias is gathered (kernels/attention/mod_sums.cuh)."""

    name: str
    number: int


NO_BIAS, COLUMNS, ROWS, CELLS, STORE, COPIES = (
    BiasKind(name, number) for number, name in enumerate(("none", "columns", "rows", "cells", "store", "copies"))
)
MAX_COPIES = 4
"""Batches or heads that share elements of a bias, up to which each has its own, of 16 bits: twice the bytes of fp32 sums."""


@dataclass(frozen=True)
class BackwardProblem:
    """The forward's problem (whose `out` is what the forward returned) and what is differentiated."""

    forward: Problem
    dout: Operand
    lse: Operand
    dlse: Operand | None
    wanted: tuple[bool, ...]
    """by score modification: whether the gradients of its differentiable arrays are"""
    deterministic: bool
    vector_dout: int
    """bytes of the widest access that the alignment of dout allows"""

    @property
    def first_slot(self) -> int:
        """Of the pointers of the backward, after those of the forward."""
        return len(self.forward.operands)

    def slot(self, name: str) -> int:
        return self.first_slot + POINTERS.index(name)

    @property
    def parameters(self) -> tuple[Operand, ...]:
        """User parameters whose gradients are wanted; that of number n is pointed at by slot first_slot + len(POINTERS) + n."""
        pairs = zip(self.forward.mods, self.forward.mod_operands, self.wanted, strict=True)
        return tuple(ops[n] for mod, ops, wanted in pairs if wanted and isinstance(mod, UserMod) for n in mod.differentiable)

    @property
    def bias(self) -> Operand | None:
        """The bias whose gradient is wanted."""
        pairs = zip(self.forward.mods, self.forward.mod_operands, self.wanted, strict=True)
        return next((ops[0] for mod, ops, wanted in pairs if wanted and isinstance(mod, Bias)), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the gradient of q, k or v in canonical form: (batch, tokens, heads, dim), packed with a batch of 1."""
        p = self.forward
        tokens, heads = (p.total_q, p.num_heads) if name == "q" else (p.total_k, p.num_heads_kv)
        return (1 if p.packed else p.batch, tokens, heads, p.head_dim_v if name == "v" else p.head_dim)

    def __str__(self) -> str:
        extras = ", deterministic" * self.deterministic + ", dlse" * (self.dlse is not None)
        return f"Backward({self.forward}{extras})"


def make_backward_problem(
    forward: Problem,
    dout: View,
    lse: View,
    dlse: View | None,
    out: View | None,
    wanted: tuple[bool, ...],
    deterministic: bool,
) -> BackwardProblem:
    """Check what the backward takes besides the forward's arguments; views are the caller's, of 3-D or 4-D arrays."""
    p = forward
    if out is None:
        raise TypeError("out: got None, expected what the forward returned")
    canonical = (1 if p.packed else p.batch, p.total_q, p.num_heads, p.head_dim_v)
    if dout.dtype != p.dtype:
        raise TypeError(f"dout: got dtype {dout.dtype}, expected {p.dtype} as q has")
    if dout.shape != out.shape:
        raise ValueError(f"dout: got shape {dout.shape}, expected {out.shape} as out has")
    if dout.shape[-1] > 1 and dout.strides[-1] != 1 and 0 not in dout.shape:
        raise ValueError(f"dout: got stride {dout.strides[-1]} along the last axis, expected it to be contiguous (1)")
    rows = (*out.shape[:-3], p.num_heads, p.total_q)
    stats: dict[str, Operand | None] = {"lse": None, "dlse": None}
    for name, view in (("lse", lse), ("dlse", dlse)):
        if view is None:
            continue
        if view.dtype != p.real:
            raise TypeError(f"{name}: got dtype {view.dtype}, expected {p.real}")
        if view.shape != rows:
            raise ValueError(f"{name}: got shape {view.shape}, expected {rows}")
        strides = (0,) * (3 - len(view.shape)) + view.strides
        stats[name] = Operand(-1, (canonical[0], *rows[-2:]), strides, view.dtype)
    for mod in p.mods:
        if isinstance(mod, UserMod) and mod.gradient is None:
            raise NotImplementedError(f"score_mod {mod.expression!r} was given without a gradient expression")
    dout_strides = (0,) * (4 - len(dout.shape)) + dout.strides
    assert stats["lse"] is not None
    return BackwardProblem(
        forward=p,
        dout=Operand(-1, canonical, dout_strides, dout.dtype),
        lse=stats["lse"],
        dlse=stats["dlse"],
        wanted=wanted,
        deterministic=deterministic,
        vector_dout=vector_bytes(dout),
    )


# Which kernel, with which tiles ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gemm:
    """How warps multiply (a policy of kernels/tile/): its C++ type, and what tiles and grids of warps cost."""

    cuda: str
    itemsize: int
    score_units: tuple[int, int]
    """least rows and columns of a warp in S = Q K^T, and below in dK = dS^T Q and dQ = dS K"""
    key_units: tuple[int, int]
    query_units: tuple[int, int]
    pads: tuple[int, int] = (0, 0)
    """elements after a row of a tile, and of a tile of scores"""
    panel: int = 1
    """columns of a panel where tiles are swizzled instead"""
    lanes_across: int = 4
    """lanes that share the columns of a warp's scores"""
    trailer: int = 0
    """bytes after a tile"""

    @property
    def splits_inputs(self) -> bool:
        """Whether q, k, v and dout are first written as pairs of fp16 numbers (kernels/mainloop/split_input.cuh)."""
        return self.cuda == "WarpSplit"

    def tile_bytes(self, rows: int, cols: int, scores: bool = False) -> int:
        pitch = round_up(cols, self.panel) + self.pads[scores]
        return rows * pitch * self.itemsize + self.trailer


SPLIT_LEAST = 512
"""Queries per key and value, and keys per query, from which tensor cores serve tf32x3; below it is FFMA, as in the forward."""


def gemm_of(problem: Problem, device: Device) -> Gemm:
    """How this dtype and precision is multiplied."""
    if problem.dtype in ("float16", "bfloat16"):
        element = {"float16": "__half", "bfloat16": "__nv_bfloat16"}[problem.dtype]
        return Gemm(f"WarpHalf<{element}>", 2, (16, 16), (16, 16), (16, 16), panel=64)
    if problem.dtype == "float64":
        large = "true" if device.number == 90 else "false"
        return Gemm(f"WarpWide<ProductFp64<{large}>>", 8, (16, 8), (16, 8), (16, 8), (4, 4))
    queries, keys = min(problem.seqlen_q, problem.total_q), min(problem.seqlen_k, problem.total_k)
    few = queries * problem.group < SPLIT_LEAST or keys < SPLIT_LEAST
    if problem.precision == "ieee" or (problem.precision == "tf32x3" and few):
        return Gemm("WarpSimt", 4, (4, 16), (16, 32), (4, 32), (4, 8), lanes_across=8)
    units = ((16, 16), (16, 16), (16, 16))
    if problem.precision == "tf32x3":
        return Gemm("WarpSplit", 4, *units, panel=32, trailer=4 * SPLIT_PARTS)
    return Gemm("WarpTf32", 4, *units, panel=32)


def warp_grid(rows: int, cols: int, warps: int, units: tuple[int, int]) -> tuple[int, int]:
    """(down, across) of kernels/tile/warp_grid.cuh; (0, 0) where nothing fits."""
    best, least = (0, 0), 0
    for down in range(1, warps + 1):
        for across in range(1, warps // down + 1):
            if rows % (down * units[0]) or cols % (across * units[1]):
                continue
            operands, most = rows // down + cols // across, best[0] * best[1]
            if down * across > most or (down * across == most and operands < least):
                best, least = (down, across), operands
    return best


@dataclass(frozen=True)
class BackwardPlan:
    """Everything that is decided before the launches. `smem_bytes` and `grid` are those of the kernel."""

    backward: BackwardProblem
    device: Device
    kernel: str
    """of kernels/<kernel>.cu: backward, backward_sm90 or backward_window_sm90"""
    declined: tuple[str, ...]
    """why not backward_sm90"""
    gemm: Gemm
    tiles: Tiles
    head_dim: int
    """compiled, as head_dim_v"""
    head_dim_v: int
    m_blocks: int
    n_blocks: int
    q_splits: int
    """CTAs that share the queries of a key tile; their dk and dv are added by backward_combine.cu"""
    dq_splits: int
    """deterministic: CTAs that take the key tiles of a head in turn, each with a dq of its own"""
    bias_kind: BiasKind
    staged_bias: Operand | None
    """the bias whose tiles come with the queries, or one that does not vary along them and stays with the keys"""
    map_words: int
    map_batches: int
    map_heads: int
    smem_bytes: int
    run: int
    """backward_sm90: key tiles that a CTA takes one after the other; backward_window_sm90: query tiles"""
    num_splits: int = field(default=1, init=False)
    dv_chunks: int = field(default=1, init=False)
    bias_stages: int = field(default=0, init=False)

    @property
    def problem(self) -> Problem:
        return self.backward.forward

    @property
    def threads(self) -> int:
        return 32 * self.tiles.warps

    @property
    def uses_tma(self) -> bool:
        return self.kernel in (SM90, WINDOW_SM90)

    @property
    def in_one_pass(self) -> bool:
        """Whether dq is written as it is found, not summed in memory first."""
        return self.kernel == WINDOW_SM90

    @property
    def slab_threads(self) -> int:
        """Threads that add to dq_sum, which also read it."""
        return self.threads - PRODUCER_THREADS if self.uses_tma else self.threads

    @property
    def early(self) -> bool:
        """backward_sm90: dv is multiplied before dp is there."""
        return _early(self.problem)

    @property
    def tma_bias(self) -> Operand | None:
        """backward_sm90: the bias whose tiles the copy engine brings, as (batch, query, head, key)."""
        staged = self.staged_bias
        return tma_bias(staged) if self.uses_tma and staged is not None and not one_row(staged) else None

    @property
    def tma_bias_sums(self) -> Operand | None:
        """backward_sm90: what the copy engine stores the gradients of such tiles to, or adds them to: dbias or bias_sum."""
        backward, bias = self.backward, self.backward.bias
        if self.tma_bias is None or bias is None:
            return None
        stores = self.bias_kind is STORE
        batches, heads, rows, cols = (1, 1, 1, 1, *bias.shape)[-4:] if stores else self.sum_shape[1:]
        strides = (heads * rows * cols, cols, rows * cols, 1)
        slot = backward.slot("dbias" if stores else "bias_sum")
        return Operand(slot, (batches, rows, heads, cols), strides, bias.dtype if stores else self.sum_dtype)

    @property
    def sends_ds(self) -> bool:
        """backward_sm90: the tiles that the bias receives are those of dS."""
        return self.uses_tma and _sends_ds(self.backward)

    @property
    def sum_dtype(self) -> str:
        """Of bias_sum."""
        return self.problem.dtype if self.bias_kind is COPIES else self.problem.real

    @property
    def own_lengths(self) -> bool:
        """Whether sequences have lengths of their own."""
        p = self.problem
        return p.packed or p.operand("q_lens") is not None or p.operand("kv_lens") is not None

    @property
    def writes_bias(self) -> bool:
        """backward_sm90: every element of dbias or bias_sum is written once, so nobody need clear it."""
        return self.tma_bias_sums is not None and self.bias_kind is not CELLS and not self.own_lengths

    @property
    def tma_gradients(self) -> tuple[Operand, ...]:
        """backward_sm90: dk and dv, where the copy engine stores them."""
        p = self.problem
        if not (self.uses_tma and self.tiles.stores) or self.q_splits > 1:
            return ()
        shapes = [self.backward.shape(name) for name in "kv"]
        slots = [self.backward.slot(name) for name in ("dk", "dv")]
        return tuple(Operand(n, shape, contiguous_strides(shape), p.dtype) for n, shape in zip(slots, shapes, strict=True))

    @property
    def takes_turns(self) -> bool:
        """backward_sm90, deterministic: key tiles add to dq in their order."""
        return self.kernel == SM90 and self.backward.deterministic

    @property
    def chained(self) -> bool:
        """Whether the kernel may be in place before backward_prepare.cu is done, and backward_convert.cu before it is."""
        return self.kernel == SM90

    @property
    def counts_pairs(self) -> bool:
        """backward_sm90: whether backward_convert.cu waits for the sums of a KV head and batch, not for the whole kernel."""
        tiles = self.tiles
        doormen = self.chained and tiles.bulk and (tiles.seeded or tiles.alternate)
        return doormen and self.q_splits == 1 and not (tiles.runs or self.backward.deterministic)

    @property
    def prepared_units(self) -> int:
        """backward_sm90: parts of a head's queries (packed: of all sequences, as `slabs` counts) that backward_prepare_sm90.cu
        prepares while the kernel runs already. 0 where backward_prepare.cu prepares all before.
        """
        p = self.problem
        few = self.grid(p.batch, p.num_heads_kv) < LEAST_WAVES * self.device.num_sms
        short = (p.total_k // max(1, p.batch) if p.packed else p.seqlen_k) < LEAST_KEYS
        units = p.total_q // UNIT_ROWS + p.batch + 1 if p.packed else -(-p.seqlen_q // UNIT_ROWS)
        return 0 if few or short or not self.prepares_ahead else units

    @property
    def prepares_ahead(self) -> bool:
        """backward_sm90: whether it can begin before all rows are prepared: where pairs follow one another, that the first CTAs
        need few of them. Rows of no sequence, which nobody else reads, would be wrong in the gradients of sinks.
        """
        p = self.problem
        out, dout = p.operand("out"), self.backward.dout
        whole = p.vectors[3] == self.backward.vector_dout == 16 and p.head_dim_v % 8 == 0
        near = out is not None and all(0 <= array.strides[1] < 2**32 for array in (out, dout))
        all_rows = not (self.own_lengths and p.operand("sinks") is not None)
        return self.counts_pairs and self.one_by_one and whole and near and all_rows

    @property
    def one_by_one(self) -> bool:
        """backward_sm90: whether pairs of sequences and KV heads follow one another. Beyond 64 columns equal key tiles of one
        pair side by side read queries and add dq where they are in L2 still; beyond 128, where L2 is busy with adding, it pays
        where a pair has few. Of packed sequences the last ones may be long, so that only what converts counted sums meanwhile
        makes up for the multiprocessors that wait for the last CTAs.
        """
        p = self.problem
        few = _shares_keys(self.tiles) and p.seqlen_k <= FEW_KEYS
        large = self.head_dim > 64 and (self.tiles.block_n == 128 or few)
        return large and not (self.backward.deterministic or p.mods) and (self.counts_pairs or not p.packed)

    @property
    def section(self) -> int:
        """backward_sm90: pairs of sequences and KV heads whose key tiles take turns."""
        return 1 if self.one_by_one else self._long_section

    @property
    def last_section(self) -> int:
        """backward_sm90: those of the last section, 0 for as many: with a mask the last CTAs should be the shortest. Of packed
        pairs that follow one another, CTAs of the last ones, which take turns.
        """
        if self.section > 1 or isinstance(self.problem.mask, Full):
            return 0
        return self.device.num_sms // 2 if self.all_tokens and self.one_by_one else self._long_section

    @property
    def _long_section(self) -> int:
        """As many pairs as have their queries and sums of dq in L2 together, but enough to keep the GPU busy to the end."""
        p = self.problem
        row = 2 * self.head_dim + 2 * self.head_dim_v + 4 * self.head_dim
        queries = -(-p.total_q // max(1, p.batch)) if p.packed else p.seqlen_q
        in_cache = L2_BYTES // max(1, row * queries * p.group)
        pairs = self.q_splits * p.num_heads_kv * (1 if self.all_tokens else self.batches)
        return min(max(1, in_cache, -(-2 * self.device.num_sms // self.shares)), max(1, pairs))

    @property
    def all_tokens(self) -> bool:
        """backward_sm90: key tiles are numbered over all packed sequences."""
        return self.kernel == SM90 and self.problem.packed and not self.tiles.runs

    @property
    def key_tiles(self) -> int:
        """Of the longest sequence, or of all packed ones, as `slabs` counts those of queries."""
        p = self.problem
        return p.total_k // self.tiles.block_n + p.batch + 1 if self.all_tokens else self.n_blocks

    @property
    def split_inputs(self) -> bool:
        return self.gemm.splits_inputs

    @property
    def split_grid(self) -> int:
        """CTAs of magnitude.cu and split.cu, and words of magnitudes."""
        p = self.problem
        return SPLIT_PARTS * (1 if p.packed else p.batch) * 2 * (p.num_heads + p.num_heads_kv)

    @property
    def batches(self) -> int:
        return self.problem.batch + self.problem.packed  # one more for the tokens past the last packed sequence

    @property
    def empty(self) -> bool:
        """No query: every gradient is 0."""
        return self.partial_rows == 0

    @property
    def prepare_lanes(self) -> int:
        """Lanes that take a row of out and dout in backward_prepare.cu, 16 bytes each at a time."""
        aligned = self.backward.vector_dout == 16 and self.problem.vectors[3] == 16
        units = self.head_dim_v // (16 // ITEMSIZE[self.problem.dtype]) if aligned else self.head_dim_v
        return 32 if units >= 32 else 16 if units >= 16 else 8 if units >= 8 else 4

    @property
    def shares(self) -> int:
        """CTAs that the key tiles of a head are divided among, in one pass the query tiles."""
        in_turn = self.backward.deterministic and not self.uses_tma
        return self.dq_splits if in_turn else -(-(self.m_blocks if self.in_one_pass else self.key_tiles) // self.run)

    @property
    def launches(self) -> tuple[tuple[int, int, int, int], ...]:
        """(first batch, first KV head, batches, KV heads) of each launch of backward.cu, in order.

        One, unless sums over batches or heads into the elements of a bias must have a fixed order.
        """
        p, bias = self.problem, self.backward.bias
        whole = (0, 0, self.batches, p.num_heads_kv)
        if not self.backward.deterministic or self.bias_kind is not CELLS or bias is None:
            return (whole,)
        lead = (1, 1, 1, 1, *bias.shape)[-4:-2]
        parts_b = [(b, 1) for b in range(self.batches)] if lead[0] == 1 else [(0, self.batches)]
        parts_h = [(h, 1) for h in range(p.num_heads_kv)] if lead[1] == 1 else [(0, p.num_heads_kv)]
        return tuple((b, h, nb, nh) for b, nb in parts_b for h, nh in parts_h)

    def grid(self, batches: int, heads_kv: int) -> int:
        return self.shares * self.q_splits * heads_kv * (1 if self.all_tokens else batches)

    @property
    def partial_rows(self) -> int:
        p = self.problem
        return p.num_heads * (p.total_q if p.packed else p.batch * p.seqlen_q)

    @property
    def rows_kv(self) -> int:
        p = self.problem
        return p.num_heads_kv * (p.total_k if p.packed else p.batch * p.seqlen_k)

    @property
    def slabs(self) -> int:
        """Slabs of dq_sum per head (packed: of all sequences)."""
        p = self.problem
        return p.total_q // self.tiles.block_m + p.batch + 1 if p.packed else self.m_blocks

    @property
    def dq_elements(self) -> int:
        """Elements of one dq_sum."""
        if self.in_one_pass:
            return 0
        heads = self.problem.num_heads * (1 if self.problem.packed else self.problem.batch)
        return heads * self.slabs * self.tiles.block_m * self.head_dim

    @property
    def sum_shape(self) -> tuple[int, int, int, int, int]:
        """(splits, batches, heads, queries, keys) of bias_sum."""
        p, bias = self.problem, self.backward.bias
        if bias is None or self.bias_kind in (NO_BIAS, STORE):
            return (0, 0, 0, 0, 0)
        if self.bias_kind is COLUMNS:
            return (self.q_splits, p.batch, p.num_heads, 1, p.seqlen_k)
        if self.bias_kind is ROWS:
            return (self.dq_splits, p.batch, p.num_heads, p.seqlen_q, 1)
        batches, heads, rows, cols = (1, 1, 1, 1, *bias.shape)[-4:]
        if self.bias_kind is COPIES:
            batches, heads = p.batch, p.num_heads
        return (1, batches, heads, rows, round_up(cols, 8))

    @property
    def workspace(self) -> tuple[int, ...]:
        """Bytes of each part of `WORKSPACE`, rounded up to 256."""
        p, size = self.problem, ITEMSIZE[self.problem.real]
        partial = self.q_splits * self.rows_kv if self.q_splits > 1 else 0
        splits, *rest = self.sum_shape
        sums = splits * rest[0] * rest[1] * rest[2] * rest[3]
        slabs, pairs = self.dq_elements // (self.tiles.block_m * self.head_dim), p.num_heads_kv * self.batches
        sizes = (
            4 * slabs if self.takes_turns else 4 * (PREPARING_SMS + 1) * pairs if self.counts_pairs else 0,
            size * self.dq_splits * self.dq_elements,
            ITEMSIZE[self.sum_dtype] * sums,
            0 if self.in_one_pass and p.operand("sinks") is None else stats_bytes(p) * self.partial_rows,
            size * partial * p.head_dim,
            size * partial * p.head_dim_v,
            4 * self.map_batches * self.map_heads * self.m_blocks * 2 * self.map_words,
            *self._split_workspace(),
        )
        return tuple(round_up(n, 256) for n in sizes)

    @property
    def bias_units(self) -> int:
        """Of dbias, as backward_bias.cu divides it: elements, or eight in a row."""
        bias = self.backward.bias
        *lead, cols = bias.shape if bias is not None and bias.shape else (1,)
        return math.prod(lead) * (-(-cols // 8) if self.bias_kind in (CELLS, COPIES) else cols)

    @property
    def zeroed(self) -> int:
        """Bytes at the start of the workspace that kernels add to; backward_prepare.cu clears them."""
        sizes = self.workspace[: len(ZEROED)]
        return sum(sizes[:-1] if self.writes_bias else sizes)

    def _split_workspace(self) -> tuple[int, ...]:
        if not self.split_inputs:
            return (0,) * len(SPLIT)
        size, size_v = 4 * self.head_dim, 4 * self.head_dim_v
        rows_q, rows_kv = self.partial_rows, self.rows_kv
        return rows_q * size, rows_kv * size, rows_kv * size_v, rows_q * size_v, 4 * self.split_grid

    def __str__(self) -> str:
        t = self.tiles
        extras = f", {self.q_splits} splits of the queries" * (self.q_splits > 1)
        extras += f", {self.dq_splits} sums of dq" * (self.dq_splits > 1) + ", tile map" * bool(self.map_words)
        extras += f", bias by {self.bias_kind.name}" * (self.bias_kind is not NO_BIAS)
        instead = f" instead of {SM90}: {'; '.join(self.declined)}" * (bool(self.declined) and self.device.arch == "sm_90a")
        extras += ", inputs as fp16 pairs" * self.split_inputs
        return (
            f"Plan({self.kernel} for {self.device.arch}: {self.gemm.cuda}, {t.block_m}x{t.block_n} x{t.stages}, "
            f"d{self.head_dim}/{self.head_dim_v}, {self.threads} threads, {self.smem_bytes} B shared, "
            f"{self.shares * self.q_splits} CTAs a head{extras}, workspace {sum(self.workspace)} B){instead}"
        )


def padded_dims(problem: Problem) -> tuple[int, int]:
    """Head dimensions that warps can share: multiples of 32, beyond 128 of 64."""
    return tuple(round_up(d, 32 if d <= 128 else 64) for d in (problem.head_dim, problem.head_dim_v))  # type: ignore[return-value]


def stats_bytes(problem: Problem) -> int:
    """Of a query row: kernels/attention/row_stats.cuh."""
    return ITEMSIZE[problem.real] * (4 if ITEMSIZE[problem.dtype] >= 4 else 2)


def bias_to_stage(problem: Problem) -> Operand | None:
    """The one bias whose tiles can be loaded with the queries: it varies along keys, which are contiguous."""
    found = [ops[0] for mod, ops in zip(problem.mods, problem.mod_operands, strict=True) if isinstance(mod, Bias)]
    if len(found) != 1 or not found[0].shape or found[0].shape[-1] == 1 or found[0].strides[-1] != 1:
        return None
    return found[0] if found[0].vector_bytes >= 4 else None


def one_row(bias: Operand) -> bool:
    """Whether a bias is the same for all queries."""
    return len(bias.shape) < 2 or bias.shape[-2] == 1


def smem_bytes(problem: Problem, tiles: Tiles, gemm: Gemm, staged: Operand | None = None) -> int:
    """kernels/mainloop/backward.cuh, which asserts that it suffices. `staged`: the bias whose tiles come with the queries."""
    dim, dim_v = padded_dims(problem)
    m, n = tiles.block_m, tiles.block_n
    real = ITEMSIZE[problem.real]
    stage = gemm.tile_bytes(m, dim) + gemm.tile_bytes(m, dim_v) + round_up(stats_bytes(problem) * m, 128)
    if staged is not None:
        stage += round_up((1 if one_row(staged) else m) * (n * ITEMSIZE[staged.dtype] + 16), 128)
    keys = gemm.tile_bytes(n, dim) + gemm.tile_bytes(n, dim_v)
    down, across = warp_grid(m, n, tiles.warps, gemm.score_units)
    # Column sums of each warp and thread, or row sums of each warp.
    columns = down * n + 32 * tiles.warps * (n // max(1, across) // gemm.lanes_across)
    sums = real * max(columns, across * m) if any(isinstance(mod, Bias) for mod in problem.mods) else 0
    results = n * (max(dim, dim_v) * ITEMSIZE[problem.dtype] + 16)
    return max(keys + tiles.stages * stage + 2 * gemm.tile_bytes(m, n, scores=True) + sums, results)


def _registers(problem: Problem, tiles: Tiles, gemm: Gemm) -> int:
    """Registers of a thread for the sums that live through the main loop, and the larger of what comes and goes."""
    dim, dim_v = padded_dims(problem)
    words = 2 if problem.real == "float64" else 1

    def per_thread(rows: int, cols: int, units: tuple[int, int]) -> int:
        down, across = warp_grid(rows, cols, tiles.warps, units)
        return 10**6 if down == 0 else words * rows * cols // (32 * down * across)

    m, n = tiles.block_m, tiles.block_n
    keys = per_thread(n, dim, gemm.key_units) + per_thread(n, dim_v, gemm.key_units)
    return keys + max(2 * per_thread(m, n, gemm.score_units), per_thread(m, dim, gemm.query_units))


_16BIT = {  # by the wider head dimension
    64: (
        Tiles(128, 128, 2, 8, 1, 1, "the fewest reads of shared memory and additions to dq for each product", (90,)),
        Tiles(64, 128, 2, 8, 1, 5),
        Tiles(64, 64, 1, 4, 2, 15),
        Tiles(64, 64, 1, 8, 1),
    ),
    128: (
        Tiles(64, 128, 2, 8, 1, 5, "the fewest additions to dq for each product"),
        Tiles(32, 128, 2, 8, 1, 15, "half the scores in registers"),
        Tiles(32, 64, 2, 8, 1),
        Tiles(32, 64, 1, 8, 1),
    ),
    256: (
        Tiles(64, 64, 2, 8, 1, 5, archs=(90,)),
        Tiles(32, 64, 2, 8, 1, 15),
        Tiles(64, 32, 1, 8, 1),
        Tiles(32, 32, 1, 8, 1),
    ),
    512: (Tiles(64, 32, 1, 8, 1), Tiles(32, 32, 1, 8, 1, 15), Tiles(16, 16, 1, 8, 1)),
}
_FP32 = {
    64: (Tiles(64, 128, 1, 8, 1, 5), Tiles(64, 64, 1, 8, 1), Tiles(32, 64, 1, 8, 1)),
    128: (Tiles(64, 64, 1, 8, 1), Tiles(32, 64, 1, 8, 1), Tiles(32, 32, 1, 8, 1)),
    256: (Tiles(32, 32, 1, 8, 1), Tiles(16, 32, 1, 8, 1), Tiles(16, 16, 1, 8, 1)),
    512: (Tiles(16, 32, 1, 8, 1), Tiles(16, 16, 1, 8, 1)),
}
_TF32 = {
    64: (
        Tiles(64, 64, 1, 4, 2, 5, "two CTAs hide each other's barriers"),
        Tiles(64, 64, 1, 8, 1, 15),
        Tiles(32, 64, 1, 8, 1),
    ),
    128: (
        Tiles(64, 32, 1, 4, 2, 5, archs=(90,)),
        Tiles(64, 64, 1, 8, 1, 15),
        Tiles(32, 64, 1, 8, 1),
        Tiles(32, 32, 1, 8, 1),
    ),
    256: (Tiles(32, 32, 1, 8, 1), Tiles(16, 32, 1, 8, 1)),
    512: (Tiles(16, 32, 1, 8, 1, 15), Tiles(16, 16, 1, 8, 1)),
}
_SPLIT = {
    64: (
        Tiles(64, 64, 1, 4, 2, 5, "two CTAs hide each other's barriers", (90, 100)),
        Tiles(64, 64, 1, 8, 1, 15),
        Tiles(32, 64, 1, 8, 1),
    ),
    128: (
        Tiles(64, 64, 2, 8, 1, 15),
        Tiles(64, 64, 1, 8, 1, 15),
        Tiles(32, 64, 1, 8, 1, 15),
        Tiles(32, 32, 1, 8, 1),
    ),
    256: (
        Tiles(64, 32, 1, 8, 1, 15, archs=(80, 90)),
        Tiles(32, 32, 1, 8, 1, 15, archs=(80, 90)),
        Tiles(16, 32, 1, 8, 1),
        Tiles(16, 16, 1, 8, 1),
    ),
    512: (Tiles(16, 16, 1, 8, 1),),
}
_FP64 = {
    64: (Tiles(16, 64, 1, 4, 2, 5), Tiles(16, 64, 1, 8, 1), Tiles(16, 32, 1, 8, 1)),
    128: (Tiles(16, 32, 1, 4, 2, 5), Tiles(16, 32, 1, 8, 1), Tiles(16, 16, 1, 8, 1)),
    256: (Tiles(16, 16, 1, 8, 1),),
    512: (Tiles(16, 16, 1, 8, 1),),
}
UNSTAGED_BIAS, ORDERED_BIAS = 4, 14
"""What a bias adds to `register_weight` where its tiles are not staged, and where its sums have a fixed order."""
MAX_REGISTERS = 232
"""of `_registers`: the rest goes to fragments and addresses"""


def candidates(problem: Problem, device: Device, deterministic: bool = False) -> Sequence[Tiles]:
    """Tiles that fit shared memory and registers, best first."""
    gemm = gemm_of(problem, device)
    tables = {"WarpHalf": _16BIT, "WarpSimt": _FP32, "WarpSplit": _SPLIT, "WarpTf32": _TF32, "WarpWide": _FP64}
    table = tables[gemm.cuda.partition("<")[0]]
    # A bias that is not staged is read by addresses in registers, or gathered there.
    biased = any(isinstance(mod, Bias) for mod in problem.mods)
    weight = register_weight(problem)
    weight += UNSTAGED_BIAS * (biased and bias_to_stage(problem) is None) + ORDERED_BIAS * (biased and deterministic)
    widest = max(padded_dims(problem))
    tiles = next((tiles for limit, tiles in table.items() if widest <= limit), ())
    return [
        t
        for t in tiles
        if weight <= t.max_weight
        and (not t.archs or device.number in t.archs)
        and smem_bytes(problem, t, gemm) <= device.smem_per_block
        and _registers(problem, t, gemm) <= MAX_REGISTERS
    ]


# On Hopper: wgmma and TMA (kernels/backward_sm90.cu) --------------------------------------------------------------------

SM90 = "backward_sm90"
WINDOW_SM90 = "backward_window_sm90"
PRODUCER_THREADS = 128
WARP_ROWS = 16
"""Keys whose dk and dv a warp stores at once."""
UNIT_ROWS = 32
"""Of out and dout: kernels/backward_prepare_sm90.cu."""
LEAST_WAVES, LEAST_KEYS = 2, 512
"""CTAs of backward_sm90 for each multiprocessor, and keys, from which they begin before all rows are prepared: with fewer they
would wait for most.
"""
PREPARING_SMS = 32
"""Multiprocessors that prepare while the others multiply already: enough for memory, which is what preparing waits for. They
count in as many words of a pair (kPreparing of kernels/mainloop/pair_counters.cuh).
"""
L2_BYTES = 32 << 20
"""Of an H200's 50 MB, what may be counted on."""


FEW_KEYS = 2048
"""Of a sequence, up to which pairs follow one another beyond 128 columns."""
MOST_FEW_ROWS = 4096
"""Queries of a causal call up to which tiles of 64 rows were no slower than of 96, at 64 columns."""
LONG_RUNS = ((512, 4, 4), (2048, 1, 2))
"""At 64 columns, up to so many keys: key tiles that a CTA takes one after the other without a mask, and under a causal one."""
NARROW_WINDOW = 256
"""Keys of a window up to which its few query tiles do not repay what a CTA costs before and after them. A CTA then has one
consumer warpgroup, shares its SM with another, and takes several key tiles one after the other.
"""


def _window(problem: Problem) -> int | None:
    """Keys that a query of a window sees, None without one."""
    mask = problem.mask
    if not isinstance(mask, SlidingWindow) or mask.left is None or mask.right is None:
        return None
    return mask.left + mask.right + 1


def sm90_declines(backward: BackwardProblem, device: Device) -> list[str]:
    """Reasons why backward.cu, which serves everything, runs a problem instead."""
    p, reasons = backward.forward, []
    if device.arch != "sm_90a":
        return [f"needs sm_90a, got {device.arch}"]
    if p.dtype not in ("float16", "bfloat16"):
        return [f"multiplies float16 and bfloat16, got {p.dtype}"]
    widest = max(p.head_dim, p.head_dim_v)
    if widest > 256:
        reasons.append(f"serves head dimensions to 256, got {p.head_dim} and {p.head_dim_v}")
    for name, alignment in zip(("q", "k", "v"), p.vectors, strict=False):
        reasons += tma_obstacles(name, p.operand(name), alignment)
    reasons += tma_obstacles("dout", backward.dout, backward.vector_dout)
    reasons += [f"{name} is empty" for name, n in (("q", p.total_q), ("k", p.total_k)) if n == 0]
    if _bias_kind(backward) is ROWS:
        reasons.append("does not sum a bias over keys")
    if _bias_kind(backward) is COLUMNS and widest > 128:
        reasons.append("sums a bias over queries for head dimensions to 128")
    reasons += _bias_obstacles(backward)
    window = _window(p)
    if window is not None and window <= NARROW_WINDOW and widest > 128:
        reasons.append(f"does not repay its start in windows to {NARROW_WINDOW} keys, got {window}")
    if not reasons and not _in_one_pass(p) and not sm90_candidates(backward, device):
        reasons.append("has no registers or shared memory left for these modifications")
    return reasons


def sm90_bias(problem: Problem) -> Operand | None:
    """The one bias that backward_sm90 does not read element by element: it does not vary along the queries, or comes by TMA."""
    found = [ops[0] for mod, ops in zip(problem.mods, problem.mod_operands, strict=True) if isinstance(mod, Bias)]
    return found[0] if len(found) == 1 and (one_row(found[0]) or tma_bias(found[0]) is not None) else None


def _sm90_bias_kind(backward: BackwardProblem) -> BiasKind:
    kind, bias, p = _bias_kind(backward), backward.bias, backward.forward
    if kind not in (CELLS, STORE) or bias is None or sm90_bias(p) is None:
        return kind
    batches, heads, _, cols = (1, 1, 1, 1, *bias.shape)[-4:]
    if kind is STORE and cols % 8 == 0 and bias.dtype == p.dtype:  # else the copy engine could not, or not dS
        return STORE
    return COPIES if p.batch * p.num_heads <= MAX_COPIES * batches * heads else CELLS


def _sends_ds(backward: BackwardProblem) -> bool:
    """Whether what elements of a bias receive is, as 16-bit tiles, dS itself."""
    return len(backward.forward.mods) == 1 and _sm90_bias_kind(backward) in (STORE, COPIES)


def _early(problem: Problem) -> bool:
    """Whether probabilities and gradients of scores can be found one after the other: a bias moves scores, no gradient."""
    p = problem
    folded = not p.mods and p.scale > 0
    return (folded or (len(p.mods) == 1 and sm90_bias(p) is not None)) and p.dropout == 0 and not p.mask.tiled


def _bias_obstacles(backward: BackwardProblem) -> list[str]:
    """Why backward_sm90 would read a bias element by element, or could not sum its gradient, where backward.cu stages it."""
    p = backward.forward
    staged = sm90_bias(p)
    if staged is None:
        return ["reads a bias element by element, not in tiles"] if bias_to_stage(p) is not None else []
    if one_row(staged):
        return []
    reasons = []
    if max(p.head_dim, p.head_dim_v) > 128:
        reasons.append("has no shared memory left for tiles of a bias beyond head dimensions of 128")
    if backward.deterministic and _sm90_bias_kind(backward) is CELLS:
        reasons.append("adds up tiles of a bias in no fixed order")
    return reasons


def _shares_keys(tiles: Tiles) -> bool:
    """Whether two consumer warpgroups hold the same keys, each half the columns."""
    return tiles.block_n == 64 and tiles.warps == 12


def sm90_dims(problem: Problem, tiles: Tiles) -> tuple[int, int]:
    """Head dimensions in whole panels of 64 columns, of each of two warpgroups where these share their keys."""
    unit = 128 if _shares_keys(tiles) else 64
    return round_up(problem.head_dim, unit), round_up(problem.head_dim_v, unit)


def sm90_smem_bytes(backward: BackwardProblem, tiles: Tiles) -> int:
    """kernels/mainloop/backward_sm90.cuh, which asserts that it suffices."""
    dim, dim_v = sm90_dims(backward.forward, tiles)
    m, n, stages = tiles.block_m, tiles.block_n, tiles.stages
    staged, sums = sm90_bias(backward.forward), {CELLS: 2 * 4, STORE: 2 * 2, COPIES: 2 * 2}.get(_sm90_bias_kind(backward), 0)
    sums = 0 if _sends_ds(backward) else sums
    bias = (2 * stages + sums) * m * n if staged is not None and not one_row(staged) else 0
    # Of each consumer warp's 16 keys, and each consumer's two.
    bias += 4 * 8 * 16 * (staged is not None and one_row(staged)) + 4 * 256 * 2 * (_bias_kind(backward) is COLUMNS)
    stage = 2 * m * (dim + dim_v) + 8 * m + 32
    bulk = tiles.dq_buffers * 4 * m * dim if tiles.bulk or tiles.stores else 0
    buffers = 4 if _shares_keys(tiles) else 3 if tiles.alternate else 2  # of dS, and of P where warpgroups share their keys
    apart = _shares_keys(tiles) and tiles.seeded
    keys = (1 + tiles.runs) * 2 * n * (dim + dim_v)
    return keys + stages * stage + buffers * 2 * m * n + bulk + bias + 8 * (7 + 7 * stages + 6 * tiles.alternate + 8 * apart)


_SM90 = {  # by the wider head dimension; warps include the producer's four
    64: (
        Tiles(128, 128, 2, 12, max_weight=1),
        Tiles(96, 128, 2, 12, max_weight=5),
        Tiles(64, 128, 2, 12, max_weight=11),
        Tiles(32, 128, 2, 12, max_weight=17),
    ),
    128: (Tiles(64, 128, 2, 12, max_weight=5), Tiles(32, 128, 2, 12, max_weight=13)),
    192: (Tiles(48, 128, 2, 12, max_weight=1), Tiles(32, 128, 2, 12, max_weight=4)),  # with values to 128
    256: (Tiles(64, 64, 2, 12, max_weight=17),),
}
_SM90_NARROW = {64: (Tiles(64, 64, 2, 8, 2, max_weight=5),), 128: (Tiles(32, 64, 2, 8, 2, max_weight=5),)}
"""Where a window shows no more than `NARROW_WINDOW` keys."""


def sm90_candidates(backward: BackwardProblem, device: Device) -> Sequence[Tiles]:
    """Tiles that fit shared memory and registers, best first."""
    problem = backward.forward
    weight = register_weight(problem)
    if problem.mods and not _early(problem):
        weight += 4 + 4 * any(isinstance(mod, Bias) for mod in problem.mods)
    weight += 2 * any(isinstance(mod, UserMod) for mod in problem.mods)
    dim, dim_v = round_up(problem.head_dim, 64), round_up(problem.head_dim_v, 64)
    widest = max(dim, dim_v)
    weight += problem.packed and problem.mask.tiled and widest == 64  # of 96 rows, tile map and sequence together spill
    window = _window(problem)
    narrow = window is not None and window <= NARROW_WINDOW
    table = {**_SM90, **_SM90_NARROW} if narrow else _SM90
    tiles = next((tiles for limit, tiles in table.items() if widest <= limit and (limit != 192 or dim_v <= 128)), ())
    own_lengths = problem.packed or any(problem.operand(name) is not None for name in ("q_lens", "kv_lens"))
    if widest == 192:  # whose 48 rows leave the producers fewer registers than doormen and sequences' own lengths take
        tight = backward.deterministic or own_lengths
        tiles = (*(t for t in tiles if not (tight and t.block_m == 48)), *_SM90[256])
    band = isinstance(problem.mask, Full) or (isinstance(problem.mask, SlidingWindow) and window is None)
    bare = band and not own_lengths and _early(problem) and not problem.mods
    weight += 2 * (backward.deterministic and weight > 0 and not bare)  # the doormen, beside what is heavy already
    run = _long_run(problem, device) if bare and widest == 64 and not backward.deterministic else 0
    # The copy engine waits for additions to dq instead of the consumers. At 64 columns it costs more than it hides where they
    # spread by themselves, and at 256 there is no shared memory left to stage them.
    bulk = widest in (128, 192) or (
        widest == 64 and (narrow or isinstance(problem.mask, Full) or run > 0 or backward.deterministic)
    )
    # The rows that a band shows to 128 keys begin and end at multiples of 64 more often than of 96, which counts where they
    # are few.
    plain = not (problem.packed or problem.mods or backward.deterministic)
    few = window is not None or (plain and isinstance(problem.mask, SlidingWindow) and problem.seqlen_q <= MOST_FEW_ROWS)
    rows = 128 if run > 0 or (bare and (weight == 0 or backward.deterministic)) else 64 if few else 96
    runs = run > 1 or (narrow and widest == 64 and not backward.deterministic)
    seeded = bare and widest != 192
    whole = widest <= 128 and dim_v <= dim and problem.head_dim % 8 == problem.head_dim_v % 8 == 0
    tiles = tuple(
        replace(t, bulk=bulk and not _shares_keys(t), runs=runs, seeded=seeded, stores=bare and whole)
        for t in tiles
        if weight <= t.max_weight and t.block_m <= rows
    )
    fits = device.smem_per_block
    # Where dv is multiplied early and nothing but a mask's limits is between, warpgroups of 64 x 128 tiles need no barrier.
    if dim == dim_v == 128 and band and _early(problem) and not problem.mods and not backward.deterministic:
        tiles = tuple(replace(t, alternate=t.block_m == 64, stores=whole and t.block_m == 64) for t in tiles)
    elif seeded and not runs and not backward.deterministic:
        # Each warpgroup has a doorman, and two buffers where there is room.
        doubled = [replace(t, dq_buffers=2) for t in tiles]
        tiles = tuple(d if d.bulk and sm90_smem_bytes(backward, d) <= fits else t for d, t in zip(doubled, tiles, strict=True))
    return [t for t in tiles if sm90_smem_bytes(backward, t) <= fits]


_IN_ONE_PASS = Tiles(64, 64, 3, 16, reason="a query tile sees no more than three key tiles: no sums of dq in memory")
HELD_TILES = 3
"""Key tiles that a CTA of backward_window_sm90 holds."""
WINDOW_SLOTS = 4
"""Its buffers for them."""


def _in_one_pass(problem: Problem) -> bool:
    """Whether backward_window_sm90 serves what backward_sm90 does."""
    p, t, window = problem, _IN_ONE_PASS, _window(problem)
    plain = not p.mods and p.scale > 0 and p.dropout == 0 and max(p.head_dim, p.head_dim_v) <= 64
    plain = plain and not tma_obstacles("out", p.operand("out"), p.vectors[3])
    return plain and window is not None and window <= min(NARROW_WINDOW, (HELD_TILES - 1) * t.block_n + 1)


def window_smem_bytes(tiles: Tiles) -> int:
    """kernels/mainloop/backward_window_sm90.cuh, which asserts that it suffices."""
    tile = 2 * 64 * tiles.block_m
    stage = 3 * tile + 8 * tiles.block_m
    barriers = 3 * WINDOW_SLOTS + 4 * tiles.stages + 4
    return 2 * WINDOW_SLOTS * tile + tiles.stages * stage + 2 * HELD_TILES * tile + 80 + 8 * barriers + 1024


def _sm90_gemm(problem: Problem) -> Gemm:
    element = {"float16": "__half", "bfloat16": "__nv_bfloat16"}[problem.dtype]
    return Gemm(f"WarpgroupHalf<{element}>", 2, (64, 64), (64, 64), (64, 64), panel=64)


def declines(problem: Problem, device: Device) -> list[str]:
    """Reasons why there is no backward for a problem, none if there is."""
    reasons = []
    if device.number < 80:
        reasons.append(f"needs sm_80 or newer, got {device.arch}")
    if max(problem.head_dim, problem.head_dim_v) > 512:
        reasons.append(f"serves head dimensions to 512, got {problem.head_dim} and {problem.head_dim_v}")
    elif not reasons and not candidates(problem, device):
        reasons.append(
            f"no tile of head dimensions {problem.head_dim} and {problem.head_dim_v} in {problem.dtype} fits the "
            f"{device.smem_per_block} bytes of shared memory of a block"
        )
    return reasons


def make_backward_plan(backward: BackwardProblem, device: Device) -> BackwardPlan:
    """How a backward runs. Raises NotImplementedError with the reasons when no kernel serves it."""
    p = backward.forward
    reasons = declines(p, device)
    biases = sum(wanted and isinstance(mod, Bias) for mod, wanted in zip(p.mods, backward.wanted, strict=True))
    if biases > 1:
        reasons.append(f"differentiates one bias a call, got {biases}; add them up first")
    if backward.deterministic and backward.parameters:
        reasons.append("adds up gradients of user parameters by atomics, which deterministic=True forbids")
    if reasons:
        raise NotImplementedError(f"no kernel serves {backward} on {device.arch}:\n  backward: " + "; ".join(reasons))
    declined = sm90_declines(backward, device)
    hopper = not declined
    gemm = _sm90_gemm(p) if hopper else gemm_of(p, device)
    one_pass = hopper and _in_one_pass(p)
    if one_pass:
        tiles = _IN_ONE_PASS
    else:
        tiles = (sm90_candidates(backward, device) if hopper else candidates(p, device, backward.deterministic))[0]
    longest_q, longest_k = min(p.seqlen_q, p.total_q), min(p.seqlen_k, p.total_k)
    m_blocks, n_blocks = -(-longest_q // tiles.block_m), max(1, -(-longest_k // tiles.block_n))
    if p.packed:
        m_blocks = max(m_blocks, 1)
    dims = sm90_dims(p, tiles) if hopper else padded_dims(p)
    staged = sm90_bias(p) if hopper else bias_to_stage(p)
    if not hopper and staged is not None and smem_bytes(p, tiles, gemm, staged) > device.smem_per_block:
        staged = None
    kind = _sm90_bias_kind(backward) if hopper else _bias_kind(backward)
    if one_pass:
        smem = window_smem_bytes(tiles)
    else:
        smem = sm90_smem_bytes(backward, tiles) if hopper else smem_bytes(p, tiles, gemm, staged)
    resident = max(1, min(tiles.min_blocks, device.smem_per_sm // (smem + 1024)))
    slots, heads = resident * device.num_sms, max(1, p.num_heads_kv * p.batch)
    dq_splits = 1
    in_turn = backward.deterministic and not hopper
    if in_turn:
        dq_splits = min(n_blocks, max(1, slots // heads))
    ctas = heads * (dq_splits if in_turn else n_blocks)
    per_batch, per_head = p.mask.varies(p.mask_operands)
    own_lengths = p.packed or p.operand("q_lens") is not None or p.operand("kv_lens") is not None
    return BackwardPlan(
        backward=backward,
        device=device,
        kernel=WINDOW_SM90 if one_pass else SM90 if hopper else "backward",
        declined=tuple(declined),
        gemm=gemm,
        tiles=tiles,
        head_dim=dims[0],
        head_dim_v=dims[1],
        m_blocks=m_blocks,
        n_blocks=n_blocks,
        q_splits=1 if one_pass or (kind is CELLS and _sums_in_order(backward)) else _q_splits(ctas, m_blocks * p.group, slots),
        dq_splits=dq_splits,
        bias_kind=kind,
        staged_bias=staged,
        map_words=-(-n_blocks // 32) if p.mask.tiled else 0,
        map_batches=p.batch if own_lengths or per_batch else 1,
        map_heads=p.num_heads if per_head else 1,
        smem_bytes=smem,
        run=_window_run(m_blocks, heads, p.group, slots) if one_pass else _key_run(p, device, tiles, n_blocks, heads, slots),
    )


MAX_RUN = 16


def _run(n_blocks: int, heads: int, slots: int) -> int:
    """Key tiles of a CTA of several in narrow windows: of the fewest in turn, where what a CTA costs besides counts as one."""
    runs = [1 << n for n in range(MAX_RUN.bit_length())]
    return min(runs, key=lambda run: -(-heads * -(-n_blocks // run) // slots) * (run + 1))


def _long_run(problem: Problem, device: Device) -> int:
    """The same where key tiles see many queries, which one CTA an SM takes: as many as were fastest, if CTAs abound."""
    p = problem
    keys, column = min(p.seqlen_k, p.total_k), 1 if isinstance(p.mask, Full) else 2
    run = next((row[column] for row in LONG_RUNS if keys <= row[0]), 1)
    ctas = p.num_heads_kv * p.batch * -(-keys // (128 * run))
    return run if ctas >= 2 * device.num_sms else 1


def _key_run(problem: Problem, device: Device, tiles: Tiles, n_blocks: int, heads: int, slots: int) -> int:
    """Key tiles of a CTA of backward_sm90."""
    if not tiles.runs:
        return 1
    return _run(n_blocks, heads, slots) if tiles.block_n == 64 else _long_run(problem, device)


def _window_run(m_blocks: int, heads: int, group: int, slots: int) -> int:
    """Query tiles of a CTA of backward_window_sm90: of the fewest visits in turn; what a CTA costs besides counts as two."""
    runs = range(1, max(1, m_blocks) + 1)
    return min(runs, key=lambda run: -(-heads * -(-m_blocks // run) // slots) * ((run + HELD_TILES - 1) * group + 2))


MIN_TILES_PER_SPLIT = 4
"""Query tiles that a split must have to be worth a CTA."""


def _q_splits(ctas: int, tiles: int, slots: int) -> int:
    """Parts of the queries of a key tile, so that few keys and heads still fill most of the GPU."""
    return max(1, min(slots // max(1, ctas), tiles // MIN_TILES_PER_SPLIT))


def _sums_in_order(backward: BackwardProblem) -> bool:
    """Whether one CTA must visit all heads of a group, because they add to the same elements of a bias in a fixed order."""
    if not backward.deterministic or backward.bias is None:
        return False
    return backward.forward.group > 1 and (1, 1, 1, 1, *backward.bias.shape)[-3] == 1


def _bias_kind(backward: BackwardProblem) -> BiasKind:
    bias, p = backward.bias, backward.forward
    if bias is None:
        return NO_BIAS
    batches, heads, rows, cols = (1, 1, 1, 1, *bias.shape)[-4:]
    if rows == 1:
        return COLUMNS
    if cols == 1:
        return ROWS
    return STORE if (batches, heads) == (p.batch, p.num_heads) else CELLS
