"""`python -m bench host`: time from call to return of warm calls, on a problem so small that the GPU waits for the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from bench import backward
from bench.baselines import Baseline
from bench.cases import HOST
from bench.forward import OURS, ours
from bench.inputs import Arrays, CupyArrays, Inputs, TorchArrays, torch_on_gpu
from bench.progress import within
from bench.results import Row, Store, make_row
from bench.timing import Contender, Deadline, first_line, measure_host

CALLS = 4000
QUICK_CALLS = 2000
CORE, EMPTY, EMPTY_JIT = "core", "an empty autograd.Function", "an empty jit"
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


def flash_attn_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """`flash_attn_func` of cuattn and the core call that it makes."""
    import cuattn
    from cuattn.flash_attn import flash_attn_func

    (qkv, *_) = inputs.sets
    door = functools.partial(flash_attn_func, *qkv, causal=True)
    return [Contender(OURS, [door]), Contender(CORE, [functools.partial(cuattn.attention, *qkv, causal=True)])]


def sdpa_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """`scaled_dot_product_attention` of cuattn and the core call that it makes, on the layout of PyTorch's."""
    import cuattn
    from cuattn.torch import scaled_dot_product_attention

    qkv = [x.transpose(1, 2).contiguous() for x in inputs.sets[0]]
    door = functools.partial(scaled_dot_product_attention, *qkv, is_causal=True)
    core = functools.partial(cuattn.attention, *(x.transpose(1, 2) for x in qkv), causal="top-left")
    return [Contender(OURS, [door]), Contender(CORE, [core])]


def jax_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """Calls under jit until their results are there: `cuattn.jax.attention`, jax.nn's, and a program that only adds."""
    import jax

    import cuattn.jax

    qkv = [jax.dlpack.from_dlpack(x) for x in inputs.sets[0]]

    def finished(function: Callable[..., Any]) -> Callable[[], Any]:
        compiled = jax.jit(function)
        return lambda: compiled(*qkv).block_until_ready()

    peers = [
        Contender(b.name, [finished(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))])
        for b in baselines
    ]
    mine = finished(functools.partial(cuattn.jax.attention, causal=True))
    return [Contender(OURS, [mine]), Contender(EMPTY_JIT, [finished(lambda q, k, v: q + k)]), *peers]


Build = Callable[[Inputs, Sequence[Baseline]], list[Contender]]
PARTS: dict[str, Build] = {"": forward_contenders, "/backward": backward_contenders}
TORCH_PARTS: dict[str, Build] = {
    "/autograd": autograd_contenders,
    "/flash_attn": flash_attn_contenders,
    "/sdpa": sdpa_contenders,
}


def run(baselines: Sequence[Baseline], calls: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Measure on CuPy arrays and on PyTorch tensors; peers join on the tensors they take."""
    jobs: list[tuple[Arrays, str, Build, list[Baseline]]] = [(CupyArrays(), *part, []) for part in PARTS.items()]
    if torch_on_gpu():
        peers = [b for b in baselines if b.name in PEERS]
        jobs += [(TorchArrays(), *part, peers) for part in (*PARTS.items(), *TORCH_PARTS.items())]
    jax = [b for b in baselines if b.name == "jax"]
    if jax:
        jobs.append((CupyArrays(), "/jax", jax_contenders, jax))

    def title(job: tuple[Arrays, str, Build, list[Baseline]]) -> str:
        return f"host, {job[0].name} arrays{job[1].replace('/', ', ')}"

    for job in within(deadline, jobs, title):
        (arrays, part, build, peers), name = job, title(job)
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
        store.add(make_row(case, mine, us, env, None, p99=timing.p99 and round(timing.p99, 2)))
