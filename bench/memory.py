"""`python -m bench memory`: device memory that a call takes from CuPy's pool beyond its inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.cases import Case
from bench.forward import free_memory, ours
from bench.inputs import CupyArrays, Inputs
from bench.results import Row, Store, make_row
from bench.timing import Deadline, first_line, synchronize


def peak_bytes(case: Case, arrays: CupyArrays) -> int:
    """Largest sum of live blocks during the first and second call, less the output."""
    from cupy.cuda.memory_hook import MemoryHook

    class Live(MemoryHook):  # type: ignore[misc]
        """Counts live bytes; a block that was there before the hook is not its business."""

        name = "live bytes"

        def __init__(self) -> None:
            self.sizes: dict[int, int] = {}
            self.peak = 0

        def malloc_postprocess(self, **block: Any) -> None:
            self.sizes[block["mem_ptr"]] = block["mem_size"]
            self.peak = max(self.peak, sum(self.sizes.values()))

        def free_postprocess(self, **block: Any) -> None:
            self.sizes.pop(block["mem_ptr"], None)

    inputs = Inputs.of(case, arrays)
    call = ours(inputs)
    with Live() as hook:
        for _ in range(2):  # a workspace may be kept from the first call for the second
            out = call()
            synchronize()
            size = out.nbytes
            del out
    return int(hook.peak - size)


def run(cases: Sequence[Case], store: Store, env: Row, deadline: Deadline) -> None:
    """Measure each case and print it beside the score matrix that an implementation without tiling would hold."""
    arrays = CupyArrays()
    for case in cases:
        if deadline.passed:
            print(f"time limit: memory of {case} not measured")
            return
        try:
            extra = peak_bytes(case, arrays)
        except Exception as error:
            print(f"memory, {case}: {first_line(error)}")
            continue
        scores = case.scores * case.itemsize
        print(f"memory, {case}: {extra / 2**20:.3f} MiB beyond inputs and outputs; N^2 scores: {scores / 2**30:.1f} GiB")
        store.add(make_row(dataclasses.replace(case, bench="memory"), None, {}, env, None, bytes=extra))
        free_memory(arrays)
