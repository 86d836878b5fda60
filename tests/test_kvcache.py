"""`PagedKVCache` against a dictionary: what every sequence holds, and that no page is lost, aliased or leaked."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cuattn
from cuattn import CacheFull, PagedKVCache, reference
from tests.tolerance import assert_close, limit


class Model:
    """A cache and the numbers that its sequences ought to hold; a token's key is its number, its value the negative."""

    def __init__(self, pages: int, page_size: int, sequences: int, max_length: int | None = None) -> None:
        self.cache = PagedKVCache(
            pages,
            page_size,
            num_heads_kv=1,
            head_dim=1,
            dtype="float64",
            layers=2,
            max_sequences=sequences,
            max_length=max_length,
        )
        self.held: dict[int, list[int]] = {}
        self.unknown: set[int] = set()
        self.filled = 0

    def add(self, tokens: list[int] | None) -> int | None:
        before = self.snapshot()
        try:
            seq = self.cache.add_sequence(tokens)
        except CacheFull:
            assert len(self.held) == self.cache.max_sequences
            assert self.snapshot() == before
            return None
        assert seq not in self.held
        found = self.cache.length(seq)
        assert found % self.cache.page_size == 0 and (found < len(tokens) if tokens else found == 0)
        self.held[seq] = list(tokens or [])[:found]
        self.unknown.discard(seq)
        return seq

    def append(self, new: dict[int, list[int]], known: bool) -> None:
        before = self.snapshot()
        try:
            step = self.cache.append(list(new), [list(x) if known else len(x) for x in new.values()])
        except CacheFull:
            self.filled += 1
            assert self.snapshot() == before
            return
        assert step.cache_batch_idx.tolist() == list(new)
        assert step.cache_seqlens.tolist() == [len(self.held[seq]) for seq in new]
        for seq, tokens in new.items():  # what the attention call does
            for token in tokens:
                n = len(self.held[seq])
                page, slot = self.cache.page_table[seq, n // self.cache.page_size], n % self.cache.page_size
                self.cache.k_cache[:, page, slot] = token
                self.cache.v_cache[:, page, slot] = -token
                self.held[seq].append(token)

    def fork(self, seq: int) -> None:
        if len(self.held) == self.cache.max_sequences:
            with pytest.raises(CacheFull):
                self.cache.fork(seq)
            return
        self.held[self.cache.fork(seq)] = self.held[seq].copy()

    def truncate(self, seq: int, length: int) -> None:
        self.cache.truncate(seq, length)
        del self.held[seq][length:]

    def free(self, seq: int) -> None:
        self.cache.free(seq)
        del self.held[seq]

    def snapshot(self) -> Any:
        cache = self.cache
        held = {seq: (cache.length(seq), cache.pages(seq)) for seq in cache.sequences}
        statistics = cache.statistics()
        return held, statistics, cache.page_table.tobytes(), cache.k_cache.tobytes()

    def check(self, seq: int) -> None:
        cache, tokens = self.cache, self.held[seq]
        assert cache.length(seq) == len(tokens)
        places = np.arange(len(tokens))
        pages = cache.page_table[seq, places // cache.page_size]
        assert list(cache.pages(seq)) == cache.page_table[seq, : len(cache.pages(seq))].tolist()
        assert len(cache.pages(seq)) == -(-len(tokens) // cache.page_size)
        for store, sign in ((cache.k_cache, 1), (cache.v_cache, -1)):
            assert (store[:, pages, places % cache.page_size, 0, 0] == sign * np.array(tokens, np.float64)).all()

    def check_all(self) -> None:
        cache = self.cache
        assert set(cache.sequences) == set(self.held)
        for seq in self.held:
            self.check(seq)
        statistics = cache.statistics()
        referenced = {page for seq in self.held for page in cache.pages(seq)}
        assert statistics.referenced == len(referenced)
        assert statistics.free + statistics.referenced + statistics.kept == statistics.pages
        assert not referenced & set(cache._free) and not referenced & set(cache._kept)
        assert not set(cache._free) & set(cache._kept) and len(set(cache._free)) == len(cache._free)
        for page, count in enumerate(cache._references):
            assert count == sum(page in cache.pages(seq) for seq in self.held)
        for seq in self.held:
            assert len(set(cache.pages(seq))) == len(cache.pages(seq))
        assert statistics.tokens == sum(map(len, self.held.values()))


tokens = st.lists(st.integers(0, 2), max_size=9)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model(7, 3, 4)

    def pick(self, n: int) -> int:
        return sorted(self.model.held)[n % len(self.model.held)]

    @rule(start=st.none() | tokens)
    def add(self, start: list[int] | None) -> None:
        seq = self.model.add(start)
        if seq is not None and start:
            self.model.append({seq: start[len(self.model.held[seq]) :]}, True)

    @precondition(lambda self: self.model.held)
    @rule(n=st.integers(0, 9), new=tokens, known=st.booleans(), both=st.booleans())
    def append(self, n: int, new: list[int], known: bool, both: bool) -> None:
        self.model.append({seq: new for seq in {self.pick(n), self.pick(n + both)}}, known)

    @precondition(lambda self: self.model.held)
    @rule(n=st.integers(0, 9))
    def fork(self, n: int) -> None:
        self.model.fork(self.pick(n))

    @precondition(lambda self: self.model.held)
    @rule(n=st.integers(0, 9), part=st.floats(0, 1))
    def truncate(self, n: int, part: float) -> None:
        seq = self.pick(n)
        self.model.truncate(seq, int(part * len(self.model.held[seq])))

    @precondition(lambda self: self.model.held)
    @rule(n=st.integers(0, 9))
    def free(self, n: int) -> None:
        self.model.free(self.pick(n))

    @rule()
    def drop(self) -> None:
        kept = self.model.cache.statistics().kept
        assert self.model.cache.drop_kept() == kept

    @invariant()
    def holds(self) -> None:
        self.model.check_all()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.slow
def test_a_hundred_thousand_operations() -> None:
    rng, model = random.Random(0), Model(40, 4, 12)
    for n in range(100_000):
        held = sorted(model.held)
        choice = rng.random()
        if not held or choice < 0.08:
            start = [rng.randrange(2) for _ in range(rng.randrange(30))]
            seq = model.add(start)
            if seq is not None:
                model.append({seq: start[len(model.held[seq]) :]}, True)
        elif choice < 0.75:
            chosen = rng.sample(held, rng.randint(1, len(held)))
            model.append({s: [rng.randrange(2) for _ in range(rng.randrange(4))] for s in chosen}, rng.random() < 0.95)
        elif choice < 0.83:
            model.fork(rng.choice(held))
        elif choice < 0.9:
            seq = rng.choice(held)
            model.truncate(seq, rng.randint(0, len(model.held[seq])))
        else:
            model.free(rng.choice(held))
        if n % 500 == 0:
            model.check_all()
    statistics = model.cache.statistics()
    assert min(statistics.hits, statistics.evictions, statistics.copies, model.filled) > 100, statistics
    for seq in sorted(model.held):
        model.free(seq)
    model.cache.drop_kept()
    assert model.cache.statistics().free == 40


def test_prefixes_are_shared_and_evicted_in_order() -> None:
    model = Model(6, 2, 4)
    first = model.add([1, 2, 3, 4, 5])
    assert first is not None
    model.append({first: [1, 2, 3, 4, 5]}, True)
    assert model.cache.lookup([1, 2, 3, 4, 9]) == 0  # its pages count as written from its next operation on
    model.free(first)
    assert (
        model.cache.lookup([1, 2, 3, 4, 9]) == 4
        and model.cache.lookup([1, 2, 3, 4]) == 2
        and model.cache.lookup([2, 2, 3]) == 0
    )
    assert model.cache.statistics().kept == 2
    second = model.add([1, 2, 3, 9])
    assert second is not None and model.cache.length(second) == 2
    model.append({second: [3, 9] + [7] * 8}, True)  # all other pages: the unreferenced one had to go
    assert model.cache.statistics()[:4] == (6, 0, 6, 0) and model.cache.statistics().evictions == 1
    model.check_all()


def test_a_fork_copies_what_it_writes() -> None:
    model = Model(6, 4, 4)
    seq = model.add(None)
    assert seq is not None
    model.append({seq: [1, 2, 3, 4, 5]}, True)
    model.fork(seq)
    assert model.cache.statistics().referenced == 2
    other = next(s for s in model.held if s != seq)
    model.append({seq: [6], other: [7]}, True)
    assert model.cache.statistics().copies == 1 and model.cache.statistics().referenced == 3
    model.check_all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="page_size"):
        PagedKVCache(4, 0, num_heads_kv=1, head_dim=8)
    with pytest.raises(TypeError, match="dtype"):
        PagedKVCache(4, 4, num_heads_kv=1, head_dim=8, dtype="int32")
    cache = PagedKVCache(4, 4, num_heads_kv=1, head_dim=8, max_length=8)
    seq = cache.add_sequence()
    for call, name in (
        (lambda: cache.append([seq, seq], [1, 1]), "seqs"),
        (lambda: cache.append([seq], [-1]), "tokens"),
        (lambda: cache.truncate(seq, 1), "length"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(KeyError, match="seq"):
        cache.length(seq + 1)
    with pytest.raises(CacheFull, match="9 tokens"):
        cache.append([seq], [9])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_paged_equals_contiguous(backend: Any, dtype: str) -> None:
    """Prefill and decode through the cache, a fork included, against the oracle over contiguous keys."""
    rng = np.random.default_rng(0)
    heads, heads_kv, dim, total = 4, 2, 32, 23
    q, k, v = (rng.standard_normal((2, total, n, dim)).astype(np.float16) for n in (heads, heads_kv, heads_kv))
    like = backend.put(np.zeros(1, np.float16))
    cache = PagedKVCache(16, 4, num_heads_kv=heads_kv, head_dim=dim, dtype=dtype, like=like)
    scale = (
        {"k_scale": np.full(heads_kv, 0.05, np.float32), "v_scale": np.full(heads_kv, 0.05, np.float32)}
        if dtype == "int8"
        else {}
    )
    scale = {n: backend.put(x) for n, x in scale.items()}
    seqs = [cache.add_sequence(), cache.add_sequence()]
    chunks = [9, 1, 1, 4, 1, 7]
    found, start = [], 0
    for n in chunks:
        step = cache.append(seqs, [n, n])
        parts = [backend.put(np.ascontiguousarray(x[:, start : start + n])) for x in (q, k, v)]
        found.append(backend.get(cuattn.attention_with_kvcache(*_order(parts, step), causal=True, **_rest(step), **scale)))
        start += n
        if start == 10:  # a fork that takes over from the second sequence
            fork = cache.fork(seqs[1])
            cache.free(seqs[1])
            seqs = [seqs[0], fork]
    whole = np.zeros((2, 32, heads_kv, dim), np.float16 if dtype == "float16" else np.int8)
    scales = {n: backend.get(x) for n, x in scale.items()}
    options = {"scale": dim**-0.5, "mask": cuattn.Causal(), "cache_seqlens": np.zeros(2, np.int32), **scales}
    exact, naive = (
        reference.with_kvcache(q, whole, whole, k=k, v=v, **options, dtype=precise)[0] for precise in (np.float64, np.float16)
    )
    assert_close("out", np.concatenate(found, 1), exact, limit(exact, naive, np.float16, "float16"))


def test_values_that_are_columns_of_the_keys(backend: Any) -> None:
    """A latent cache has no v_cache, and its forks copy what they write."""
    rng = np.random.default_rng(0)
    dim, dim_v = 48, 32
    q, k = (rng.standard_normal((1, 9, n, dim)).astype(np.float16) for n in (4, 1))
    cache = PagedKVCache(
        8, 4, num_heads_kv=1, head_dim=dim, head_dim_v=dim_v, latent=True, like=backend.put(np.zeros(1, np.float16))
    )
    assert cache.v_cache is None
    seq = cache.add_sequence()
    for rows in (slice(0, 6), slice(6, 9)):
        step = cache.append([seq], [rows.stop - rows.start])
        parts = [backend.put(np.ascontiguousarray(x[:, rows])) for x in (q, k)]
        out = backend.get(cuattn.attention_with_kvcache(parts[0], k=parts[1], causal=True, **step.arguments()))
        exact, naive = (
            reference.forward(
                q[:, rows],
                k[:, : rows.stop],
                k[:, : rows.stop, :, :dim_v],
                scale=dim**-0.5,
                mask=cuattn.Causal(),
                dtype=precise,
            )[0]
            for precise in (np.dtype(np.float64), np.dtype(np.float16))
        )
        assert_close("out", out, exact, limit(exact, naive, np.float16, "float16"))
        seq = cache.fork(seq)
    assert cache.statistics().copies == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_torch_waits_for_nothing(dtype: str) -> None:
    """Tables, lengths and copies of pages are queued on the stream; the host never waits for it."""
    torch = pytest.importorskip("torch")
    cache = PagedKVCache(16, 4, num_heads_kv=1, head_dim=64, dtype=dtype, like=torch.zeros(1, device="cuda"))
    new = torch.ones((2, 5, 1, 64), device="cuda", dtype=torch.float16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seqs = [cache.add_sequence([1, 2, 3, 4, 5]), cache.add_sequence()]
        step = cache.append(seqs, [[1, 2, 3, 4, 5], [6] * 5])
        cuattn.attention_with_kvcache(new, k=new, v=new, **step.arguments())
        seqs = [seqs[0], cache.fork(seqs[0])]
        step = cache.append(seqs, [[1], [2]])
        out = cuattn.attention_with_kvcache(new[:, :1], k=new[:, :1], v=new[:, :1], **step.arguments())
        cache.truncate(seqs[1], 2)
        cache.free(seqs[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.statistics().copies == 1 and bool((out == 1).all())


def _order(parts: list[Any], step: Any) -> tuple[Any, ...]:
    arguments = step.arguments()
    return (parts[0], arguments["k_cache"], arguments["v_cache"], parts[1], parts[2])


def _rest(step: Any) -> dict[str, Any]:
    return {n: x for n, x in step.arguments().items() if n not in ("k_cache", "v_cache")}


@pytest.mark.parametrize("options", [["--random"], ["--steps", "2"]], ids=str)
def test_the_example_runs(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from examples import generate

    assert generate.main([*options, "--tokens", "5"]) == 0
    assert "agree to the bit: True" in capsys.readouterr().out


def test_the_example_differentiates_its_model(numpy_backend: Any) -> None:
    from examples.generate import Model

    rng, step = np.random.default_rng(0), 2.0**-7
    model = Model(np, vocabulary=7, width=16, layers=2, heads=2, heads_kv=1, longest=12)
    model.weights = {name: x.astype(np.float64) for name, x in model.weights.items()}
    batch = rng.integers(0, 7, (3, 12))
    _, grads = model.gradients(batch)
    for name, x in list(model.weights.items()):
        direction = rng.standard_normal(x.shape)
        direction /= np.linalg.norm(direction)
        values = []
        for sign in (1, -1, 2, -2):
            model.weights[name] = x + sign * step / 16 * direction
            values.append(model.gradients(batch)[0])
        model.weights[name] = x
        exact = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step / 16)
        assert_close(name, np.array((grads[name] * direction).sum()), np.array(exact), TOLERANCE)


TOLERANCE = 1e-6
"""Of finite differences across the kinks of a perceptron."""
