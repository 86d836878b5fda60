"""cuattn.torch.scaled_dot_product_attention beside torch.nn.functional's, in float64 on both devices."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from tests.tolerance import ABSOLUTE, assert_close

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("cuattn.torch")

Tensor = Any
EXACT = 10 * ABSOLUTE["float64"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    torch.manual_seed(0)
    return str(request.param)


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


def both(leaves: list[Tensor], *arguments: Any, **options: Any) -> None:
    """The results and all gradients of the two functions."""
    mine = adapter.scaled_dot_product_attention(*arguments, **options)
    theirs = torch.nn.functional.scaled_dot_product_attention(*arguments, **options)
    assert mine.dtype == theirs.dtype
    compare(mine, theirs)
    cotangent = torch.randn_like(theirs)
    gradients = zip(torch.autograd.grad(mine, leaves, cotangent), torch.autograd.grad(theirs, leaves, cotangent), strict=True)
    for one, other in gradients:
        compare(one, other)


def compare(mine: Tensor, theirs: Tensor) -> None:
    assert_close("result", mine.detach().cpu().numpy(), theirs.detach().cpu().numpy(), EXACT)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_leading_axes_and_top_left_causal(device: str, lead: tuple[int, ...], is_causal: bool) -> None:
    q, k, v = leaf(*lead, 5, 8, device=device), leaf(*lead, 7, 8, device=device), leaf(*lead, 7, 6, device=device)
    both([q, k, v], q, k, v, is_causal=is_causal, scale=0.4)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (4, 5, 7), (2, 1, 1, 7), (2, 4, 5, 7), (1, 4, 5, 1)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_broadcast(device: str, shape: tuple[int, ...], kind: str) -> None:
    q, k, v = leaf(2, 4, 5, 8, device=device), leaf(2, 4, 7, 8, device=device), leaf(2, 4, 7, 8, device=device)
    if kind == "boolean":
        both([q, k, v], q, k, v, attn_mask=torch.rand(shape, device=device) < 0.8)
    else:
        mask = leaf(*shape, device=device)
        both([q, k, v, mask], q, k, v, attn_mask=mask)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 7), (3, 1, 5, 7), (2, 1, 1, 1, 7)])
def test_masks_of_five_axes(device: str, shape: tuple[int, ...]) -> None:
    q, k, v = (leaf(2, 3, 4, n, 8, device=device) for n in (5, 7, 7))
    mask = leaf(*shape, device=device)
    both([q, k, v, mask], q, k, v, attn_mask=mask)


def test_grouped_heads(device: str) -> None:
    q, k, v = leaf(2, 6, 5, 8, device=device), leaf(2, 2, 7, 8, device=device), leaf(2, 2, 7, 8, device=device)
    both([q, k, v], q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6)),
        ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
        ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 6)),
        ((1, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
        ((3, 1, 4, 5, 8), (1, 2, 1, 7, 8), (3, 2, 4, 7, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_leading_axes_broadcast(device: str, shapes: tuple[tuple[int, ...], ...], masked: bool) -> None:
    q, k, v = (leaf(*shape, device=device) for shape in shapes)
    both([q, k, v], q, k, v, **({"attn_mask": torch.rand(4, 5, 7, device=device) < 0.8} if masked else {}))


def test_strides_of_projections_are_read_in_place(device: str) -> None:
    x = leaf(2, 5, 3, 4, 8, device=device)
    both([x], *(part.transpose(1, 2) for part in x.unbind(2)))


def test_a_row_that_sees_no_key_is_zero(device: str) -> None:
    q, k, v = (leaf(1, 2, 3, 8, device=device) for _ in range(3))
    mask = torch.tensor([[True, True, True], [False] * 3, [True] * 3], device=device)
    out = adapter.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out[:, :, 1] == 0).all() and (out[:, :, 0] != 0).all()
    out.sum().backward()
    assert (q.grad[:, :, 1] == 0).all() and k.grad.isfinite().all()


def test_dropout_scales_what_it_keeps(device: str) -> None:
    q = k = torch.zeros(1, 1, 64, 8, dtype=torch.float64, device=device)
    v = torch.eye(64, dtype=torch.float64, device=device)[None, None]
    torch.manual_seed(5)
    p = adapter.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    kept = p > 0
    compare(p[kept], torch.full_like(p[kept], 2 / 64))
    assert 0 < kept.sum() < kept.numel()
    torch.manual_seed(5)
    assert torch.equal(adapter.scaled_dot_product_attention(q, k, v, dropout_p=0.5), p)
    assert not torch.equal(adapter.scaled_dot_product_attention(q, k, v, dropout_p=0.5), p)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_without_a_graph_break(device: str, masked: bool) -> None:
    q, k, v = (leaf(2, 4, 6, 8, device=device) for _ in range(3))
    options = {"attn_mask": leaf(4, 1, 6, device=device)} if masked else {"is_causal": True}
    compiled = torch.compile(adapter.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    leaves = [q, k, v, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    mine, theirs = compiled(q, k, v, **options), adapter.scaled_dot_product_attention(q, k, v, **options)
    compare(mine, theirs)
    for one, other in zip(torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True):
        compare(one, other)
    torch._dynamo.reset()


def test_signature_is_pytorchs() -> None:
    parameters = inspect.signature(adapter.scaled_dot_product_attention).parameters.values()
    spelled = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    theirs = str(torch.nn.functional.scaled_dot_product_attention.__doc__).strip().partition("(")[2].partition(")")[0]
    assert spelled == " ".join(theirs.split())


Q = torch.zeros(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.zeros((2, 4, 5, 8), np.float32)}, TypeError, "query: got ndarray"),
        ({"key": Q[0]}, ValueError, r"key: got shape \(4, 5, 8\), expected 4 axes"),
        ({"key": Q[:, :2]}, ValueError, "key: got 2 heads beside 4 .* enable_gqa=True"),
        ({"key": Q[:0]}, ValueError, r"key: got leading axes \(0,\), expected .* \(2,\) as query has"),
        ({"value": Q[:, :2]}, ValueError, "value: got 2 heads beside 4"),
        ({"query": Q[:, :3], "enable_gqa": True}, ValueError, "query: got 3 heads, expected .* of key and value"),
        ({"key": Q[..., :4]}, ValueError, "key: got head_dim 4, expected 8 as query has"),
        ({"value": Q[:, :, :3]}, ValueError, "value: got 3 tokens, expected 5 as key has"),
        ({"key": Q.half()}, TypeError, "key: got dtype float16, expected float32 as query has"),
        ({"attn_mask": np.ones((5, 5))}, TypeError, "attn_mask: got ndarray, expected a torch.Tensor"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask: got list, expected a torch.Tensor"),
        ({"value": Q.to("meta")}, ValueError, "value: got a tensor on meta, expected cpu"),
        ({"attn_mask": torch.ones(4, 5)}, ValueError, r"attn_mask: got shape \(4, 5\), expected one that broadcasts to"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, TypeError, "attn_mask: got torch.int32"),
        ({"attn_mask": torch.ones(5, 5, device="meta")}, ValueError, "attn_mask: got a tensor on meta"),
        ({"attn_mask": torch.ones(5, 5), "is_causal": True}, ValueError, "is_causal: got True together with"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
    ],
)
def test_wrong_use_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapter.scaled_dot_product_attention(**{"query": Q, "key": Q, "value": Q, **change})
