"""The functions of flash-attn 2.8 and 3 over cuattn, against the textbook formula in float64 and, in bfloat16, by the one
tolerance rule. A test that takes `device` runs on the CPU and, marked `gpu`, on the CUDA kernels.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.tolerance import ABSOLUTE, assert_close, limit

torch = pytest.importorskip("torch")
flash_attn = pytest.importorskip("cuattn.flash_attn")
flash_attn3 = pytest.importorskip("cuattn.flash_attn3")

Tensor = Any
EXACT = ABSOLUTE["float64"]
BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_KV, DIM = 2, 5, 7, 4, 2, 8


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    torch.manual_seed(0)
    return str(request.param)


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def qkv(device: str, seqlen_q: int = SEQLEN_Q, seqlen_k: int = SEQLEN_K) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (BATCH, seqlen_q, HEADS, DIM), (BATCH, seqlen_k, HEADS_KV, DIM), (BATCH, seqlen_k, HEADS_KV, DIM)
    q, k, v = (leaf(*shape, device=device) for shape in shapes)
    return q, k, v


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor = None,
    kept: Tensor = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, P) of one dense batch, all scores in memory, from flash-attn's documentation."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1], device=q.device)[None]
    if slopes is not None:
        s = s - slopes.reshape(-1, q.shape[2], 1, 1) * (i - j).abs()
    visible = torch.ones_like(i - j, dtype=torch.bool)
    if causal:
        visible &= j <= i
    if window[0] >= 0:
        visible &= j >= i - window[0]
    if window[1] >= 0:
        visible &= j <= i + window[1]
    s = s.masked_fill(~visible, -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.where(visible, (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp(), 0)
    weights = p if kept is None else p * kept / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse, p


def check(actual: Tensor, expected: Tensor) -> None:
    assert_close("result", actual.detach().cpu().numpy(), expected.detach().cpu().numpy(), EXACT * 10)


def check_gradients(actual: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Gradients of two results of the same leaves, by a random cotangent."""
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, cotangent, retain_graph=True)
    meant = torch.autograd.grad(expected, leaves, cotangent, retain_graph=True)
    for mine, theirs in zip(found, meant, strict=True):
        check(mine, theirs)


FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"softmax_scale": 0.25}, {"scale": 0.25}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (2, 1)}, {"window": (2, 1)}),
    "one side": ({"window_size": (-1, 1)}, {"window": (-1, 1)}),
    "causal window": ({"causal": True, "window_size": (2, 3)}, {"causal": True, "window": (2, 3)}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_dense_matches_the_textbook(device: str, feature: str) -> None:
    given, meant = FEATURES[feature]
    q, k, v = qkv(device)
    out = flash_attn.flash_attn_func(q, k, v, **given)
    expected, lse, _ = textbook(q, k, v, **meant)
    check(out, expected)
    check_gradients(out, expected, q, k, v)
    again, softmax_lse, s_dmask = flash_attn.flash_attn_func(q, k, v, **given, return_attn_probs=True)
    check(again, expected)
    check(softmax_lse, lse)
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype
    check_gradients(softmax_lse, lse, q, k)


@pytest.mark.parametrize("batched", [False, True])
def test_alibi_slopes(device: str, batched: bool) -> None:
    q, k, v = qkv(device)
    slopes = torch.rand((BATCH, HEADS) if batched else (HEADS,), device=device)
    out = flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    check(out, textbook(q, k, v, causal=True, slopes=slopes.double())[0])


def test_rows_without_a_key_have_an_infinite_lse(device: str) -> None:
    q, k, v = qkv(device, seqlen_q=7, seqlen_k=3)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[:, :, :4] == torch.inf).all() and lse[:, :, 4:].isfinite().all()
    assert (out[:, :4] == 0).all()
    out3, lse3 = flash_attn3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out3, out) and (lse3[:, :, :4] == -torch.inf).all()
    (out.sum() + lse[:, :, 4:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_packed_inputs_are_views_with_packed_gradients(device: str) -> None:
    packed = leaf(BATCH, SEQLEN_K, 3, HEADS, DIM, device=device)
    q, k, v = packed.unbind(2)
    out = flash_attn.flash_attn_qkvpacked_func(packed, causal=True)
    expected = textbook(q, k, v, causal=True)[0]
    check(out, expected)
    check_gradients(out, expected, packed)
    q, kv = leaf(BATCH, SEQLEN_Q, HEADS, DIM, device=device), leaf(BATCH, SEQLEN_K, 2, HEADS_KV, DIM, device=device)
    out = flash_attn.flash_attn_kvpacked_func(q, kv)
    expected = textbook(q, *kv.unbind(2))[0]
    check(out, expected)
    check_gradients(out, expected, q, kv)
    assert flash_attn._unpack("kv", kv, 2, 5)[1].data_ptr() == kv.data_ptr() + HEADS_KV * DIM * kv.element_size()


LENGTHS_Q, LENGTHS_K = (3, 0, 5), (7, 2, 4)


def cumulative(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(np.cumsum((0, *lengths)), dtype=torch.int32, device=device)


def test_varlen_matches_each_sequence_alone(device: str) -> None:
    q, k, v = (leaf(sum(n), h, DIM, device=device) for n, h in ((LENGTHS_Q, 4), (LENGTHS_K, 2), (LENGTHS_K, 2)))
    cu_q, cu_k = cumulative(LENGTHS_Q, device), cumulative(LENGTHS_K, device)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 7, causal=True, return_attn_probs=True)
    pieces = zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), strict=True)
    parts = [textbook(*(x[None] for x in piece), causal=True) for piece in pieces]
    expected = torch.cat([part[0][0] for part in parts])
    check(out, expected)
    expected_lse = torch.cat([part[1][0] for part in parts], -1)
    check(lse, expected_lse.masked_fill(expected_lse == -torch.inf, torch.inf))
    check_gradients(out, expected, q, k, v)
    assert torch.equal(flash_attn3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 7, causal=True), out)
    kv = torch.stack([k, v], 1).detach()
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 5, 7, causal=True), out)
    packed = torch.randn(sum(LENGTHS_K), 3, HEADS, DIM, device=device, dtype=torch.float64)
    both = flash_attn.flash_attn_varlen_qkvpacked_func(packed, cu_k, 7)
    assert torch.equal(both, flash_attn.flash_attn_varlen_func(*packed.unbind(1), cu_k, cu_k, 7, 7))


def test_used_lengths_of_flash_attn_3(device: str) -> None:
    q, k, v = (leaf(sum(n), h, DIM, device=device) for n, h in ((LENGTHS_Q, 4), (LENGTHS_K, 2), (LENGTHS_K, 2)))
    cu_q, cu_k = cumulative(LENGTHS_Q, device), cumulative(LENGTHS_K, device)
    used = torch.tensor([2, 2, 1], dtype=torch.int32, device=device)
    out = flash_attn3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 7, seqused_k=used)
    first = textbook(q[None, :3], k[None, :2], v[None, :2])[0][0]
    check(out[:3], first)
    check(out[3:], v[9:10].repeat_interleave(2, 1).expand(5, -1, -1))


