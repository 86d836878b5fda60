"""`python -m bench decode`: GPU time of attention over a paged KV cache, in CUDA graphs of ten calls, beside peers.

Sequences have equal lengths (or those of MIXED), pages lie in random order. GB/s are of the keys and values that a call reads.
What has to be compiled is compiled first, peers in processes of their own and for a limited time: who is not ready is left out.
Needs PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.forward import prewarm
from bench.progress import within
from bench.results import Row, Store
from bench.timing import Deadline, first_line

CALLS = 10
"""of a graph"""
MIXED = (128, 512, 1024, 2048, 4096, 8192, 16384, 65536)
"""Lengths that take turns in a batch of length 0."""


class DecodeCase(NamedTuple):
    """One shape."""

    batch: int
    length: int
    """tokens of every sequence; 0: those of MIXED"""
    heads: tuple[int, int] = (64, 8)
    head_dim: int = 128
    page_size: int = 16
    seqlen_q: int = 1
    cache: str = "bfloat16"
    """dtype of its elements; under 8 bits, queries are bfloat16"""
    columns: int = 0
    """of the keys that are values; 0: values have a cache of their own"""

    def __str__(self) -> str:
        length = str(self.length) if self.length else "mixed"
        cache = "" if self.cache == "bfloat16" else f" {self.cache}"
        queries = f" q{self.seqlen_q}" if self.seqlen_q > 1 else ""
        dims = f"d{self.head_dim}" + (f"/{self.columns}" if self.columns else "")
        shape = f"{self.batch}x{length} h{self.heads[0]}/{self.heads[1]} {dims} page{self.page_size}"
        return f"decode {shape}{queries}{cache}"

    def lengths(self) -> list[int]:
        return [self.length or MIXED[b % len(MIXED)] for b in range(self.batch)]

    def bytes(self) -> int:
        """of keys and values"""
        size = {"float64": 8, "float32": 4, "bfloat16": 2}.get(self.cache, 1)
        return (1 if self.columns else 2) * sum(self.lengths()) * self.heads[1] * self.head_dim * size

    @property
    def dtype(self) -> str:
        """of the queries"""
        return "bfloat16" if self.scaled else self.cache

    @property
    def scaled(self) -> bool:
        """Whether the elements of the cache have 8 bits."""
        return self.cache in ("int8", "float8_e4m3fn")

    def flops(self) -> int:
        return 2 * sum(self.lengths()) * self.seqlen_q * self.heads[0] * (self.head_dim + self.head_dim_v)

    @property
    def head_dim_v(self) -> int:
        return self.columns or self.head_dim


QUICK = (
    DecodeCase(1, 2048),
    DecodeCase(1, 8192, (32, 8)),
    DecodeCase(128, 8192),
    DecodeCase(8, 8192, seqlen_q=4),
    DecodeCase(64, 4096, (32, 8), 256),
    DecodeCase(128, 8192, cache="float8_e4m3fn"),
    DecodeCase(64, 0),
    DecodeCase(64, 8192, (128, 1), 576, 64, columns=512),
)
CASES = (
    *QUICK,
    DecodeCase(32, 8192, seqlen_q=4),
    DecodeCase(8, 8192),
    DecodeCase(32, 8192),
    DecodeCase(8, 2048),
    DecodeCase(1, 131072),
    DecodeCase(256, 1024, (32, 8)),
    *(DecodeCase(batch, length, (32, 8), page_size=64) for batch, length in ((1, 8192), (1, 131072), (16, 8192), (64, 8192))),
    DecodeCase(128, 8192, (32, 8)),
    DecodeCase(128, 8192, page_size=64),
    DecodeCase(64, 8192, (32, 1), page_size=64),
    DecodeCase(64, 16384, (64, 8), 64, 64),
    DecodeCase(16, 16384, (16, 4), 256, 64),
    DecodeCase(32, 8192, (32, 32), page_size=64),
    DecodeCase(128, 8192, cache="int8"),
    DecodeCase(64, 8192, (128, 1), 576, columns=512),
    DecodeCase(64, 8192, (16, 1), 576, 64, columns=512),
    DecodeCase(16, 4096, (32, 32), cache="float32"),
    DecodeCase(64, 4096, cache="float32"),
    DecodeCase(16, 4096, (32, 32), cache="float64"),
)
"""What matters most first: a run may end early."""
LENGTHS = tuple(DecodeCase(batch, 1024 << n) for batch in (1, 32) for n in range(0, 7, 2))
"""Bandwidth against length."""


class Inputs(NamedTuple):
    q: Any
    k_cache: Any
    v_cache: Any
    """columns of k_cache, or an array of its own"""
    page_table: Any
    cache_seqlens: Any
    scales: Any
    out: Any


def inputs_of(case: DecodeCase) -> Inputs:
    """PyTorch tensors; the pages of every sequence are drawn from all of the pool."""
    import torch

    lengths = case.lengths()
    each = [-(-n // case.page_size) for n in lengths]
    pages, device, dtype = sum(each), torch.device("cuda"), getattr(torch, case.dtype)
    shape = (pages, case.page_size, case.heads[1], case.head_dim)

    def cache() -> Any:
        if not case.scaled:
            return torch.randn(shape, device=device, dtype=dtype)
        # As e4m3, negative ones would hold -1, which is a NaN.
        least = -100 if case.cache == "int8" else 0
        return torch.randint(least, 100, shape, device=device, dtype=torch.int8).view(getattr(torch, case.cache))

    order = torch.randperm(pages, device=device, dtype=torch.int32)
    table = torch.zeros((case.batch, max(each)), device=device, dtype=torch.int32)
    start = 0
    for b, n in enumerate(each):
        table[b, :n] = order[start : start + n]
        start += n
    q = torch.randn((case.batch, case.seqlen_q, case.heads[0], case.head_dim), device=device, dtype=dtype)
    scales = None if not case.scaled else torch.full((case.heads[1],), 0.02, device=device)
    k_cache, out = cache(), torch.empty_like(q[..., : case.head_dim_v])
    v_cache = k_cache[..., : case.columns] if case.columns else cache()
    return Inputs(q, k_cache, v_cache, table, torch.tensor(lengths, device=device, dtype=torch.int32), scales, out)


def ours(case: DecodeCase, x: Inputs) -> Callable[[], Any]:
    """The public call."""
    import cuattn

    scales = {} if x.scales is None else {"k_scale": x.scales, "v_scale": x.scales}
    call = cuattn.attention_with_kvcache
    rest = {"cache_seqlens": x.cache_seqlens, "page_table": x.page_table, "causal": True, "out": x.out}
    return functools.partial(call, x.q, x.k_cache, x.v_cache, **rest, **scales)


def fa3(case: DecodeCase, x: Inputs) -> Callable[[], Any]:
    """vLLM's build of FA3, see bench/baselines.py. Latent attention as vLLM asks it: columns that are no values are q and k."""
    import torch

    if case.cache != "bfloat16":
        raise NotImplementedError("16-bit queries take a 16-bit cache")
    torch.ops.load_library(os.environ["FA3_SO"])
    cumulative = torch.arange(0, (case.batch + 1) * case.seqlen_q, case.seqlen_q, device="cuda", dtype=torch.int32)
    q, longest = x.q.flatten(0, 1), x.page_table.shape[1] * case.page_size
    q_keys, k_cache, q_values = q, x.k_cache, None
    if case.columns:
        q_keys, k_cache, q_values = q[..., case.columns :], x.k_cache[..., case.columns :], q[..., : case.columns]

    def call() -> Any:
        return torch.ops._vllm_fa3_C.fwd(
            q_keys, k_cache, x.v_cache, None, None, q_values, None, cumulative, None, None, None, x.cache_seqlens,
            case.seqlen_q, longest, x.page_table, None, None, None, None, None, None, None, None,
            case.head_dim**-0.5, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )  # fmt: skip

    return call


