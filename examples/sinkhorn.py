"""Entropic optimal transport between the colours of two photographs, in linear memory.

Sinkhorn's iteration in the logarithmic domain is one `lse` for each half-step. With cost |x - y|^2 / 2 and regularisation e,

    f_i = -e log sum_j b_j exp((g_j - |x_i - y_j|^2 / 2) / e) = |x_i|^2 / 2 - e lse_i

where lse is that of attention with queries x, keys y, scale 1 / e and the bias (g_j - |y_j|^2 / 2) / e + log b_j: the N x M
cost is never stored. After the last step the output of the same call, with values y, is where each colour is carried to.

    python examples/sinkhorn.py                     # 17,120 pixels a side; --points 500 for a quick look
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import cuattn

Array = np.ndarray[Any, np.dtype[np.float64]]


def load(points: int) -> tuple[Array, Array, tuple[Any, Any]]:
    """Colours in [0, 1] of random pixels of two photographs (Tsinghua's garden, a flower), and the photographs."""
    from sklearn.datasets import load_sample_image

    pictures = tuple(load_sample_image(name)[::4, ::4] / 255 for name in ("china.jpg", "flower.jpg"))
    rng = np.random.default_rng(0)
    x, y = (rng.permutation(picture.reshape(-1, 3))[:points] for picture in pictures)
    return x, y, pictures


def half_step(x: Array, y: Array, g: Array, epsilon: float) -> tuple[Array, Array]:
    """(f, where each x is carried): the potential of x from that of y, whose points all weigh the same."""
    bias = (g - 0.5 * (y**2).sum(1)) / epsilon - np.log(len(y))
    q, kv = x[None, :, None], y[None, :, None]
    out, lse = cuattn.attention(q, kv, kv, scale=1 / epsilon, bias=bias, return_lse=True)
    return 0.5 * (x**2).sum(1) - epsilon * lse[0, 0], out[0, :, 0]


def dense_half_step(x: Array, y: Array, g: Array, epsilon: float) -> Array:
    """The same from the whole cost matrix."""
    from scipy.special import logsumexp

    cost = 0.5 * ((x[:, None] - y[None]) ** 2).sum(-1)
    return np.asarray(-epsilon * logsumexp((g[None] - cost) / epsilon - np.log(len(y)), axis=1))


def transport(x: Array, y: Array, epsilon: float, steps: int) -> tuple[Array, Array, list[float]]:
    """(f, g, mass of x that is misplaced before each step)."""
    f, g, errors = np.zeros(len(x)), np.zeros(len(y)), []
    for _ in tqdm(range(steps), desc="Sinkhorn", disable=None):
        new, _ = half_step(x, y, g, epsilon)
        errors.append(float(np.abs(np.expm1((f - new) / epsilon)).mean()))  # under the plan of f and g
        f = new
        g, _ = half_step(y, x, f, epsilon)
    return f, g, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=17_120, help="pixels of each photograph; default: all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--figure", default="sinkhorn.png")
    arguments = parser.parse_args()
    x, y, pictures = load(arguments.points)
    print(f"{len(x)} and {len(y)} colours; backend {cuattn.backend_info().backend}")

    f, g, errors = transport(x, y, arguments.epsilon, arguments.steps)
    print(f"misplaced mass before step 1, {len(errors) // 2}, {len(errors)}: ", end="")
    print(", ".join(f"{errors[n]:.1e}" for n in (0, len(errors) // 2 - 1, -1)))
    assert errors[-1] < 0.1 * errors[0]

    few = slice(0, 400)
    rest = np.zeros(len(y[few]))
    difference = np.abs(half_step(x[few], y[few], rest, arguments.epsilon)[0]
                        - dense_half_step(x[few], y[few], rest, arguments.epsilon)).max()  # fmt: skip
    print(f"a half-step of 400 points beside the dense one: difference {difference:.1e}")
    assert difference < 1e-12

    cost = f.mean() + g.mean()  # the dual value
    print(f"transport cost {cost:.5f}, between colours at random {0.5 * ((x - y[: len(x)]) ** 2).sum(1).mean():.5f}")
    assert cost < 0.5 * ((x - y[: len(x)]) ** 2).sum(1).mean()

    first, second = pictures
    _, carried = half_step(first.reshape(-1, 3), y, g, arguments.epsilon)
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    titles = ("photograph", "colours of", "transported")
    for axes, image, title in zip(figure.subplots(1, 3), (first, second, carried.reshape(first.shape)), titles, strict=True):
        axes.imshow(np.clip(image, 0, 1))
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(arguments.figure, dpi=120)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
