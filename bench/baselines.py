"""What cuattn is compared with: each baseline says why it is absent, which cases it declines, and makes its calls.

All of them read the memory that cuattn reads, (batch, seqlen, heads, head_dim), in the layout their own interface takes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.cases import BLOCK, COMPILED, DROPOUT, SOFTCAP, WINDOWS, Case, user_mod
from bench.inputs import Inputs, torch_on_gpu
from bench.timing import Call, Contender, first_line

MAX_SCORES = 1 << 30
"""Largest score matrix that implementations without tiling are asked to allocate."""


class Baseline:
    """One contender that is not cuattn."""

    name = ""
    title = ""
    heads_first = False
    """Whether results are (batch, heads, seqlen, head_dim)."""
    no_gradient = "has no gradient that PyTorch's autograd could call"
    """Why it has no place in the backward's tables, or ''."""
    wait: Callable[[Any], Any] | None = None

    def absent(self) -> str:
        """Why this machine cannot run it, or ''."""
        raise NotImplementedError

    def declines(self, case: Case) -> str:
        """Why it does not serve a case, or ''."""
        raise NotImplementedError

    def declines_gradient(self, case: Case) -> str:
        """Why it does not serve a case's backward, or ''."""
        return self.no_gradient or self.declines(case)

    def calls(self, inputs: Inputs) -> list[Call]:
        """One call for each set of inputs."""
        raise NotImplementedError

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def contender(self, inputs: Inputs) -> Contender:
        return Contender(self.name, self.calls(inputs), self.wait, self.context)


def plain(case: Case) -> bool:
    """Dense, full or causal with as many queries as keys, nothing else."""
    square = case.mask == "full" or (case.mask == "causal" and case.seqlen_q == case.seqlen_k)
    return square and not case.mods


def needs_torch() -> str:
    return "" if torch_on_gpu() else "PyTorch with a GPU is not installed"


def needs(module: str, name: str) -> str:
    """Why a library over PyTorch cannot be used, or ''."""
    if needs_torch():
        return needs_torch()
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{name} does not import: {first_line(error)}"
    return ""


