"""Nadaraya-Watson regression of the Mauna Loa CO2 record, in float64, with the bandwidth learned by gradient descent.

A Gaussian kernel is a softmax: -(t_i - t_j)^2 / 2h^2 = s t_i t_j - s t_j^2 / 2 + (a constant of row i), with s = 1 / h^2. So
attention with queries s t_i, keys t_j, values y_j and the bias -s t_j^2 / 2 is the kernel estimate. The diagonal is hidden:
every week is predicted from all others, and the mean squared error of that is a function of s, whose derivative the pullback
gives.

    python examples/kernel_regression.py            # the whole record; --points 300 for a quick look
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import cuattn
from cuattn.demo import hide_diagonal

Array = np.ndarray[Any, np.dtype[np.float64]]


def load(points: int) -> tuple[Array, Array]:
    """Time in years from the middle of the record, and parts per million, of the last `points` weeks (0: all)."""
    from statsmodels.datasets import co2

    series = co2.load_pandas().data["co2"].dropna()[-points:]
    years = (series.index - series.index[0]).days.to_numpy() / 365.25
    return years - years.mean(), series.to_numpy(np.float64)


def column(x: Array) -> Array:
    """(batch, seqlen, heads, head_dim) = (1, n, 1, 1)."""
    return np.ascontiguousarray(x[None, :, None, None])


class Regression:
    """Leave-one-out prediction, its error, and the derivative of that by log s."""

    def __init__(self, t: Array, y: Array) -> None:
        self.t, self.y, self.offset = t, y, float(y.mean())
        self.mask = hide_diagonal(len(t))

    def __call__(self, log_s: float) -> tuple[float, float, Array]:
        s = np.exp(log_s)
        q, k, v = column(s * self.t), column(self.t), column(self.y - self.offset)
        bias = -0.5 * s * self.t**2
        out, pullback = cuattn.vjp(q, k, v, scale=1.0, bias=bias, mask=self.mask)
        residual = out[0, :, 0, 0] + self.offset - self.y
        gradients = pullback(column(2 * residual / len(residual)))
        # d q_i / d log s = q_i and d bias_j / d log s = bias_j
        slope = float((gradients.dq * q).sum() + (gradients.dbias * bias).sum())
        return float((residual**2).mean()), slope, out[0, :, 0, 0] + self.offset

    def dense(self, log_s: float) -> Array:
        """The same prediction from the whole n x n matrix of weights."""
        weights = np.exp(-0.5 * np.exp(log_s) * (self.t[:, None] - self.t[None]) ** 2)
        np.fill_diagonal(weights, 0)
        return np.asarray(weights @ self.y / weights.sum(1))


def fit(regression: Regression, log_s: float, steps: int) -> tuple[float, list[float]]:
    """Descent with a step that doubles after a success and halves after a failure; the errors of the accepted steps."""
    error, slope, _ = regression(log_s)
    errors, rate = [error], 1.0
    for _ in tqdm(range(steps), desc="bandwidth", disable=None):
        trial = log_s - np.clip(rate * slope, -1, 1)
        new_error, new_slope, _ = regression(trial)
        if new_error < error:
            log_s, error, slope, rate = trial, new_error, new_slope, 2 * rate
            errors.append(error)
        else:
            rate /= 2
    return log_s, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=0, help="weeks; default all")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--figure", default="kernel_regression.png")
    arguments = parser.parse_args()
    t, y = load(arguments.points)
    regression, start = Regression(t, y), float(np.log(1 / 0.5**2))
    print(f"{len(t)} weeks of CO2 at Mauna Loa; backend {cuattn.backend_info().backend}")

    error, slope, fitted = regression(start)
    step = 1e-5
    numeric = (regression(start + step)[0] - regression(start - step)[0]) / (2 * step)
    print(f"derivative of the error by log s: {slope:.9f}, by differences {numeric:.9f}")
    assert abs(slope - numeric) < 1e-6 * abs(slope)
    difference = np.abs(fitted - regression.dense(start)).max()
    print(f"largest difference from the dense estimate: {difference:.1e} ppm")
    assert difference < 1e-9

    log_s, errors = fit(regression, start, arguments.steps)
    print(
        f"bandwidth 0.5 -> {np.exp(-log_s / 2):.4f} years, leave-one-out error {error**0.5:.3f} -> {errors[-1] ** 0.5:.3f} ppm"
    )
    assert errors[-1] < 0.9 * error

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(t, y, ".", markersize=2, label="weekly record")
    axes.plot(t, regression(log_s)[2], linewidth=1, label=f"estimate, bandwidth {np.exp(-log_s / 2):.3f} years")
    axes.set(xlabel="years from the middle of the record", ylabel="CO2, ppm")
    axes.legend()
    figure.savefig(arguments.figure, dpi=120)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
