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
BARE = "an autograd.Function of the core calls"
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


def decode_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """One new token of each sequence over a cache that holds the others."""
    import numpy as np

    import cuattn

    q, k, v = inputs.sets[0]
    lengths = inputs.arrays.put(np.full(HOST.batch, HOST.seqlen_k - 1, np.int32))
    step = functools.partial(cuattn.attention_with_kvcache, cache_seqlens=lengths, causal=True)
    return [Contender(OURS, [functools.partial(step, q[:, -1:], k, v, k[:, -1:], v[:, -1:])])]


def recorded_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """A forward that autograd records, the core call that it makes, and what PyTorch takes for a function that does nothing."""
    import cuattn

    (qkv, *_), options = inputs.sets, inputs.options()
    leaves = [x.detach().requires_grad_() for x in qkv]
    recorded = functools.partial(cuattn.attention, *leaves, **options)
    core = functools.partial(cuattn.attention, *qkv, return_lse=True, **options)
    empty = functools.partial(_empty_function(inputs.cotangents()[0]).apply, *leaves)
    return [Contender(OURS, [recorded]), Contender(CORE, [core]), Contender(EMPTY, [empty])]


def autograd_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """Forward and backward through autograd, the two core calls, and what PyTorch takes for other functions.

    These are one that does nothing, one that does nothing but the core calls, and peers' forward and backward.
    """
    import torch

    import cuattn

    (qkv, *_), (dout, *_), options = inputs.sets, inputs.cotangents(), inputs.options()
    leaves = [x.detach().requires_grad_() for x in qkv]

    def core() -> Any:
        out, lse = cuattn.attention(*qkv, return_lse=True, **options)
        return cuattn.attention_backward(dout, *qkv, out, lse, **options)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out, lse = cuattn.attention(q, k, v, return_lse=True, **options)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return cuattn.attention_backward(dout, *ctx.saved_tensors, **options)[:3]

    def through_autograd(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    mine = [
        Contender(OURS, [through_autograd(functools.partial(cuattn.attention, **options))]),
        Contender(CORE, [core]),
        Contender(EMPTY, [through_autograd(_empty_function(dout).apply)]),
        Contender(BARE, [through_autograd(Bare.apply)]),
    ]
    return [*mine, *(_both(b, inputs, leaves, dout) for b in baselines if not b.declines_gradient(HOST))]


def _empty_function(dout: Any) -> Any:
    """Takes and returns as many tensors as attention does."""
    import torch

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            ctx.save_for_backward(q, k, v)
            return dout.detach()

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return ctx.saved_tensors

    return Empty


def _both(baseline: Baseline, inputs: Inputs, leaves: Sequence[Any], dout: Any) -> Contender:
    """A peer's forward and backward."""
    import torch

    forward = baseline.calls(dataclasses.replace(inputs, sets=[tuple(leaves)]))[0]
    dout = dout.transpose(-3, -2) if baseline.heads_first else dout

    def both() -> Any:
        result = forward()
        return torch.autograd.grad(result[0] if isinstance(result, (tuple, list)) else result, leaves, dout)

    return Contender(baseline.name, [both], context=baseline.context)


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
PARTS: dict[str, Build] = {"": forward_contenders, "/backward": backward_contenders, "/decode": decode_contenders}
TORCH_PARTS: dict[str, Build] = {
    "/recorded": recorded_contenders,
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
