"""Triangle attention with a learned pair bias, as in AlphaFold, on a table of pairs: which digits are the same?

A pair (i, j) of handwritten digits is described by z_ij, here noisy distances of their pixels. For each i, pair (i, j) attends
to the pairs (i, k) with scores q_ij . k_ik + b_jk, where the bias comes from z_jk: whether j resembles k says how much the
evidence about (i, k) tells about (i, j). Every row i is one element of the batch and all share the bias, whose gradient is
summed over them where it is computed. It is compared with that of the dense formula, and the block must beat the same model
without it.

    python examples/pair_bias.py                    # --steps 20 for a quick look
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import trange

import cuattn

WIDTH, HEADS, NOISE = 32, 4, 4.0


class Digits:
    """The digits 0 to 3 of scikit-learn, the last fifth of them held out."""

    def __init__(self, device: str) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(n_class=4, return_X_y=True)
        quarters = torch.tensor(images / 16, dtype=torch.float32).view(-1, 2, 4, 2, 4).transpose(2, 3)
        self.quarters, self.labels = quarters.reshape(len(images), 4, 16).to(device), torch.tensor(labels).to(device)
        self.held = len(images) // 5

    def pairs(self, count: int, held: bool) -> tuple[Any, Any]:
        """(z, same) of so many digits at random: noisy distances (n, n, 4) of each quarter, and whether two are equal."""
        first = len(self.labels) - self.held
        chosen = first + torch.randperm(self.held)[:count] if held else torch.randperm(first)[:count]
        x = self.quarters[chosen]
        distance = (x[:, None] - x[None]).square().sum(-1)
        noise = NOISE * torch.randn_like(distance)
        z = distance + (noise + noise.transpose(0, 1)) / 2
        return (z - 4) / 4, (self.labels[chosen][:, None] == self.labels[chosen][None]).float()


class TriangleAttention(nn.Module):
    """Around the starting node: z (n, n, WIDTH) to an update of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.bias, self.gate = nn.Linear(WIDTH, HEADS, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Any) -> Any:
        z = self.norm(z)
        q, k, v = self.qkv(z).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # (rows i, tokens j, heads, dim): a batch of rows
        out = cuattn.attention(q, k, v, bias=self.bias(z).permute(2, 0, 1))
        return self.out(torch.sigmoid(self.gate(z)) * out.flatten(-2))


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList(TriangleAttention() for _ in range(layers))
        self.steps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
        )

    def forward(self, z: Any) -> Any:
        x = self.embed(z)
        for n, step in enumerate(self.steps):
            if len(self.layers):
                x = x + self.layers[n](x)
            x = x + step(x)
        logits = self.head(x)[..., 0]
        return logits + logits.T


def check_bias_gradient(digits: int, device: str) -> float:
    """The largest difference of dbias from that of the dense formula, in float64."""
    q, k, v = (torch.randn(digits, digits, HEADS, 8, dtype=torch.float64, device=device) for _ in range(3))
    bias = torch.randn(HEADS, digits, digits, dtype=torch.float64, device=device, requires_grad=True)
    s = torch.einsum("ijhd,ikhd->ihjk", q, k) * 8**-0.5 + bias
    dense = torch.einsum("ihjk,ikhd->ijhd", s.softmax(-1), v)
    cotangent = torch.randn_like(dense)
    mine, theirs = (torch.autograd.grad(x, bias, cotangent)[0] for x in (cuattn.attention(q, k, v, bias=bias), dense))
    return float((mine - theirs).abs().max())


def train(layers: int, data: Digits, count: int, steps: int) -> tuple[list[float], float]:
    """Losses on digits and noise that change with every step, and the loss on digits held out."""
    torch.manual_seed(1)
    model = Model(layers).to(data.labels.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in trange(steps, desc=f"{layers} layers of attention", disable=None):
        z, same = data.pairs(count, held=False)
        loss = binary_cross_entropy_with_logits(model(z), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        tests = [data.pairs(count, held=True) for _ in range(8)]
        return losses, sum(binary_cross_entropy_with_logits(model(z), same).item() for z, same in tests) / len(tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--figure", default="pair_bias.png")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and cuattn.backend_info().backend == "cuda" else "cpu"
    data = Digits(device)
    print(f"{len(data.labels)} digits, {arguments.digits} at a time; on {device}")
    difference = check_bias_gradient(arguments.digits, device)
    print(f"dbias beside the dense formula: {difference:.1e}")
    assert difference < 1e-10

    attending, held = train(2, data, arguments.digits, arguments.steps)
    alone, held_alone = train(0, data, arguments.digits, arguments.steps)
    print(f"loss on digits held out: {held:.3f} with triangle attention, {held_alone:.3f} without")
    assert held < (0.9 * held_alone if arguments.steps >= 200 else attending[0])

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(attending, label="with triangle attention")
    axes.plot(alone, label="without")
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(arguments.figure, dpi=120)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