@pytest.mark.parametrize("page_size", [1, 3])
def test_pages_are_read_through_the_block_table(device: str, page_size: int) -> None:
    lengths = (7, 2, 4)
    k, v = (leaf(sum(lengths), HEADS_KV, DIM, device=device) for _ in range(2))
    q = leaf(sum(LENGTHS_Q), HEADS, DIM, device=device)
    cu_q, cu_k = cumulative(LENGTHS_Q, device), cumulative(lengths, device)
    needed = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(needed), device=device).int()
    table = torch.full((3, max(needed)), -7, dtype=torch.int32, device=device)  # unused entries hold anything
    pages = torch.full((2, sum(needed), page_size, HEADS_KV, DIM), torch.nan, dtype=torch.float64, device=device)
    start = 0
    for b, (count, n) in enumerate(zip(needed, lengths, strict=True)):
        table[b, :count] = order[start : start + count]
        for x, y in zip(pages, (k, v), strict=True):
            rows = torch.full((count * page_size, HEADS_KV, DIM), torch.nan, dtype=torch.float64, device=device)
            rows[:n] = y.detach()[cu_k[b] : cu_k[b + 1]]
            x[table[b, :count].long()] = rows.view(count, page_size, HEADS_KV, DIM)
        start += count
    paged = flash_attn.flash_attn_varlen_func(q, *pages, cu_q, cu_k, 5, 7, causal=True, block_table=table)
    check(paged, flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 7, causal=True))


def cached(device: str) -> dict[str, Tensor]:
    """Three sequences with 6, 0 and 9 tokens in a cache of five rows, and two new tokens each."""
    given = {"q": (3, 2, HEADS, DIM), "k_cache": (5, 12, HEADS_KV, DIM), "v_cache": (5, 12, HEADS_KV, DIM)}
    given |= {"k": (3, 2, HEADS_KV, DIM), "v": (3, 2, HEADS_KV, DIM)}
    arrays = {name: torch.randn(shape, dtype=torch.float64, device=device) for name, shape in given.items()}
    ints = {"dtype": torch.int32, "device": device}
    return {**arrays, "cache_seqlens": torch.tensor([6, 0, 9], **ints), "cache_batch_idx": torch.tensor([4, 0, 2], **ints)}


@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
def test_cache_is_extended_and_attended(device: str, window: tuple[int, int]) -> None:
    given = cached(device)
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    out, lse = flash_attn.flash_attn_with_kvcache(**given, causal=True, window_size=window, return_softmax_lse=True)
    for b, (row, n) in enumerate(((4, 6), (0, 0), (2, 9))):
        keys, values = (torch.cat([before[f"{x}_cache"][row, :n], given[x][b]]) for x in "kv")
        assert torch.equal(given["k_cache"][row, : n + 2], keys) and torch.equal(given["v_cache"][row, : n + 2], values)
        expected, expected_lse, _ = textbook(given["q"][b : b + 1], keys[None], values[None], causal=True, window=window)
        check(out[b : b + 1], expected)
        check(lse[b : b + 1], expected_lse)
    assert torch.equal(given["k_cache"][[1, 3]], before["k_cache"][[1, 3]])


def test_cache_in_pages_and_without_lengths(device: str) -> None:
    given = cached(device)
    q, (k_cache, v_cache) = given["q"], (given[name][:3] for name in ("k_cache", "v_cache"))
    whole = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache)
    check(whole, textbook(q, k_cache, v_cache)[0])
    table = torch.randperm(12, device=device).view(3, 4).int()
    pages = [torch.empty(12, 3, HEADS_KV, DIM, dtype=torch.float64, device=device) for _ in range(2)]
    for paged, x in zip(pages, (k_cache, v_cache), strict=True):
        paged[table.flatten().long()] = x.reshape(12, 3, HEADS_KV, DIM)
    check(flash_attn.flash_attn_with_kvcache(q, *pages, block_table=table), whole)


