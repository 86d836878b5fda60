"""Step 5: the parameter struct of kernels/params.cuh, and launches on the caller's stream."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Mapping, Sequence
from struct import Struct as Packer
from typing import TYPE_CHECKING, Any, NamedTuple

from cuattn.arrays import contiguous_strides
from cuattn.backward import POINTERS as BACKWARD_POINTERS
from cuattn.backward import WARP_ROWS, BackwardPlan
from cuattn.decode import POINTERS as DECODE_POINTERS
from cuattn.decode import SHARED as DECODE_SHARED
from cuattn.decode import SLOT as DECODE_SLOT
from cuattn.decode import DecodePlan, LatentPlan, decode_fields, decode_variant
from cuattn.fields import ITEMSIZE, Field, Operand
from cuattn.problem import POINTERS, SLOT, Problem
from cuattn.registry import staged_bias
from cuattn.score_mods import Bias
from cuattn.tma import MAP_ALIGNMENT, MAP_BYTES, TensorMap

if TYPE_CHECKING:
    from cuattn.plan import Plan

WORD = 8
"""Bytes of a pointer; every member of a struct is padded to them."""
_Q, _SPLIT_Q = SLOT["q"], SLOT["split_q"]


WARPGROUP_ROWS = 64
"""Rows of q that forward_sm90.cu loads at once: each warpgroup has its own."""


def _strides(plan: Plan | BackwardPlan, of_pairs: bool) -> list[int]:
    """Batch, row and head strides of q, k, v and out. `of_pairs`: q, k and v are the fp16 pairs that split.cu wrote; the
    forward's strides then count rows.
    """
    p = plan.problem
    strides: list[int] = []
    for name in ("q", "k", "v", "out"):
        operand = p.operand(name)
        assert operand is not None
        # A packed array has no batch axis of its own: its sequences lie one after the other.
        strides += [0 if p.packed else operand.strides[0], operand.strides[1], operand.strides[2]]
    if of_pairs:
        row, row_v = (2 * plan.head_dim, 2 * plan.head_dim_v) if isinstance(plan, BackwardPlan) else (1, 1)
        kinds = ((p.num_heads, p.total_q, row), (p.num_heads_kv, p.total_k, row), (p.num_heads_kv, p.total_k, row_v))
        strides[:9] = [n for kind in kinds for n in _pair_strides(p, *kind)]
    return strides


def _pair_strides(problem: Problem, heads: int, rows: int, pitch: int) -> tuple[int, int, int]:
    """Batch, row and head strides of an array of pairs whose rows are `pitch` long."""
    return 0 if problem.packed else heads * rows * pitch, pitch, rows * pitch


def fixed_fields(plan: Plan | BackwardPlan, of_pairs: bool = False) -> list[tuple[str, int | float]]:
    """Members of ForwardParams after its pointers, in order, as (struct code, value); each takes 8 bytes."""
    p = plan.problem
    rows = p.total_q if p.packed else p.seqlen_q
    longs = [
        *_strides(plan, of_pairs),
        0 if p.packed else p.num_heads * rows,
        rows,
        plan.partial_rows,
        plan.m_blocks * 2 * plan.map_words * plan.map_heads if plan.map_batches > 1 else 0,
        plan.m_blocks * 2 * plan.map_words if plan.map_heads > 1 else 0,
    ]
    ints = [
        p.batch,
        p.seqlen_q,
        p.seqlen_k,
        p.num_heads,
        p.group,
        p.head_dim,
        p.head_dim_v,
        p.total_q,
        p.total_k,
        plan.m_blocks,
        plan.num_splits,
        plan.dv_chunks,
        plan.map_words,
        plan.section,
        round(p.dropout * 65536),
    ]
    reals = [p.scale, 1.0 / (1.0 - p.dropout)]
    return [("q", n) for n in longs] + [("i4x", n) for n in ints] + [("d", x) for x in reals]


def _variant_fields(plan: Plan | BackwardPlan, with_mods: bool) -> list[Field]:
    p = plan.problem
    fields = list(p.mask.fields(p.mask_operands))
    if not with_mods or not p.mods:
        return [*fields, Field("int", 0)]
    for mod, operands in zip(p.mods, p.mod_operands, strict=True):
        fields += mod.fields(operands)
    return fields


def _tensor_maps(plan: Plan | BackwardPlan, rows_q: int) -> list[TensorMap]:
    """Of q, k and v as (head_dim, row, head, batch), in boxes of 64 columns by the rows of a tile (of q: rows_q), and of a
    staged bias.
    """
    p, tiles = plan.problem, plan.tiles
    arrays = [(p.operand(name), rows) for name, rows in (("q", rows_q), ("k", tiles.block_n), ("v", tiles.block_n))]
    arrays += [(staged_bias(p), tiles.block_m)] if plan.bias_stages else []
    return [TensorMap(operand, (64, rows, 1, 1)) for operand, rows in arrays if operand is not None]


def _layout(
    real: str, fixed: Sequence[tuple[str, int | float]], variant: Sequence[Field]
) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes after the pointers of ForwardParams, and where in them (offset, slot) pointers of the variant belong."""
    codes = {"ptr": "Q", "int": "q", "real": "d" if real == "float64" else "f4x"}
    layout = "<" + "".join(code for code, _ in fixed) + "".join(codes[f.kind] for f in variant)
    values = [value for _, value in fixed] + [0 if f.kind == "ptr" else f.value for f in variant]
    start = 8 * len(fixed)
    return struct.pack(layout, *values), [(start + 8 * n, int(f.value)) for n, f in enumerate(variant) if f.kind == "ptr"]