class Naive(Baseline):
    """Three CuPy statements and N^2 memory, in the input dtype; bfloat16 in float32, CuPy has no batched product of it."""

    name, title, heads_first = "naive", "naive CuPy", True

    def absent(self) -> str:
        return ""

    def declines(self, case: Case) -> str:
        if not plain(case) or case.num_heads != case.num_heads_kv:
            return "not a plain case"
        return "N^2 scores too large" if case.scores > MAX_SCORES else ""

    def calls(self, inputs: Inputs) -> list[Call]:
        import cupy

        case = inputs.case
        hidden = ~cupy.tri(case.seqlen_q, case.seqlen_k, dtype=bool) if case.mask == "causal" else None
        dtype = "float32" if case.dtype == "bfloat16" else case.dtype

        def attend(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (x.astype(dtype, copy=False) for x in (q, k, v))
            s = cupy.matmul(q, k.swapaxes(-1, -2)) * cupy.asarray(case.head_dim**-0.5, dtype)
            if hidden is not None:
                s = cupy.where(hidden, cupy.asarray(-cupy.inf, dtype), s)
            s = cupy.exp(s - s.max(-1, keepdims=True))
            return cupy.matmul(s / s.sum(-1, keepdims=True), v)

        views = [[cupy.from_dlpack(x).swapaxes(1, 2) for x in qkv] for qkv in inputs.sets]
        return [functools.partial(attend, *qkv) for qkv in views]


class Sdpa(Baseline):
    """`torch.nn.functional.scaled_dot_product_attention` with one backend forced; float32 is IEEE float32 in all of them."""

    heads_first = True
    no_gradient = ""

    def __init__(self, backend: str, name: str, title: str, dtypes: Sequence[str]) -> None:
        self.name, self.title, self._backend, self._dtypes = name, title, backend, dtypes

    def absent(self) -> str:
        return needs_torch()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        forced: contextlib.AbstractContextManager[Any] = sdpa_kernel(getattr(SDPBackend, self._backend))
        return forced

    def declines(self, case: Case) -> str:
        if case.dtype not in self._dtypes:
            return "dtype"
        if set(case.mods) - {"bias", "key bias", "alibi", "dropout", "deterministic"}:
            return "mods"
        if case.mask == "causal" and case.seqlen_q != case.seqlen_k:
            return "top-left causal"
        if self.name == "flash" and (case.mask not in ("full", "causal") or case.biased or "alibi" in case.mods):
            return "takes no mask"
        if self.name == "flash" and case.head_dim != case.head_dim_v:
            return "one head dimension for q, k and v"
        return "N^2 scores too large" if self.name == "math" and case.scores > MAX_SCORES else ""

    def declines_gradient(self, case: Case) -> str:
        """The slower kernels run only where a faster one has no gradient: a backward has many rows and little time."""
        if self.name == "cudnn" and case.biased:
            return "no gradient of a bias"
        if self.name == "math" and case.dtype != "float64":
            return "slower than the fused kernels"
        if self.name == "efficient" and not (case.dtype == "float32" or case.biased or case.head_dim != case.head_dim_v):
            return "slower than FA2"
        return self.declines(case)

    def calls(self, inputs: Inputs) -> list[Call]:
        import torch

        case, sdpa = inputs.case, torch.nn.functional.scaled_dot_product_attention
        options = {
            "attn_mask": dense_mask(inputs),
            "is_causal": case.mask == "causal",
            "dropout_p": DROPOUT if "dropout" in case.mods else 0.0,
            "enable_gqa": case.num_heads != case.num_heads_kv,
        }
        views = [[x.transpose(1, 2) for x in qkv] for qkv in inputs.sets]
        return [functools.partial(sdpa, *qkv, **options) for qkv in views]


def dense_mask(inputs: Inputs) -> Any:
    """Mask, bias or ALiBi as the (seqlen_q, seqlen_k) or (1, heads, seqlen_q, seqlen_k) tensor that PyTorch takes."""
    import torch

    case = inputs.case
    if inputs.bias is not None:
        return inputs.bias.expand(case.batch, -1, case.seqlen_q, -1)
    if inputs.slopes is not None:
        i, j = (torch.arange(n, device="cuda") for n in (case.seqlen_q, case.seqlen_k))
        distance = (i[:, None] + case.seqlen_k - case.seqlen_q - j[None, :]).abs()
        table = (-inputs.slopes[:, None, None] * distance).to(getattr(torch, case.dtype))
        return table[None].expand(case.batch, -1, -1, -1)
    if case.mask in ("full", "causal"):
        return None
    visible = case.mask_object().materialize(case.seqlen_q, case.seqlen_k)
    return torch.from_numpy(visible.copy()).cuda()[None]


class FlashPacked(Baseline):
    """FlashAttention 2 as PyTorch ships it, over packed sequences."""

    name, title, no_gradient = "flash_packed", "FA2 (packed)", ""

    def absent(self) -> str:
        return needs_torch()

    def declines(self, case: Case) -> str:
        served = case.dtype in HALF and case.mask in ("full", "causal") and case.mods == ("packed",)
        return "" if served else "not a plain packed case"

    def calls(self, inputs: Inputs) -> list[Call]:
        import torch

        cu_seqlens, *_, longest = inputs.packing()

        def attend(q: Any, k: Any, v: Any) -> Any:
            return torch.ops.aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, inputs.case.mask == "causal", False
            )

        return [functools.partial(attend, *qkv) for qkv in inputs.sets]


class Flex(Baseline):
    """`torch.nn.attention.flex_attention`, compiled: the one peer that takes user code for masks and scores."""

    name, title, heads_first, no_gradient = "flex", "FlexAttention", True, ""

    def absent(self) -> str:
        return needs_torch()

    def declines(self, case: Case) -> str:
        unserved = {"packed", "dropout", "deterministic"} & set(case.mods)
        special = case.mask not in ("full", "causal") or bool(case.mods) or case in COMPILED
        served = case.dtype in HALF and special and not unserved
        return "" if served else "not a mask or score modification that it serves"

    def calls(self, inputs: Inputs) -> list[Call]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case = inputs.case
        if inputs.sets[0][0].requires_grad:
            keep_compiled_graphs()
        attend = torch.compile(flex_attention, dynamic=False)
        keep = flex_keep(inputs)
        block_mask = None if keep is None else create_block_mask(keep, None, None, case.seqlen_q, case.seqlen_k)
        options = {"score_mod": flex_score(inputs), "block_mask": block_mask}
        views = [[x.transpose(1, 2) for x in qkv] for qkv in inputs.sets]
        return [functools.partial(attend, *qkv, **options) for qkv in views]


def keep_compiled_graphs() -> None:
    """Let the backward of a compiled function run more than once, and forget earlier cases, whose number is limited."""
    import torch
    import torch._dynamo
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()


