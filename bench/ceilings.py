"""What the GPU itself reaches: matrix products of 8192^3 and reading device memory. A case's bound follows from these."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bench.cases import Case
from bench.timing import Contender, measure

SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """Rates in TFLOP/s by kind of product, and the read bandwidth in TB/s."""

    products: dict[str, float]
    read: float

    def rate(self, case: Case) -> float:
        """TFLOP/s that no kernel of this case and precision can exceed: tf32x3 spends three products on one."""
        if case.dtype == "float32":
            return {"ieee": self.products["float32"], "tf32": self.products["tf32"]}.get(
                case.precision, self.products["tf32"] / 3
            )
        return self.products[case.dtype]

    def bound_us(self, case: Case) -> float:
        """Microseconds below which the case cannot go."""
        return max(case.flops() / self.rate(case) * 1e-6, case.bytes() / self.read * 1e-6)


RECORDED = {
    "h200": Ceilings(
        {"bfloat16": 741.0, "float16": 731.0, "tf32": 400.0, "float32": 50.0, "float64": 56.0},
        read=4.36,
    ),
}
"""Measured once on each GPU (by name, as in bench/results/), so that percentages of different days stay comparable."""


def measured(rounds: int = 5) -> Ceilings:
    """Measure the current GPU with PyTorch's matrix products and sum."""
    import torch

    kinds = {"bfloat16": "bfloat16", "float16": "float16", "tf32": "float32", "float32": "float32", "float64": "float64"}
    products: dict[str, float] = {}
    for kind, dtype in kinds.items():
        a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        product = Contender(kind, [functools.partial(torch.matmul, a, b, out=out)])
        products[kind] = 2 * SIZE**3 / measure([product], rounds)[kind].us * 1e-6
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.randn(1 << 30, device="cuda")
    read = x.nbytes / measure([Contender("read", [x.sum])], rounds)["read"].us * 1e-6
    return Ceilings(products, read)


def of(gpu: str) -> Ceilings | None:
    """The recorded ceilings of a GPU, or measured now; None without PyTorch to measure them."""
    if gpu in RECORDED:
        return RECORDED[gpu]
    try:
        import torch
    except ImportError:
        return None
    return measured() if torch.cuda.is_available() else None
