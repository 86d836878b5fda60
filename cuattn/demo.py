"""The main job on real data: handwritten digits classified by attention, each image by all others.

Nadaraya-Watson regression is attention. With images as queries and keys, one-hot labels as values and a bandwidth h,

    S[i, j] = (q_i . k_j - |k_j|^2 / 2) / h^2 = |q_i|^2 / 2h^2 - |q_i - k_j|^2 / 2h^2

and the first term, constant along a row, drops out of the softmax: P is a Gaussian kernel, out the class probabilities.
The key term enters as a bias of shape (seqlen_k,); a mask hides the diagonal, so that no image votes for itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuattn.masks import BlockSparse, Mask
from cuattn.score_mods import Bias

Array = npt.NDArray[Any]

BANDWIDTH = 0.35
"""Width of the Gaussian for pixels in [0, 1]: about five neighbours share a vote. Anything from 0.1 to 0.5 is as accurate."""
MASK_BLOCK = 64
REPEATS = 5
SHOWN_NEIGHBOURS = 8


class Digits(NamedTuple):
    """The test images of the UCI "Optical Recognition of Handwritten Digits" set, as shipped inside scikit-learn."""

    images: Array
    """(1797, 64) float32, pixels in [0, 1]"""
    labels: Array
    """(1797,) integers 0 ... 9"""


class Task(NamedTuple):
    """The arguments of one attention call; every array of one kind."""

    q: Any
    """(1, n, 1, 64); the keys are the same array"""
    v: Any
    """(1, n, 1, 10) one-hot labels"""
    bias: Any
    """(n,) -|k|^2 / 2h^2"""
    mask: Mask
    scale: float

    def attention(self) -> tuple[Any, Any]:
        """(out, lse) by the public API: CUDA where there is a usable GPU, else NumPy."""
        import cuattn

        options: dict[str, Any] = {"scale": self.scale, "bias": self.bias, "mask": self.mask, "return_lse": True}
        out, lse = cuattn.attention(self.q, self.q, self.v, **options)
        return out, lse

    def numpy_backend(self) -> tuple[Array, Array]:
        """(out, lse) by the NumPy backend, GPU or not."""
        from cuattn import cpu

        return cpu.forward(self.q, self.q, self.v, scale=self.scale, mask=self.mask, mods=(Bias(self.bias),))

    def oracle(self) -> tuple[Array, Array]:
        """(out, lse) by the textbook formula in float64."""
        from cuattn import reference

        mods = (Bias(self.bias.astype(np.float64)),)
        return reference.forward(self.q, self.q, self.v, scale=self.scale, mask=self.mask, mods=mods, dtype=np.float64)

    def on_gpu(self) -> Task:
        """The same task over CuPy arrays."""
        import cupy

        mask = self.mask.bind([cupy.asarray(a) for a in self.mask.arrays])
        return Task(cupy.asarray(self.q), cupy.asarray(self.v), cupy.asarray(self.bias), mask, self.scale)


class Result(NamedTuple):
    """One contender: its output, and the time of its first and of its median later call in milliseconds."""

    name: str
    out: Array
    """(1, n, 1, 10)"""
    lse: Array
    """(1, 1, n)"""
    first_ms: float
    warm_ms: float


def load_digits() -> Digits:
    """The digits of scikit-learn; SystemExit with advice where it is not installed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise SystemExit("the demo needs scikit-learn: pip install '.[demo]'") from None
    images, labels = load(return_X_y=True)
    return Digits((images / 16).astype(np.float32), labels)