def flashinfer(case: DecodeCase, x: Inputs) -> Callable[[], Any]:
    """FlashInfer's decode on tensor cores, planned beforehand; what it has not compiled yet its plan compiles."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    if case.cache != "bfloat16" or case.columns:
        raise NotImplementedError("a 16-bit cache, with values apart")
    counts = [-(-n // case.page_size) for n in case.lengths()]
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).to(dtype=torch.int32, device="cuda")
    indices = torch.cat([x.page_table[b, :n] for b, n in enumerate(counts)])
    last = torch.tensor([(n - 1) % case.page_size + 1 for n in case.lengths()], dtype=torch.int32, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    dtype = torch.bfloat16
    sizes = (*case.heads, case.head_dim, case.page_size)
    tokens = {"q_len_per_req": case.seqlen_q} if case.seqlen_q > 1 else {}
    wrapper.plan(starts, indices, last, *sizes, q_data_type=dtype, kv_data_type=dtype, **tokens)
    q = x.q.flatten(0, 1)
    return lambda: wrapper.run(q, (x.k_cache, x.v_cache), **tokens)


def efficient(case: DecodeCase, x: Inputs) -> Callable[[], Any]:
    """PyTorch's kernel for float32, over the same keys and values in one contiguous piece."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.cache != "float32" or case.heads[0] != case.heads[1] or case.seqlen_q > 1 or not case.length or case.columns:
        raise NotImplementedError("one query token over float32 keys of equal lengths, a head for each of the queries")
    pages = x.page_table.long()
    k, v = (c[pages].flatten(1, 2)[:, : case.length].transpose(1, 2).contiguous() for c in (x.k_cache, x.v_cache))
    q = x.q.transpose(1, 2)

    def call() -> Any:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return call


