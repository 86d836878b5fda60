"""`python -m bench decode`: GPU time of attention over a paged KV cache, in CUDA graphs of ten calls, beside peers.

Sequences have equal lengths (or those of MIXED), pages lie in random order. GB/s are of the keys and values that a call reads.
Needs PyTorch.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
)
CASES = (
    *QUICK,
    DecodeCase(8, 2048),
    DecodeCase(1, 131072),
    DecodeCase(32, 8192, seqlen_q=4),
    DecodeCase(64, 0),
    DecodeCase(256, 1024, (32, 8)),
    *(DecodeCase(batch, length, (32, 8), page_size=64) for batch, length in ((1, 8192), (1, 131072), (16, 8192), (64, 8192))),
    DecodeCase(128, 8192, (32, 8)),
    DecodeCase(128, 8192, page_size=64),
    DecodeCase(64, 8192, (32, 1), page_size=64),
    DecodeCase(64, 16384, (64, 8), 64, 64),
    DecodeCase(16, 16384, (16, 4), 256, 64),
    DecodeCase(32, 8192, (32, 32), page_size=64),
    DecodeCase(128, 8192, cache="int8"),
    DecodeCase(64, 8192, (128, 1), 576, 64, columns=512),
    DecodeCase(64, 8192, (128, 1), 576, columns=512),
    DecodeCase(64, 8192, (16, 1), 576, 64, columns=512),
    DecodeCase(16, 4096, (32, 32), cache="float32"),
    DecodeCase(64, 4096, cache="float32"),
    DecodeCase(16, 4096, (32, 32), cache="float64"),
)
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
    """vLLM's build of FA3, see bench/baselines.py."""
    import torch

    if case.cache != "bfloat16" or case.columns:
        raise NotImplementedError("16-bit queries take a 16-bit cache, with values apart")
    torch.ops.load_library(os.environ["FA3_SO"])
    cumulative = torch.arange(0, (case.batch + 1) * case.seqlen_q, case.seqlen_q, device="cuda", dtype=torch.int32)
    q, longest = x.q.flatten(0, 1), x.page_table.shape[1] * case.page_size

    def call() -> Any:
        return torch.ops._vllm_fa3_C.fwd(
            q, x.k_cache, x.v_cache, None, None, None, None, cumulative, None, None, None, x.cache_seqlens,
            case.seqlen_q, longest, x.page_table, None, None, None, None, None, None, None, None,
            case.head_dim**-0.5, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )  # fmt: skip

    return call


def flashinfer(case: DecodeCase, x: Inputs) -> Callable[[], Any]:
    """FlashInfer's decode on tensor cores, planned beforehand; its first call compiles."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    if case.cache != "bfloat16" or case.seqlen_q > 1 or case.columns:
        raise NotImplementedError("one query token over a 16-bit cache, with values apart")
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
    wrapper.plan(starts, indices, last, *sizes, data_type=dtype, q_data_type=dtype)
    q = x.q[:, 0]
    return lambda: wrapper.run(q, (x.k_cache, x.v_cache))


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
    """Median microseconds of a call, in interleaved rounds."""
    import torch

    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for n in range(rounds + 1):
        for name, graph in graphs.items():
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
    """Measure the cases in order until the deadline, storing every row as it comes."""
    for case in within(deadline, cases):
        try:
            store.add(run_case(case, peers, rounds, env))
        except Exception as error:
            print(f"{case!s:48} failed: {first_line(error)}")
