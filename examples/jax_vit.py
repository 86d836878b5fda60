"""A vision transformer in plain JAX, trained on scikit-learn's handwritten digits with cuattn's attention under jit and grad.

Each 8 x 8 image is 16 patches of 2 x 2 pixels. The whole training step is one compiled program. Its first gradient is compared
with that of jax.nn.dot_product_attention, and the accuracy is that on images that training never saw.

    python examples/jax_vit.py                      # --steps 40 for a quick look
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import trange

import cuattn.jax

WIDTH, HEADS, LAYERS = 64, 4, 2
Params = dict[str, Any]


def load() -> tuple[Any, Any]:
    """(images as (n, 16, 4) patches with pixels in [0, 1], labels), in random order."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4) / 16
    return jnp.asarray(patches[order], jnp.float32), jnp.asarray(labels[order])


def initial(key: Any) -> Params:
    shapes = {"embed": (4, WIDTH), "places": (16, WIDTH), "head": (WIDTH, 10)}
    for n in range(LAYERS):
        shapes |= {f"qkv{n}": (WIDTH, 3 * WIDTH), f"out{n}": (WIDTH, WIDTH)}
        shapes |= {f"up{n}": (WIDTH, 4 * WIDTH), f"down{n}": (4 * WIDTH, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) / np.sqrt(s[0]) for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def normalised(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def logits(params: Params, patches: Any, attention: Any) -> Any:
    x = patches @ params["embed"] + params["places"]
    for n in range(LAYERS):
        qkv = (normalised(x) @ params[f"qkv{n}"]).reshape(*x.shape[:2], 3, HEADS, -1)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + out.reshape(x.shape) @ params[f"out{n}"]
        x = x + jax.nn.gelu(normalised(x) @ params[f"up{n}"]) @ params[f"down{n}"]
    return normalised(x).mean(1) @ params["head"]


def loss(params: Params, patches: Any, labels: Any, attention: Any = cuattn.jax.attention) -> Any:
    log_p = jax.nn.log_softmax(logits(params, patches, attention))
    return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()


@jax.jit
def step(params: Params, moments: tuple[Params, Params], count: Any, patches: Any, labels: Any) -> Any:
    """One step of Adam."""
    value, gradients = jax.value_and_grad(loss)(params, patches, labels)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradients)
    rate = 2e-3 * jnp.sqrt(1 - 0.99**count) / (1 - 0.9**count)
    params = jax.tree.map(lambda p, m, s: p - rate * m / (jnp.sqrt(s) + 1e-8), params, first, second)
    return params, (first, second), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--figure", default="jax_vit.png")
    arguments = parser.parse_args()
    patches, labels = load()
    held = len(labels) // 5
    params = initial(jax.random.key(0))
    print(f"{len(labels)} digits, {held} of them held out; JAX on {jax.default_backend()}")

    few = (patches[-64:], labels[-64:])
    mine, theirs = (jax.grad(loss)(params, *few, f) for f in (cuattn.jax.attention, jax.nn.dot_product_attention))
    difference = max(float(jnp.abs(mine[n] - theirs[n]).max() / jnp.abs(theirs[n]).max()) for n in params)
    print(f"first step: gradients differ from those of jax.nn's attention by {difference:.1e} at most")
    assert difference < 1e-3

    moments = (jax.tree.map(jnp.zeros_like, params),) * 2
    losses, rng = [], np.random.default_rng(1)
    for n in trange(1, arguments.steps + 1, desc="training", disable=None):
        chosen = jnp.asarray(held + rng.integers(0, len(labels) - held, arguments.batch))
        params, moments, value = step(params, moments, n, patches[chosen], labels[chosen])
        losses.append(float(value))
    guesses = np.asarray(jax.jit(logits, static_argnums=2)(params, patches[:held], cuattn.jax.attention).argmax(-1))
    accuracy = float((guesses == np.asarray(labels[:held])).mean())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}; accuracy on digits not seen {accuracy:.1%}")
    assert accuracy > (0.95 if arguments.steps >= 300 else 0.5)

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(losses)
    axes.set(xlabel="step", ylabel="training loss", title=f"accuracy on digits not seen: {accuracy:.1%}")
    figure.savefig(arguments.figure, dpi=120)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
