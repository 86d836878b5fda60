"""`python -m bench host`: time from call to return of warm calls, on a problem so small that the GPU waits for the host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import backward
from bench.baselines import Baseline
from bench.cases import HOST
from bench.forward import OURS, ours
from bench.inputs import Arrays, CupyArrays, Inputs, TorchArrays, torch_on_gpu
from bench.progress import within
from bench.results import Row, Store, make_row
from bench.timing import Contender, Deadline, first_line, measure_host

CALLS = 1000
QUICK_CALLS = 400
CORE, EMPTY, EMPTY_JIT = "core", "an empty autograd.Function", "an empty jit"
BARE = "an autograd.Function of the core calls"
PEERS = ("cudnn", "flash", "fa3", "fa4")
"""Those whose host path is worth a comparison, on the tensors they take; `jax` joins under its own jit."""
Context = Callable[[], contextlib.AbstractContextManager[Any]]


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


def decode_contenders(inputs: Inputs, baselines: Sequence[Baseline], append: bool) -> list[Contender]:
    """One token of each sequence over a cache that holds all keys and values, or all but its own, which are appended."""
    import numpy as np

    import cuattn

    q, k, v = inputs.sets[0]
    new = (k[:, -1:], v[:, -1:]) if append else ()
    lengths = inputs.arrays.put(np.full(HOST.batch, HOST.seqlen_k - append, np.int32))
    step = functools.partial(cuattn.attention_with_kvcache, cache_seqlens=lengths, causal=True)
    return [Contender(OURS, [functools.partial(step, q[:, -1:], k, v, *new)])]


def recorded_contenders(inputs: Inputs, baselines: Sequence[Baseline]) -> list[Contender]:
    """A forward that autograd records, the core call that it makes, and what PyTorch takes for a function that does nothing."""
    import cuattn

    (qkv, *_), options = inputs.sets, inputs.options()
    leaves = [x.detach().requires_grad_() for x in qkv]
    recorded = functools.partial(cuattn.attention, *leaves, **options)
    core = functools.partial(cuattn.attention, *qkv, return_lse=True, **options)
    empty = functools.partial(_empty_function(inputs.cotangents()[0]).apply, *leaves)
    return [Contender(OURS, [recorded]), Contender(CORE, [core]), Contender(EMPTY, [empty])]


def autograd_contenders(
    inputs: Inputs, baselines: Sequence[Baseline], forward: bool = True, threads: bool = True
) -> list[Contender]:
    """Gradients through autograd, the core calls, and what PyTorch takes for other functions.

    These are one that does nothing, one that does nothing but the core calls, and peers. forward: with the forward; without
    it, gradients are taken of one graph again and again. threads: without them, the engine runs the backward in the caller's.
    """
    import torch

    import cuattn

    (qkv, *_), (dout, *_), options = inputs.sets, inputs.cotangents(), inputs.options()
    leaves = [x.detach().requires_grad_() for x in qkv]
    attend = functools.partial(cuattn.attention, *qkv, return_lse=True, **options)
    done = attend()

    def core() -> Any:
        out, lse = attend() if forward else done
        return cuattn.attention_backward(dout, *qkv, out, lse, **options)

    def engine() -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if threads else torch.autograd.set_multithreading_enabled(False)

    def contender(name: str, call: Callable[[], Any], dout: Any = dout, context: Context = contextlib.nullcontext) -> Contender:
        graph = call if forward else functools.cache(call)

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            with context(), engine():
                yield

        def gradients() -> Any:
            return torch.autograd.grad(graph(), leaves, dout, retain_graph=not forward)

        return Contender(name, [gradients], context=around)

    return [
        contender(OURS, functools.partial(cuattn.attention, *leaves, **options)),
        Contender(CORE, [core]),
        contender(EMPTY, functools.partial(_empty_function(dout).apply, *leaves)),
        contender(BARE, functools.partial(_bare_function(options).apply, *leaves)),
        *[
            contender(b.name, _forward_of(b, inputs, leaves), dout.transpose(-3, -2) if b.heads_first else dout, b.context)
            for b in baselines
            if not b.declines_gradient(HOST)
        ],
    ]


def _bare_function(options: dict[str, Any]) -> Any:
    """The core calls, and nothing else."""
    import torch

    import cuattn

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out, lse = cuattn.attention(q, k, v, return_lse=True, **options)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return cuattn.attention_backward(dout, *ctx.saved_tensors, **options)[:3]

    return Bare


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


def _forward_of(baseline: Baseline, inputs: Inputs, leaves: Sequence[Any]) -> Callable[[], Any]:
    """A peer's out."""
    forward = baseline.calls(dataclasses.replace(inputs, sets=[tuple(leaves)]))[0]

    def out() -> Any:
        result = forward()
        return result[0] if isinstance(result, (tuple, list)) else result

    return out


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


