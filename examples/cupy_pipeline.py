"""Forecasting the sea's temperature by analogues, on the GPU from end to end and without PyTorch: FFT, attention, reduction.

Every month of the El Nino record is described by the spectrum of the months before it. The months to come are forecast as the
average of what followed similar months, weighted by a softmax of the similarity: attention whose causal mask is shifted so that
no month sees its own future. Arrays are CuPy's where there is a GPU, else NumPy's; nothing else changes.

    python examples/cupy_pipeline.py
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import cuattn

WINDOW, AHEAD = 24, 3
"""Months that describe the present, and how many months later the forecast is for."""


def load() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Monthly sea surface temperature, 1950 to 2010, degrees Celsius."""
    from statsmodels.datasets import elnino

    return np.asarray(elnino.load_pandas().data.iloc[:, 1:], np.float64).ravel()


def library() -> Any:
    """CuPy where there is a usable GPU, else NumPy."""
    if cuattn.backend_info().backend == "cuda":
        import cupy

        return cupy
    return np


def features(xp: Any, series: Any) -> Any:
    """(months, frequencies) of unit length: the complex spectrum of the window that ends with each month."""
    windows = xp.lib.stride_tricks.as_strided(
        series, (len(series) - WINDOW + 1, WINDOW), (series.strides[0], series.strides[0])
    )
    spectrum = xp.fft.rfft(windows - windows.mean(1, keepdims=True), axis=1)
    joined = xp.concatenate([spectrum.real, spectrum.imag], axis=1)
    return joined / xp.linalg.norm(joined, axis=1, keepdims=True)


def forecast(xp: Any, series: Any, sharpness: float) -> tuple[Any, Any]:
    """(temperatures forecast, what they turned out to be), for every month that has a past of ten years."""
    x = xp.ascontiguousarray(features(xp, series))
    change = series[WINDOW - 1 + AHEAD :] - series[WINDOW - 1 : -AHEAD]  # what followed each month
    keys, values = x[:-AHEAD], change
    first = 120
    # Query i may see key j iff the change after j was known at i: j <= i - AHEAD, aligned at the start of both sequences.
    q, k = x[first:-AHEAD][None, :, None], keys[None, :, None]
    past = cuattn.BooleanMask(xp.arange(len(keys))[None] <= xp.arange(first, len(x) - AHEAD)[:, None] - AHEAD)
    v = xp.ascontiguousarray(values[None, :, None, None])
    predicted = cuattn.attention(q, k, v, scale=sharpness, mask=past)[0, :, 0, 0]
    now = series[WINDOW - 1 + first : -AHEAD]
    return now + predicted, now + change[first:]


def dense(series: Any, sharpness: float) -> Any:
    """The same in NumPy, with all weights in memory."""
    x = features(np, series)
    change = series[WINDOW - 1 + AHEAD :] - series[WINDOW - 1 : -AHEAD]
    i, j = np.arange(120, len(x) - AHEAD), np.arange(len(x) - AHEAD)
    weights = np.where(j[None] <= i[:, None] - AHEAD, np.exp(sharpness * (x[i] @ x[j].T)), 0)
    return series[WINDOW - 1 + 120 : -AHEAD] + weights @ change / weights.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", default="cupy_pipeline.png")
    arguments = parser.parse_args()
    xp, host = library(), load()
    series = xp.asarray(host)
    predicted, actual = forecast(xp, series, sharpness=30.0)
    error = float(xp.abs(predicted - actual).mean())
    year_before = float(xp.abs(series[WINDOW - 1 + 120 + AHEAD - 12 : -12] - actual).mean())
    print(f"{len(host)} months, arrays of {xp.__name__}; mean error {AHEAD} months ahead: {error:.3f} K by analogues, ", end="")
    print(f"{year_before:.3f} K by the same month of the year before")
    assert error < 0.8 * year_before
    shown = predicted.get() if xp is not np else predicted
    difference = np.abs(shown - dense(host, 30.0)).max()
    print(f"largest difference from the dense formula: {difference:.1e} K")
    assert difference < 1e-10

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    years = 1950 + (np.arange(len(shown)) + WINDOW - 1 + 120 + AHEAD) / 12
    axes.plot(years, host[WINDOW - 1 + 120 + AHEAD :], linewidth=1, label="measured")
    axes.plot(years, shown, linewidth=1, label=f"forecast {AHEAD} months before")
    axes.set(ylabel="sea surface temperature, C")
    axes.legend()
    figure.savefig(arguments.figure, dpi=120)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
