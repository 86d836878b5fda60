"""Rows of results: bench/results/<gpu>.json, one list per GPU, and the README's table made from them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.ceilings import Ceilings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BACKWARD_BEGIN, BACKWARD_END = "<!-- bench-backward:begin -->", "<!-- bench-backward:end -->"

Row = dict[str, Any]

KEY = ("bench", "dtype", "precision", "d", "dv", "heads", "heads_kv", "batch", "seqlen_q", "seqlen_k", "mask", "mods")
"""The fields that say which case a row belongs to. The others: us (median microseconds), tflops, gbps, bound_pct (percent of
the measured bound), peers {name: us}, gpu, versions, source_hash, date; and where they apply, error (largest error against
the float64 reference, relative to the largest output), bytes (memory beyond inputs and outputs, of a backward also beyond
gradients and lse) and planned (the bytes of it that the plan announces)."""
RATED = ("forward", "backward")
"""Parts whose time is GPU time."""


def gpu_slug(name: str) -> str:
    """The file name of a GPU.

    >>> gpu_slug("NVIDIA H200"), gpu_slug("NVIDIA GeForce RTX 4090")
    ('h200', 'geforce-rtx-4090')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def installed_versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    versions = {"python": platform.python_version()}
    distributions = ("cuattn", "torch", "jax", "flash-attn-4", "flashinfer-python")
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> Row:
    """The part of every row that describes the machine and the code: gpu, versions, source_hash, date. Needs a GPU."""
    import cupy

    import cuattn
    from tests.source_hash import source_hash

    info = cuattn.backend_info()
    versions = installed_versions()
    versions |= {"cuattn": cuattn.__version__, "cupy": cupy.__version__, "driver": str(info.driver), "nvrtc": str(info.nvrtc)}
    if "torch" in versions:
        import torch

        versions["cudnn"] = str(torch.backends.cudnn.version())
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"gpu": name, "versions": versions, "source_hash": source_hash(), "date": date}


def make_row(case: Case, us: float | None, peers: Mapping[str, float], env: Row, ceilings: Ceilings | None, **more: Any) -> Row:
    """One row; rates only where the time is GPU time."""
    rated = us is not None and case.bench in RATED
    bound = ceilings.bound_us(case) if rated and ceilings else None
    return {
        "bench": case.bench,
        "dtype": case.dtype,
        "precision": case.precision,
        "d": case.head_dim,
        "dv": case.head_dim_v,
        "heads": case.num_heads,
        "heads_kv": case.num_heads_kv,
        "batch": case.batch,
        "seqlen_q": case.seqlen_q,
        "seqlen_k": case.seqlen_k,
        "mask": case.mask,
        "mods": list(case.mods),
        "us": None if us is None else round(us, 2),
        "tflops": round(case.flops() / us * 1e-6, 2) if rated and us else None,
        "gbps": round(case.bytes() / us * 1e-3, 1) if rated and us else None,
        "bound_pct": round(100 * bound / us, 1) if bound and us else None,
        "peers": {name: round(value, 2) for name, value in peers.items()},
        **env,
        **more,
    }


def key(row: Row) -> tuple[Any, ...]:
    """What identifies the row's case."""
    return tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in KEY)


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Both lists, each case once with its newest row, in the order in which cases first appeared."""
    rows: dict[tuple[Any, ...], Row] = {}
    for row in (*old, *new):
        known = rows.get(key(row))
        if known is None or row["date"] >= known["date"]:
            rows[key(row)] = row
    return list(rows.values())


def load(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist."""
    return list(json.loads(path.read_text())) if path.exists() else []


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write one row per line, at once: a run that is killed leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(temporary, path)


class Store:
    """The file that a run writes to, after every case."""

    def __init__(self, path: Path | None, env: Row) -> None:
        self.path = path or FOLDER / f"{gpu_slug(env['gpu'])}.json"

    def add(self, row: Row) -> None:
        save(self.path, merge(load(self.path), [row]))


# ---------------------------------------------------------------------------------------------------------------- report


def label(row: Row) -> str:
    """A row's case in the words of a table."""
    number = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(row["dtype"], f"fp32 {row['precision']}")
    heads = str(row["heads"]) if row["heads"] == row["heads_kv"] else f"{row['heads']}/{row['heads_kv']}"
    sizes = str(row["seqlen_q"]) if row["seqlen_q"] == row["seqlen_k"] else f"{row['seqlen_q']} x {row['seqlen_k']}"
    dims = str(row["d"]) if row["d"] == row["dv"] else f"{row['d']}/{row['dv']}"
    feature = ", ".join((row["mask"], *row["mods"]))
    return f"{number} | {dims} | {row['batch']} x {heads} | {sizes} | {feature}"


def is_backward(row: Row) -> bool:
    """Whether a row is about gradients."""
    return not {"backward", "autograd"}.isdisjoint(row["bench"].split("/"))


def group(row: Row) -> str:
    """The table that a row with rates belongs to."""
    if row["dtype"] in ("float32", "float64"):
        return "float32 and float64"
    featured = row["mods"] or row["mask"] not in ("full", "causal")
    featured = featured or row["heads"] != row["heads_kv"] or row["seqlen_q"] != row["seqlen_k"]
    return "Masks, score modifications, packed and split calls" if featured else "float16 and bfloat16"