def jax_contenders(inputs: Inputs, baselines: Sequence[Baseline], wait: bool) -> list[Contender]:
    """Calls under jit: `cuattn.jax.attention`, jax.nn's, and a program that only adds. wait: until their results are there."""
    import jax

    import cuattn.jax

    qkv = [jax.dlpack.from_dlpack(x) for x in inputs.sets[0]]

    def finished(function: Callable[..., Any]) -> Callable[[], Any]:
        compiled = jax.jit(function)
        return (lambda: compiled(*qkv).block_until_ready()) if wait else (lambda: compiled(*qkv))

    peers = [
        Contender(b.name, [finished(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))])
        for b in baselines
    ]
    mine = finished(functools.partial(cuattn.jax.attention, causal=True))
    return [Contender(OURS, [mine]), Contender(EMPTY_JIT, [finished(lambda q, k, v: q + k)]), *peers]


Build = Callable[[Inputs, Sequence[Baseline]], list[Contender]]
FIRST: dict[str, Build] = {"": forward_contenders}
JAX_PARTS: dict[str, Build] = {
    "/jax": functools.partial(jax_contenders, wait=True),
    "/jax_return": functools.partial(jax_contenders, wait=False),
}
TORCH_PARTS: dict[str, Build] = {
    "/flash_attn": flash_attn_contenders,
    "/sdpa": sdpa_contenders,
    "/autograd": autograd_contenders,
}
PARTS: dict[str, Build] = {
    "/backward": backward_contenders,
    "/decode": functools.partial(decode_contenders, append=False),
    "/append": functools.partial(decode_contenders, append=True),
}
SPLIT_PARTS: dict[str, Build] = {
    "/recorded": recorded_contenders,
    "/gradients": functools.partial(autograd_contenders, forward=False),
    "/autograd_one_thread": functools.partial(autograd_contenders, threads=False),
    "/gradients_one_thread": functools.partial(autograd_contenders, forward=False, threads=False),
}
"""What the time of /autograd is made of."""
Job = tuple[type[Arrays], str, Build, Sequence[Baseline]]


def jobs(baselines: Sequence[Baseline], torch: bool) -> list[Job]:
    """What is measured, the most telling first: (arrays, part, how, peers) of each row. torch: whether there are tensors."""
    peers = [b for b in baselines if b.name in PEERS]
    jax = [b for b in baselines if b.name == "jax"]

    def on_cupy(parts: dict[str, Build]) -> list[Job]:
        return [(CupyArrays, *part, ()) for part in parts.items()]

    def on_torch(parts: dict[str, Build]) -> list[Job]:
        return [(TorchArrays, *part, peers) for part in parts.items()] if torch else []

    on_jax: list[Job] = [(CupyArrays, *part, jax) for part in JAX_PARTS.items()] if jax else []
    return [
        *on_cupy(FIRST),
        *on_torch(FIRST),
        *on_jax,
        *on_torch(TORCH_PARTS),
        *on_cupy(PARTS),
        *on_torch(PARTS),
        *on_torch(SPLIT_PARTS),
    ]


def run(baselines: Sequence[Baseline], calls: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Measure on CuPy arrays, PyTorch tensors and under JAX's jit; peers join on the arrays they take."""

    def title(job: Job) -> str:
        return f"host, {job[0].name} arrays{job[1].replace('/', ', ')}"

    for job in within(deadline, jobs(baselines, torch_on_gpu()), title):
        (kind, part, build, peers), name = job, title(job)
        arrays = kind()
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
        tail = timing.p99 and round(timing.p99, 2)
        store.add(make_row(case, mine, us, env, None, p99=tail, whole=round(timing.us, 2)))