def test_flash_attention_3_has_the_same_cache(device: str) -> None:
    """A row that sees no key has -inf there; queries may be packed, where all keys are in the cache."""
    given, other = cached(device), cached(device)
    for name, x in other.items():
        x.copy_(given[name])
    options = {"causal": True, "window_size": (3, 0), "softcap": 2.0, "softmax_scale": 0.3, "return_softmax_lse": True}
    out, lse, *partial = flash_attn3.flash_attn_with_kvcache(**given, **options)
    same, same_lse = flash_attn.flash_attn_with_kvcache(**other, **options)
    check(out, same)
    check(lse, same_lse)
    assert partial == [None, None] and torch.equal(given["k_cache"], other["k_cache"])
    q, cache = given["q"], {name: given[name] for name in ("k_cache", "v_cache", "cache_batch_idx")}
    lens = torch.tensor([8, 0, 11], dtype=torch.int32, device=device)
    padded, padded_lse, *_ = flash_attn3.flash_attn_with_kvcache(q, **cache, cache_seqlens=lens, return_softmax_lse=True)
    assert (padded_lse[1] == -torch.inf).all() and (padded[1] == 0).all()
    packing = {"cu_seqlens_q": torch.tensor([0, 2, 3, 5], dtype=torch.int32, device=device), "max_seqlen_q": 2}
    tokens = torch.cat([q[0], q[1, :1], q[2]])
    packed = flash_attn3.flash_attn_with_kvcache(tokens, **cache, cache_seqlens=lens, **packing)
    check(packed, torch.cat([padded[0], padded[1, :1], padded[2]]))
    with pytest.raises(NotImplementedError, match="k: got new keys beside cu_seqlens_q"):
        flash_attn3.flash_attn_with_kvcache(**given, **packing)
    with pytest.raises(NotImplementedError, match="k_descale: got"):
        flash_attn3.flash_attn_with_kvcache(**given, k_descale=lens)


def test_cache_rotates_queries_and_new_keys(device: str) -> None:
    given = cached(device)
    angles = torch.arange(12, device=device, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], device=device)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor, start: int) -> Tensor:
        """The first four dimensions, in neighbouring pairs, by the positions from `start`."""
        c, s = (t[start : start + x.shape[0], None] for t in (cos, sin))
        a, b = x[..., :4:2], x[..., 1:4:2]
        return torch.cat([torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2), x[..., 4:]], -1)

    before = given["k_cache"].clone()
    out = flash_attn.flash_attn_with_kvcache(**given, rotary_cos=cos, rotary_sin=sin, causal=True)
    for b, (row, n) in enumerate(((4, 6), (0, 0), (2, 9))):
        keys = torch.cat([before[row, :n], rotate(given["k"][b], n)])
        check(given["k_cache"][row, : n + 2], keys)
        values = given["v_cache"][row, : n + 2]
        check(out[b : b + 1], textbook(rotate(given["q"][b], n)[None], keys[None], values[None], causal=True)[0])
    with pytest.raises(NotImplementedError, match="rotary_cos: got 2 queries, 2 new keys and no causal or local mask"):
        flash_attn.flash_attn_with_kvcache(**given, rotary_cos=cos, rotary_sin=sin)
    with pytest.raises(ValueError, match="cache_seqlens: got None together with k"):
        flash_attn.flash_attn_with_kvcache(**{**given, "cache_seqlens": None})


@pytest.mark.parametrize("seqlen_k", [7, 300])
def test_dropout_can_be_replayed_from_s_dmask(device: str, seqlen_k: int) -> None:
    q, k, v = qkv(device, seqlen_k=seqlen_k)
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.25, causal=True, return_attn_probs=True)
    expected, _, p = textbook(q, k, v, causal=True, kept=(s_dmask > 0).double(), dropout_p=0.25)
    check(s_dmask.abs(), p)
    assert 0 < (s_dmask < 0).sum() < (p > 0).sum()
    check(out, expected)
    check_gradients(out, expected, q, k, v)


def test_dropout_of_packed_sequences(device: str) -> None:
    q, k, v = (leaf(sum(n), h, DIM, device=device) for n, h in ((LENGTHS_Q, 4), (LENGTHS_K, 2), (LENGTHS_K, 2)))
    cu_q, cu_k = cumulative(LENGTHS_Q, device), cumulative(LENGTHS_K, device)
    out, _, s_dmask = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 7, 0.5, return_attn_probs=True)
    assert s_dmask.shape == (3, HEADS, 5, 7) and (s_dmask[1] == 0).all()
    start_q = start_k = 0
    for b, (m, n) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        pieces = q[None, start_q : start_q + m], k[None, start_k : start_k + n], v[None, start_k : start_k + n]
        kept = (s_dmask[b : b + 1, :, :m, :n] > 0).double()
        expected, _, p = textbook(*pieces, kept=kept, dropout_p=0.5)
        check(s_dmask[b : b + 1, :, :m, :n].abs(), p)
        check(out[start_q : start_q + m], expected[0])
        start_q, start_k = start_q + m, start_k + n