PEERS: dict[str, Callable[[DecodeCase, Inputs], Callable[[], Any]]] = {
    "fa3": fa3,
    "flashinfer": flashinfer,
    "efficient": efficient,
}


# Kernels ahead of time ------------------------------------------------------------------------------------------------


def smallest(peer: str, case: DecodeCase) -> DecodeCase | None:
    """A small case on which a peer compiles what it needs for `case`; None if it compiles nothing."""
    if peer != "flashinfer" or case.cache != "bfloat16" or case.columns:
        return None
    return DecodeCase(1, 64, (8, 1), case.head_dim, seqlen_q=case.seqlen_q)


COMPILE_LIMIT = 300.0
"""Most seconds that they get; and at most a third of the time that the run has."""


def sources(case: DecodeCase, arch: str | None = None) -> list[tuple[str, str]]:
    """(source, architecture) of our kernels of a case; with `arch` for a typical GPU of it, else for the current one."""
    from cuattn import call
    from cuattn.catalogue import decode_problem_of
    from cuattn.codegen import decode_units
    from cuattn.decode import make_decode_plan
    from cuattn.registry import DEVICES

    options: dict[str, Any] = {"batch": case.batch, "seqlen_q": case.seqlen_q, "page_size": case.page_size}
    dims = case.head_dim, case.head_dim_v
    problem = decode_problem_of(case.dtype, case.cache, dims, heads=case.heads, latent=bool(case.columns), **options)
    plan = make_decode_plan(problem, DEVICES[arch] if arch else call.device_of(0))
    return [(unit.source, plan.device.arch) for unit in decode_units(plan).values()]


def first_call(peer: str, case: DecodeCase) -> None:
    """Let a peer compile, in a process of its own, which can be ended with all that it starts."""
    os.setsid()
    PEERS[peer](case, inputs_of(case))()


Compiles = tuple[str, DecodeCase]
"""A peer, and the small case that it compiles."""


def start(peers: Sequence[str], cases: Sequence[DecodeCase]) -> dict[Compiles, Any]:
    """Processes in which peers compile."""
    fresh, started = multiprocessing.get_context("spawn"), {}
    for peer, small in dict.fromkeys((peer, smallest(peer, case)) for case in cases for peer in peers):
        if small is not None:
            started[peer, small] = fresh.Process(target=first_call, args=(peer, small), daemon=True)
            started[peer, small].start()
    return started