def flex_keep(inputs: Inputs) -> Callable[..., Any] | None:
    """The case's mask as FlexAttention takes it."""
    shift = inputs.case.seqlen_k - inputs.case.seqlen_q
    table = inputs.mask.arrays[0][0, 0] if inputs.mask.arrays else None
    left = inputs.case.window
    if left is not None:
        return lambda b, h, i, j: (j <= i + shift) & (j >= i + shift - left)
    return {
        "full": None,
        "causal": lambda b, h, i, j: j <= i + shift,
        "boolean": lambda b, h, i, j: table[i, j],
        "blocks": lambda b, h, i, j: table[i // BLOCK, j // BLOCK] != 0,
    }[inputs.case.mask]


def flex_score(inputs: Inputs) -> Callable[..., Any] | None:
    """The case's score modification as FlexAttention takes it."""
    import torch

    shift, bias, slopes = inputs.case.seqlen_k - inputs.case.seqlen_q, inputs.bias, inputs.slopes
    scores: dict[str, Callable[..., Any]] = {
        "bias": lambda s, b, h, i, j: s + bias[0, h, i, j],
        "key bias": lambda s, b, h, i, j: s + bias[0, h, 0, j],
        "alibi": lambda s, b, h, i, j: s - slopes[h] * (i + shift - j).abs(),
        "softcap": lambda s, b, h, i, j: SOFTCAP * torch.tanh(s / SOFTCAP),
        "user": user_mod,
    }
    return scores[inputs.case.mods[0]] if inputs.case.mods else None


class FlashAttention3(Baseline):
    """FA3 as vLLM builds it: a PyTorch operator in the library that FA3_SO names; it takes packed queries only."""

    name, title, no_gradient = "fa3", "FA3", "vLLM builds it without its backward"

    def absent(self) -> str:
        if needs_torch():
            return needs_torch()
        path = os.environ.get("FA3_SO", "")
        if not os.path.isfile(path):
            return "FA3_SO does not name a library"
        import torch

        try:
            torch.ops.load_library(path)
            torch.ops._vllm_fa3_C.fwd  # noqa: B018
        except Exception as error:
            return f"{path}: {first_line(error)}"
        return ""

    def declines(self, case: Case) -> str:
        served = case.dtype in ("bfloat16", "float16") and case.mask in ("full", "causal", *WINDOWS)
        return "" if served and not set(case.mods) - {"softcap", "packed"} else "dtype, mask or mods"

    def calls(self, inputs: Inputs) -> list[Call]:
        import torch

        case = inputs.case
        cu_q = cu_k = inputs.cu_seqlens
        if not case.packed:
            cu_q, cu_k = (
                torch.arange(0, (case.batch + 1) * n, n, device="cuda", dtype=torch.int32)
                for n in (case.seqlen_q, case.seqlen_k)
            )
        left, right = (-1, -1) if case.window is None else (case.window, 0)
        softcap = SOFTCAP if "softcap" in case.mods else 0.0

        def attend(q: Any, k: Any, v: Any) -> Any:
            return torch.ops._vllm_fa3_C.fwd(
                q, k, v,
                None, None, None, None,  # new keys, new values, qv, out
                cu_q, cu_k, None, None, None,  # cumulative lengths of q, k, new keys; used lengths of q, k
                case.seqlen_q, case.seqlen_k,
                None, None, None, None, None, None,  # page table, batch index, left padding, rotary cos, sin, offsets
                None, None, None,  # scales of fp8 q, k, v
                case.head_dim**-0.5, case.mask == "causal", left, right, softcap,
                True, None, 0,  # interleaved rotary, scheduler metadata, splits (0: its own choice)
                None, 0, None, 1, 0, None,  # GQA packing, SM margin, sinks, context parallelism: size, rank, lengths
            )  # fmt: skip

        flat = [[x.reshape(-1, *x.shape[-2:]) for x in qkv] for qkv in inputs.sets]
        return [functools.partial(attend, *qkv) for qkv in flat]


class FlashAttention4(Baseline):
    name, title, no_gradient = "fa4", "FA4", ""

    def absent(self) -> str:
        return needs("flash_attn.cute", "flash-attn-4")

    def declines(self, case: Case) -> str:
        served = case.dtype in ("bfloat16", "float16") and case.mask in ("full", "causal", *WINDOWS)
        return "" if served and not set(case.mods) - {"softcap", "packed", "deterministic"} else "dtype, mask or mods"

    def calls(self, inputs: Inputs) -> list[Call]:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        case = inputs.case
        options: dict[str, Any] = {"causal": case.mask == "causal"}
        if case.window is not None:
            options["window_size"] = (case.window, 0)
        if "deterministic" in case.mods:
            options["deterministic"] = True
        if "softcap" in case.mods:
            options["softcap"] = SOFTCAP
        if case.packed:
            cu, longest = inputs.cu_seqlens, case.seqlen_q
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        attend = flash_attn_varlen_func if case.packed else flash_attn_func
        return [functools.partial(attend, *qkv, **options) for qkv in inputs.sets]


class FlashInfer(Baseline):
    """`single_prefill_with_kv_cache`: one sequence. Its first call compiles with nvcc for up to a minute."""

    name, title = "flashinfer", "FlashInfer"

    def absent(self) -> str:
        return needs("flashinfer", "flashinfer")

    def declines(self, case: Case) -> str:
        return "" if case.dtype in ("bfloat16", "float16") and plain(case) and case.batch == 1 else "one plain sequence only"

    def calls(self, inputs: Inputs) -> list[Call]:
        import flashinfer

        attend, causal = flashinfer.single_prefill_with_kv_cache, inputs.case.mask == "causal"
        return [functools.partial(attend, *(x[0] for x in qkv), causal=causal) for qkv in inputs.sets]


@contextlib.contextmanager
def without_fa4() -> Iterator[None]:
    """xFormers takes any package `flash_attn` for version 2, and does not import beside version 4 alone, which has its name."""
    spec = importlib.util.find_spec
    if spec("flash_attn") is None or spec("flash_attn.flash_attn_interface"):
        yield
        return
    known = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "flash_attn"}
    sys.modules["flash_attn"] = None  # type: ignore[assignment]  # nothing, to import statements and to find_spec
    try:
        yield
    finally:
        del sys.modules["flash_attn"]
        sys.modules.update(known)


