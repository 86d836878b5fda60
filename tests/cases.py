"""Named attention problems: the one place that lists masks, score modifications and shapes for every test.

A `Case` is a frozen description whose string is the test id. Its inputs come from a seed through NumPy and are handed out
twice: as keyword arguments for `cuattn.attention` / `cuattn.attention_varlen`, and as the oracle's. To test a new mask or score
modification, add one entry to `MASKS` or `MODS`: FEATURES (every pair of features at least once), the random tests and the
compilation pass pick it up.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

import cuattn
from cuattn import reference
from cuattn.masks import BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow, TreeMask
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

Array = npt.NDArray[Any]
Put = Callable[[Array], Any]

DTYPES: dict[str, npt.DTypeLike] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
LENGTHS = ((1, 1), (1, 239), (113, 203), (239, 1), (799, 3), (1023, 1024), (1024, 1023), (2048, 2048), (4224, 4224))
"""(seqlen_q, seqlen_k): odd, prime, one-sided, off by one around a power of two, and a few full tiles."""

UNWRITTEN = 5
"""Tokens past cu_seqlens[-1] in a packed case: the result must hold 0 there."""


class Feature(NamedTuple):
    """A mask or score modification: how a caller asks for it, and the object that the oracle evaluates."""

    options: Mapping[str, Any]
    model: Any


@dataclass(frozen=True)
class Case:
    """One attention problem. `seqlen_q` and `seqlen_k` are the longest lengths where `sequences` makes them vary."""

    dtype: str = "float32"
    precision: str = "ieee"
    batch: int = 2
    seqlen_q: int = 113
    seqlen_k: int = 203
    num_heads: int = 4
    num_heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    """0: as head_dim"""
    mask: str = "full"
    mods: tuple[str, ...] = ()
    sequences: str = "dense"
    """dense | kv_lens | q_lens | lens (both) | packed"""
    sinks: bool = False
    dropout: float = 0.0
    layout: str = "contiguous"
    scale: float | None = None
    magnitude: float = 1.0
    """Standard deviation of q and k; scores then have one of magnitude**2."""
    nonfinite: str = ""
    """'inf q', 'nan k', 'nan dout' ...: one such element, in the middle of that input or of its first sequence"""
    batch_axis: bool = True
    seed: int = 0
    growth: float = field(default=0.0, repr=False)
    """How much larger the last key is than the first: late scores then exceed all before. Not part of what seeds the inputs."""
    negative: bool = field(default=False, repr=False)
    """No score is positive; with growth, they fall from the first key to the last. Not part of what seeds the inputs."""

    def __str__(self) -> str:
        kind = {"ieee": self.dtype}.get(self.precision, self.precision)
        dims = f"d{self.head_dim}" + (f"v{self.head_dim_v}" if self.head_dim_v else "")
        sizes = f"{f'{self.batch}x' if self.batch_axis else ''}{self.seqlen_q}x{self.seqlen_k}"
        tags = [kind, dims, sizes, f"h{self.num_heads}:{self.num_heads_kv}", self.mask, *self.mods]
        tags += [t for t in (self.sequences, self.layout) if t not in ("dense", "contiguous")]
        tags += ["sinks"] if self.sinks else []
        tags += [f"dropout{self.dropout:g}"] if self.dropout else []
        tags += [f"scale{self.scale:g}"] if self.scale is not None else []
        tags += [f"x{self.magnitude:g}"] if self.magnitude != 1 else []
        tags += [f"growth{self.growth:g}"] if self.growth else []
        tags += ["negative"] if self.negative else []
        tags += [self.nonfinite.replace(" ", "_")] if self.nonfinite else []
        return "-".join(tags)

    @property
    def packed(self) -> bool:
        return self.sequences == "packed"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*_inputs(self).q.shape[:-1], self.head_dim_v or self.head_dim)

    def arguments(self, put: Put = np.asarray) -> dict[str, Any]:
        """Keyword arguments of the public call; `put` turns each NumPy array into one of the library under test."""
        inputs = _inputs(self)
        layouts = ("heads_first", "offset", "interleaved") if self.layout == "mixed" else (self.layout,) * 3
        tensors = {n: place(getattr(inputs, n), layout, put) for n, layout in zip("qkv", layouts, strict=True)}
        options = {name: _convert(value, put) for name, value in inputs.options.items()}
        return {**tensors, **options}

    def run(self, put: Put = np.asarray, **extra: Any) -> Any:
        """The public call on this case's inputs, with `extra` options."""
        call = cuattn.attention_varlen if self.packed else cuattn.attention
        return call(**self.arguments(put), **extra)

    def exact(self) -> tuple[Array, Array]:
        """(out, lse) of the oracle in float64."""
        return _answer("forward", self, np.dtype(np.float64))

    def naive(self) -> tuple[Array, Array]:
        """(out, lse) of the textbook formula in the arithmetic of the case's dtype and precision."""
        return _answer("forward", self, self.numpy_dtype)

    def cotangents(self) -> tuple[Array, Array]:
        """(dout, dlse) of a random loss; NaN in rows that are padding."""
        return _cotangents(self)

    def exact_gradients(self) -> reference.Gradients:
        """Of the oracle in float64."""
        return _answer("backward", self, np.dtype(np.float64))

    def naive_gradients(self) -> reference.Gradients:
        """Of the textbook formulas in the arithmetic of the case's dtype and precision."""
        return _answer("backward", self, self.numpy_dtype)

    def run_backward(self, put: Put, out: Any, lse: Any, **extra: Any) -> cuattn.Gradients:
        """The public call on this case's inputs and cotangents."""
        call = cuattn.attention_varlen_backward if self.packed else cuattn.attention_backward
        dout, dlse = (put(x) for x in self.cotangents())
        return call(dout, **self.arguments(put), out=out, lse=lse, **{"dlse": dlse, **extra})

    def naive_lse(self) -> Array:
        """As `naive`, in the dtype of lse: at least float32."""
        return _answer("forward", self, np.promote_types(self.numpy_dtype, np.float32))[1]


class Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    options: dict[str, Any]
    """of the public call"""
    oracle: dict[str, Any]
    """of reference.forward"""


# Masks and score modifications ---------------------------------------------------------------------------------------------


def _full(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({}, Full())


def _causal(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"causal": True}, Causal())


def _top_left(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"causal": "top-left"}, Causal(top_left=True))


def _window(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"window": (37, 5)}, SlidingWindow(37, 5))


def _window_left(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"window": (70, None)}, SlidingWindow(70, None))


def _window_right(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"window": (None, 3)}, SlidingWindow(None, 3))


def _causal_window(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"causal": True, "window": (90, 40)}, Causal() & SlidingWindow(90, 40))


def _boolean(case: Case, rng: np.random.Generator) -> Feature:
    keep = rng.random((case.batch, case.num_heads, case.seqlen_q, case.seqlen_k)) < 0.6
    keep[..., case.seqlen_q // 2 :: 7, :] = False  # rows without a visible key
    return Feature({"mask": keep}, BooleanMask(keep))


def _boolean_keys(case: Case, rng: np.random.Generator) -> Feature:
    keep = rng.random((case.batch, 1, 1, case.seqlen_k)) < 0.3
    return Feature({"mask": keep}, BooleanMask(keep))


def _block_sparse(case: Case, rng: np.random.Generator) -> Feature:
    shape = (case.batch, case.num_heads, -(-case.seqlen_q // 32), -(-case.seqlen_k // 48))
    blocks = rng.choice(np.array([0, 0, 1, 1, 2, 3], np.int32), shape)
    mask = BlockSparse(blocks, 32, 48, rng.random((2, 32, 48)) < 0.5)
    return Feature({"mask": mask}, mask)


def _bsr(case: Case, rng: np.random.Generator) -> Feature:
    from scipy.sparse import bsr_matrix

    if case.seqlen_q == 0 or case.seqlen_k == 0:  # SciPy has no empty BSR matrix
        return _boolean(case, rng)
    block = tuple(max(b for b in range(1, 49) if n % b == 0) for n in (case.seqlen_q, case.seqlen_k))
    grid = rng.random((case.seqlen_q // block[0], case.seqlen_k // block[1])) < 0.5
    dense = np.kron(grid, np.ones(block)) * (rng.random((grid.shape[0] * block[0], grid.shape[1] * block[1])) < 0.8)
    matrix = bsr_matrix(dense, blocksize=block)
    return Feature({"mask": matrix}, BooleanMask(dense != 0))


def _tree(case: Case, rng: np.random.Generator) -> Feature:
    mask = TreeMask(rng.random((case.batch, 1, case.seqlen_q, 19)) < 0.5)
    return Feature({"mask": mask}, mask)


def _composed(case: Case, rng: np.random.Generator) -> Feature:
    mask = SlidingWindow(50, 20) & BooleanMask(rng.random((case.num_heads, 1, case.seqlen_k)) < 0.7)
    return Feature({"mask": mask, "causal": True}, mask & Causal())


MASKS: dict[str, Callable[[Case, np.random.Generator], Feature]] = {
    "full": _full,
    "causal": _causal,
    "top_left": _top_left,
    "window": _window,
    "window_left": _window_left,
    "window_right": _window_right,
    "causal_window": _causal_window,
    "boolean": _boolean,
    "boolean_keys": _boolean_keys,
    "block_sparse": _block_sparse,
    "bsr": _bsr,
    "tree": _tree,
    "composed": _composed,
}


def _softcap(case: Case, rng: np.random.Generator) -> Feature:
    return Feature({"softcap": 1.5}, SoftCap(1.5))


def _alibi(case: Case, rng: np.random.Generator) -> Feature:
    slopes = np.exp2(-8.0 * (1 + np.arange(case.num_heads)) / case.num_heads).astype(np.float32)
    return Feature({"alibi_slopes": slopes}, Alibi(slopes))


def _alibi_batch(case: Case, rng: np.random.Generator) -> Feature:
    slopes = rng.random((case.batch, case.num_heads), np.float32) / 8
    return Feature({"alibi_slopes": slopes}, Alibi(slopes))


def _bias(case: Case, rng: np.random.Generator) -> Feature:
    shape = (case.batch, case.num_heads, case.seqlen_q, case.seqlen_k)
    bias = rng.standard_normal(shape, np.float32).astype(case.numpy_dtype)
    return Feature({"bias": bias}, Bias(bias))


def _bias_keys(case: Case, rng: np.random.Generator) -> Feature:
    bias = rng.standard_normal((case.num_heads, 1, case.seqlen_k), np.float32).astype(case.numpy_dtype)
    return Feature({"bias": bias}, Bias(bias))


def _bias_queries(case: Case, rng: np.random.Generator) -> Feature:
    bias = rng.standard_normal((case.batch, 1, case.seqlen_q, 1), np.float32)
    return Feature({"bias": bias}, Bias(bias))


def _bias_pairs(case: Case, rng: np.random.Generator) -> Feature:
    bias = rng.standard_normal((case.num_heads, case.seqlen_q, case.seqlen_k), np.float32).astype(case.numpy_dtype)
    return Feature({"bias": bias}, Bias(bias))


def _bias_scalar(case: Case, rng: np.random.Generator) -> Feature:
    bias = rng.standard_normal((case.num_heads, 1, 1), np.float32)
    return Feature({"bias": bias}, Bias(bias))


def _bias_hides(case: Case, rng: np.random.Generator) -> Feature:
    """A bias that holds -inf: an additive mask."""
    keep = rng.random((case.batch, 1, 1, case.seqlen_k)) < 0.7
    bias = np.where(keep, 0, -np.inf).astype(case.numpy_dtype)
    return Feature({"bias": bias}, Bias(bias))


def _user(case: Case, rng: np.random.Generator) -> Feature:
    expression = "s + Real(0.125) * ((i + j) % 3 == 0 ? Real(h) : -s * tanh(s))"
    gradient = "Real(1) - ((i + j) % 3 == 0 ? Real(0) : Real(0.125) * (tanh(s) + s * (Real(1) - tanh(s) * tanh(s))))"
    return Feature({"score_mod": (expression, gradient)}, UserMod(expression, gradient))


def _user_params(case: Case, rng: np.random.Generator) -> Feature:
    slope = rng.random(case.num_heads, np.float32)
    expression = "s - slope[h] * tanh(Real(j) / Real(seqlen_k) - s) * gain"
    tanh = "tanh(Real(j) / Real(seqlen_k) - s)"
    gradient = f"Real(1) + slope[h] * gain * (Real(1) - {tanh} * {tanh})"
    mod = UserMod(expression, gradient, {"slope": slope, "gain": 0.5}, {"slope": ("h", f"-{tanh} * gain")})
    return Feature({"score_mod": mod}, mod)


def _user_table(case: Case, rng: np.random.Generator) -> Feature:
    """A learned bias by relative position, clipped."""
    table = rng.standard_normal(33, np.float32)
    index = "(j - i < -16 ? 0 : j - i > 16 ? 32 : j - i + 16)"
    mod = UserMod(f"s + table[{index}]", "1", {"table": table}, {"table": (index, "1")})
    return Feature({"score_mod": mod}, mod)


MODS: dict[str, Callable[[Case, np.random.Generator], Feature]] = {
    "softcap": _softcap,
    "alibi": _alibi,
    "alibi_batch": _alibi_batch,
    "bias": _bias,
    "bias_keys": _bias_keys,
    "bias_queries": _bias_queries,
    "bias_pairs": _bias_pairs,
    "bias_scalar": _bias_scalar,
    "bias_hides": _bias_hides,
    "user": _user,
    "user_params": _user_params,
    "user_table": _user_table,
}
MOD_SETS: tuple[tuple[str, ...], ...] = (
    (),
    *((name,) for name in MODS),
    ("softcap", "alibi", "bias"),
    ("alibi_batch", "user", "user_params"),
)
"""Modifications used together, in the order in which they apply: softcap, ALiBi, bias, then `score_mod` in list order."""


# Inputs --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _inputs(case: Case) -> Inputs:
    """The arrays of a case; cached because a test needs them for the call, the oracle and the tolerance."""
    rng = np.random.default_rng(zlib.crc32(repr(replace(case, precision="ieee")).encode()))
    lens_q, lens_k = _lengths(case, rng)
    head_dim_v = case.head_dim_v or case.head_dim
    lead_q, lead_k = ((case.batch, n) for n in (case.seqlen_q, case.seqlen_k))
    if case.packed:
        lead_q, lead_k = (int(lens_q.sum()) + UNWRITTEN,), (int(lens_k.sum()) + UNWRITTEN,)
    shapes = ((*lead_q, case.num_heads, case.head_dim), (*lead_k, case.num_heads_kv, case.head_dim))
    shapes = (*shapes, (*lead_k, case.num_heads_kv, head_dim_v))
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    q, k, v = (x.astype(case.numpy_dtype) for x in (q * np.float32(case.magnitude), k * np.float32(case.magnitude), v))
    if case.negative:
        q, k = abs(q), -abs(k)
    if case.growth:
        k = (k * (1 + case.growth * np.linspace(0, 1, k.shape[-3], dtype=np.float32)[:, None, None] ** 3)).astype(k.dtype)
    if case.layout == "broadcast":
        q, k, v = (np.broadcast_to(x[_repeated(x, n)], x.shape) for x, n in ((q, "q"), (k, "k"), (v, "v")))
    else:
        _pad_with_nan(case, q, lens_q, "q"), _pad_with_nan(case, k, lens_k, "kv"), _pad_with_nan(case, v, lens_k, "kv")
    _spoil(case, {"q": q, "k": k, "v": v})
    options, oracle = _options(case, rng, lens_q, lens_k)
    if not case.batch_axis:
        q, k, v = q[0], k[0], v[0]
    return Inputs(q, k, v, options, oracle)


def _spoil(case: Case, inputs: Mapping[str, Array]) -> None:
    """Put the element of `Case.nonfinite` in, if it is one of these inputs'."""
    value, name = case.nonfinite.split() if case.nonfinite else ("", "")
    if name in inputs:
        at = [n // 2 for n in inputs[name].shape]
        if case.packed:  # in the first sequence, whose lengths are the largest
            at[0] = (case.seqlen_q if name in ("q", "dout") else case.seqlen_k) // 2
        inputs[name][tuple(at)] = float(value)


def _lengths(case: Case, rng: np.random.Generator) -> tuple[Array, Array]:
    """Lengths of each sequence: the first is full, the second is empty on one side, the rest are random."""

    def draw(longest: int, varies: bool, empty: int) -> Array:
        lens = np.full(case.batch, longest, np.int32)
        if varies and case.batch > 1:
            lens[1:] = rng.integers(0, longest + 1, case.batch - 1)
        if varies and case.batch > empty:
            lens[empty] = 0
        return lens

    varies = {"dense": "", "packed": "qk", "lens": "qk", "q_lens": "q", "kv_lens": "k"}[case.sequences]
    return draw(case.seqlen_q, "q" in varies, 2), draw(case.seqlen_k, "k" in varies, 3)


def _pad_with_nan(case: Case, x: Array, lens: Array, side: str) -> None:
    """Fill what lies past the lengths with NaN: it must never reach a result."""
    if case.packed:
        x[int(lens.sum()) :] = np.nan
    elif case.sequences in ("lens", f"{side}_lens"):
        for b, n in enumerate(lens):
            x[b, n:] = np.nan


def _options(case: Case, rng: np.random.Generator, lens_q: Array, lens_k: Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword options of the public call and of the oracle."""
    mask = MASKS[case.mask](case, rng)
    mods = [MODS[name](case, rng) for name in case.mods]
    options, oracle = dict(mask.options), {"mask": mask.model, "mods": tuple(m.model for m in mods)}
    user = [m.options["score_mod"] for m in mods if "score_mod" in m.options]
    for feature in mods:
        options.update(feature.options)
    if len(user) > 1:
        options["score_mod"] = [UserMod(*mod) if isinstance(mod, tuple) else mod for mod in user]
    shared: dict[str, Any] = {}
    if case.packed:
        shared["cu_seqlens_q"], shared["cu_seqlens_k"] = (
            np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (lens_q, lens_k)
        )
        options.update(max_seqlen_q=case.seqlen_q, max_seqlen_k=case.seqlen_k)
    if case.sequences in ("lens", "q_lens"):
        shared["q_lens"] = lens_q
    if case.sequences in ("lens", "kv_lens"):
        shared["kv_lens"] = lens_k
    if case.sinks:
        shared["sinks"] = rng.standard_normal(case.num_heads, np.float32)
    if case.dropout:
        shared.update(dropout=case.dropout, seed=0x9E3779B97F4A7C15 ^ case.seed)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    options.update(shared, **({} if case.scale is None else {"scale": case.scale}))
    options.update({} if case.precision == "ieee" else {"precision": case.precision})
    return options, {**oracle, **shared, "scale": scale}


def _convert(value: Any, put: Put) -> Any:
    """An option with every NumPy array inside it moved to the library under test."""
    if isinstance(value, np.ndarray):
        return put(value)
    if isinstance(value, list):
        return [_convert(v, put) for v in value]
    if isinstance(value, (Mask, ScoreMod)) and value.arrays:
        return value.bind([put(a) for a in value.arrays])
    return value


# Memory layouts ------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How an array (..., tokens, heads, head_dim) sits in memory: a contiguous base, and the view of it that is the array."""

    base: Callable[[tuple[int, ...]], tuple[int, ...]]
    view: Callable[[Any], Any]


LAYOUTS: dict[str, Layout] = {
    "contiguous": Layout(lambda s: s, lambda x: x),
    "heads_first": Layout(lambda s: (*s[:-3], s[-2], s[-3], s[-1]), lambda x: x.swapaxes(-3, -2)),
    "offset": Layout(lambda s: (*s[:-3], s[-3] + 1, s[-2], s[-1] + 3), lambda x: x[..., 1:, :, 3:]),  # rows are not aligned
    "padded": Layout(lambda s: (*s[:-1], s[-1] + 8), lambda x: x[..., 8:]),
    "interleaved": Layout(lambda s: (*s[:-2], 3, *s[-2:]), lambda x: x[..., 1, :, :]),  # one of q, k, v packed together
    "reversed": Layout(lambda s: s, lambda x: x[..., ::-1, :, :]),  # negative stride
}


def place(x: Array, layout: str, put: Put = np.asarray) -> Any:
    """`x` in the library of `put`, laid out in memory as told; everything around it is NaN."""
    if layout == "broadcast":
        index = tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for s, n in zip(x.strides, x.shape, strict=True))
        return np.broadcast_to(put(np.ascontiguousarray(x[index])), x.shape)
    base = np.full(LAYOUTS[layout].base(x.shape), np.nan, x.dtype)
    LAYOUTS[layout].view(base)[...] = x
    return LAYOUTS[layout].view(put(base))


def _repeated(x: Array, name: str) -> tuple[slice, ...]:
    """Index of the part of `x` that a broadcast case repeats: over the batch for k, over the heads for q and v."""
    axis = 0 if name == "k" and x.ndim == 4 else x.ndim - 2
    return tuple(slice(0, 1) if a == axis else slice(None) for a in range(x.ndim))


# Oracle --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _oracle(case: Case, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    inputs = _inputs(case)
    tensors = [inputs.q, inputs.k, inputs.v]
    if dtype != np.float64 and case.precision == "tf32":
        tensors = [round_to_tf32(x) for x in tensors]
    if not case.batch_axis:
        tensors = [x[None] for x in tensors]
    with np.errstate(all="ignore"):  # fully masked rows and non-finite inputs are part of the cases
        out, lse = reference.forward(*tensors, **inputs.oracle, dtype=dtype)
    return (out, lse) if case.batch_axis else (out[0], lse[0])


@functools.lru_cache(maxsize=16)
def _cotangents(case: Case) -> tuple[Array, Array]:
    inputs = _inputs(case)
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()) + 1)
    shape = case.out_shape
    dout = rng.standard_normal(shape, np.float32).astype(case.numpy_dtype)
    wide = np.float64 if case.dtype == "float64" else np.float32
    dlse = rng.standard_normal((*shape[:-3], shape[-2], shape[-3]), np.float32).astype(wide)
    oracle = {name: inputs.oracle[name] for name in ("q_lens", "cu_seqlens_q") if name in inputs.oracle}
    exists = np.zeros(shape[:-2] if case.batch_axis else (1, *shape[:-2]), np.bool_)
    for span in reference.spans(*([inputs.q] * 2 if case.batch_axis else [inputs.q[None]] * 2), **oracle):
        exists[span.q] = True
    exists = exists if case.batch_axis else exists[0]
    _spoil(case, {"dout": dout})
    dout[~exists] = np.nan
    np.moveaxis(dlse, -2, -1)[~exists] = np.nan
    return dout, dlse


@functools.lru_cache(maxsize=16)
def _gradients(case: Case, dtype: np.dtype[Any]) -> reference.Gradients:
    inputs = _inputs(case)
    dout, dlse = case.cotangents()
    tensors: list[Array] = [dout, inputs.q, inputs.k, inputs.v]
    operand = round_to_tf32 if dtype != np.float64 and case.precision == "tf32" else np.asarray
    tensors = [operand(x) for x in tensors]
    if not case.batch_axis:
        tensors, dlse = [x[None] for x in tensors], dlse[None]
    with np.errstate(all="ignore"):
        gradients = reference.backward(*tensors, **inputs.oracle, dlse=dlse, dtype=dtype, operand=operand)
    return gradients if case.batch_axis else gradients._replace(**{n: getattr(gradients, n)[0] for n in ("dq", "dk", "dv")})


PREPARED: dict[tuple[str, Case, np.dtype[Any]], Any] = {}
"""Answers of the oracle that were computed ahead, in parallel (tests/conftest.py)."""


def _answer(direction: str, case: Case, dtype: np.dtype[Any]) -> Any:
    key = (direction, case, dtype)
    return PREPARED[key] if key in PREPARED else answer(key)


def answer(key: tuple[str, Case, np.dtype[Any]]) -> Any:
    """What the oracle says of ("forward" or "backward", a case, the dtype to compute in)."""
    direction, case, dtype = key
    return _oracle(case, dtype) if direction == "forward" else _gradients(case, dtype)


def questions(case: Case, backward: bool) -> list[tuple[str, Case, np.dtype[Any]]]:
    """What a check of a case asks the oracle."""
    dtypes = dict.fromkeys([np.dtype(np.float64), case.numpy_dtype])
    if backward:
        return [("backward", case, dtype) for dtype in dtypes]
    return [("forward", case, dtype) for dtype in {**dtypes, np.promote_types(case.numpy_dtype, np.float32): None}]


def round_to_tf32(x: Array) -> Array:
    """float32 values rounded to the 10-bit mantissa that a TF32 tensor core reads, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


# Selections ----------------------------------------------------------------------------------------------------------------

KINDS = (
    ("bfloat16", "ieee"),
    ("float16", "ieee"),
    ("float32", "ieee"),
    ("float32", "tf32x3"),
    ("float32", "tf32"),
    ("float64", "ieee"),
)
"""(dtype, precision): each has its own arithmetic on the GPU."""


def _regular() -> Iterator[Case]:
    """Every arithmetic at every length, full and causal, head dimensions 64 and 128 in turn."""
    for (dtype, precision), (index, (sq, sk)), mask in itertools.product(KINDS, enumerate(LENGTHS), ("full", "causal")):
        area = sq * sk
        batch, heads = (2, (4, 2)) if area < 1 << 16 else (1, (2, 1)) if area < 1 << 22 else (1, (1, 1))
        yield Case(dtype, precision, batch, sq, sk, *heads, (64, 128)[index % 2], mask=mask)


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Assignments that hold every pair of levels of two different factors at least once: greedy, best of a few random ones."""
    rng, names = random.Random(seed), list(factors)
    open_pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    rows = []
    while open_pairs:
        best, best_pairs = None, set()
        a, x, b, y = min(open_pairs)
        for _ in range(24):
            levels = [rng.randrange(len(factors[n])) for n in names]
            levels[a], levels[b] = x, y
            pairs = {(c, levels[c], d, levels[d]) for c, d in itertools.combinations(range(len(names)), 2)} & open_pairs
            if len(pairs) > len(best_pairs):
                best, best_pairs = levels, pairs
        assert best is not None
        open_pairs -= best_pairs
        rows.append({n: factors[n][level] for n, level in zip(names, best, strict=True)})
    return rows


def _features() -> Iterator[Case]:
    """Every pair of features in some case."""
    factors: dict[str, Sequence[Any]] = {
        "mask": list(MASKS),
        "mods": MOD_SETS,
        "head_dim": (64, 128, 256, 40, 96, 192, 33, 8),
        "layout": (*LAYOUTS, "mixed", "broadcast"),
        "kind": KINDS,
        "sequences": ("dense", "kv_lens", "q_lens", "lens", "packed"),
        "lengths": ((113, 203), (203, 113), (64, 64), (1, 239), (257, 130)),
        "heads": ((4, 4), (6, 2), (5, 1)),
        "head_dim_v": (0, 72, 160),
        "sinks": (False, True),
        "dropout": (0.0, 0.3),
    }
    for row in pairwise(factors):
        (dtype, precision), (sq, sk), (heads, heads_kv) = row.pop("kind"), row.pop("lengths"), row.pop("heads")
        batch = 2 if row["sequences"] == "dense" else 4
        yield Case(dtype, precision, batch, sq, sk, heads, heads_kv, **row)


def _corner_dims() -> Iterator[Case]:
    """Head dimensions at and around every limit, alone and unequal."""
    for d in (1, 2, 3, 7, 16, 17, 32, 80, 100, 112, 160, 224, 255, 256):
        for dtype, precision in KINDS[d % 2 :: 2]:
            yield Case(dtype, precision, 1, 77, 130, 2, 1, d, mask="causal")
    for d, dv in ((64, 128), (128, 64), (192, 128), (1, 256), (256, 1), (24, 8)):
        for dtype in ("bfloat16", "float32", "float64"):
            yield Case(dtype, "ieee", 2, 65, 129, 2, 2, d, dv)
    for dtype, d in (("bfloat16", 257), ("float16", 320), ("bfloat16", 512), ("float32", 512)):
        yield Case(dtype, "ieee", 1, 70, 133, 2, 1, d, mask="causal")


def _corner_edges() -> Iterator[Case]:
    """The edge table of the contract."""
    for dtype, precision in KINDS:
        base = Case(dtype, precision)
        for name in ("batch", "seqlen_q", "seqlen_k"):  # nothing to compute
            yield replace(base, **{name: 0})
        yield replace(base, seqlen_k=0, sinks=True)
        yield replace(base, seqlen_q=203, seqlen_k=40, mask="causal", sinks=True)  # rows without a visible key
        yield replace(base, seqlen_q=203, seqlen_k=40, mask="causal")
        yield replace(base, batch=5, sequences="packed", mask="causal")
        large = {"float16": 70.0, "float64": 10.0}.get(
            dtype, 100.0
        )  # float64 is its own oracle: rounding grows with the scores
        yield replace(base, magnitude=large)  # scores of magnitude 1e4
        yield replace(base, magnitude=large, mask="causal", mods=("alibi",))
        if dtype in ("float16", "bfloat16"):
            yield replace(base, growth=40.0)
            yield replace(base, growth=40.0, seqlen_q=300, seqlen_k=500, head_dim=128, dropout=0.5)
            yield replace(base, growth=40.0, seqlen_q=300, seqlen_k=500, mask="causal")
            yield replace(base, growth=40.0, seqlen_q=300, seqlen_k=500, mask="window", head_dim=128)
        for nonfinite in ("nan q", "nan k", "nan v", "inf q", "inf k", "inf v"):
            yield replace(base, nonfinite=nonfinite)
        yield replace(base, batch=1, batch_axis=False, mask="causal", mods=("alibi",))
        yield replace(base, scale=-0.3, mask="causal")
        yield replace(base, scale=0.0, mask="window")


def _nonfinite() -> Iterator[Case]:
    """One element that is not finite under masks whose edges run through tiles, by every kernel that has such tiles."""
    dense = Case("bfloat16", "ieee", 2, 300, 333, 4, 2, 64, mask="causal")
    packed = replace(dense, batch=4, sequences="packed")
    for dtype, cases in {
        "bfloat16": (
            *(replace(c, head_dim=d) for c in (dense, packed) for d in (64, 128, 192, 256)),
            *(replace(dense, mask="window", head_dim=d) for d in (64, 128)),
            *(replace(dense, mask="window_left", head_dim=d) for d in (64, 128)),
            *(replace(packed, mask="window", head_dim=d) for d in (64, 128)),
            replace(dense, head_dim=33),
            replace(dense, mask="boolean"),
            replace(dense, mods=("bias_pairs",)),
        ),
        "float16": (dense, replace(dense, head_dim=128), replace(dense, mask="window"), replace(packed, head_dim=128)),
    }.items():
        for case, value, name in itertools.product(cases, ("nan", "inf"), ("q", "k", "v", "dout")):
            yield replace(case, dtype=dtype, nonfinite=f"{value} {name}")
    for (dtype, precision), name in itertools.product(KINDS[2:], ("q", "k", "v", "dout")):
        larger = {"seqlen_q": 530, "seqlen_k": 700} if precision == "tf32x3" else {}  # or it would not take pairs
        yield replace(dense, dtype=dtype, precision=precision, nonfinite=f"nan {name}", **larger)


def _corner_options() -> Iterator[Case]:
    """Option values at their limits, wide groups, and few queries over many keys (a split over the keys)."""
    base = Case("bfloat16")
    for heads in ((71, 1), (7, 7), (12, 3), (32, 4), (1, 1)):
        yield replace(base, num_heads=heads[0], num_heads_kv=heads[1], seqlen_q=19, mask="causal")
    for p in (1e-4, 0.5, 0.99):
        yield replace(base, dropout=p, mask="causal")
        yield replace(base, dtype="float32", dropout=p, sequences="lens", batch=4)
    for dtype in ("float16", "bfloat16"):  # scores far below the cap have a formula of their own
        yield Case(dtype, mods=("softcap",), magnitude=0.4)
        yield Case(dtype, head_dim=128, mask="causal", mods=("softcap",), magnitude=0.4)
        yield Case(dtype, "ieee", 3, 130, 150, 45, 45, 128, mask="causal", mods=("softcap",), magnitude=0.8)
        yield Case(dtype, "ieee", 4, 203, 301, 4, 2, 128, mask="window", mods=("softcap",), sequences="packed", sinks=True)
        yield Case(dtype, "ieee", 4, 203, 301, 4, 2, 64, mask="boolean", mods=("softcap",), sequences="lens", dropout=0.3)
        yield Case(dtype, "ieee", 2, 300, 2100, 2, 1, 64, mask="causal", mods=("softcap",), magnitude=3.0)
    for dims, mask in (((64, 64), "window"), ((128, 128), "causal"), ((192, 128), "full"), ((256, 256), "causal")):
        # More query tiles than an H200 has places for CTAs, so that each takes several.
        yield Case("bfloat16", "ieee", 3, 130, 150, 45, 45, *dims, mask=mask)
    for d, seqlen_q, heads in ((64, 130, 45), (128, 130, 45), (256, 130, 45), (128, 190, 90)):
        # The same where maxima grow: 190 rows fill a tile of 192.
        for dtype in ("float16", "bfloat16"):
            yield Case(dtype, "ieee", 3, seqlen_q, 170, heads, heads, d, mask="causal", growth=40.0)
    for dtype in ("float16", "bfloat16"):
        # No score is positive, whose maxima are found in another way.
        for d, sequences, mods in ((64, "dense", ()), (128, "packed", ()), (128, "dense", ("bias",)), (256, "lens", ())):
            case = Case(dtype, "ieee", 3, 203, 301, 4, 2, d, mask="causal", sequences=sequences, mods=mods, negative=True)
            yield case
            yield replace(case, growth=4.0)
        yield Case(dtype, "ieee", 1, 130, 2100, 64, 8, 256, negative=True)  # in float16, rows take maxima of all tiles
        yield Case(dtype, "ieee", 3, 190, 170, 90, 90, 128, negative=True)
    for dtype, precision in KINDS:
        split = Case(dtype, precision, 1, 1, 5003, 2, 1, 64)
        yield split
        yield replace(split, seqlen_q=5, mods=("softcap", "alibi"), sinks=True, dropout=0.2)
        yield replace(split, seqlen_q=5, mask="causal", mods=("softcap", "alibi"), sinks=True)
        yield replace(split, batch=4, seqlen_q=3, sequences="kv_lens", head_dim=128, sinks=True)
        yield replace(split, batch=2, seqlen_q=3, head_dim=128, mask="boolean")
        yield replace(split, batch=4, seqlen_q=4, sequences="packed", mods=("bias_keys",))
        yield replace(split, batch=4, seqlen_q=4, sequences="packed", mask="window_left")


def _unique(cases: Iterator[Case]) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(cases))


REGULAR = _unique(_regular())
FEATURES = _unique(_features())
CORNERS = _unique(itertools.chain(_corner_dims(), _corner_edges(), _corner_options()))
NONFINITE = _unique(_nonfinite())
ALL = tuple(dict.fromkeys((*REGULAR, *FEATURES, *CORNERS)))
SMALL = tuple(c for c in FEATURES if math.prod((c.seqlen_q, c.seqlen_k)) <= 1 << 14)[::12]
"""A spread of small feature cases, for checks that repeat a call or run under a slow tool."""
