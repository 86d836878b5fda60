"""`python -m bench memory`: device memory that calls take beyond their inputs and results.

Ours from CuPy's pool, that of peers from PyTorch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bench.baselines import Baseline
from bench.cases import Case
from bench.forward import free_memory
from bench.forward import ours as forward_of
from bench.inputs import CupyArrays, Inputs, TorchArrays
from bench.progress import within
from bench.results import Row, Store, make_row
from bench.timing import Deadline, first_line, synchronize

PEERS = ("cudnn", "flash", "math", "xformers")
"""Two fused ones and one that stores all scores."""


def peak_bytes(call: Callable[[], Sequence[Any]]) -> int:
    """Largest sum of live blocks during the first and second call, less the arrays that it returns."""
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

    with Live() as hook:
        for _ in range(2):  # a workspace may be kept from the first call for the second
            results = call()
            synchronize()
            size = sum(x.nbytes for x in results)
            del results
    return int(hook.peak - size)


def forward_peak(case: Case, arrays: CupyArrays) -> dict[str, int]:
    """bytes: of the forward, beyond inputs and output."""
    call = forward_of(Inputs.of(case, arrays))
    return {"bytes": peak_bytes(lambda: [call()])}


def backward_peak(case: Case, arrays: CupyArrays) -> dict[str, int]:
    """bytes: of forward and backward, beyond inputs, out, lse and gradients; planned: the workspace that the plan announces."""
    import cuattn

    inputs = Inputs.of(case, arrays)
    qkv, options, (dout, *_) = inputs.sets[0], inputs.options(), inputs.cotangents()

    def step() -> list[Any]:
        out, lse = cuattn.attention(*qkv, return_lse=True, **options)
        gradients = cuattn.attention_backward(dout, *qkv, out, lse, **options)
        return [x for x in (out, lse, *gradients) if x is not None]

    plan = cuattn.explain(*qkv, backward=True, return_lse=True, **options)
    return {"bytes": peak_bytes(step), "planned": sum(plan.workspace)}


def torch_peak(call: Callable[[], Sequence[Any]]) -> int:
    """What PyTorch's allocator gives out at most during a second call, less the tensors that it returns."""
    import torch

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results))


def peer_call(baseline: Baseline, inputs: Inputs) -> Callable[[], Sequence[Any]]:
    """A peer's forward; of a backward case also its gradients, in one call that returns both."""
    import torch

    if inputs.case.bench != "memory/backward":
        forward = baseline.calls(inputs)[0]
        return lambda: tensors(forward())
    qkv = tuple(x.detach().requires_grad_() for x in inputs.sets[0])
    forward = baseline.calls(dataclasses.replace(inputs, sets=[qkv]))[0]
    (dout, *_) = inputs.cotangents()
    dout = dout.transpose(-3, -2) if baseline.heads_first else dout

    def step() -> Sequence[Any]:
        out, *_ = tensors(forward())
        return out.detach(), *torch.autograd.grad(out, qkv, dout)

    return step


def tensors(result: Any) -> Sequence[Any]:
    return result[:1] if isinstance(result, (tuple, list)) else (result,)


def peer_peaks(case: Case, baselines: Sequence[Baseline]) -> dict[str, int]:
    """Bytes of each peer that serves the case. What it keeps for its backward is counted, lse (4 bytes a row) included."""
    arrays, found = TorchArrays(), {}
    for baseline in baselines:
        if baseline.declines(case) or (case.bench == "memory/backward" and baseline.no_gradient):
            continue
        try:
            with baseline.context():
                found[baseline.name] = torch_peak(peer_call(baseline, Inputs.of(case, arrays)))
        except Exception as error:
            print(f"  ! {baseline.name}: {first_line(error)}")
        free_memory(arrays)
    return found


def run(cases: Sequence[Case], baselines: Sequence[Baseline], store: Store, env: Row, deadline: Deadline) -> None:
    """Measure each case and print it beside the score matrix that an implementation without tiling would hold."""
    arrays = CupyArrays()
    for case in within(deadline, cases):
        backward = case.bench == "memory/backward"
        name = f"memory, {'forward and backward, ' * backward}{case}"
        try:
            found = backward_peak(case, arrays) if backward else forward_peak(case, arrays)
            free_memory(arrays)
            peers = peer_peaks(case, baselines)
        except Exception as error:
            print(f"{name}: {first_line(error)}")
            continue
        beyond = "inputs, outputs, gradients and lse" if backward else "inputs and outputs"
        planned = f" (planned: {found['planned'] / 2**20:.2f})" if backward else ""
        others = "".join(f", {peer} {size / 2**20:.2f}" for peer, size in peers.items())
        scores = case.scores * case.itemsize / 2**30
        print(f"{name}: {found['bytes'] / 2**20:.2f} MiB{planned} beyond {beyond}{others}; scores {scores:.2f} GiB", flush=True)
        row_case = case if backward else dataclasses.replace(case, bench="memory")
        store.add(make_row(row_case, None, {}, env, None, **found, peer_bytes=peers))
