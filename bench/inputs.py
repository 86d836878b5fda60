"""Device arrays of a case, as PyTorch tensors where PyTorch sees a GPU and as CuPy arrays otherwise."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (before CuPy, which supports bfloat16 only when it finds this)
import numpy as np

from bench.cases import DROPOUT, SOFTCAP, USER_MOD, Case
from cuattn.masks import Full, Mask

MAX_SETS = 8


class TorchArrays:
    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._torch.randn(shape, dtype=getattr(self._torch, dtype), device="cuda")

    def put(self, array: Any) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def get(self, array: Any) -> Any:
        return array.cpu().numpy()

    def release(self) -> None:
        self._torch.cuda.empty_cache()


class CupyArrays:
    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        wide = "float64" if dtype == "float64" else "float32"
        return self._cupy.random.standard_normal(shape, dtype=wide).astype(np.dtype(dtype), copy=False)

    def put(self, array: Any) -> Any:
        return self._cupy.asarray(array)

    def get(self, array: Any) -> Any:
        return array.get()

    def release(self) -> None:
        self._cupy.get_default_memory_pool().free_all_blocks()


class HostArrays:
    """NumPy arrays that stand for those of a GPU in plans; their contents are never touched."""

    name = "numpy"

    def normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape, np.dtype(dtype))

    def put(self, array: Any) -> Any:
        return np.asarray(array)

    def get(self, array: Any) -> Any:
        return array

    def release(self) -> None:
        pass


Arrays = TorchArrays | CupyArrays | HostArrays


def torch_on_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def best_arrays() -> Arrays:
    return TorchArrays() if torch_on_gpu() else CupyArrays()


@dataclass(frozen=True)
class Inputs:
    """What every contender of a case reads: several (q, k, v) that take turns, and one of everything else."""

    case: Case
    arrays: Arrays
    sets: list[tuple[Any, Any, Any]]
    mask: Mask
    """Bound to device arrays."""
    bias: Any
    """(1, num_heads, seqlen_q or 1, seqlen_k) in the dtype of q, or None."""
    slopes: Any
    """(num_heads,) float32 ALiBi slopes, or None."""
    cu_seqlens: Any
    """(batch + 1,) int32 of a packed call, or None."""

    @staticmethod
    def of(case: Case, arrays: Arrays, l2_bytes: int = 0) -> Inputs:
        """Fresh inputs; enough sets that more than three times `l2_bytes` are read before one returns."""
        shapes = case.shapes()
        size = sum(int(np.prod(s)) for s in shapes) * case.itemsize
        count = min(MAX_SETS, 3 * l2_bytes // size + 1)
        q, k, v = shapes
        sets = [tuple(arrays.normal(shape, case.dtype) for shape in (q, k, v)) for _ in range(count)]
        mask = case.mask_object()
        slopes = np.exp2(-8 * np.arange(1, case.num_heads + 1) / case.num_heads).astype(np.float32)
        return Inputs(
            case,
            arrays,
            sets,
            mask.bind([arrays.put(a) for a in mask.arrays]),
            arrays.normal(case.bias_shape(), case.dtype) if case.biased else None,
            arrays.put(slopes) if "alibi" in case.mods else None,
            arrays.put(np.cumsum((0, *case.lengths), dtype=np.int32)) if case.packed else None,
        )

    def packing(self) -> tuple[Any, ...]:
        """The arguments that `cuattn.attention_varlen` takes after q, k and v; none for a dense case."""
        if not self.case.packed:
            return ()
        return (self.cu_seqlens, self.cu_seqlens, self.case.seqlen_q, self.case.seqlen_k)

    def cotangents(self) -> list[Any]:
        """A random dout for each set."""
        return [self.arrays.normal((*q.shape[:-1], self.case.head_dim_v), self.case.dtype) for q, _, _ in self.sets]

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `cuattn.attention`, its packed form and the gradients of both for this case."""
        mods = {
            "bias": {"bias": self.bias},
            "key bias": {"bias": self.bias},
            "alibi": {"alibi_slopes": self.slopes},
            "softcap": {"softcap": SOFTCAP},
            "user": {"score_mod": USER_MOD},
            "dropout": {"dropout": DROPOUT, "seed": 1},
            "packed": {},
            "deterministic": {"deterministic": True},
        }
        result = {name: value for mod in self.case.mods for name, value in mods[mod].items()}
        if self.case.mask == "causal":
            result["causal"] = True
        elif not isinstance(self.mask, Full):
            result["mask"] = self.mask
        if self.case.dtype == "float32":
            result["precision"] = self.case.precision
        return result
