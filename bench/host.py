"""`python -m bench host`: time from call to return of warm calls, on a problem so small that the GPU waits for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bench import backward
from bench.baselines import Baseline
from bench.cases import HOST
from bench.forward import OURS, ours
from bench.inputs import Arrays, CupyArrays, Inputs, TorchArrays, torch_on_gpu
from bench.results import Row, Store, make_row
from bench.timing import Contender, Deadline, first_line, measure_host

CALLS = 4000
QUICK_CALLS = 2000
CORE, EMPTY = "core", "an empty autograd.Function"
PEERS = ("cudnn", "flash", "fa3", "fa4")
"""Those whose host path is worth a comparison, on the tensors they take."""


def forward_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    peers = [b for b in baselines if not b.declines(HOST)]
    return [ours(inputs), *(b.contender(inputs) for b in peers)]


def backward_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """The backward beside torch.autograd.grad of the peers."""
    douts, peers = inputs.cotangents(), []
    for baseline in baselines:
        if baseline.declines_gradient(HOST):
            continue
        try:
            peers.append(backward.theirs(baseline, inputs, douts))
        except Exception as error:
            print(f"  ! {baseline.name}: {first_line(error)}")
    return [backward.ours(inputs, douts), *peers]


def autograd_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """Forward and backward through autograd, the two core calls, and what PyTorch takes for a function that does nothing."""
    import torch

    import cuattn

    (qkv, *_), (dout, *_), options = inputs.sets, inputs.cotangents(), inputs.options()
    leaves = [x.detach().requires_grad_() for x in qkv]

    def core() -> Any:
        out, lse = cuattn.attention(*qkv, return_lse=True, **options)
        return cuattn.attention_backward(dout, *qkv, out, lse, **options)

    def recorded() -> Any:
        return torch.autograd.grad(cuattn.attention(*leaves, **options), leaves, dout)

    class Empty(torch.autograd.Function):
        """Takes and returns as many tensors as attention does."""

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            ctx.save_for_backward(q, k, v)
            return dout.detach()

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return ctx.saved_tensors

    def empty() -> Any:
        return torch.autograd.grad(Empty.apply(*leaves), leaves, dout)

    return [Contender(OURS, [recorded]), Contender(CORE, [core]), Contender(EMPTY, [empty])]


Build = Callable[[Inputs, Sequence[Baseline]], list[Contender]]
PARTS: dict[str, Build] = {"": forward_contenders, "/backward": backward_contenders}


def run(baselines: Sequence[Baseline], calls: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Measure on CuPy arrays and on PyTorch tensors; peers join on the tensors they take."""
    jobs: list[tuple[Arrays, str, Build, list[Baseline]]] = [(CupyArrays(), *part, []) for part in PARTS.items()]
    if torch_on_gpu():
        peers = [b for b in baselines if b.name in PEERS]
        jobs += [(TorchArrays(), *part, peers) for part in (*PARTS.items(), ("/autograd", autograd_contenders))]
    for arrays, part, build, peers in jobs:
        name = f"host, {arrays.name} arrays{part.replace('/', ', ')}"
        if deadline.passed:
            print(f"time limit: {name} not measured")
            return
        case = dataclasses.replace(HOST, bench=f"host/{arrays.name}{part}")
        try:
            times = measure_host(build(Inputs.of(case, arrays), peers), calls)
            timing = times.pop(OURS)
        except Exception as error:
            print(f"{name}: {first_line(error)}")
            continue
        us = {contender: t.us for contender, t in times.items()}
        mine = timing.us - us.pop(CORE) if CORE in us else timing.us
        others = "  ".join(f"{contender} {t:.1f}" for contender, t in us.items())
        note = f" | {others} us" if others else ""
        whole = f" beyond the core calls, {timing.us:.1f} us in all" if mine != timing.us else ""
        print(f"{name}: {mine:.1f} us{whole} (spread {100 * timing.spread:.0f}%){note}", flush=True)
        store.add(make_row(case, mine, us, env, None))
