"""The cases of every benchmark, their floating-point operations and their bytes. Needs no GPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from cuattn.masks import BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
BLOCK = 128
"""Rows and columns of a block of the block-sparse case."""
WINDOWS = {"window": 1024, "window 128": 128}
"""Keys to the left of the query that each window sees."""
SOFTCAP = 30.0
DROPOUT = 0.1
USER_MOD = ("s - Real(0.25) * log(Real(1) + fabs(Real(i - j)))", "1")
"""A user's score and its derivative: a logarithmic distance penalty, which no option of the API computes."""


def user_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """USER_MOD over tensors, for the peers that take a Python function."""
    return s - 0.25 * (1 + abs(i - j)).log()


BACKWARD_PARTS = ("backward", "matrix/backward")
"""Parts whose time is that of the gradients alone."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark. `mask` names an entry of MASKS; `mods` name score modifications and other options.

    `bench` is the part it belongs to: FLOPs and bytes of those in BACKWARD_PARTS are those of the gradients alone.
    """

    bench: str
    dtype: str
    head_dim: int
    head_dim_v: int
    num_heads: int
    num_heads_kv: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    precision: str = "ieee"
    mask: str = "full"
    mods: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Lengths of the sequences of a packed call; empty for a dense one."""

    def __str__(self) -> str:
        number = SHORT[self.dtype] if self.dtype != "float32" else f"fp32 {self.precision}"
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}/{self.head_dim_v}"
        heads = f"h{self.num_heads}" if self.num_heads == self.num_heads_kv else f"h{self.num_heads}/{self.num_heads_kv}"
        sizes = f"s{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"s{self.seqlen_q}x{self.seqlen_k}"
        return " ".join((number, dims, f"b{self.batch}", heads, sizes, self.mask, *self.mods))

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def packed(self) -> bool:
        return bool(self.lengths)

    @property
    def scores(self) -> int:
        """Elements of the score matrix that an implementation without tiling allocates."""
        return self.batch * self.num_heads * self.seqlen_q * self.seqlen_k

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of q, k and v: (batch, seqlen, heads, head_dim), or (tokens, heads, head_dim) when packed."""
        lead_q = (sum(self.lengths),) if self.packed else (self.batch, self.seqlen_q)
        lead_k = (sum(self.lengths),) if self.packed else (self.batch, self.seqlen_k)
        kv = self.num_heads_kv
        return (*lead_q, self.num_heads, self.head_dim), (*lead_k, kv, self.head_dim), (*lead_k, kv, self.head_dim_v)

    def mask_object(self) -> Mask:
        """The mask over NumPy arrays; the same for every sequence and head."""
        return build_mask(self.mask, self.seqlen_q, self.seqlen_k)

    def flops(self) -> int:
        """Multiplications and additions of the matrix products, over visible pairs alone; backward five for two."""
        sizes = [(n, n) for n in self.lengths] or [(self.seqlen_q, self.seqlen_k)] * self.batch
        pairs = sum(visible_pairs(self.mask, *size) for size in sizes) * self.num_heads
        forward = 2 * pairs * (self.head_dim + self.head_dim_v)
        return forward * 5 // 2 if self.backward else forward

    def bytes(self) -> int:
        """Bytes that must cross device memory once: q, k, v, out, what mask and bias read; backward lse and gradients too."""
        q, k, v = (int(np.prod(shape)) for shape in self.shapes())
        out = q // self.head_dim * self.head_dim_v
        tables = sum(np.asarray(a).nbytes for a in self.mask_object().arrays)
        bias = int(np.prod(self.bias_shape())) * self.itemsize if self.biased else 0
        if not self.backward:
            return (q + k + v + out) * self.itemsize + tables + bias
        lse = q // self.head_dim * max(4, self.itemsize)
        return 2 * ((q + k + v + out) * self.itemsize + bias) + tables + lse

    @property
    def backward(self) -> bool:
        return self.bench in BACKWARD_PARTS

    @property
    def biased(self) -> bool:
        return not {"bias", "key bias"}.isdisjoint(self.mods)

    def bias_shape(self) -> tuple[int, int, int, int]:
        return (1, self.num_heads, 1 if "key bias" in self.mods else self.seqlen_q, self.seqlen_k)

    @property
    def window(self) -> int | None:
        """Keys to the left of the query that it sees, where a window is all of the mask."""
        return WINDOWS.get(self.mask)


