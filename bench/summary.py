"""The README's section: what the rows of a GPU say in one table and a few lines; and that of docs/peers.md.

docs/results.md holds all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.figures import is_paper
from bench.results import FOLDER, Row, best_peer, load
from bench.tables import environment_line, replace_section, standing

Chosen = Callable[[Row], bool]


def write(readme: Path, titles: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Replace the section of `readme` by one for each GPU. `titles`: peers by name."""
    files = [load(path) for path in sorted(folder.glob("*.json"))]
    sections = [section(rows, titles) for rows in files if rows]
    readme.write_text(replace_section(readme.read_text(), "\n".join(sections) or "No results yet."))


def write_standing(page: Path, titles: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Replace the section of docs/peers.md by a table for each GPU."""
    files = [load(path) for path in sorted(folder.glob("*.json"))]
    sections = ["\n".join([f"Rows of the {rows[0]['gpu']}:", "", *standing(rows, titles)]) for rows in files if rows]
    page.write_text(replace_section(page.read_text(), "\n\n".join(sections) or "No results yet."))


def section(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """The rows of one GPU in short."""
    lines = [f"### {rows[0]['gpu']}", "", environment_line(rows), ""]
    lines += [*rate_table(rows, titles), "", *other_lines(rows)]
    return "\n".join(lines) + "\n"


def rate_table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """A line for each kind of call and head size: lengths, rates, and how many times the best peer's time is ours."""
    head = ["", "d", "lengths", "TFLOP/s", "x the best peer", "least", "peers"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---:|---:|---:|---|"]
    for name, chosen in KINDS.items():
        some = [row for row in rows if chosen(row)]
        for d in sorted({row["d"] for row in some}):
            lines.append(rate_line(name, [row for row in some if row["d"] == d], titles))
    return lines


def rate_line(name: str, rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    rates, lengths = ([row[field] for row in rows] for field in ("tflops", "seqlen_q"))
    ratios = [best_peer(row) / row["us"] for row in rows if row["peers"]]
    mean = f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}" if ratios else ""
    least = f"{min(ratios):.2f}" if ratios else ""
    peers = ", ".join(title for peer, title in titles.items() if any(peer in row["peers"] for row in rows))
    cells = [name, str(rows[0]["d"]), span(lengths, "d"), span(rates, ".0f"), mean, least, peers]
    return "| " + " | ".join(cells) + " |"


def span(values: Sequence[float], form: str) -> str:
    """The smallest and the largest value, or the one.

    >>> span([3, 1, 2], "d"), span([1.04, 1.01], ".1f")
    ('1 to 3', '1.0')
    """
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def wide(bench: str, dtype: str, precision: str) -> Chosen:
    """Rows of a wide dtype, without features."""
    return lambda row: (row["bench"], row["dtype"], row["precision"], row["mods"]) == (bench, dtype, precision, [])


KINDS: dict[str, Chosen] = {
    "forward, bf16": lambda row: row["bench"] == "forward" and is_paper(row),
    "backward, bf16": lambda row: row["bench"] == "backward" and is_paper(row),
    "backward, bf16, deterministic": lambda row: row["bench"] == "backward" and is_paper(row, "deterministic"),
    **{
        f"{bench}, {name}": wide(bench, dtype, precision)
        for dtype, precision, name in (
            ("float32", "ieee", "fp32 ieee"),
            ("float32", "tf32x3", "fp32 tf32x3"),
            ("float64", "ieee", "fp64"),
        )
        for bench in ("forward", "backward")
    },
}
"""What the table shows, in its order: the setting of the FlashAttention papers, full and causal, and the wide dtypes."""


def other_lines(rows: Sequence[Row]) -> list[str]:
    """Decode, host time, first call and memory."""
    lines = []
    decode = [row for row in rows if row["bench"] == "decode"]
    if decode:
        fastest, widest = min(decode, key=lambda row: row["us"]), max(decode, key=lambda row: row["gbps"])
        shape = f"{fastest['batch']} x {fastest['seqlen_k']} tokens, {fastest['heads']}/{fastest['heads_kv']} heads"
        lines.append(
            f"- Decode over a paged cache: up to {widest['gbps']:.0f} GB/s of keys and values; {shape}: {fastest['us']:.1f} us"
        )
    host = {row["bench"]: row["us"] for row in rows if row["bench"] in ("host/cupy", "host/torch")}
    if host:
        words = ", ".join(f"{us:.0f} us on {name.removeprefix('host/')} arrays" for name, us in sorted(host.items()))
        lines.append(f"- Host time of a warm call: {words}")
    first = {kind: [row["us"] * 1e-6 for row in rows if row["bench"] == f"jit/{kind}"] for kind in ("cold", "warm")}
    if first["cold"]:
        cold, warm = span(first["cold"], ".1f"), span(first["warm"], ".2f")
        lines.append(f"- First call of a process: {cold} s, with kernels in the disk cache {warm} s")
    memory = [row for row in rows if row["bench"].startswith("memory")]
    for bench, what in (("memory", "forward"), ("memory/backward", "forward and backward")):
        largest = max((row for row in memory if row["bench"] == bench), key=lambda row: row["seqlen_q"], default=None)
        if largest is not None:
            size = f"{largest['seqlen_q']} tokens, {largest['heads']} heads, d{largest['d']}"
            lines.append(f"- Memory beyond inputs and results, {what}, {size}: {largest['bytes'] / 2**20:.0f} MiB")
    return lines
