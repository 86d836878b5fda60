"""cuattn as an attention implementation of Hugging Face transformers: real modelling code with random weights.

A training step beside the textbook formula in float64, by the one tolerance rule with "eager" as the naive result; generation
beside "eager".
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.tolerance import assert_close, limit

torch = pytest.importorskip("torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="4.53")
adapter = pytest.importorskip("cuattn.torch")

Tensor = Any
VOCABULARY, TOKENS, WINDOW, PADDING = 97, 17, 5, 3
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = ("Llama", "GPT2", "Gemma2", "Mistral", "GptOss")
"""Plain with grouped heads; learned positions; window and softcap; window alone; window and sinks."""


def configuration(kind: str) -> tuple[Any, Any]:
    """(configuration, class of the model)."""
    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "GPT2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, **quiet, **common), transformers.GPT2LMHeadModel
    more: dict[str, Any] = {} if kind == "Llama" else {"sliding_window": WINDOW}
    if kind in ("Gemma2", "GptOss"):
        more["head_dim"] = 16
    if kind == "GptOss":
        more.update(num_local_experts=2, num_experts_per_tok=1)
    return getattr(transformers, f"{kind}Config")(**SIZES, **more, **common), getattr(transformers, f"{kind}ForCausalLM")


def textbook(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: Any = None, **more: Any
) -> tuple[Tensor, None]:
    """Attention of one layer with a boolean mask, in the dtype of its inputs throughout ("eager" takes softmax in float32)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    s = query @ key.transpose(-1, -2) * scaling
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~mask, -torch.inf)
    if more.get("s_aux") is not None:
        s = torch.cat([s, more["s_aux"].reshape(1, -1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    largest = s.amax(-1, keepdim=True).detach().clamp(min=-1e9)  # finite where a row sees no key
    e = (s - largest).exp()
    p = e / e.sum(-1, keepdim=True).masked_fill(e.sum(-1, keepdim=True) == 0, 1)
    return (p[..., : value.shape[2]] @ value).transpose(1, 2), None


def model(kind: str, implementation: str, device: str, dtype: Any = torch.float32) -> Any:
    from transformers.masking_utils import sdpa_mask

    adapter.register_transformers()
    transformers.AttentionInterface.register("textbook", textbook)
    transformers.AttentionMaskInterface.register(
        "textbook", lambda *sizes, **options: sdpa_mask(*sizes, **{**options, "allow_is_causal_skip": False})
    )
    config, build = configuration(kind)
    config._attn_implementation = implementation
    config._experts_implementation = "eager"  # grouped matrix products know no float64
    torch.manual_seed(0)
    built = build(config).to(device, dtype)
    for name, parameter in built.named_parameters():
        if name.endswith("sinks"):  # zeros at first, which hides an error in their gradient
            torch.nn.init.normal_(parameter)
    return built


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    return str(request.param)


def inputs(device: str, padding: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, TOKENS), device=device)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :PADDING] = 0
    if padding == "right":
        mask[1, -PADDING:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def step(network: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of valid tokens and gradients of a training step on them."""
    network.zero_grad()
    valid = given["attention_mask"].bool()
    logits = network(**given).logits[valid]
    torch.nn.functional.cross_entropy(logits, given["input_ids"][valid]).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"logits": logits, **gradients}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_equals_eager(device: str, kind: str, padding: str) -> None:
    given = inputs(device, padding)
    exact = step(model(kind, "textbook", device, torch.float64), given)
    naive = step(model(kind, "eager", device), given)
    found = step(model(kind, "cuattn", device), given)
    assert found.keys() == exact.keys() and (kind != "GptOss" or any("sinks" in name for name in found))
    for name, x in found.items():
        mine, theirs, plain = (y.detach().cpu().numpy() for y in (x, exact[name], naive[name]))
        assert_close(name, mine, theirs, limit(theirs, plain, "float32", "float32"))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_eager(device: str, kind: str, cache: str | None) -> None:
    given = inputs(device, "left")
    options = {"max_new_tokens": 12, "do_sample": False, **({"cache_implementation": cache} if cache else {})}
    options["disable_compile"] = True
    mine, theirs = (model(kind, name, device).generate(**given, **options) for name in ("cuattn", "eager"))
    assert mine.shape == (2, TOKENS + 12)
    assert torch.equal(mine, theirs)


def test_plain_masks_are_never_materialised() -> None:
    adapter.register_transformers()
    seen: list[Any] = []
    network = model("Gemma2", "cuattn", "cpu")
    for layer in network.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    network(**inputs("cpu", "none"))
    assert seen == [None, None]
    network(**inputs("cpu", "left"))
    assert [tuple(x.shape) for x in seen[2:]] == [(2, 1, 1, TOKENS)] * 2


def test_packed_documents_do_not_see_each_other() -> None:
    given = inputs("cpu", "none")
    del given["attention_mask"]
    given["position_ids"] = torch.tensor([[*range(9), *range(8)]] * 2)
    mine, theirs = (model("Llama", name, "cpu", torch.float64)(**given).logits for name in ("cuattn", "textbook"))
    exact = theirs.detach().numpy()
    assert_close("logits", mine.detach().numpy(), exact, limit(exact, exact, "float64", "float64"))


def test_dropout_is_drawn_anew_for_every_layer_and_step() -> None:
    network = model("Llama", "cuattn", "cpu")
    network.config.attention_dropout = 0.5
    for layer in network.model.layers:
        layer.self_attn.attention_dropout = 0.5
    given = inputs("cpu", "none")
    network.train()
    torch.manual_seed(0)
    first, second = network(**given).logits, network(**given).logits
    torch.manual_seed(0)
    assert torch.equal(network(**given).logits, first) and not torch.equal(first, second)


def layer(**options: Any) -> Any:
    q = torch.zeros(2, 4, 5, 8)
    return adapter.transformers_attention(torch.nn.Module(), q, q, q, **options)


def test_position_bias_is_added() -> None:
    bias = torch.randn(1, 4, 5, 5, requires_grad=True)
    value = torch.randn(2, 4, 5, 8)
    q = torch.zeros(2, 4, 5, 8)
    out, weights = adapter.transformers_attention(torch.nn.Module(), q, q, value, None, position_bias=bias, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, value, attn_mask=bias).transpose(1, 2)
    assert weights is None
    exact = expected.detach().numpy()
    assert_close("out", out.detach().numpy(), exact, limit(exact, exact, "float32", "float32"))


def test_wrong_use_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 1, 5, 4\), expected one that broadcasts to"):
        layer(attention_mask=torch.ones(2, 1, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask: got shape .* pass the 2-D"):
        layer(attention_mask=torch.ones(2, 5))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        layer(attention_mask=None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="cache"):
        layer(attention_mask=None, cache=object())