def documents(seqlen: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(1, 1, seqlen, seqlen): eight documents of uneven length in a row, each seeing itself."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, seqlen), 7, replace=False))
    document = np.searchsorted(cuts, np.arange(seqlen), side="right")
    return np.asarray(document[:, None] == document[None, :])[None, None]


def random_blocks(seqlen_q: int, seqlen_k: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """(1, 1, query blocks, key blocks): a quarter of all blocks, and the diagonal so that no row is empty."""
    shape = (seqlen_q // BLOCK, seqlen_k // BLOCK)
    chosen = np.random.default_rng(0).random(shape) < 0.25
    return np.asarray(chosen | np.eye(*shape, dtype=bool), np.int32)[None, None]


MASKS = {
    "full": lambda sq, sk: Full(),
    "causal": lambda sq, sk: Causal(),
    "window": lambda sq, sk: SlidingWindow(WINDOWS["window"], 0),
    "window 128": lambda sq, sk: SlidingWindow(WINDOWS["window 128"], 0),
    "boolean": lambda sq, sk: BooleanMask(documents(sk)),
    "blocks": lambda sq, sk: BlockSparse(random_blocks(sq, sk), BLOCK, BLOCK),
}


@functools.lru_cache(maxsize=8)
def build_mask(name: str, seqlen_q: int, seqlen_k: int) -> Mask:
    return MASKS[name](seqlen_q, seqlen_k)


@functools.cache
def visible_pairs(name: str, seqlen_q: int, seqlen_k: int) -> int:
    """Visible (query, key) pairs of one sequence and one head."""
    return build_mask(name, seqlen_q, seqlen_k).visible(seqlen_q, seqlen_k)


def dense(dtype: str, head_dim: int, batch: int, num_heads: int, seqlen: int, **options: Any) -> Case:
    """A forward case with as many queries as keys and as many KV heads as query heads, unless `options` says otherwise."""
    sizes = {"head_dim_v": head_dim, "num_heads_kv": num_heads, "seqlen_q": seqlen, "seqlen_k": seqlen, "bench": "forward"}
    return Case(dtype=dtype, head_dim=head_dim, batch=batch, num_heads=num_heads, **{**sizes, **options})


def paper(*seqlens: int) -> list[Case]:
    """The setting of the FlashAttention papers: 16,384 tokens, hidden size 2048."""
    grid = itertools.product((64, 128, 256), ("full", "causal"), seqlens)
    return [dense("bfloat16", d, 16384 // s, 2048 // d, s, mask=mask) for d, mask, s in grid]


def wide(*head_dims: int) -> list[Case]:
    """float32 in each precision, and float64."""
    fp32 = [dense("float32", d, 2, 16, 4096, precision=p) for p in ("ieee", "tf32x3", "tf32") for d in head_dims]
    return fp32 + [dense("float64", d, 2, 16, 4096) for d in head_dims]


def featured(**options: Any) -> Case:
    return dense("bfloat16", 128, 4, 16, 4096, **options)


CELLS = (512, 1024, 2048, 4096, 8192, 16384)
"""Sequence lengths of the papers' tables."""
LENGTHS = (512, 3584, 1024, 2560, 1536, 4096, 1000, 2072)
"""Sequences of the packed case; 16,384 tokens."""
PACKED = Case("forward", "bfloat16", 128, 128, 16, 16, len(LENGTHS), max(LENGTHS), max(LENGTHS), mask="causal",
              mods=("packed",), lengths=LENGTHS)  # fmt: skip
UNEVEN = tuple(int(n) for n in np.random.default_rng(0).integers(512, 4097, 16))
"""Sequences of random length."""
UNEVEN_PACKED = replace(PACKED, batch=len(UNEVEN), seqlen_q=max(UNEVEN), seqlen_k=max(UNEVEN), lengths=UNEVEN)
GROUPED = [dense("bfloat16", 128, 2, 64, 8192, num_heads_kv=8, mask=m) for m in ("full", "causal")]
UNEQUAL = dense("bfloat16", 192, 2, 16, 8192, head_dim_v=128)
"""More columns of queries and keys than of values."""
WINDOWED = dense("bfloat16", 64, 2, 32, 8192, mask="window 128")
SPLIT = dense("bfloat16", 128, 1, 16, 128, seqlen_k=65536)
"""One query tile: too few blocks to fill a GPU unless the keys are split."""

FEATURES = [
    *(featured(mask=m) for m in ("window", "boolean", "blocks")),
    *(featured(mods=(m,)) for m in ("bias", "alibi", "softcap", "user", "dropout")),
    dense("bfloat16", 128, 4, 32, 4096, num_heads_kv=8, mask="causal"),
    *GROUPED,
    UNEQUAL,
    WINDOWED,
    PACKED,
    UNEVEN_PACKED,
    SPLIT,
]
HALF = dense("float16", 128, 2, 16, 8192, mask="causal")
FORWARD = [*paper(4096, 8192, 16384), *paper(512, 1024, 2048), HALF, *wide(64, 128), *FEATURES]
QUICK = [*paper(4096), HALF, *wide(128), FEATURES[0], FEATURES[3], PACKED, SPLIT]


MODIFICATIONS = {"bias", "key bias", "alibi", "softcap", "user"}
"""What a case's options may say that changes its scores."""


def gradients(*cases: Case) -> list[Case]:
    """Of these forward cases."""
    return [replace(case, bench="backward") for case in cases]


def deterministic(*cases: Case) -> list[Case]:
    """The same, bit for bit from run to run."""
    return [replace(case, mods=(*case.mods, "deterministic")) for case in cases]


BACKWARD = gradients(
    *paper(4096),
    *(dense("float32", d, 2, 16, 4096, precision=p) for p in ("ieee", "tf32x3") for d in (64, 128)),
    *(dense("float64", d, 2, 16, 4096) for d in (64, 128)),
    *(featured(mods=(m,)) for m in ("bias", "key bias")),
    *paper(512, 1024, 2048, 8192, 16384),
    *GROUPED,
    UNEQUAL,
    WINDOWED,
    PACKED,
    UNEVEN_PACKED,
    *deterministic(*paper(*CELLS)),
    featured(mods=("dropout",)),
    *(dense("bfloat16", 128, 128, 16, 128, mask=m) for m in ("full", "causal")),
    *(featured(mods=(m,)) for m in ("alibi", "softcap", "user")),
)
"""The most telling first; what only FlexAttention has besides us, which compiles for seconds, last."""
BACKWARD_QUICK = [
    *(case for case in BACKWARD if case.seqlen_q == 4096 and case.head_dim == 128 and case.mask == "full"
      and set(case.mods) <= {"bias", "key bias", "deterministic"}),
    *gradients(*(dense("bfloat16", d, 4, 2048 // d, 4096, mask="causal") for d in (64, 128, 256))),
]  # fmt: skip

ABLATION = paper(1024, 8192)


def matrix(head_counts: Sequence[int], seqlens: Sequence[int]) -> list[Case]:
    """One causal sequence for each length, head size and number of heads."""
    grid = itertools.product(head_counts, (128, 64), seqlens)
    return [dense("bfloat16", d, 1, h, s, mask="causal", bench="matrix") for h, d, s in grid]


MATRIX_LENGTHS = (1024, 2048, 4096, 8192, 16384)
COMPILED = [dense("bfloat16", 128, 1, 16, 4096, mask="causal", bench=bench) for bench in ("matrix", "matrix/backward")]
"""Plain cells that a peer joins which compiles for ten seconds at every shape."""
MATRIX_FORWARD = matrix((16, 32, 8), MATRIX_LENGTHS)
MATRIX = sorted(
    [*MATRIX_FORWARD, *(replace(case, bench="matrix/backward") for case in MATRIX_FORWARD)], key=COMPILED.__contains__
)
MATRIX_QUICK = [case for case in MATRIX if case.num_heads == 16 and case not in COMPILED]

ERROR = [
    *(dense("bfloat16", d, 1, 4, 2048, mask="causal", bench="error") for d in (128, 64, 256)),
    dense("float16", 128, 1, 4, 2048, mask="causal", bench="error"),
    *(dense("float32", 128, 1, 4, 2048, mask="causal", bench="error", precision=p) for p in ("ieee", "tf32x3", "tf32")),
    *(dense("bfloat16", d, 1, 4, 2048, bench="error") for d in (128, 64, 256)),
]
"""What matters most first: peers that compile take most of the time."""
ERROR_QUICK = ERROR[:3]
LATENCY = [dense("bfloat16", 128, 1, 16, s, mask="causal", bench="latency") for s in (128, 512, 1024, 4096, 16384)]
LATENCY_QUICK = LATENCY[:4]

HOST = dense("float16", 64, 1, 4, 64, mask="causal")
"""So small that the GPU waits for the host."""
JIT = [dense(dtype, 128, 1, 4, 256) for dtype in ("float16", "bfloat16", "float32", "float64")]
MEMORY = [
    dense("float16", 128, 1, 16, 65536, mask="causal"),
    dense("float16", 128, 1, 16, 128, seqlen_k=65536),
]
MEMORY_BACKWARD = [
    replace(case, bench="memory/backward")
    for case in (
        dense("float16", 64, 4, 8, 1024),
        dense("bfloat16", 64, 4, 8, 1024),
        dense("float16", 128, 1, 16, 65536, mask="causal"),
    )
]
"""Forward and backward together."""
MEMORY_LENGTHS = [
    dense("bfloat16", 128, 1, 16, 1024 << n, mask="causal", bench=bench)
    for bench in ("memory", "memory/backward")
    for n in range(7)
]
"""One sequence that grows, beside peers."""