class XFormers(Baseline):
    """`xformers.ops.memory_efficient_attention`, which chooses among kernels of its own and those of FlashAttention."""

    name, title, no_gradient = "xformers", "xFormers", ""

    def absent(self) -> str:
        if needs_torch():
            return needs_torch()
        with without_fa4():
            return needs("xformers.ops", "xformers")

    def declines(self, case: Case) -> str:
        served = case.dtype in (*HALF, "float32") and case.num_heads == case.num_heads_kv and not set(case.mods) - {"bias"}
        return "" if served and case.mask in ("full", "causal", *WINDOWS) else "dtype, grouped heads, mask or mods"

    def calls(self, inputs: Inputs) -> list[Call]:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import LocalAttentionFromBottomRightMask, LowerTriangularFromBottomRightMask

        case, bias = inputs.case, None
        if case.mask == "causal":
            bias = LowerTriangularFromBottomRightMask()
        elif case.window is not None:
            bias = LocalAttentionFromBottomRightMask(window_left=case.window, window_right=0)
        elif inputs.bias is not None:
            bias = inputs.bias.expand(case.batch, -1, -1, -1)
        return [functools.partial(memory_efficient_attention, *qkv, attn_bias=bias) for qkv in inputs.sets]


class Jax(Baseline):
    """`jax.nn.dot_product_attention` under jit with its cuDNN implementation; on the host clock, for its stream is its own."""

    name, title = "jax", "JAX (cuDNN)"

    def absent(self) -> str:
        if importlib.util.find_spec("jax") is None:
            return "jax is not installed"
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import jax

            return "" if jax.default_backend() == "gpu" else "jax sees no GPU"
        except Exception as error:
            return f"jax: {first_line(error)}"

    def declines(self, case: Case) -> str:
        served = case.dtype in ("bfloat16", "float16") and plain(case) and case.head_dim <= 128
        return "" if served else "dtype, head dimension, mask or mods"

    def wait(self, result: Any) -> Any:
        return result.block_until_ready()

    def calls(self, inputs: Inputs) -> list[Call]:
        import jax

        attend = jax.jit(
            functools.partial(jax.nn.dot_product_attention, is_causal=inputs.case.mask == "causal", implementation="cudnn")
        )
        views = [[jax.dlpack.from_dlpack(x) for x in qkv] for qkv in inputs.sets]
        return [functools.partial(attend, *qkv) for qkv in views]


HALF = ("bfloat16", "float16")
BASELINES: tuple[Baseline, ...] = (
    Naive(),
    Sdpa("CUDNN_ATTENTION", "cudnn", "cuDNN", HALF),
    Sdpa("FLASH_ATTENTION", "flash", "FA2", HALF),
    FlashPacked(),
    Sdpa("EFFICIENT_ATTENTION", "efficient", "torch efficient", (*HALF, "float32")),
    Sdpa("MATH", "math", "torch math", (*HALF, "float32", "float64")),
    Flex(),
    FlashAttention3(),
    FlashAttention4(),
    XFormers(),
    FlashInfer(),
    Jax(),
)
"""All baselines, in the order of the tables' columns. `flash` is FlashAttention 2 as PyTorch ships it."""
TITLES = {b.name: b.title for b in BASELINES}


def available(names: Sequence[str] = (), report: Callable[[str], None] = print) -> list[Baseline]:
    """The baselines of this machine, all or the named ones; `report` hears why another is absent.

    Raises ValueError for a name that is none of them.
    """
    unknown = set(names) - set(TITLES)
    if unknown:
        raise ValueError(f"--peers: got {', '.join(sorted(unknown))}, expected some of {', '.join(TITLES)}")
    found = []
    for baseline in BASELINES:
        if names and baseline.name not in names:
            continue
        reason = baseline.absent()
        if reason:
            report(f"  - {baseline.name}: {reason}")
        else:
            found.append(baseline)
    return found
