"""docs/results.md and its figures, from the rows in bench/results/."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import FOLDER, ROOT, Row, gpu_slug, is_backward, load
from bench.tables import behind, label, render

DOCS = ROOT / "docs"
OURS = "cuattn"
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
        slower = behind(rows, titles)
        if slower:
            lines += [
                "## Where a peer is faster",
                "",
                "Every row in which a peer took less time, the worst first.",
                "",
                *slower,
                "",
            ]
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
            found.append((bench, caption, rates(paper, titles, ("mask", "{}"), ("d", "d {}"))))
    for bench in ("matrix", "matrix/backward"):
        cells = [row for row in rows if row["bench"] == bench]
        if len({row["seqlen_q"] for row in cells}) > 1:
            caption = f"TFLOP/s of the {'backward' if is_backward(cells[0]) else 'forward'} of one causal sequence, bf16"
            found.append((bench.replace("/", "-"), caption, rates(cells, titles, ("d", "d {}"), ("heads", "{} heads"))))
    decode = [row for row in rows if row["bench"] == "decode" and is_typical_decode(row)]
    decode = [row for row in decode if sum(other["batch"] == row["batch"] for other in decode) > 1]
    if decode:
        caption = "Decode, 64 query and 8 key heads, d 128, pages of 16: GB/s of keys and values against length"
        found.append(("decode", caption, bandwidths(decode, titles)))
    memory = [row for row in rows if row["bench"].startswith("memory") and row.get("peer_bytes") and row["d"] == 128]
    memory = [row for row in memory if row["dtype"] == "bfloat16" and row["mask"] == "causal"]
    if len({row["seqlen_q"] for row in memory}) > 1:
        caption = "Memory beyond inputs and results against sequence length, one causal sequence, 16 heads, d 128, bf16"
        found.append(("memory", caption, memories(memory, titles)))
    latency = [row for row in rows if row["bench"] == "latency"]
    if len({row["seqlen_q"] for row in latency}) > 1:
        shape = "one causal sequence, 16 heads, d 128"
        caption = f"Microseconds from a call to its finished result, p50 (lines) and p99 (dashes); {shape}"
        found.append(("latency", caption, tails(latency, titles)))
    host = [row for row in rows if row["bench"].startswith("host/")]
    if host:
        found.append(("host", "Host time of warm calls on a tiny problem", bars(host)))
    errors = [row for row in rows if "errors" in row]
    if errors:
        caption = "Largest error against float64, relative to the largest element, on the same inputs"
        found.append(("error", caption, error_dots(errors, titles)))
    return found


def is_typical_decode(row: Row) -> bool:
    shape = (row["heads"], row["heads_kv"], row["d"], row["seqlen_q"], row["mods"])
    return shape == (64, 8, 128, 1, ["page 16"]) and row["seqlen_k"] > 0


def is_paper(row: Row, *mods: str) -> bool:
    """Whether a row is of the papers' setting, with exactly these options."""
    tokens = row["batch"] * row["seqlen_q"] == PAPER_TOKENS and row["seqlen_q"] == row["seqlen_k"]
    plain = row["mods"] == list(mods) and row["heads"] == row["heads_kv"] and row["mask"] in ("full", "causal")
    return bool(
        tokens and plain and row["d"] == row["dv"] and row["d"] * row["heads"] == PAPER_WIDTH and row["dtype"] == "bfloat16"
    )


Point = tuple[float, float]
Panel = tuple[str, Mapping[str, Sequence[Point]]]
"""A title, and the points of each line by the name of a library."""


def library_colors(drawn: Collection[str], titles: Mapping[str, str]) -> dict[str, str]:
    """A color for each library of a figure, in the order of its legend."""
    peers = [name for name in titles if name in drawn]
    return {OURS: "black"} | {name: f"C{n}" for n, name in enumerate(peers)}


