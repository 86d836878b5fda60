"""Tables of rows in Markdown, and where they go in a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.results import RATED, Row, best_peer, is_backward

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Cell = Callable[[Row], str]


def label(row: Row) -> str:
    """A row's case in the words of a table."""
    number = {"float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(row["dtype"], f"fp32 {row['precision']}")
    heads = str(row["heads"]) if row["heads"] == row["heads_kv"] else f"{row['heads']}/{row['heads_kv']}"
    sizes = str(row["seqlen_q"]) if row["seqlen_q"] == row["seqlen_k"] else f"{row['seqlen_q']} x {row['seqlen_k']}"
    dims = str(row["d"]) if row["d"] == row["dv"] else f"{row['d']}/{row['dv']}"
    feature = ", ".join((row["mask"], *row["mods"]))
    return f"{number} | {dims} | {row['batch']} x {heads} | {sizes} | {feature}"


def group(row: Row) -> str:
    """The table that a row with rates belongs to."""
    if row["bench"].startswith("matrix"):
        return "One causal sequence"
    if row["dtype"] in ("float32", "float64"):
        return "float32 and float64"
    featured = row["mods"] or row["mask"] not in ("full", "causal")
    featured = featured or row["heads"] != row["heads_kv"] or row["seqlen_q"] != row["seqlen_k"]
    return "Masks, score modifications, packed and split calls" if featured else "float16 and bfloat16"


def table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Lines of one table: time, rate, percent of the bound, and how many times a peer's time is ours.

    Backward tables and those with many peers say so of the best peer of a row as well; "x plain" is our own call without its
    score modifications.
    """
    peers = [name for name in titles if any(name in row["peers"] for row in rows)]
    some: dict[str, Cell] = {
        "error": lambda row: f"{row['error']:.1e}" if "error" in row else "",
        "x plain": lambda row: f"{row['plain'] / row['us']:.2f}" if "plain" in row else "",
    }
    some = {title: cell for title, cell in some.items() if any(map(cell, rows))}
    best = any(is_backward(row) for row in rows) or len(peers) > 2
    head = ["dtype", "d", "batch x heads", "length", "mask, options", "us", "TFLOP/s", "GB/s", "% of bound"]
    head += [*some, *["x best"] * best, *(f"x {titles[name]}" for name in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 5 + "---:|" * (len(head) - 5)]
    for row in rows:
        percent = "" if row["bound_pct"] is None else f"{row['bound_pct']:.0f}"
        cells = [label(row), f"{row['us']:.0f}", f"{row['tflops']:.1f}", f"{row['gbps']:.0f}", percent]
        cells += [cell(row) for cell in some.values()]
        if best:
            cells.append(f"{best_peer(row) / row['us']:.2f}" if row["peers"] else "")
        cells += [f"{row['peers'][name] / row['us']:.2f}" if name in row["peers"] else "" for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def columns(rows: Sequence[Row], words: Mapping[str, Cell], numbers: Mapping[str, Cell]) -> list[str]:
    """Lines of a table with a column for each entry that says something: `words` to the left, then `numbers`.

    Rows of different sources say of which they are.
    """
    if len({row["source_hash"] for row in rows}) > 1:
        words = {**words, "sources": lambda row: row["source_hash"][:6]}
    shown = {title: [cell(row) for row in rows] for title, cell in {**words, **numbers}.items()}
    shown = {title: cells for title, cells in shown.items() if any(cells)}
    lines = ["| " + " | ".join(shown) + " |"]
    lines.append("|" + "".join("---|" if title in words else "---:|" for title in shown))
    return lines + ["| " + " | ".join(cells) + " |" for cells in zip(*shown.values(), strict=True)]


SIZES: dict[str, Cell] = {
    "dtype": lambda row: label(row).split(" | ")[0],
    "d": lambda row: label(row).split(" | ")[1],
    "batch x heads": lambda row: label(row).split(" | ")[2],
    "length": lambda row: label(row).split(" | ")[3],
    "mask, options": lambda row: label(row).split(" | ")[4],
}


def peer_columns(titles: Mapping[str, str], field: str, form: Callable[[float], str]) -> dict[str, Cell]:
    """A column for each peer with a number in a field {name: number} of the rows."""

    def cell(name: str) -> Cell:
        return lambda row: form(row[field][name]) if name in row.get(field, {}) else ""

    return {title: cell(name) for name, title in titles.items()}


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f}"


def memory_table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    numbers: dict[str, Cell] = {
        "cuattn, MiB": lambda row: mebibytes(row["bytes"]),
        "planned": lambda row: mebibytes(row["planned"]) if "planned" in row else "",
        **peer_columns(titles, "peer_bytes", mebibytes),
    }
    return columns(rows, SIZES, numbers)


def latency_table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    def both(name: str) -> Cell:
        return lambda row: f"{row['peers'][name]:.1f} / {row['peers_p99'][name]:.1f}" if name in row["peers"] else ""

    numbers: dict[str, Cell] = {"cuattn": lambda row: f"{row['us']:.1f} / {row['p99']:.1f}"}
    return columns(rows, SIZES, numbers | {title: both(name) for name, title in titles.items()})


def decode_table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    words: dict[str, Cell] = {
        "batch x length": lambda row: f"{row['batch']} x {row['seqlen_k'] or 'mixed'}",
        "heads": lambda row: f"{row['heads']}/{row['heads_kv']}",
        "d": SIZES["d"],
        "cache": lambda row: ", ".join(row["mods"]),
        "query tokens": lambda row: str(row["seqlen_q"]),
    }
    numbers: dict[str, Cell] = {
        "us": lambda row: f"{row['us']:.1f}",
        "GB/s": lambda row: f"{row['gbps']:.0f}",
        "TFLOP/s": lambda row: f"{row['tflops']:.0f}" if row["tflops"] else "",
    }
    return columns(rows, words, numbers | peer_columns(titles, "peers", lambda us: f"{us:.1f}"))


def error_table(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """A line for each array of a case."""

    def cell(name: str) -> Cell:
        def text(row: Row) -> str:
            worst, rms = row["errors"].get(name, {}).get(row["array"], (0, 0))
            return f"{worst:.1e} ({rms:.1e})" if worst else ""

        return text

    lines = [{**row, "array": array} for row in rows for array in row["errors"]["cuattn"]]
    words: dict[str, Cell] = {**SIZES, "array": lambda row: row["array"]}
    return columns(lines, words, {title: cell(name) for name, title in {"cuattn": "cuattn", **titles}.items()})


Table = Callable[[Sequence[Row], Mapping[str, str]], list[str]]
TABLES: dict[str, tuple[str, Table]] = {
    "decode": ("Decode over a paged cache, in CUDA graphs; columns of peers are their microseconds", decode_table),
    "error": ("Largest error against float64, relative to the largest element (and root of the mean squares)", error_table),
    "memory": ("Memory of a forward beyond inputs and output", memory_table),
    "memory/backward": ("Memory of forward and backward beyond inputs, output, gradients and lse", memory_table),
    "latency": ("Microseconds from a call to its finished result: half of the calls, 99 of 100 took less", latency_table),
}
"""Title and table of the parts whose rows are no rates."""


def behind(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """A table of every row in which a peer took less time than we did, the worst first; [] where there is none."""
    found = []
    for row in rows:
        mine = row.get("whole", row["us"])
        peers = {name: us for name, us in row["peers"].items() if name in titles and us < mine}
        if peers:
            best = min(peers, key=lambda name: peers[name])
            found.append({**row, "best": titles[best], "ratio": peers[best] / mine})
    words: dict[str, Cell] = {"": lambda row: row["bench"], **SIZES, "faster": lambda row: row["best"]}
    found.sort(key=lambda row: row["ratio"])
    return columns(found, words, {"its time over ours": lambda row: f"{row['ratio']:.2f}"}) if found else []


def standing(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """A table that counts, for each part and peer, the rows in which the peer took less time than we did, of those it has."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if any(name in titles for name in row["peers"]):
            part = row["bench"].partition("/")[0]
            parts.setdefault(f"{part}, backward" if is_backward(row) and part != "backward" else part, []).append(row)
    peers = [name for name in titles if any(name in row["peers"] for some in parts.values() for row in some)]
    lines = [
        "| " + " | ".join(["faster than cuattn in", *(titles[name] for name in peers)]) + " |",
        "|---" * (1 + len(peers)) + "|",
    ]
    for part, some in parts.items():
        cells = [part]
        for name in peers:
            shared = [row for row in some if name in row["peers"]]
            ahead = sum(row["peers"][name] < row.get("whole", row["us"]) for row in shared)
            cells.append(f"{ahead} of {len(shared)}" if shared else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def other_lines(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Host path and first call, one line each."""
    lines = []
    for row in rows:
        part, _, kind = row["bench"].partition("/")
        if part == "host":
            kind, _, what = kind.partition("/")
            call = HOST_LINES[what].format(kind=kind)
            peers = ", ".join(f"{titles.get(name, name)} {us:.0f}" for name, us in row["peers"].items())
            note = f" ({peers})" if peers else ""
            whole = f", {row['whole']:.1f} us in all" if row.get("whole", row["us"]) != row["us"] else ""
            tail = f", 99 of 100 whole calls below {row['p99']:.0f} us" if row.get("p99") else ""
            lines.append(f"- {call}: {row['us']:.1f} us{whole}{tail}{note}")
        elif part == "jit":
            cache = "empty cache" if kind == "cold" else "filled disk cache"
            lines.append(f"- First call of a process, {row['dtype']} d{row['d']}, {cache}: {row['us'] * 1e-6:.2f} s")
    return lines


HOST_LINES = {
    "": "Host time of a warm call on {kind} arrays",
    "backward": "Host time of a warm backward on {kind} arrays",
    "decode": "Host time of a warm attention_with_kvcache on {kind} arrays",
    "append": "Host time of a warm attention_with_kvcache that appends a token, on {kind} arrays",
    "recorded": "Host time that autograd adds to a warm forward on {kind} arrays",
    "gradients": "Host time that autograd adds to a warm backward on {kind} arrays",
    "gradients_one_thread": "Host time that autograd adds to a warm backward on {kind} arrays, without threads of its own",
    "autograd": "Host time that autograd adds to a warm forward and backward on {kind} arrays",
    "autograd_one_thread": "Host time that autograd adds to both on {kind} arrays, without threads of its own",
    "flash_attn": "Host time that cuattn.flash_attn adds to a warm call on {kind} arrays",
    "sdpa": "Host time that cuattn.torch.scaled_dot_product_attention adds to a warm call on {kind} arrays",
    "jax": "Warm call of cuattn.jax.attention under jit, until the result is there",
    "jax_return": "Warm call of cuattn.jax.attention under jit, until it returns",
}


def render(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """All rows of one GPU, in tables and lists. `titles`: peers by name, in the order of columns."""
    lines = [f"### {rows[0]['gpu']}", "", environment_line(rows), ""]
    rated = [row for row in rows if row["bench"] in RATED]
    for name in dict.fromkeys(group(row) for row in rated):
        lines += [f"**{name}**", "", *table([row for row in rated if group(row) == name], titles), ""]
    for bench, (title, build) in TABLES.items():
        some = [row for row in rows if row["bench"] == bench]
        if some:
            lines += [f"**{title}**", "", *build(some, titles), ""]
    return "\n".join([*lines, *other_lines(rows, titles), ""])


def environment_line(rows: Sequence[Row]) -> str:
    """When and with what the rows were measured: which part of the benchmark on which sources, for one."""
    newest = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{name} {version}" for name, version in sorted(newest["versions"].items()))
    parts: dict[str, dict[str, None]] = {}
    for row in rows:
        parts.setdefault(row["source_hash"][:12], {})[row["bench"].partition("/")[0]] = None
    sources = ", ".join(f"{name} ({', '.join(parts[name])})" for name in parts) if len(parts) > 1 else next(iter(parts))
    return f"{newest['date'][:10]}, sources {sources}; {versions}."


def replace_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what lies between two markers replaced. Raises ValueError if it lacks them."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"expected the lines {begin} and {end}, found {text.count(begin)} and {text.count(end)}")
    return f"{before}{begin}\n{section.strip()}\n{end}{after}"