class Struct(NamedTuple):
    """A plan's parameter struct, and where in it the words of a call belong."""

    image: bytes
    """all of it; 0 where a word or a map belongs"""
    words: tuple[tuple[int, int], ...]
    """(place in 8-byte words, slot)"""
    maps: tuple[TensorMap, ...]
    """at the start, one after the other"""
    shifted: tuple[tuple[int, int, int], ...] = ()
    """(place, slot, bytes) of words that are addresses some bytes further on"""


def _assemble(maps: Sequence[TensorMap], *parts: Sequence[int] | tuple[bytes, list[tuple[int, int]]]) -> Struct:
    """Maps, then parts: slots of words that lie one after the other, or what `_layout` gives."""
    image, words = bytes(MAP_BYTES * len(maps)), []
    for part in parts:
        place = len(image) // WORD
        if isinstance(part, tuple):
            image += part[0]
            words += [(place + offset // WORD, slot) for offset, slot in part[1]]
        else:
            image += bytes(WORD * len(part))
            words += [(place + n, slot) for n, slot in enumerate(part)]
    if maps:
        image += bytes(-len(image) % MAP_ALIGNMENT)
    return Struct(image, tuple(words), tuple(maps))


def forward_struct(plan: Plan | BackwardPlan, with_mods: bool) -> Struct:
    """ForwardParams of a kernel; those that attend are `with_mods`."""
    # Where inputs are split first, attention reads the pairs in the place of q, k and v.
    of_pairs = with_mods and plan.split_inputs
    maps = _tensor_maps(plan, WARPGROUP_ROWS) if with_mods and plan.uses_tma else []
    layout = _layout(plan.problem.real, fixed_fields(plan, of_pairs), _variant_fields(plan, with_mods))
    return _assemble(maps, _slots(of_pairs), layout)


def _slots(of_pairs: bool) -> list[int]:
    """What `POINTERS` are filled from, in order."""
    slots = list(range(len(POINTERS)))
    if of_pairs:
        slots[_Q : _Q + 3] = range(_SPLIT_Q, _SPLIT_Q + 3)
    return slots


# Backward -------------------------------------------------------------------------------------------------------------

_DOUT, _SPLIT_DOUT = BACKWARD_POINTERS.index("dout"), BACKWARD_POINTERS.index("split_dout")


def _backward_fields(
    plan: BackwardPlan, launch: tuple[int, int, int, int], of_pairs: bool = False
) -> Sequence[tuple[str, int | float]]:
    """Members of BackwardParams after its pointers, in order, as (struct code, value)."""
    backward, p, bias = plan.backward, plan.problem, plan.backward.bias

    def rows(strides: Sequence[int]) -> list[int]:  # batch, row, head
        return [0 if p.packed else strides[0], strides[1], strides[2]]

    def stats(operand: Operand | None) -> list[int]:  # batch, head, row
        return list(operand.strides) if operand is not None else [0, 0, 0]

    gradients = [n for name in "qkv" for n in rows(contiguous_strides(backward.shape(name)))]
    shape = (1, 1, 1, 1, *(bias.shape if bias is not None else ()))[-4:]
    extents = plan.sum_shape
    sum_strides = [s if n > 1 else 0 for s, n in zip(contiguous_strides(extents), extents, strict=True)]
    dout = rows(backward.dout.strides)
    longs = [
        *(_pair_strides(p, p.num_heads, p.total_q, 2 * plan.head_dim_v) if of_pairs else dout),
        *stats(backward.lse),
        *stats(backward.dlse),
        *gradients,
        plan.rows_kv,
        plan.slabs,
        plan.dq_elements,
        plan.zeroed // 16,
        *contiguous_strides(shape),
        *sum_strides,
    ]
    ints = [plan.key_tiles, plan.q_splits, plan.dq_splits, plan.run, plan.last_section]
    ints += [plan.prepared_units, *launch, *shape]
    return [("q", n) for n in longs] + [("i4x", n) for n in ints]


def _backward_variant(plan: BackwardPlan, attends: bool) -> list[Field]:
    """Mask and modifications; the kernels around backward.cu have neither."""
    p, backward = plan.problem, plan.backward
    if not attends:
        return [Field("int", 0), Field("int", 0)]
    fields = list(p.mask.fields(p.mask_operands))
    if not p.mods:
        return [*fields, Field("int", 0)]
    slot = backward.first_slot + len(BACKWARD_POINTERS)
    for mod, operands, wanted in zip(p.mods, p.mod_operands, backward.wanted, strict=True):
        count = len(mod.differentiable) if wanted and not isinstance(mod, Bias) else 0
        fields += mod.fields(operands, tuple(range(slot, slot + count)))
        slot += count
    return fields


def _backward_maps(plan: BackwardPlan) -> list[TensorMap]:
    """Of q, k, v and dout, of dk and dv where the copy engine stores them, of a staged bias and of what its gradient goes
    to, of out where the kernel finds delta itself, in whole tiles, panels of 128 bytes or, where a warp stores them, of 16
    rows.
    """
    dout = plan.backward.dout._replace(slot=plan.backward.slot("dout"))
    m = plan.tiles.block_m
    arrays = [(dout, m), *((array, WARP_ROWS) for array in plan.tma_gradients), (plan.tma_bias, m), (plan.tma_bias_sums, m)]
    arrays += [(plan.problem.operand("out"), m)] if plan.in_one_pass else []
    ours = [TensorMap(array, (128 // ITEMSIZE[array.dtype], rows, 1, 1)) for array, rows in arrays if array is not None]
    return [*_tensor_maps(plan, m), *ours]


def backward_struct(plan: BackwardPlan, launch: tuple[int, int, int, int], attends: bool) -> Struct:
    """BackwardParams of one launch of a kernel of the backward."""
    real, of_pairs = plan.problem.real, attends and plan.split_inputs
    own = [plan.backward.first_slot + n for n in range(len(BACKWARD_POINTERS))]
    if of_pairs:
        own[_DOUT] = own[_SPLIT_DOUT]
    maps = _backward_maps(plan) if attends and plan.uses_tma else []
    base = _layout(real, fixed_fields(plan, of_pairs), [])
    layout = _layout(real, _backward_fields(plan, launch, of_pairs), _backward_variant(plan, attends))
    return _assemble(maps, _slots(of_pairs), base, own, layout)


# KV cache -------------------------------------------------------------------------------------------------------------


def decode_struct(plan: DecodePlan, attends: bool, piece: int = 0) -> Struct:
    """DecodeParams of a kernel over a KV cache; `piece` of the columns of out, if it attends."""
    p = plan.problem
    slots = list(range(len(DECODE_POINTERS)))
    if p.latent:
        for name, source in DECODE_SHARED.items():
            slots[DECODE_SLOT[name]] = DECODE_SLOT[source]
    names = ("k_cache",) if isinstance(plan, LatentPlan) else ("k_cache", "v_cache")
    caches = [p.operand(name) for name in names if attends and plan.box_rows]
    maps = [TensorMap(cache, (plan.box_columns, plan.box_rows, 1, 1)) for cache in caches if cache is not None]
    layout = _layout(p.real, decode_fields(plan, attends, piece), decode_variant(plan, attends))
    whole = _assemble(maps, slots, layout)
    first = len(maps) * MAP_BYTES // WORD
    columns = [
        (first + DECODE_SLOT[name], slots[DECODE_SLOT[name]], piece * plan.head_dim_v * ITEMSIZE[dtype])
        for name, dtype in (("v_cache", p.cache_dtype), ("out", p.dtype))
        if piece
    ]
    return whole._replace(shifted=tuple(columns))


# Launches -------------------------------------------------------------------------------------------------------------


def _first_run(words: Sequence[tuple[int, int]]) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]:
    """The words whose places follow each other from the first on, and the others. In the first are a call's arrays."""
    count = next((n for n, (place, _) in enumerate(words) if place != words[0][0] + n), len(words))
    return words[:count], words[count:]


class Launch:
    """A loaded kernel with its grid and its struct. A call gives it its words and a stream."""

    def __init__(
        self,
        function: Any,
        grid: int | tuple[int, int, int],
        threads: int,
        smem_bytes: int,
        struct: Struct,
        position: Mapping[int, int],
    ) -> None:
        """function: of `jit.load`. position: of a slot among the words of a call; slots that calls do not fill are 0."""
        self._function, self._block, self._smem_bytes = function, (threads, 1, 1), smem_bytes
        self._grid = grid if isinstance(grid, tuple) else (grid, 1, 1)
        self._struct = struct
        pointers, others = _first_run(struct.words)
        self._start, filled = pointers[0][0] * WORD, [position[slot] for _, slot in pointers if slot in position]
        self._pack = Packer("<" + "".join("Q" if slot in position else "8x" for _, slot in pointers)).pack_into
        self._pick = operator.itemgetter(*filled)
        self._words = tuple((place, position[slot]) for place, slot in others if slot in position)
        self._shifted = tuple((place, position[slot], shift) for place, slot, shift in struct.shifted)
        self._bases = tuple((n * MAP_BYTES // WORD, position[m.operand.slot]) for n, m in enumerate(struct.maps))
        self._free: list[_Memory] = []

    def __call__(self, words: Sequence[int], stream: Any) -> None:
        try:
            memory = self._free.pop()  # each launch has memory of its own, whatever other threads do
        except IndexError:
            memory = self._memory(words)
        target = memory.words
        self._pack(target, self._start, *self._pick(words))
        for place, n in memory.places:
            target[place] = words[n]
        for place, n, shift in self._shifted:
            target[place] = words[n] + shift
        self._function(self._grid, self._block, memory.arguments, self._smem_bytes, stream)
        if memory.lasting:
            self._free.append(memory)

    def _memory(self, words: Sequence[int]) -> _Memory:
        """Memory with the tensor maps of a call."""
        maps = b"".join([m.at(words[n]) for m, (_, n) in zip(self._struct.maps, self._bases, strict=True)])
        image = maps + self._struct.image[len(maps) :]
        memory = (ctypes.c_uint64 * (len(image) // WORD)).from_buffer_copy(image)
        lasting = all(m.movable for m in self._struct.maps)
        places = self._words + self._bases if lasting else self._words
        arguments = getattr(self._function, "arguments", _cupy_arguments)(ctypes.addressof(memory))
        return _Memory(memory, arguments, places, lasting)


def _cupy_arguments(address: int) -> Any:
    """Of a kernel with one struct, as `cupy.cuda.Function` takes them."""
    from cupy.cuda.function import CPointer

    return (CPointer(address),)


class _Memory(NamedTuple):
    """A struct in memory that the driver reads while it launches."""

    words: Any
    arguments: Any
    """as the function takes them"""
    places: tuple[tuple[int, int], ...]
    """(place, position of a call's word) of all that another call must write"""
    lasting: bool
    """whether maps of other calls differ in their addresses alone, so that this memory serves them too"""
