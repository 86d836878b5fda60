"""Step 2: everything that decides anything about a call, validated once.

`make_problem` takes array descriptions (`View`) and options and raises for whatever breaks the contract; later steps check
nothing. All user errors are raised here and in the parsing of options: ValueError or TypeError as "name: got X, expected Y".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cuattn.arrays import View, contiguous_strides
from cuattn.fields import ITEMSIZE, Operand
from cuattn.masks import And, BlockSparse, BooleanMask, Full, Mask, SlidingWindow, TreeMask
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

FLOATS = ("float16", "bfloat16", "float32", "float64")
PRECISIONS = ("ieee", "tf32x3", "tf32")

POINTERS = (
    "q",
    "k",
    "v",
    "out",
    "lse",
    "sinks",
    "q_lens",
    "kv_lens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "partial_out",
    "partial_lse",
    "tile_map",
    "split_q",
    "split_k",
    "split_v",
    "magnitudes",
    "tile_counter",
    "call",
    "seed",
)
"""The first words of ForwardParams, rewritten on every call; arrays of masks and score modifications take the slots after."""
SLOT = {name: slot for slot, name in enumerate(POINTERS)}


@dataclass(frozen=True)
class Problem:
    """One attention call in canonical form: 4-D arrays (packed: a batch axis of stride 0 before 3-D), one mask, several mods.

    Lengths are in tokens, strides (inside `operands`) in elements, `scale` multiplies q k^T.
    """

    dtype: str
    precision: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    packed: bool
    total_q: int
    total_k: int
    scale: float
    mask: Mask
    mods: tuple[ScoreMod, ...]
    dropout: float
    return_lse: bool
    operands: tuple[Operand | None, ...]
    """by slot: the named pointers, then the mask's arrays, then those of each score modification"""
    vectors: tuple[int, int, int, int]
    """bytes of the widest access that the alignment of q, k, v, out allows: 16, 8, 4 or 2"""

    @property
    def real(self) -> str:
        """dtype of scores and statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def group(self) -> int:
        return self.num_heads // self.num_heads_kv

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
        sizes = f"b{self.batch} sq{self.seqlen_q} sk{self.seqlen_k} h{self.num_heads}/{self.num_heads_kv}"
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        extras = [str(self.mask)] if not isinstance(self.mask, Full) else []
        extras += [type(m).__name__ for m in self.mods]
        extras += [n for n in ("sinks", "q_lens", "kv_lens") if self.operand(n) is not None]
        extras += [f"dropout {self.dropout}"] if self.dropout else []
        kind = self.dtype + (f" ({self.precision})" if self.dtype == "float32" else "") + (" packed" if self.packed else "")
        return f"Problem({kind}, {sizes}, {dims}" + "".join(f", {e}" for e in extras) + ")"


# Options -> mask and mods ---------------------------------------------------------------------------------------------


def parse_mask(causal: Any, window: Any, mask: Any) -> Mask:
    """The conjunction of the three options that hide keys."""
    parts: list[Mask] = []
    if causal is not False:
        if causal is not True and causal not in ("bottom-right", "top-left"):
            raise ValueError(f"causal: got {causal!r}, expected False, True or 'top-left'")
        parts.append(SlidingWindow(None, 0, causal == "top-left"))
    if window is not None:
        parts.append(_parse_window(window))
    if mask is not None:
        parts.append(_parse_mask_object(mask))
    return And.of(parts)


def _parse_window(window: Any) -> Mask:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: got {window!r}, expected (left, right)")
    sides: list[int | None] = []
    for side in window:
        if side is None:
            sides.append(None)
        elif isinstance(side, int) and not isinstance(side, bool) and 0 <= side < 2**31:
            sides.append(side)
        else:
            raise ValueError(f"window: got {window!r}, expected sides that are non-negative integers or None")
    return Full() if sides == [None, None] else SlidingWindow(sides[0], sides[1])


def _parse_mask_object(mask: Any) -> Mask:
    if isinstance(mask, Mask):
        return mask
    if hasattr(mask, "blocksize") and hasattr(mask, "indptr"):
        return BlockSparse.from_bsr(mask)
    if hasattr(mask, "shape") and hasattr(mask, "dtype"):
        return BooleanMask(mask)
    raise TypeError(f"mask: got {type(mask).__name__}, expected a Mask, a boolean array or a scipy.sparse BSR matrix")


def parse_mods(softcap: Any, alibi_slopes: Any, bias: Any, score_mod: Any) -> tuple[ScoreMod, ...]:
    """The score modifications of a call, in the order in which they apply."""
    mods: list[ScoreMod] = []
    if softcap is not None:
        mods.append(SoftCap(softcap))
    if alibi_slopes is not None:
        mods.append(Alibi(alibi_slopes))
    if bias is not None:
        mods.append(Bias(bias))
    if score_mod is not None:
        mods.extend(_parse_score_mod(score_mod))
    return tuple(mods)


def _parse_score_mod(score_mod: Any) -> list[ScoreMod]:
    if isinstance(score_mod, ScoreMod):
        return [score_mod]
    if isinstance(score_mod, str):
        return [UserMod(score_mod)]
    if isinstance(score_mod, tuple) and len(score_mod) == 2 and all(isinstance(x, str) for x in score_mod):
        return [UserMod(score_mod[0], score_mod[1])]
    if isinstance(score_mod, (list, tuple)):
        return [mod for item in score_mod for mod in _parse_score_mod(item)]
    raise TypeError(
        f"score_mod: got {type(score_mod).__name__}, expected a ScoreMod, a list of them, a CUDA C expression or "
        "(expression, derivative)"
    )


# Arrays -> Problem ----------------------------------------------------------------------------------------------------


def make_problem(
    views: dict[str, View],
    mask: Mask,
    mask_views: Sequence[View],
    mods: tuple[ScoreMod, ...],
    mod_views: Sequence[View],
    *,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    dropout: float,
    precision: str,
    return_lse: bool,
) -> Problem:
    """Check a call and bring it into canonical form.

    views: by name, of q, k, v and whichever of out, sinks, q_lens, kv_lens, cu_seqlens_q, cu_seqlens_k are given.
    mask_views, mod_views: of `mask.arrays` and of the arrays of all `mods`.
    """
    packed = "cu_seqlens_q" in views
    q, k, v = (canonical(name, given(views, name), packed) for name in ("q", "k", "v"))
    _check_qkv(q, k, v, packed)
    check_scalars(scale, dropout, precision)
    if precision != "ieee" and q.dtype != "float32":
        raise ValueError(f"precision: got {precision!r} with {q.dtype} inputs, expected it with float32 only")
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    total_q, total_k = seqlen_q, seqlen_k
    if packed:
        batch = _check_cu_seqlens(views)
        seqlen_q = max_seqlen_of("max_seqlen_q", max_seqlen_q)
        seqlen_k = max_seqlen_of("max_seqlen_k", max_seqlen_k)
    num_heads = q.shape[2]
    for name in ("q_lens", "kv_lens"):
        if name in views:
            check_vector(name, views[name], batch, ("int32",))
    if "sinks" in views:
        check_vector("sinks", views["sinks"], num_heads, FLOATS)
    full_shape = (batch, num_heads, seqlen_q, seqlen_k)
    check_mask_arrays(mask, mask_views, full_shape)
    check_mod_arrays(mods, mod_views, full_shape)
    out_shape = (*views["q"].shape[:-1], v.shape[3])
    out = out_view(views, out_shape)
    named = {**views, "q": q, "k": k, "v": v, "out": canonical("out", out, packed)}
    vectors = (vector_bytes(q), vector_bytes(k), vector_bytes(v), vector_bytes(named["out"]))
    return Problem(
        dtype=q.dtype,
        precision=precision if q.dtype == "float32" else "ieee",
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_heads_kv=k.shape[2],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        packed=packed,
        total_q=total_q,
        total_k=total_k,
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale),
        mask=mask,
        mods=mods,
        dropout=float(dropout),
        return_lse=return_lse,
        operands=_operands(named, mask_views, mod_views),
        vectors=vectors,
    )


def canonical(name: str, view: View, packed: bool) -> View:
    """A 4-D view (batch, tokens, heads, dim) of a dense 4-D or 3-D, or packed 3-D, array."""
    expected = "(tokens, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim) or (seqlen, heads, head_dim)"
    if len(view.shape) != 3 and (packed or len(view.shape) != 4):
        raise ValueError(f"{name}: got shape {view.shape}, expected {expected}")
    if view.shape[-1] > 1 and view.strides[-1] != 1 and 0 not in view.shape:
        raise ValueError(f"{name}: got stride {view.strides[-1]} along the last axis, expected it to be contiguous (1)")
    if len(view.shape) == 4:
        return view
    return View(view.ptr, (1, *view.shape), (0, *view.strides), view.dtype)


def _check_qkv(q: View, k: View, v: View, packed: bool) -> None:
    if q.dtype not in FLOATS:
        raise TypeError(f"q: got dtype {q.dtype}, expected one of {', '.join(FLOATS)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {q.dtype} as q has")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {q.shape[0]} as q has")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: got {v.shape[1]} tokens, expected {k.shape[1]} as k has")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: got {v.shape[2]} heads, expected {k.shape[2]} as k has")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: got head_dim {k.shape[3]}, expected {q.shape[3]} as q has")
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(f"{'q' if q.shape[3] == 0 else 'v'}: got head_dim 0, expected at least 1")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0 or q.shape[2] == 0:
        raise ValueError(f"q: got {q.shape[2]} heads, expected a positive multiple of the {k.shape[2]} heads of k and v")
    limit = 2**31 - 2**12
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] > limit:
            raise ValueError(f"{name}: got {x.shape[1]} tokens, expected at most {limit}")


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The same error for a caller whose arguments have other names.

    >>> renamed(ValueError("k: got head_dim 4, expected 8 as q has"), {"q": "query", "k": "key"})
    ValueError('key: got head_dim 4, expected 8 as query has')
    """
    text = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error))
    return type(error)(text)