def hide_diagonal(n: int) -> BlockSparse:
    """j != i for n keys and queries: every block visible, those on the diagonal through one shared pattern."""
    blocks = 1 + np.eye(-(-n // MASK_BLOCK), dtype=np.int32)
    return BlockSparse(blocks, MASK_BLOCK, MASK_BLOCK, ~np.eye(MASK_BLOCK, dtype=np.bool_)[None])


def make_task(digits: Digits) -> Task:
    """Leave-one-out classification of all digits as one attention call."""
    images, scale = digits.images, BANDWIDTH**-2
    bias = (-0.5 * scale * np.square(images, dtype=np.float64).sum(1)).astype(np.float32)
    onehot = np.eye(10, dtype=np.float32)[digits.labels]
    return Task(images[None, :, None], onehot[None, :, None], bias, hide_diagonal(len(images)), scale)


def measure(name: str, call: Callable[[], tuple[Array, Array]]) -> Result:
    """Time `call`, which returns NumPy arrays and so has finished when it returns."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        out, lse = call()
        times.append(1e3 * (time.perf_counter() - start))
    return Result(name, out, lse, times[0], statistics.median(times[1:]))


def measure_on_gpu(name: str, task: Task) -> Result:
    """Time the task on arrays that live on the GPU, from the call until the GPU is done."""
    import cupy

    on_gpu = task.on_gpu()

    def call() -> tuple[Any, Any]:
        result = on_gpu.attention()
        cupy.cuda.get_current_stream().synchronize()
        return result

    result = measure(name, call)
    return result._replace(out=cupy.asnumpy(result.out), lse=cupy.asnumpy(result.lse))


def contenders(task: Task, has_gpu: bool) -> list[Result]:
    """Every backend of this machine; the last one is the fastest."""
    if not has_gpu:
        return [measure("NumPy", task.attention)]
    gpu = [measure("CUDA, NumPy arrays", task.attention), measure_on_gpu("CUDA, CuPy arrays", task)]
    return [measure("NumPy", task.numpy_backend), *gpu]


def accuracy(out: Array, labels: Array) -> float:
    """Share of images whose largest output is their own class."""
    return float((out.reshape(len(labels), -1).argmax(1) == labels).mean())


def report(results: list[Result], labels: Array, oracle: Array) -> str:
    """One aligned line for each contender."""
    lines = [f"{'backend':20s} {'accuracy':>9s} {'first call':>13s} {'later calls':>13s} {'max |out - float64 oracle|':>28s}"]
    for r in results:
        error = float(np.abs(r.out - oracle).max())
        lines.append(f"{r.name:20s} {accuracy(r.out, labels):9.2%} {r.first_ms:10.2f} ms {r.warm_ms:10.2f} ms {error:28.1e}")
    return "\n".join(lines)


def most_attended(task: Task, lse: Array, i: int) -> tuple[Array, Array]:
    """Indices and attention weights of the images that image `i` looks at most, recovered from lse alone."""
    scores = task.scale * (task.q[0, :, 0] @ task.q[0, i, 0]) + task.bias
    weights = np.exp(scores - lse[0, 0, i])
    weights[i] = 0
    nearest = np.argsort(-weights)[:SHOWN_NEIGHBOURS]
    return nearest, weights[nearest]


def save_figure(path: Path, task: Task, digits: Digits, result: Result) -> bool:
    """Draw a few digits, right and wrong ones, beside the images they attend to most; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    predicted = result.out[0, :, 0].argmax(1)
    right, wrong = (np.flatnonzero((predicted == digits.labels) == flag) for flag in (True, False))
    shown = [*right[:: max(1, len(right) // 4)][:4], *wrong[:3]]
    figure = Figure(figsize=(1.1 * (1 + SHOWN_NEIGHBOURS), 1.4 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1 + SHOWN_NEIGHBOURS, squeeze=False)
    for row, i in zip(axes, shown, strict=True):
        nearest, weights = most_attended(task, result.lse, i)
        hit = predicted[i] == digits.labels[i]
        titles = [
            f"{digits.labels[i]} read as {predicted[i]}",
            *(f"{digits.labels[j]}: {w:.0%}" for j, w in zip(nearest, weights, strict=True)),
        ]
        for axis, j, title in zip(row, [i, *nearest], titles, strict=True):
            axis.imshow(digits.images[j].reshape(8, 8), cmap="gray_r")
            axis.set_title(title, fontsize=8, color="black" if hit or j != i else "red")
            axis.set_axis_off()
    figure.suptitle("A digit, and the images it attends to most (label: weight)", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def run(figure: Path) -> int:
    """Print the comparison, write the picture; returns the exit status."""
    import cuattn

    digits, info = load_digits(), cuattn.backend_info()
    task = make_task(digits)
    print(f"{len(digits.labels)} handwritten digits, each classified by attention to all others; Gaussian width {BANDWIDTH}")
    print(f"backend: {info.backend} ({info.reason})" + (f" on {info.gpu}" if info.gpu else ""))
    results = contenders(task, info.backend == "cuda")
    print(report(results, digits.labels, task.oracle()[0]))
    drawn = save_figure(figure, task, digits, results[-1])
    print(f"most attended neighbours: {figure}" if drawn else "no figure: it needs matplotlib (pip install '.[demo]')")
    return 0
