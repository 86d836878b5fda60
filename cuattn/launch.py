"""Step 5: the parameter struct of kernels/params.cuh, and launches on the caller's stream."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from cuattn.fields import Field
from cuattn.problem import POINTERS, SLOT
from cuattn.registry import staged_bias
from cuattn.tma import MAP_ALIGNMENT, MAP_BYTES, TensorMap

if TYPE_CHECKING:
    from cuattn.plan import Plan

HEAD = struct.Struct(f"<{len(POINTERS)}Q")
"""The words that every call rewrites."""
_Q, _SPLIT_Q = SLOT["q"], SLOT["split_q"]


def _strides(plan: Plan, of_pairs: bool) -> list[int]:
    """Batch, row and head strides of q, k, v and out. `of_pairs`: q, k and v are the fp16 pairs that split.cu wrote,
    and their strides count rows.
    """
    p = plan.problem
    strides: list[int] = []
    for name in ("q", "k", "v", "out"):
        operand = p.operand(name)
        assert operand is not None
        # A packed array has no batch axis of its own: its sequences lie one after the other.
        strides += [0 if p.packed else operand.strides[0], operand.strides[1], operand.strides[2]]
    if of_pairs:
        kinds = ((p.num_heads, p.total_q), (p.num_heads_kv, p.total_k), (p.num_heads_kv, p.total_k))
        strides[:9] = [n for heads, rows in kinds for n in (0 if p.packed else heads * rows, 1, rows)]
    return strides


def fixed_fields(plan: Plan, of_pairs: bool = False) -> list[tuple[str, int | float]]:
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


def _variant_fields(plan: Plan, with_mods: bool) -> list[Field]:
    p = plan.problem
    fields = list(p.mask.fields(p.mask_operands))
    if not with_mods or not p.mods:
        return [*fields, Field("int", 0)]
    for mod, operands in zip(p.mods, p.mod_operands, strict=True):
        fields += mod.fields(operands)
    return fields


def parameter_bytes(plan: Plan, with_mods: bool) -> int:
    """Size of the kernel's parameter struct."""
    size = 8 * (len(POINTERS) + len(fixed_fields(plan)) + len(_variant_fields(plan, with_mods)))
    if not (with_mods and plan.uses_tma):
        return size
    return (4 if plan.bias_stages else 3) * MAP_BYTES + -(-size // MAP_ALIGNMENT) * MAP_ALIGNMENT


def _tensor_maps(plan: Plan) -> list[TensorMap]:
    """Of q, k and v as (head_dim, row, head, batch), in boxes of 64 columns by the rows of a tile, and of a staged bias."""
    p, tiles = plan.problem, plan.tiles
    arrays = [(p.operand(name), rows) for name, rows in (("q", tiles.block_m), ("k", tiles.block_n), ("v", tiles.block_n))]
    arrays += [(staged_bias(p), tiles.block_m)] if plan.bias_stages else []
    return [TensorMap(operand, (64, rows, 1, 1)) for operand, rows in arrays if operand is not None]


class Parameters:
    """The bytes of a plan's parameter struct; pointers are filled in by `pack`."""

    def __init__(self, plan: Plan, with_mods: bool) -> None:
        real = "d" if plan.problem.real == "float64" else "f4x"
        # Where inputs are split first, attention reads the pairs in the place of q, k and v.
        self.of_pairs = with_mods and plan.split_inputs
        fixed = fixed_fields(plan, self.of_pairs)
        variant = _variant_fields(plan, with_mods)
        codes = {"ptr": "Q", "int": "q", "real": real}
        layout = "<" + "".join(code for code, _ in fixed) + "".join(codes[f.kind] for f in variant)
        values = [value for _, value in fixed] + [0 if f.kind == "ptr" else f.value for f in variant]
        self.tail = struct.pack(layout, *values)
        start = 8 * len(fixed)
        self.maps = _tensor_maps(plan) if with_mods and plan.uses_tma else []
        if self.maps:
            self.tail += bytes(-(8 * len(POINTERS) + len(self.tail)) % MAP_ALIGNMENT)
        self.patches = [(start + 8 * n, int(f.value)) for n, f in enumerate(variant) if f.kind == "ptr"]
        """(offset in the tail, slot) of the pointers in masks and score modifications"""

    def pack(self, pointers: list[int]) -> bytes:
        """`pointers` by slot; the first are those of `POINTERS`, seed included."""
        own = pointers[: len(POINTERS)]
        if self.of_pairs:
            own[_Q : _Q + 3] = own[_SPLIT_Q : _SPLIT_Q + 3]
        head = HEAD.pack(*own)
        if self.maps:
            head = b"".join([m.at(pointers[m.operand.slot]) for m in self.maps]) + head
        if not self.patches:
            return head + self.tail
        tail = bytearray(self.tail)
        for offset, slot in self.patches:
            struct.pack_into("<Q", tail, offset, pointers[slot])
        return head + bytes(tail)