def test_dropout_follows_the_generator(device: str) -> None:
    q, k, v = qkv(device)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append([flash_attn.flash_attn_func(q, k, v, 0.5) for _ in range(2)])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1]) and not torch.equal(results[0][0], results[2][0])


def test_checkpointing_replays_dropout(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = qkv(device)
    torch.manual_seed(1)
    plain = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v, 0.5).square().sum(), (q, k, v))
    torch.manual_seed(1)
    again = checkpoint(flash_attn.flash_attn_func, q, k, v, 0.5, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), plain, strict=True):
        check(mine, theirs)


@pytest.mark.parametrize("dim", [64, 40])
def test_bfloat16_within_the_tolerance(device: str, dim: int) -> None:
    q, k, v = (torch.randn(2, n, 4, dim, device=device).bfloat16() for n in (65, 130, 130))
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    exact = textbook(*(x.double() for x in (q, k, v)), causal=True)[0].cpu().numpy()
    naive = textbook(q, k, v, causal=True)[0].float().cpu().numpy().astype(ml_dtypes.bfloat16)
    allowed = limit(exact, naive, ml_dtypes.bfloat16, "bfloat16")
    assert out.dtype == torch.bfloat16
    assert_close("out", out.float().cpu().numpy(), exact, allowed)


def test_padding_round_trip(device: str) -> None:
    x = leaf(3, 4, 2, 3, device=device)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], device=device)
    tokens, indices, cu_seqlens, longest, used = flash_attn.unpad_input(x, mask)
    assert tokens.shape == (5, 2, 3) and cu_seqlens.tolist() == [0, 2, 2, 5] and longest == 3
    assert used.tolist() == [2, 0, 3] and cu_seqlens.dtype == torch.int32
    back = flash_attn.pad_input(tokens, indices, 3, 4)
    expected = x * mask[..., None, None]
    assert torch.equal(back, expected)
    check_gradients(back, expected, x)
    spare = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], device=device)
    tokens, _, cu_seqlens, longest, used = flash_attn.unpad_input(x, mask, spare)
    assert len(tokens) == 7 and cu_seqlens.tolist() == [0, 3, 3, 7] and longest == 4 and used.tolist() == [2, 0, 3]


def test_axes_are_indexed_as_flash_attn_does(device: str) -> None:
    x, indices = leaf(6, 2, 3, device=device), torch.tensor([4, 0, 5], device=device)
    taken = flash_attn.index_first_axis(x, indices)
    assert torch.equal(taken, x[indices])
    put = flash_attn.index_put_first_axis(taken, indices, 6)
    kept = torch.zeros(6, 1, 1, dtype=x.dtype, device=device)
    kept[indices] = 1
    assert torch.equal(put, x * kept)
    check_gradients(put, x * kept, x)


@pytest.mark.parametrize("scale", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)], ids=str)
def test_a_scale_may_be_any_scalar(device: str, scale: Any) -> None:
    """As flash-attn converts it."""
    q, k, v = qkv(device)
    mine = flash_attn.flash_attn_func(q, k, v, softmax_scale=scale)
    assert torch.equal(mine, flash_attn.flash_attn_func(q, k, v, softmax_scale=0.25))


