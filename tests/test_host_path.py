"""The host path of calls on a GPU, without one: CPU tensors in the place of CUDA tensors, kernels that only record."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import cuattn
from cuattn import arrays, call, launch, tma
from cuattn.decode import POINTERS as DECODE_POINTERS
from cuattn.problem import POINTERS
from cuattn.registry import DEVICES

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")


MARK, MAP_WORDS = 0xABCDEF, tma.MAP_BYTES // 8


class Gpu:
    """Remembers what kernels were given."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, ...]]] = []
        self.sizes: dict[int, int] = {}
        self.fails = False

    def load(self, unit: Any, plan: Any) -> Callable[..., None]:
        def function(grid: Any, block: Any, arguments: Sequence[Any], smem_bytes: int, stream: Any) -> None:
            if self.fails:
                raise RuntimeError("no launch")
            address = arguments[0].ptr
            size = self.sizes[address]
            self.launched.append((unit.entry, struct.unpack(f"<{size // 8}Q", ctypes.string_at(address, size))))

        return function

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(address, value, size)

    def words(self, entry: str) -> tuple[int, ...]:
        """Of the last launch of a kernel, from its first pointer on."""
        words = next(words for name, words in reversed(self.launched) if entry in name)
        while words[1] == MARK:  # a tensor map
            words = words[MAP_WORDS:]
        return words


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made, kind, memory = Gpu(), type(arrays.TORCH), launch.Launch._memory

    def measured(self: Any, words: Sequence[int]) -> Any:
        found = memory(self, words)
        made.sizes[found.arguments[0].ptr] = ctypes.sizeof(found.words)
        return found

    def encode(operand: Any, box: Any, address: int) -> bytes:
        return struct.pack(f"<{MAP_WORDS}Q", address, *[MARK] * (MAP_WORDS - 1))

    monkeypatch.setattr(launch.Launch, "_memory", measured)
    monkeypatch.setattr(tma, "encode", encode)
    monkeypatch.setattr(kind, "device", lambda _, x, name="array": ("cuda", 0))
    monkeypatch.setattr(kind, "guard", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(kind, "stream", lambda *_: 0)
    monkeypatch.setattr(arrays, "_torch_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(call, "device_of", lambda _: DEVICES["sm_90a"])
    monkeypatch.setattr(call, "load", made.load)
    monkeypatch.setattr(call, "runtime", lambda: made)
    monkeypatch.setattr(call, "_prepared", {})
    return made


def tensors(**more: Any) -> dict[str, Any]:
    q, k, v = (torch.zeros(2, 40, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, **more}


def everything() -> dict[str, Any]:
    lens = {name: torch.full((2,), 40, dtype=torch.int32) for name in ("q_lens", "kv_lens")}
    return tensors(sinks=torch.zeros(4), out=torch.zeros(2, 40, 4, 64, dtype=torch.bfloat16), **lens)


def own() -> dict[str, Any]:
    return {"mask": torch.ones(40, 40, dtype=torch.bool), "bias": torch.zeros(4, 40, 40), "alibi_slopes": torch.zeros(4)}


def test_a_kernel_reads_the_arrays_of_its_own_call(gpu: Gpu) -> None:
    """The first call and the warm ones after it."""
    for _ in range(3):
        named, extra = everything(), own()
        out, lse = cuattn.attention(**named, **extra, return_lse=True, seed=7, dropout=0.5)
        words = gpu.words("forward")
        found = dict(zip(POINTERS, words, strict=False))
        assert out is named["out"] and found["lse"] == lse.data_ptr() and found["seed"] == 7
        assert {name: found[name] for name in named} == {name: x.data_ptr() for name, x in named.items()}
        assert {x.data_ptr() for x in extra.values()} <= set(words[len(POINTERS) :])
    assert len(call._prepared) == 1


def test_gradients_are_of_the_arrays_of_their_own_call(gpu: Gpu) -> None:
    for _ in range(3):
        named = tensors(sinks=torch.zeros(4))
        bias = torch.zeros(4, 1, 40, requires_grad=True)
        for x in named.values():
            x.requires_grad_()
        out = cuattn.attention(**named, bias=bias)
        dout = torch.ones_like(out)
        gradients = torch.autograd.grad(out, [*named.values(), bias], dout)
        words = gpu.words("backward_sm90")
        found = dict(zip(POINTERS, words, strict=False))
        assert [found[name] for name in ("q", "k", "v", "out")] == [x.data_ptr() for x in (*list(named.values())[:3], out)]
        assert {dout.data_ptr(), bias.data_ptr()} <= set(words)
        assert [x.shape for x in gradients] == [x.shape for x in (*named.values(), bias)]
    assert len(call._prepared) == 2


def cache_call() -> dict[str, Any]:
    caches = {name: torch.zeros(2, 80, 2, 64, dtype=torch.bfloat16) for name in ("k_cache", "v_cache")}
    new = {name: torch.zeros(2, 1, 2, 64, dtype=torch.bfloat16) for name in ("k", "v")}
    q, lens = torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16), torch.full((2,), 3, dtype=torch.int32)
    return {"q": q, **caches, **new, "cache_seqlens": lens, "sinks": torch.zeros(4)}


def test_decoding_reads_the_cache_of_its_own_call(gpu: Gpu) -> None:
    for _ in range(3):
        named, slopes = cache_call(), torch.zeros(4)
        out = cuattn.attention_with_kvcache(**named, alibi_slopes=slopes)
        for entry in ("append", "decode"):
            words = gpu.words(entry)
            found = dict(zip(DECODE_POINTERS, words, strict=False))
            assert {name: found[name] for name in named} == {name: x.data_ptr() for name, x in named.items()}
        assert found["out"] == out.data_ptr() and slopes.data_ptr() in words[len(DECODE_POINTERS) :]
    assert len(call._prepared) == 1


def blocks() -> dict[str, Any]:
    return tensors(mask=cuattn.BlockSparse(torch.ones(1, 1, 1, 1, dtype=torch.int32), 64, 64))


@pytest.mark.parametrize(
    ("verb", "make"),
    [
        (cuattn.attention, lambda: {**everything(), **own()}),
        (cuattn.attention, blocks),
        (cuattn.attention_with_kvcache, lambda: {**cache_call(), "alibi_slopes": torch.zeros(4)}),
    ],
)
def test_nothing_keeps_the_arrays_of_a_call(gpu: Gpu, verb: Any, make: Any) -> None:
    """Plans outlive calls; what they were made for does not."""
    arguments = make()
    verb(**arguments)
    kept = [weakref.ref(x) for x in arguments.values()]
    del arguments
    gc.collect()
    assert call._prepared and [x() for x in kept] == [None] * len(kept)


def test_calls_that_differ_have_plans_of_their_own(gpu: Gpu) -> None:
    def shifted(x: Any, elements: int) -> Any:
        return torch.zeros(x.numel() + elements, dtype=x.dtype)[elements:].view(x.shape)

    plain = tensors()
    calls: list[dict[str, Any]] = [
        plain,
        {**plain, "q": shifted(plain["q"], 1)},
        {**plain, "k": shifted(plain["k"], 4)},
        {**plain, "k": plain["k"][:, :, :1].expand(2, 40, 2, 64)},
        {name: x.half() for name, x in plain.items()},
        {**plain, "q": plain["q"][:, :39]},
        {**plain, "return_lse": True},
        {**plain, "scale": 0.5},
        {**plain, "q_lens": torch.ones(2, dtype=torch.int32)},
        {**plain, "kv_lens": torch.ones(2, dtype=torch.int32)},
        {**plain, "causal": True},
        {**plain, "softcap": 3.0},
        {**plain, "softcap": 4.0},
        {**plain, "alibi_slopes": torch.zeros(4)},
        {**plain, "bias": torch.zeros(40, 40)},
        {**plain, "mask": torch.ones(40, 40, dtype=torch.bool)},
        {**plain, "mask": cuattn.TreeMask(torch.ones(40, 40, dtype=torch.bool))},
    ]
    for count, arguments in enumerate(calls, 1):
        for _ in range(2):
            cuattn.attention(**arguments)
            assert len(call._prepared) == count


def test_longest_lengths_are_known_by_their_value(gpu: Gpu) -> None:
    """Some callers bring them as tensors, which change in place and equal no other tensor."""
    q, k, v = torch.zeros(3, 80, 2, 64, dtype=torch.bfloat16)
    starts, longest = torch.tensor([0, 30, 80], dtype=torch.int32), torch.tensor(50)

    def kept() -> list[int]:
        return [prepared.plan.problem.seqlen_q for prepared, _ in call._prepared.values()]

    for _ in range(2):
        cuattn.attention_varlen(q, k, v, starts, starts, longest, longest.clone())
    longest.fill_(60)
    cuattn.attention_varlen(q, k, v, starts, starts, longest, 60)
    assert kept() == [50, 60]
    call._prepared.clear()
    cache = {**cache_call(), "q": q, "k": None, "v": None, "sinks": None, "cu_seqlens_q": starts}
    cache.update({name: cache[name].expand(2, 80, 2, 64) for name in ("k_cache", "v_cache")})
    for value in (50, 50, 60):
        cuattn.attention_with_kvcache(**cache, max_seqlen_q=longest.fill_(value))
    assert kept() == [50, 60]


def test_values_in_the_columns_of_keys_are_known_by_their_address(gpu: Gpu) -> None:
    """A v_cache of the same strides elsewhere has another plan, and is what its kernel reads."""
    q, lens = torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16), torch.full((2,), 3, dtype=torch.int32)
    for _ in range(2):
        k, other = torch.zeros(2, 2, 80, 1, 64, dtype=torch.bfloat16)
        for source in (k, other):
            cuattn.attention_with_kvcache(q, k, source[..., :32], cache_seqlens=lens)
            found = dict(zip(DECODE_POINTERS, gpu.words("decode"), strict=False))
            assert (found["k_cache"], found["v_cache"]) == (k.data_ptr(), source.data_ptr())
    assert len(call._prepared) == 2


def test_a_launch_that_fails_leaves_the_next_one_whole(gpu: Gpu) -> None:
    first, second = tensors(), tensors()
    cuattn.attention(**first)
    gpu.fails = True
    with pytest.raises(RuntimeError, match="no launch"):
        cuattn.attention(**first)
    gpu.fails = False
    cuattn.attention(**second)
    found = dict(zip(POINTERS, gpu.words("forward"), strict=False))
    assert [found[name] for name in "qkv"] == [x.data_ptr() for x in second.values()]


def test_a_workspace_is_given_back_whatever_happens(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's allocator lends an address: nobody else would return it."""
    lent: list[int] = []

    def alloc(size: int, stream: int) -> int:
        lent.append(1 << 20)
        return 1 << 20

    monkeypatch.setattr(arrays.TORCH, "_raw_memory", (alloc, lent.remove))
    cache = cache_call()
    cuattn.attention_with_kvcache(**cache)
    found = dict(zip(DECODE_POINTERS, gpu.words("decode"), strict=False))
    assert found["partial_out"] == 1 << 20 < found["tickets"] and not lent
    gpu.fails = True
    with pytest.raises(RuntimeError, match="no launch"):
        cuattn.attention_with_kvcache(**cache)
    assert not lent


def test_no_room_for_a_workspace(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, stream: int) -> int:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(arrays.TORCH, "_raw_memory", (full, lambda address: None))
    with pytest.raises(MemoryError, match=r"no room for a workspace of \d+ bytes: out of memory"):
        cuattn.attention_with_kvcache(**cache_call())


def test_out_and_caches_are_checked_by_warm_calls_too(gpu: Gpu) -> None:
    named, cache = everything(), cache_call()
    cuattn.attention(**named)
    cuattn.attention_with_kvcache(**cache)
    count = len(gpu.launched)
    with pytest.raises(ValueError, match=r"^out: got a read-only array"):
        cuattn.attention(**{**named, "out": named["out"].requires_grad_()})
    with pytest.raises(NotImplementedError, match="has no gradient"):
        cuattn.attention_with_kvcache(**{**cache, "k_cache": cache["k_cache"].requires_grad_()})
    with pytest.raises(TypeError, match=r"^v: got numpy array"):
        cuattn.attention(**{**named, "v": named["v"].float().numpy()})
    assert len(gpu.launched) == count
    with torch.no_grad():
        cuattn.attention(**named)
        cuattn.attention_with_kvcache(**cache)
    assert len(gpu.launched) > count


def test_arrays_of_masks_and_modifications_are_refused_by_name(gpu: Gpu) -> None:
    lazy = torch.zeros(40, 40, dtype=torch.complex64).conj().imag
    for name, x in (("mask", own()["mask"].to_sparse()), ("bias", own()["bias"].to_sparse()), ("bias", lazy)):
        with pytest.raises(TypeError, match=rf"^{name}: got a (tensor without|lazily negated)"):
            cuattn.attention(**tensors(**{name: x}))


def test_transforms_are_refused_by_name_also_around_plain_tensors(gpu: Gpu) -> None:
    """What PyTorch makes inside of torch.func.grad has no memory."""
    arguments = tensors()
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
            torch.func.grad(lambda x: x + cuattn.attention(**arguments).float().sum())(torch.zeros(()))
    assert not gpu.launched
    assert torch.func.vmap(lambda x: x + cuattn.attention(**arguments).float().sum())(torch.zeros(3)).shape == (3,)