def check_scalars(scale: Any, dropout: Any, precision: Any) -> None:
    """Refuse options that are no numbers, or out of range."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ValueError(f"scale: got {scale!r}, expected a finite float or int, or None")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout!r}, expected a number p with 0 <= p < 1")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")


def _check_cu_seqlens(views: dict[str, View]) -> int:
    """Batch size of a packed call."""
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        view = views[name]
        if len(view.shape) != 1 or view.shape[0] < 1:
            raise ValueError(f"{name}: got shape {view.shape}, expected (batch + 1,)")
        check_vector(name, view, views["cu_seqlens_q"].shape[0], ("int32",))
    return views["cu_seqlens_q"].shape[0] - 1


def max_seqlen_of(name: str, value: Any) -> int:
    """The longest length, as an integer."""
    try:
        length = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: got {value!r}, expected an integer") from None
    if isinstance(value, bool) or length < 0:
        raise ValueError(f"{name}: got {value!r}, expected a non-negative integer")
    return int(length)


def check_vector(name: str, view: View, length: int, dtypes: tuple[str, ...]) -> None:
    """Refuse anything but a contiguous vector of `length` elements."""
    if view.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {view.dtype}, expected {' or '.join(dtypes)}")
    if view.shape != (length,):
        raise ValueError(f"{name}: got shape {view.shape}, expected ({length},)")
    if length > 1 and view.strides[0] != 1:
        raise ValueError(f"{name}: got stride {view.strides[0]}, expected a contiguous array")


def _check_broadcast(name: str, shape: tuple[int, ...], full: tuple[int, ...], meaning: str) -> None:
    padded = (1,) * (len(full) - len(shape)) + shape
    if len(shape) > len(full) or any(n not in (1, m) for n, m in zip(padded, full, strict=True)):
        raise ValueError(f"{name}: got shape {shape}, expected one that broadcasts to {meaning} = {full}")


def check_mask_arrays(mask: Mask, views: Sequence[View], full: tuple[int, int, int, int]) -> None:
    """Refuse a mask whose arrays do not fit (batch, num_heads, seqlen_q, seqlen_k)."""
    position = 0
    for part in mask.masks if isinstance(mask, And) else (mask,):
        own = views[position : position + len(part.arrays)]
        position += len(part.arrays)
        if isinstance(part, BooleanMask):
            if own[0].dtype not in ("bool", "uint8"):
                raise TypeError(f"mask: got dtype {own[0].dtype}, expected bool (True = visible) or uint8")
            _check_broadcast("mask", own[0].shape, full, "(batch, num_heads, seqlen_q, seqlen_k)")
        elif isinstance(part, TreeMask):
            if own[0].dtype not in ("bool", "uint8"):
                raise TypeError(f"mask: got a tree of dtype {own[0].dtype}, expected bool (True = visible) or uint8")
            if not own[0].shape:
                raise ValueError("mask: got a tree without axes, expected (..., seqlen_q, columns)")
            _check_broadcast("mask", own[0].shape, (*full[:3], own[0].shape[-1]), "(batch, num_heads, seqlen_q, columns)")
        elif isinstance(part, BlockSparse):
            _check_block_sparse(part, own, full)


def _check_block_sparse(mask: BlockSparse, views: Sequence[View], full: tuple[int, int, int, int]) -> None:
    if mask.block_q < 1 or mask.block_k < 1:
        raise ValueError(f"mask: got blocks of {mask.block_q} x {mask.block_k}, expected positive sizes")
    if views[0].dtype not in ("bool", "uint8", "int32", "int64"):
        raise TypeError(f"mask: got blocks of dtype {views[0].dtype}, expected bool, uint8, int32 or int64")
    blocks = (-(-full[2] // mask.block_q), -(-full[3] // mask.block_k))
    shape = views[0].shape
    if len(shape) < 2 or shape[-2:] != blocks:  # a block axis of length 1 is one block, not a broadcast one
        raise ValueError(f"mask: got {shape} blocks, expected (..., {blocks[0]}, {blocks[1]}) to cover {full[2]} x {full[3]}")
    _check_broadcast("mask", shape[:-2], full[:2], "(batch, num_heads)")
    if len(views) > 1:
        expected = (mask.block_q, mask.block_k)
        if views[1].dtype not in ("bool", "uint8") or views[1].shape[1:] != expected or len(views[1].shape) != 3:
            raise ValueError(f"mask: got partial {views[1].shape} of {views[1].dtype}, expected boolean (count, {expected})")
        _check_packed_rows("mask", views[1])


def _check_packed_rows(name: str, view: View) -> None:
    expected = 1
    for n, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if n > 1 and stride != expected:
            raise ValueError(f"{name}: got strides {view.strides} for shape {view.shape}, expected a C-contiguous array")
        expected *= n


def check_mod_arrays(mods: tuple[ScoreMod, ...], views: Sequence[View], full: tuple[int, int, int, int]) -> None:
    """Refuse modifications whose arrays do not fit (batch, num_heads, seqlen_q, seqlen_k)."""
    position = 0
    for mod in mods:
        own = views[position : position + len(mod.arrays)]
        position += len(mod.arrays)
        if isinstance(mod, Bias):
            if own[0].dtype not in FLOATS:
                raise TypeError(f"bias: got dtype {own[0].dtype}, expected one of {', '.join(FLOATS)}")
            _check_broadcast("bias", own[0].shape, full, "(batch, num_heads, seqlen_q, seqlen_k)")
        elif isinstance(mod, Alibi):
            if own[0].dtype not in ("float32", "float64"):
                raise TypeError(f"alibi_slopes: got dtype {own[0].dtype}, expected float32")
            if own[0].shape not in ((full[1],), full[:2]):
                raise ValueError(f"alibi_slopes: got shape {own[0].shape}, expected ({full[1]},) or {full[:2]}")
        elif isinstance(mod, UserMod):
            for view in own:
                if view.dtype not in (*FLOATS, "int32", "int64", "bool", "uint8"):
                    raise TypeError(f"score_mod: got a parameter of dtype {view.dtype}, expected a float or integer dtype")
                if len(view.shape) != 1 or (view.shape[0] > 1 and view.strides[0] != 1):
                    raise ValueError(f"score_mod: got a parameter of shape {view.shape}, expected a contiguous vector")


def out_view(views: dict[str, View], shape: tuple[int, ...]) -> View:
    """The caller's out, checked; or the contiguous one that will be made."""
    if "out" not in views:
        return View(0, shape, contiguous_strides(shape), views["q"].dtype)
    out = views["out"]
    if out.dtype != views["q"].dtype:
        raise TypeError(f"out: got dtype {out.dtype}, expected {views['q'].dtype} as q has")
    if out.shape != shape:
        raise ValueError(f"out: got shape {out.shape}, expected {shape}")
    if 0 not in shape and any(n > 1 and s == 0 for n, s in zip(shape, out.strides, strict=True)):
        raise ValueError(f"out: got strides {out.strides}, expected an array whose elements do not overlap")
    return out


def _operands(views: dict[str, View], mask_views: Sequence[View], mod_views: Sequence[View]) -> tuple[Operand | None, ...]:
    operands: list[Operand | None] = [
        Operand(slot, views[name].shape, views[name].strides, views[name].dtype) if name in views else None
        for slot, name in enumerate(POINTERS)
    ]
    for view in (*mask_views, *mod_views):
        operands.append(Operand(len(operands), view.shape, view.strides, view.dtype, math.gcd(16, view.ptr)))
    return tuple(operands)


def given(views: dict[str, View], name: str) -> View:
    """An array that no call can do without."""
    if name not in views:
        raise TypeError(f"{name}: got None, expected an array")
    return views[name]


def vector_bytes(view: View) -> int:
    """Bytes of the widest access (16, 8, 4 or 2) to which the start of every row of an array is aligned."""
    size = ITEMSIZE[view.dtype]
    steps = [s * size for n, s in zip(view.shape[:-1], view.strides[:-1], strict=True) if n > 1]
    return math.gcd(16, view.ptr, *steps)
