"""A small language model of characters, trained in PyTorch with cuattn's attention on the documentation of real data sets.

The text is the descriptions that ship inside scikit-learn (43,000 characters of English). The first training step is
repeated with PyTorch's own attention: loss and gradients must agree. Then, on text that it was not trained on, the model must
predict letters better than a table of pairs of letters does.

    python examples/train_transformer.py            # bfloat16 on a GPU, float32 on the CPU; --steps 20 for a quick look
"""

from __future__ import annotations

import argparse
from importlib import resources
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from tqdm import trange

import cuattn

WIDTH, HEADS, LAYERS, CONTEXT, WINDOW = 128, 4, 3, 128, 64


def load() -> tuple[torch.Tensor, torch.Tensor, int]:
    """(letters to train on, windows of CONTEXT + 1 letters held out, size of the alphabet); letters are indices into it."""
    files = sorted(path for path in resources.files("sklearn.datasets.descr").iterdir() if path.name.endswith(".rst"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    alphabet = {letter: n for n, letter in enumerate(sorted(set(text)))}
    windows = torch.tensor([alphabet[letter] for letter in text]).unfold(0, CONTEXT + 1, CONTEXT + 1)
    held = torch.arange(len(windows)) % 100 >= 90  # ten windows in a row of every hundred
    return windows[~held].flatten(), windows[held], len(alphabet)


def attend(q: Any, k: Any, v: Any, theirs: bool) -> Any:
    """Causal attention; cuattn limits it to a window as well, the reference writes that as a mask."""
    if not theirs:
        return cuattn.attention(q, k, v, causal=True, window=(WINDOW, 0))
    i = torch.arange(q.shape[1], device=q.device)
    visible = (i[None] <= i[:, None]) & (i[None] >= i[:, None] - WINDOW)
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible).transpose(1, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Any, theirs: bool) -> Any:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # views: nothing is copied
        x = x + self.out(attend(q, k, v, theirs).flatten(-2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, tokens: Any, theirs: bool = False) -> Any:
        x = self.letters(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, theirs)
        return self.head(self.norm(x))


def loss_of(model: Model, batch: Any, theirs: bool = False) -> Any:
    return cross_entropy(model(batch[:, :-1], theirs).flatten(0, 1), batch[:, 1:].flatten())


def check_first_step(model: Model, batch: Any) -> float:
    """The largest difference of a gradient from PyTorch's attention, relative to that gradient."""
    losses = [loss_of(model, batch, theirs) for theirs in (False, True)]
    mine, other = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, other, strict=True))


def pair_loss(tokens: torch.Tensor, held: torch.Tensor, letters: int) -> float:
    """Nats for each letter held out, by how often it follows the one before it in the rest; each pair counts once more."""
    counts = torch.bincount(tokens[:-1] * letters + tokens[1:], minlength=letters**2).view(letters, letters) + 1.0
    return float(-(counts / counts.sum(1, keepdim=True)).log()[held[:, :-1], held[:, 1:]].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--figure", default="train_transformer.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and cuattn.backend_info().backend == "cuda" else "cpu"
    tokens, held, letters = load()
    model = Model(letters).to(device)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{len(tokens)} characters of {letters} kinds, {held.numel()} held out, {weights} weights, on {device}")

    def batch() -> Any:
        starts = torch.randint(len(tokens) - CONTEXT - 1, (arguments.batch,))
        return tokens[starts[:, None] + torch.arange(CONTEXT + 1)].to(device)

    difference = check_first_step(model, batch())
    print(f"first step: gradients differ from those of PyTorch's attention by {difference:.1e} at most")
    assert difference < 1e-3

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses, tests = [], []
    for step in trange(1, arguments.steps + 1, desc="training", disable=None):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, batch())
            if step % min(50, arguments.steps) == 0:
                with torch.no_grad():
                    tests.append((step, loss_of(model, held.to(device)).item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best, pairs = min(test for _, test in tests), pair_loss(tokens, held, letters)
    print(
        f"training loss {losses[0]:.2f} -> {losses[-1]:.2f}; held out {best:.2f}, by pairs of letters {pairs:.2f} nats a letter"
    )
    assert best < (pairs if arguments.steps >= 400 else losses[0] - 0.5)

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, label="training")
    axes.plot(*zip(*tests, strict=True), marker=".", label="held out")
    axes.axhline(pairs, linestyle=":", color="black", label="pairs of letters")
    axes.set(xlabel="step", ylabel="nats a letter")
    axes.legend()
    figure.savefig(arguments.figure, dpi=120)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
