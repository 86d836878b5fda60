"""Every script in examples/ runs at small size, checks its own result, and saves a figure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = {
    "cupy_pipeline": [],
    "jax_vit": ["--steps", "40"],
    "kernel_regression": ["--points", "300"],
    "pair_bias": ["--digits", "24", "--steps", "10"],
    "sinkhorn": ["--points", "400", "--steps", "30"],
    "train_transformer": ["--steps", "20", "--batch", "4"],
}
ELSEWHERE = {"generate"}
"""Text instead of a figure, and longer; tests/test_kvcache.py runs them."""
NEEDS = ("jax", "matplotlib", "sklearn", "statsmodels", "torch", "tqdm")
MOST_LINES = 150


def test_every_example_is_run() -> None:
    assert SMALL.keys() | ELSEWHERE == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SMALL)
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_example_runs_and_draws(name: str, tmp_path: Path) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    for module in set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)) & set(NEEDS):
        pytest.importorskip(module)
    figure = tmp_path / "figure.png"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--figure", str(figure), *SMALL[name]]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)})
    assert result.returncode == 0, result.stdout + result.stderr
    assert figure.read_bytes().startswith(b"\x89PNG") and "figure: " in result.stdout
