"""docs/results.md and its figures, from the rows in bench/results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import FOLDER, ROOT, Row, gpu_slug, is_backward, load, render

DOCS = ROOT / "docs"
PAPER_TOKENS, PAPER_WIDTH = 16384, 2048
"""The setting of the FlashAttention papers, whose rows differ in length, head size and mask alone."""


def write(titles: Mapping[str, str], docs: Path = DOCS, folder: Path = FOLDER) -> list[Path]:
    """Write the page and one figure for each quantity and GPU; returns what was written. `titles`: peers by name."""
    lines = ["# Results", "", "Written by `python -m bench report` from the rows in bench/results/; the method is in", ""]
    lines[2] += " [Performance](performance.md)."
    written = []
    for path in sorted(folder.glob("*.json")):
        rows = load(path)
        if not rows:
            continue
        for name, caption, figure in figures(rows, titles):
            target = docs / "figures" / f"{gpu_slug(rows[0]['gpu'])}-{name}.svg"
            save(figure, target)
            written.append(target)
            lines += [f"![{caption}]({target.relative_to(docs).as_posix()})", "", f"{caption}.", ""]
        for backward in (False, True):
            chosen = [row for row in rows if is_backward(row) == backward]
            if chosen:
                lines += ["## Gradients" if backward else "## Forward, host and memory", ""]
                lines += [render(chosen, titles).strip(), ""]
    page = docs / "results.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [*written, page]


def save(figure: Any, path: Path) -> None:
    """As text that is the same for the same rows."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "cuattn", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def figures(rows: Sequence[Row], titles: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """(name, caption, figure) of everything that the rows can show."""
    found = []
    for bench in ("forward", "backward"):
        paper = [row for row in rows if row["bench"] == bench and is_paper(row)]
        if len({row["seqlen_q"] for row in paper}) > 1:
            caption = (
                f"TFLOP/s of the {bench} against sequence length, 16-bit, {PAPER_TOKENS} tokens, hidden size {PAPER_WIDTH}"
            )
            found.append((bench, caption, rates(paper, titles)))
    host = [row for row in rows if row["bench"].startswith("host/")]
    if host:
        found.append(("host", "Host time of warm calls on a tiny problem", bars(host)))
    errors = [row for row in rows if "error" in row]
    if errors:
        found.append(("error", "Largest error against float64, relative to the largest output", error_bars(errors)))
    return found


def is_paper(row: Row) -> bool:
    tokens = row["batch"] * row["seqlen_q"] == PAPER_TOKENS and row["seqlen_q"] == row["seqlen_k"]
    plain = not row["mods"] and row["heads"] == row["heads_kv"] and row["mask"] in ("full", "causal")
    return bool(
        tokens and plain and row["d"] == row["dv"] and row["d"] * row["heads"] == PAPER_WIDTH and row["dtype"] == "bfloat16"
    )


def rates(rows: Sequence[Row], titles: Mapping[str, str]) -> Any:
    """One panel for each head size and mask, one line for each library."""
    from matplotlib.figure import Figure

    sizes, masks = sorted({row["d"] for row in rows}), [m for m in ("full", "causal") if any(r["mask"] == m for r in rows)]
    figure = Figure(figsize=(3.2 * len(sizes), 2.6 * len(masks)), layout="constrained")
    panels = figure.subplots(len(masks), len(sizes), squeeze=False, sharex=True, sharey=True)
    names = ["cuattn", *(name for name in titles if any(name in row["peers"] for row in rows))]
    for mask, line in zip(masks, panels, strict=True):
        for size, axes in zip(sizes, line, strict=True):
            chosen = sorted((r for r in rows if r["d"] == size and r["mask"] == mask), key=lambda row: row["seqlen_q"])
            for name in names:
                points = [(r["seqlen_q"], rate(r, name)) for r in chosen if rate(r, name)]
                if points:
                    style = {"linewidth": 2, "color": "black"} if name == "cuattn" else {"color": f"C{names.index(name) - 1}"}
                    axes.plot(*zip(*points, strict=True), marker=".", label=titles.get(name, name), **style)
            axes.set(title=f"d {size}, {mask}", xscale="log")
            axes.set_xticks(
                sorted({r["seqlen_q"] for r in rows}), [f"{r // 1024}k" for r in sorted({r["seqlen_q"] for r in rows})]
            )
            axes.minorticks_off()
    panels[0, 0].set_ylim(0, 1.05 * max(rate(row, name) for row in rows for name in names))
    figure.supylabel("TFLOP/s")
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def rate(row: Row, name: str) -> float:
    """TFLOP/s of a library in a row; 0 where it did not run."""
    if name == "cuattn":
        return float(row["tflops"])
    return float(row["tflops"] * row["us"] / row["peers"][name]) if name in row["peers"] else 0.0


def bars(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names = [row["bench"].removeprefix("host/") for row in rows]
    axes.barh(names, [row["us"] for row in rows], color="0.7", height=0.5)
    for n, row in enumerate(rows):
        for us in row["peers"].values():
            axes.plot([us], [n], "|", color="tab:orange", markersize=14)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds (marks: what each is compared with)")
    return figure


def error_bars(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [f"{row['dtype']} {row['precision']} d{row['d']}" for row in rows],
        [row["error"] for row in rows],
        color="black",
        height=0.5,
    )
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="relative error")
    return figure
