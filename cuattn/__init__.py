"""Exact attention in CUDA C, compiled just in time, for NumPy, CuPy, PyTorch and JAX arrays alike."""

from cuattn.api import (
    BackendInfo,
    Gradients,
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    attention_with_kvcache,
    backend_info,
    explain,
    vjp,
)
from cuattn.dropout import dropout_mask
from cuattn.jit import CompileError
from cuattn.kvcache import CacheFull, PagedKVCache
from cuattn.masks import BlockSparse, BooleanMask, Causal, Full, Mask, SlidingWindow, TreeMask
from cuattn.merge import attention_cascade, merge_states, merge_states_backward
from cuattn.score_mods import Alibi, Bias, ScoreMod, SoftCap, UserMod

__version__ = "0.1.0"
__all__ = [
    "Alibi",
    "BackendInfo",
    "Bias",
    "BlockSparse",
    "BooleanMask",
    "CacheFull",
    "Causal",
    "CompileError",
    "Full",
    "Gradients",
    "Mask",
    "PagedKVCache",
    "ScoreMod",
    "SlidingWindow",
    "SoftCap",
    "TreeMask",
    "UserMod",
    "attention",
    "attention_backward",
    "attention_cascade",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_with_kvcache",
    "backend_info",
    "dropout_mask",
    "explain",
    "merge_states",
    "merge_states_backward",
    "vjp",
]