def finish(started: Mapping[Compiles, Any], end: float) -> set[Compiles]:
    """Wait until all have compiled or time.monotonic() is `end`, and end the rest. Returns those that are not ready."""
    unready = set()
    for (peer, case), process in started.items():
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode == 0:
            continue
        why = "its first call failed" if process.exitcode is not None else "has not compiled in time"
        print(f"  - {peer}, as for {case}: {why}", flush=True)
        unready.add((peer, case))
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it has not called os.setsid() yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    return unready


def graph_of(call: Callable[[], Any]) -> Any:
    """CALLS calls as a graph, after some that compile and load."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def measure(graphs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median microseconds of a call, in interleaved rounds that each of them begins in turn."""
    import torch

    samples: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for n in range(rounds + 1):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            graph = graphs[name]
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if n:  # the first round uploads the graphs
                samples[name].append(start.elapsed_time(stop) * 1e3 / CALLS)
    return {name: statistics.median(times) for name, times in samples.items()}


def run_case(case: DecodeCase, peers: Sequence[str], rounds: int, env: Row) -> Row:
    """Measure one case and print its line."""
    import torch

    x = inputs_of(case)
    calls = {"cuattn": ours(case, x)}  # kept: a graph knows the addresses of what they hold, and does not hold it
    graphs = {"cuattn": graph_of(calls["cuattn"])}
    for name in peers:
        try:
            calls[name] = PEERS[name](case, x)
            graphs[name] = graph_of(calls[name])
        except NotImplementedError:
            continue
        except Exception as error:
            print(f"  ! {name}: {first_line(error)}")
    times = measure(graphs, rounds)
    us = times.pop("cuattn")
    others = "  ".join(f"x{t / us:.2f} {name} ({t:.1f} us)" for name, t in times.items())
    rates = f"{case.bytes() / us * 1e-3:6.0f} GB/s" + f" {case.flops() / us * 1e-6:5.0f} TFLOP/s" * bool(case.columns)
    print(f"{case!s:48} {us:9.1f} us | {rates} | {others}", flush=True)
    del graphs, calls, x
    torch.cuda.empty_cache()
    return row(case, us, times, env)


def row(case: DecodeCase, us: float, peers: Mapping[str, float], env: Row) -> Row:
    """What is stored of a case."""
    mods = [f"page {case.page_size}"] + [f"cache {case.cache}"] * (case.cache != "bfloat16")
    return {
        "bench": "decode",
        "dtype": case.dtype,
        "precision": "ieee",
        "d": case.head_dim,
        "dv": case.head_dim_v,
        "heads": case.heads[0],
        "heads_kv": case.heads[1],
        "batch": case.batch,
        "seqlen_q": case.seqlen_q,
        "seqlen_k": case.length,
        "mask": "causal",
        "mods": mods,
        "us": round(us, 2),
        "tflops": round(case.flops() / us * 1e-6, 1) if case.columns else None,
        "gbps": round(case.bytes() / us * 1e-3, 1),
        "bound_pct": None,
        "peers": {name: round(t, 2) for name, t in peers.items()},
        **env,
    }


def run(cases: Sequence[DecodeCase], peers: Sequence[str], rounds: int, store: Store, env: Row, deadline: Deadline) -> None:
    """Compile, then measure the cases in order until the deadline, storing every row as it comes."""
    end = time.monotonic() + min(COMPILE_LIMIT, deadline.left / 3)
    started = start(peers, cases)
    prewarm(cases, sources)
    unready = finish(started, end)
    for case in within(deadline, cases):
        ready = [peer for peer in peers if (peer, smallest(peer, case)) not in unready]
        try:
            store.add(run_case(case, ready, rounds, env))
        except Exception as error:
            print(f"{case!s:48} failed: {first_line(error)}")