def panels(grid: Sequence[Sequence[Panel]], titles: Mapping[str, str], y: str, yscale: str = "linear") -> Any:
    """A figure of panels against sequence length, with one legend; the style of a library is the same in all of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(grid[0]) + 1, 2.6 * len(grid) + 0.4), layout="constrained")
    drawn = {key.partition(" ")[0] for line in grid for _, series in line for key in series}
    colors = library_colors(drawn, titles)
    lengths = sorted({int(x) for line in grid for _, series in line for points in series.values() for x, _ in points})
    handles: dict[str, Any] = {}
    for line, row_of_axes in zip(
        grid, figure.subplots(len(grid), len(grid[0]), squeeze=False, sharex=True, sharey=True), strict=True
    ):
        for (title, series), axes in zip(line, row_of_axes, strict=True):
            for key, points in sorted(series.items(), key=lambda entry: list(colors).index(entry[0].partition(" ")[0])):
                name, _, variant = key.partition(" ")
                style = {
                    "color": colors[name],
                    "linewidth": 2 if name == OURS else 1,
                    "linestyle": "--" if variant == "p99" else "-",
                }
                (handle,) = axes.plot(*zip(*sorted(points), strict=True), marker=".", **style)
                if variant != "p99":
                    handles[" ".join((titles.get(name, name), variant)).strip()] = handle
            axes.set(title=title, xscale="log", yscale=yscale)
            axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths], fontsize=7)
            axes.minorticks_off()
    if yscale == "linear":
        axes.set_ylim(0, 1.05 * max(v for line in grid for _, series in line for points in series.values() for _, v in points))
    figure.supylabel(y)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def by_library(
    rows: Sequence[Row], titles: Mapping[str, str], value: Callable[[Row, str], float | None]
) -> dict[str, list[Point]]:
    """(length, value) of each library that has one."""
    series: dict[str, list[Point]] = {}
    for name in (OURS, *titles):
        points = [(row["seqlen_q"], found) for row in rows if (found := value(row, name)) is not None]
        if points:
            series[name] = points
    return series


def rates(rows: Sequence[Row], titles: Mapping[str, str], down: tuple[str, str], across: tuple[str, str]) -> Any:
    """TFLOP/s: a panel for each value of two fields, which come with the form of their titles."""
    lines, columns = ([v for v in dict.fromkeys(sorted(row[field] for row in rows))] for field, _ in (down, across))
    if down[0] == "mask":
        lines.reverse()  # full before causal
    grid = []
    for line in lines:
        chosen = [[row for row in rows if (row[down[0]], row[across[0]]) == (line, column)] for column in columns]
        names = [f"{across[1].format(column)}, {down[1].format(line)}" for column in columns]
        grid.append([(name, by_library(some, titles, rate)) for name, some in zip(names, chosen, strict=True)])
    return panels(grid, titles, "TFLOP/s")


def bandwidths(rows: Sequence[Row], titles: Mapping[str, str]) -> Any:
    """GB/s of decode: a panel for each number of sequences."""

    def of(row: Row, name: str) -> float | None:
        us = row["us"] if name == OURS else row["peers"].get(name)
        return None if us is None else row["gbps"] * row["us"] / us

    line = []
    for batch in sorted({row["batch"] for row in rows}):
        some = [{**row, "seqlen_q": row["seqlen_k"]} for row in rows if row["batch"] == batch]
        line.append((f"{batch} sequence{'s' * (batch > 1)}", by_library(some, titles, of)))
    return panels([line], titles, "GB/s")


def memories(rows: Sequence[Row], titles: Mapping[str, str]) -> Any:
    def of(row: Row, name: str) -> float | None:
        size = row["bytes"] if name == OURS else row["peer_bytes"].get(name)
        return None if size is None else size / 2**20

    benches = [(bench, title) for bench, title in (("memory", "forward"), ("memory/backward", "forward and backward"))]
    line = [(title, by_library([row for row in rows if row["bench"] == bench], titles, of)) for bench, title in benches]
    return panels([line], titles, "MiB", yscale="symlog")


def tails(rows: Sequence[Row], titles: Mapping[str, str]) -> Any:
    def p50(row: Row, name: str) -> float | None:
        return row["us"] if name == OURS else row["peers"].get(name)

    def p99(row: Row, name: str) -> float | None:
        return row["p99"] if name == OURS else row["peers_p99"].get(name)

    series = by_library(rows, titles, p50) | {f"{name} p99": x for name, x in by_library(rows, titles, p99).items()}
    return panels([[("", series)]], titles, "microseconds", yscale="log")


def rate(row: Row, name: str) -> float | None:
    """TFLOP/s of a library in a row; None where it did not run."""
    if name == OURS:
        return float(row["tflops"])
    return float(row["tflops"] * row["us"] / row["peers"][name]) if name in row["peers"] else None


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


def error_dots(rows: Sequence[Row], titles: Mapping[str, str]) -> Any:
    """A panel for each array, a line for each case, a mark for each library."""
    from matplotlib.figure import Figure

    arrays = list(dict.fromkeys(array for row in rows for array in row["errors"][OURS]))
    colors = library_colors({name for row in rows for name in row["errors"]}, titles)
    figure = Figure(figsize=(10, 0.3 * len(rows) + 1.6), layout="constrained")
    for array, axes in zip(arrays, figure.subplots(1, len(arrays), sharey=True, squeeze=False)[0], strict=True):
        for name, color in colors.items():
            points = [(row["errors"][name][array][0], n) for n, row in enumerate(rows) if array in row["errors"].get(name, {})]
            if points:
                style = {"marker": "D", "zorder": 3} if name == OURS else {"marker": "o"}
                axes.plot(
                    *zip(*points, strict=True),
                    linestyle="",
                    color=color,
                    markersize=5,
                    alpha=0.8,
                    label=titles.get(name, name),
                    **style,
                )
        axes.set(title=array, xscale="log")
        axes.grid(axis="y", linewidth=0.3)
    axes.set_yticks(range(len(rows)), [f"{label(row).split(' | ')[0]} d{row['d']} {row['mask']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, fontsize=8)
    return figure
