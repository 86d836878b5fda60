"""Time the first call of this process: `python -m bench.first_call DTYPE HEAD_DIM HEADS SEQLEN` prints the seconds."""

from __future__ import annotations

import sys
import time

import ml_dtypes  # noqa: F401  (before CuPy, which supports bfloat16 only when it finds this)
import numpy as np


def first_call(dtype: str, head_dim: int, num_heads: int, seqlen: int) -> float:
    """Seconds from the call to its finished result, with everything imported, the context made and the inputs in place."""
    import cupy

    import cuattn

    rng = np.random.default_rng(0)
    host = (rng.standard_normal((1, seqlen, num_heads, head_dim)).astype(np.dtype(dtype)) for _ in range(3))
    q, k, v = (cupy.asarray(x) for x in host)
    cupy.cuda.runtime.deviceSynchronize()
    begin = time.perf_counter()
    cuattn.attention(q, k, v)
    cupy.cuda.runtime.deviceSynchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(first_call(sys.argv[1], *map(int, sys.argv[2:5])))