def table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Lines of one table: time, rate, percent of the bound, and how many times a peer's time is ours.

    Backward tables say so of the best peer of a row as well.
    """
    peers = [name for name in titles if any(name in row["peers"] for row in rows)]
    errors = any("error" in row for row in rows)
    best = any(is_backward(row) for row in rows)
    head = ["dtype", "d", "batch x heads", "length", "mask, options", "us", "TFLOP/s", "GB/s", "% of bound"]
    head += ["error"] * errors + ["x best"] * best + [f"x {titles[name]}" for name in peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 5 + "---:|" * (len(head) - 5)]
    for row in rows:
        percent = "" if row["bound_pct"] is None else f"{row['bound_pct']:.0f}"
        cells = [label(row), f"{row['us']:.0f}", f"{row['tflops']:.1f}", f"{row['gbps']:.0f}", percent]
        if errors:
            cells.append(f"{row['error']:.1e}" if "error" in row else "")
        if best:
            cells.append(f"{min(row['peers'].values()) / row['us']:.2f}" if row["peers"] else "")
        cells += [f"{row['peers'][name] / row['us']:.2f}" if name in row["peers"] else "" for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def other_lines(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Host path, first call and memory, one line each."""
    lines = []
    for row in rows:
        part, _, kind = row["bench"].partition("/")
        if part == "host":
            kind, _, what = kind.partition("/")
            call = HOST_LINES[what].format(kind=kind)
            peers = ", ".join(f"{titles.get(name, name)} {us:.0f}" for name, us in row["peers"].items())
            note = f" ({peers})" if peers else ""
            tail = f", 99 of 100 whole calls below {row['p99']:.0f} us" if row.get("p99") else ""
            lines.append(f"- {call}: {row['us']:.1f} us{tail}{note}")
        elif part == "jit":
            cache = "empty cache" if kind == "cold" else "filled disk cache"
            lines.append(f"- First call of a process, {row['dtype']} d{row['d']}, {cache}: {row['us'] * 1e-6:.2f} s")
        elif part == "decode":
            lines.append(decode_line(row, titles))
        elif part == "memory":
            size = f"{row['seqlen_q']} x {row['seqlen_k']}, {row['heads']} heads, {row['mask']}"
            measured = f"{row['bytes'] / 2**20:.2f} MiB"
            if kind == "backward":
                size = f"{row['dtype']} d{row['d']}, {row['batch']} x {size}"
                beyond = "inputs, outputs, gradients and lse, forward and backward"
                lines.append(f"- Memory beyond {beyond}, {size}: {measured}; planned {row['planned'] / 2**20:.2f} MiB")
            else:
                lines.append(f"- Memory beyond inputs and outputs, {size}: {measured}")
    return lines


def decode_line(row: Row, titles: Mapping[str, str]) -> str:
    """A stored row as the report shows it."""
    length = str(row["seqlen_k"]) if row["seqlen_k"] else "mixed lengths"
    queries = f", {row['seqlen_q']} query tokens" if row["seqlen_q"] > 1 else ""
    peers = ", ".join(f"{titles.get(name, name)} {us:.1f}" for name, us in row["peers"].items())
    note = f" ({peers})" if peers else ""
    shape = f"{row['batch']} x {length}, {row['heads']}/{row['heads_kv']} heads, d{row['d']}, {', '.join(row['mods'])}{queries}"
    return f"- Decode, {shape}: {row['us']:.1f} us, {row['gbps']:.0f} GB/s{note}"


HOST_LINES = {
    "": "Host time of a warm call on {kind} arrays",
    "backward": "Host time of a warm backward on {kind} arrays",
    "autograd": "Host time that autograd adds to a warm forward and backward on {kind} arrays",
    "flash_attn": "Host time that cuattn.flash_attn adds to a warm call on {kind} arrays",
    "sdpa": "Host time that cuattn.torch.scaled_dot_product_attention adds to a warm call on {kind} arrays",
    "jax": "Warm call of cuattn.jax.attention under jit, until the result is there",
}


def render(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """The README's section for the rows of one GPU. `titles`: peers by name, in the order of columns."""
    newest = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in sorted(newest["versions"].items()))
    hashes = ", ".join(sorted({row["source_hash"][:12] for row in rows}))
    lines = [f"### {newest['gpu']}", "", f"{newest['date'][:10]}, sources {hashes}; {versions}.", ""]
    rated = [row for row in rows if row["bench"] in RATED]
    for name in dict.fromkeys(group(row) for row in rated):
        lines += [f"**{name}**", "", *table([row for row in rated if group(row) == name], titles), ""]
    others = other_lines([row for row in rows if row["bench"] not in RATED], titles)
    return "\n".join([*lines, *others, ""] if others else lines)


def replace_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what lies between two markers replaced. Raises ValueError if it lacks them."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"expected the lines {begin} and {end}, found {text.count(begin)} and {text.count(end)}")
    return f"{before}{begin}\n{section.strip()}\n{end}{after}"


def report(readme: Path, titles: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Write the tables of all GPUs in `folder` into `readme`: those of the forward, and apart from them the backward's."""
    text, files = readme.read_text(), [load(path) for path in sorted(folder.glob("*.json"))]
    for backward, begin, end in ((False, BEGIN, END), (True, BACKWARD_BEGIN, BACKWARD_END)):
        chosen = [[row for row in rows if is_backward(row) == backward] for rows in files]
        sections = [render(rows, titles) for rows in chosen if rows]
        text = replace_section(text, "\n".join(sections) or "No results yet.", begin, end)
    readme.write_text(text)