def test_flash_attn_3_takes_its_own_order(device: str) -> None:
    q, k, v = qkv(device)
    expected = textbook(q, k, v, scale=0.3, causal=True)
    out, lse = flash_attn3.flash_attn_func(q, k, v, 0.3, True, return_attn_probs=True)
    check(out, expected[0])
    check(lse, expected[1])
    joined = leaf(BATCH, SEQLEN_K, HEADS + 2 * HEADS_KV, DIM, device=device)
    grouped = flash_attn3.flash_attn_qkvpacked_func(joined, num_heads_q=HEADS)
    check(grouped, textbook(*torch.split(joined, [HEADS, HEADS_KV, HEADS_KV], 2))[0])
    packed = leaf(BATCH, SEQLEN_K, 3, HEADS, DIM, device=device)
    check(flash_attn3.flash_attn_qkvpacked_func(packed), textbook(*packed.unbind(2))[0])


SIGNATURES = {
    "flash_attn_func": "q k v",
    "flash_attn_kvpacked_func": "q kv",
    "flash_attn_qkvpacked_func": "qkv",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen",
}
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)


def spelled(function: Any) -> str:
    """The parameters of a function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    tail = ", block_table=None" if name == "flash_attn_varlen_func" else ""
    assert spelled(getattr(flash_attn, name)) == ", ".join(SIGNATURES[name].split()) + ", " + OPTIONS + tail


OF_CACHES = (
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
    "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
)


@pytest.mark.parametrize(("module", "signature"), zip((flash_attn, flash_attn3), OF_CACHES, strict=True))
def test_signatures_of_caches_are_those_of_either_version(module: Any, signature: str) -> None:
    assert spelled(module.flash_attn_with_kvcache) == signature


def wrong(**change: Any) -> Any:
    q, k, v = (torch.zeros(1, 4, 2, 8) for _ in range(3))
    return flash_attn.flash_attn_func(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.zeros((1, 4, 2, 8))}, TypeError, "q: got numpy.ndarray"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        ({"window_size": 3}, ValueError, "window_size: got 3"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"causal": "top-left"}, ValueError, "causal: got 'top-left'"),
        ({"v": torch.zeros(1, 4, 2, 8, dtype=torch.float64)}, TypeError, "v: got dtype float64"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes: got shape"),
    ],
)
def test_wrong_use_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        wrong(**change)


def test_other_wrong_shapes_name_the_argument() -> None:
    with pytest.raises(ValueError, match="qkv: got shape"):
        flash_attn.flash_attn_qkvpacked_func(torch.zeros(1, 4, 2, 2, 8))
    with pytest.raises(ValueError, match="num_heads_q"):
        flash_attn3.flash_attn_qkvpacked_func(torch.zeros(1, 4, 6, 8))
    with pytest.raises(NotImplementedError, match="attention_chunk: got 4"):
        flash_attn3.flash_attn_func(*torch.zeros(3, 1, 4, 2, 8), attention_chunk=4)
    with pytest.raises(NotImplementedError, match=r"qv: got a tensor of shape \(1, 4, 2, 8\), expected nothing"):
        flash_attn3.flash_attn_func(*torch.zeros(3, 1, 4, 2, 8), qv=torch.zeros(1, 4, 2, 8))
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        flash_attn.unpad_input(torch.zeros(2, 3, 1), torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"attention_mask: got numpy\.ndarray, expected a torch\.Tensor"):
        flash_attn.unpad_input(torch.zeros(2, 3, 1), np.ones((2, 3)))
    for module in (flash_attn, flash_attn3):
        for scale in ("0.5", True, torch.tensor(torch.nan), torch.ones(2)):
            with pytest.raises(ValueError, match=r"softmax_scale: got .*, expected a finite number or None"):
                module.flash_attn_func(*torch.zeros(3, 1, 4, 2, 8), softmax_scale=scale)


@pytest.mark.gpu
def test_dropout_refuses_a_captured_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    q, k, v = (x.detach() for x in qkv("cuda"))
    flash_attn.flash_attn_func(q, k, v, 0.5)
    with pytest.raises(NotImplementedError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flash_attn.flash_attn_func(q, k, v, 0.5)
