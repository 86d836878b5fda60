"""A character-level transformer: trained with `cuattn.vjp`, then generating from a `PagedKVCache`.

    python examples/generate.py                 train on the Zen of Python (public domain), then continue a prompt
    python examples/generate.py --random        random weights, nothing to train

Everything is CuPy, or NumPy where there is no GPU. Text is generated three times: with pages, with a contiguous cache, and by
computing all of the text anew for every character; the script compares what they say and how fast they are.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import cuattn

EPSILON = 1e-5
Pull = Callable[[Any], Any]


def text() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


class Model:
    """Pre-norm blocks of attention and a two-layer perceptron; `weights` by name, all float32."""

    def __init__(self, xp: Any, vocabulary: int, width: int, layers: int, heads: int, heads_kv: int, longest: int) -> None:
        self.xp, self.layers, self.heads, self.heads_kv, self.dim = xp, layers, heads, heads_kv, width // heads
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Any:
            return xp.asarray(rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[0]))

        kv = heads_kv * self.dim
        self.weights = {"embed": normal(vocabulary, width), "place": normal(longest, width), "out": normal(width, vocabulary)}
        for n in range(layers):
            shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
            shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
            self.weights.update({f"{name}{n}": normal(*shape) for name, shape in shapes.items()})

    def split(self, x: Any, heads: int) -> Any:
        return x.reshape(*x.shape[:2], heads, self.dim)

    def norm(self, x: Any) -> Any:
        return x / self.xp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)

    def forward(self, tokens: Any, start: int, attend: Callable[[int, Any, Any, Any], Any]) -> Any:
        """Logits (batch, seqlen, vocabulary); attend(layer, q, k, v) is what the three ways of generating differ in."""
        w = self.weights
        x = w["embed"][tokens] + w["place"][start : start + tokens.shape[1]]
        for n in range(self.layers):
            y = self.norm(x)
            parts = (
                self.split(y @ w[f"{p}{n}"], h) for p, h in (("q", self.heads), ("k", self.heads_kv), ("v", self.heads_kv))
            )
            x = x + attend(n, *parts).astype(np.float32).reshape(x.shape) @ w[f"o{n}"]
            x = x + self.xp.maximum(self.norm(x) @ w[f"up{n}"], 0) @ w[f"down{n}"]
        return self.norm(x) @ w["out"]

    def gradients(self, tokens: Any) -> tuple[float, dict[str, Any]]:
        """Mean cross entropy of the next character, and its gradient by every weight."""
        xp, w = self.xp, self.weights
        grads = {name: xp.zeros_like(x) for name, x in w.items()}

        def linear(x: Any, name: str) -> tuple[Any, Pull]:
            def pull(dy: Any) -> Any:
                grads[name] += x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
                return dy @ w[name].T

            return x @ w[name], pull

        def norm(x: Any) -> tuple[Any, Pull]:
            y = self.norm(x)
            size = xp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
            return y, lambda dy: (dy - y * (y * dy).mean(-1, keepdims=True)) / size

        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = w["embed"][inputs] + w["place"][: inputs.shape[1]]
        pulls: list[Pull] = []
        for n in range(self.layers):
            x, pull = self.attention_block(x, n, linear, norm)
            pulls.append(pull)
            x, pull = self.perceptron_block(x, n, linear, norm)
            pulls.append(pull)
        y, pull_norm = norm(x)
        logits, pull_out = linear(y, "out")
        logits = logits - logits.max(-1, keepdims=True)
        p = xp.exp(logits)
        p /= p.sum(-1, keepdims=True)
        rows, columns = xp.arange(targets.size), targets.reshape(-1)
        flat = p.reshape(-1, p.shape[-1])
        loss = float(-xp.log(flat[rows, columns] + 1e-30).mean())
        flat[rows, columns] -= 1
        dx = pull_norm(pull_out(p / targets.size))
        for pull in reversed(pulls):
            dx = pull(dx)
        flat_dx, chosen = dx.reshape(-1, dx.shape[-1]), inputs.reshape(-1)
        grads["embed"] += (xp.arange(len(w["embed"]))[:, None] == chosen[None]).astype(np.float32) @ flat_dx
        grads["place"][: inputs.shape[1]] += dx.sum(0)
        return loss, grads

    def attention_block(self, x: Any, n: int, linear: Any, norm: Any) -> tuple[Any, Pull]:
        y, pull_norm = norm(x)
        q, pull_q = linear(y, f"q{n}")
        k, pull_k = linear(y, f"k{n}")
        v, pull_v = linear(y, f"v{n}")
        out, pullback = cuattn.vjp(
            self.split(q, self.heads), self.split(k, self.heads_kv), self.split(v, self.heads_kv), causal=True
        )
        z, pull_o = linear(out.reshape(x.shape), f"o{n}")

        def pull(dx: Any) -> Any:
            found = pullback(pull_o(dx).reshape(out.shape))
            parts = zip((pull_q, pull_k, pull_v), (found.dq, found.dk, found.dv), strict=True)
            return dx + pull_norm(sum(back(d.reshape(*d.shape[:2], -1)) for back, d in parts))

        return x + z, pull

    def perceptron_block(self, x: Any, n: int, linear: Any, norm: Any) -> tuple[Any, Pull]:
        y, pull_norm = norm(x)
        up, pull_up = linear(y, f"up{n}")
        down, pull_down = linear(self.xp.maximum(up, 0), f"down{n}")
        return x + down, lambda dx: dx + pull_norm(pull_up(pull_down(dx) * (up > 0)))


def train(model: Model, tokens: np.ndarray[Any, Any], steps: int, window: int) -> float:
    """Adam over random windows; returns the last loss."""
    xp, rng, rate = model.xp, np.random.default_rng(1), 3e-3
    first = {name: xp.zeros_like(x) for name, x in model.weights.items()}
    second = {name: xp.zeros_like(x) for name, x in model.weights.items()}
    loss = float("nan")
    for step in range(1, steps + 1):
        starts = rng.integers(0, len(tokens) - window - 1, 16)
        batch = xp.asarray(np.stack([tokens[s : s + window + 1] for s in starts]))
        loss, grads = model.gradients(batch)
        for name, g in grads.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.99 * second[name] + 0.01 * g * g
            change = (first[name] / (1 - 0.9**step)) / (xp.sqrt(second[name] / (1 - 0.99**step)) + 1e-8)
            model.weights[name] -= (rate * min(1.0, 3 * (1 - step / (steps + 1)))) * change
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: {loss:.3f} nats a character")
    return loss


def half(*arrays: Any) -> list[Any]:
    return [x.astype(np.float16) for x in arrays]


def generate(model: Model, prompt: Sequence[int], count: int, longest: int, how: str) -> tuple[list[int], Any, float]:
    """(characters, last logits, characters per second) by the largest logit; attention in float16."""
    xp, tokens = model.xp, list(prompt)
    like = xp.zeros(1, np.float16)
    sizes = {"num_heads_kv": model.heads_kv, "head_dim": model.dim, "layers": model.layers}
    cache = cuattn.PagedKVCache(-(-longest // 16), 16, **sizes, like=like)
    seq = cache.add_sequence()
    whole = [xp.zeros((2, 1, longest, model.heads_kv, model.dim), np.float16) for _ in range(model.layers)]
    start, begin = 0, time.perf_counter()
    for _ in range(count):
        if how == "anew":
            start = 0
        new = tokens[start:]
        if how == "paged":
            step = cache.append([seq], [new])

        def attend(n: int, q: Any, k: Any, v: Any) -> Any:
            q, k, v = half(q, k, v)
            if how == "anew":
                return cuattn.attention(q, k, v, causal=True)
            if how == "paged":
                return cuattn.attention_with_kvcache(q, k=k, v=v, causal=True, **step.arguments(n))  # noqa: B023
            return cuattn.attention_with_kvcache(q, *whole[n], k, v, cache_seqlens=start, causal=True)  # noqa: B023

        logits = model.forward(xp.asarray([new]), start, attend)[0, -1]
        start = len(tokens)
        tokens.append(int(logits.argmax()))
    return tokens, logits, count / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--random", action="store_true", help="random weights instead of training")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--tokens", type=int, default=120, help="to generate")
    parser.add_argument("--prompt", default="Beautiful is")
    arguments = parser.parse_args(argv)
    if cuattn.backend_info().backend == "cuda":
        import cupy as xp
    else:
        xp = np
    corpus = text()
    letters = sorted(set(corpus))
    codes = np.array([letters.index(c) for c in corpus])
    window, longest = 96, len(arguments.prompt) + arguments.tokens + 96
    model = Model(xp, len(letters), width=128, layers=3, heads=4, heads_kv=2, longest=longest)
    if not arguments.random:
        train(model, codes, arguments.steps, window)
    prompt = [letters.index(c) for c in arguments.prompt]
    results = {how: generate(model, prompt, arguments.tokens, longest, how) for how in ("paged", "contiguous", "anew")}
    for how, (tokens, _, speed) in results.items():
        print(f"{how:>10}: {speed:7.1f} characters/s  {''.join(letters[t] for t in tokens)!r}")
    paged, contiguous, anew = (results[how] for how in ("paged", "contiguous", "anew"))
    same = paged[0] == contiguous[0] and bool((paged[1] == contiguous[1]).all())
    print(f"paged and contiguous agree to the bit: {same}; computed anew, the text is the same: {paged[0] == anew[0]}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
