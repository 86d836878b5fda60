"""Command line: see `python -m bench --help`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuattn
from bench import (
    ablation,
    backward,
    cases,
    ceilings,
    compare,
    decode,
    error,
    figures,
    forward,
    host,
    jit,
    latency,
    memory,
    results,
    summary,
)
from bench.baselines import TITLES, Baseline, available
from bench.timing import Deadline

ROUNDS = {"forward": 7, "backward": 5, "matrix": 3, "decode": 7, "latency": 5, "ablation": 7, "jit": 3}
QUICK_ROUNDS = {"forward": 3, "backward": 3, "matrix": 3, "decode": 5, "latency": 2, "ablation": 3, "jit": 1}
STORED = ("forward", "backward", "decode", "error", "memory", "latency", "host", "jit", "matrix")
"""The parts of `all`, which share its time limit; what matters least last."""
TIME_LIMIT, ALL_LIMIT = 480.0, 3600.0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of cuattn beside its peers.")
    parts = top.add_subparsers(dest="part", required=True)
    summaries = {
        "forward": "GPU time of the forward pass",
        "backward": "GPU time of the gradients",
        "matrix": "GPU time of one causal sequence, over lengths, head sizes and numbers of heads",
        "decode": "GPU time of attention over a KV cache",
        "latency": "time from a call to its finished result, one call at a time: p50 and p99",
        "error": "errors against float64, of results and gradients, beside those of peers on the same inputs",
        "ablation": "GPU time of the Hopper forward with single choices undone",
        "host": "host time of a warm call, its backward, and autograd",
        "jit": "first call of a process, cold and warm cache",
        "memory": "memory beyond inputs and outputs, beside that of peers",
        "ceilings": "measure matrix products and read bandwidth of this GPU, and print them",
        "all": "every part that stores rows, one after the other",
        "report": "write what bench/results/ says in short into README.md, and tables and figures into docs/",
        "compare": "two files of rows, case by case; fails when one is slower",
    }
    for name, words in summaries.items():
        part = parts.add_parser(name, help=words, description=words)
        if name == "ceilings":
            continue
        if name == "compare":
            part.add_argument("old", type=Path)
            part.add_argument("new", type=Path)
            part.add_argument(
                "--tolerance", type=float, default=compare.TOLERANCE, metavar="PERCENT", help="growth that passes"
            )
            continue
        part.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP["report" if name == "report" else "run"])
        if name == "report":
            continue
        part.add_argument("--quick", action="store_true", help="fewer cases and rounds")
        part.add_argument("--only", default="", metavar="SUBSTR", help="cases whose printed name contains this")
        part.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(TITLES)}, or none; default all")
        part.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds a case (jit: pairs of processes)")
        limit = ALL_LIMIT if name == "all" else TIME_LIMIT
        part.add_argument("--time-limit", type=float, default=limit, metavar="SECONDS", help="start no case after this")
        part.add_argument("--list", action="store_true", help="print the cases and stop; needs no GPU")
        if name == "all":
            part.add_argument("--report", action="store_true", help="write tables and figures afterwards")
            part.add_argument("--parts", default=",".join(STORED), metavar="A,B", help="in this order; default: %(default)s")
    return top


JSON_HELP = {
    "run": "write rows there instead of bench/results/<gpu>.json",
    "report": "first take the rows of this file into bench/results/<gpu>.json",
}


PEERS: dict[str, Sequence[str]] = {
    "forward": (),
    "backward": (),
    "decode": tuple(decode.PEERS),
    "matrix": ("naive", "cudnn", "flash", "efficient", "math", "flex", "xformers", "fa3", "fa4"),
    "error": error.PEERS,
    "latency": latency.PEERS,
    "memory": memory.PEERS,
    "host": (*host.PEERS, "jax"),
}
"""Baselines that a part runs when none are named; () for all of them. Others are not even imported."""


def parts_of(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each part of `all`. Raises ValueError for a name that is none of them."""
    names = arguments.parts.split(",")
    unknown = set(names) - set(STORED)
    if unknown:
        raise ValueError(f"--parts: got {', '.join(sorted(unknown))}, expected some of {', '.join(STORED)}")
    return [argparse.Namespace(**{**vars(arguments), "part": name}) for name in names]


def selected(arguments: argparse.Namespace) -> list[cases.Case | decode.DecodeCase]:
    """The cases of a part that --quick and --only leave."""
    if arguments.part == "all":
        return [case for one in parts_of(arguments) for case in selected(one)]
    everything: Sequence[cases.Case | decode.DecodeCase] = {
        "forward": cases.QUICK if arguments.quick else cases.FORWARD,
        "backward": cases.BACKWARD_QUICK if arguments.quick else cases.BACKWARD,
        "matrix": cases.MATRIX_QUICK if arguments.quick else cases.MATRIX,
        "decode": decode.QUICK if arguments.quick else (*decode.CASES, *decode.LENGTHS),
        "latency": cases.LATENCY_QUICK if arguments.quick else cases.LATENCY,
        "error": cases.ERROR_QUICK if arguments.quick else cases.ERROR,
        "ablation": cases.ABLATION,
        "host": [cases.HOST],
        "jit": cases.JIT,
        "memory": [*cases.MEMORY, *cases.MEMORY_BACKWARD, *([] if arguments.quick else cases.MEMORY_LENGTHS)],
    }[arguments.part]
    return [case for case in everything if arguments.only in str(case)]


def take_in(path: Path) -> None:
    """Merge the rows of a file into those of their GPUs."""
    by_gpu: dict[str, list[results.Row]] = {}
    for row in results.load(path):
        by_gpu.setdefault(results.gpu_slug(row["gpu"]), []).append(row)
    for slug, rows in by_gpu.items():
        target = results.FOLDER / f"{slug}.json"
        results.save(target, results.merge(results.load(target), rows))
        print(f"{target}: {len(rows)} rows taken in")


def peers_of(arguments: argparse.Namespace) -> list[Baseline]:
    """The peers of a part that this machine can run; all of those worth it, or the named ones."""
    part, wanted = arguments.part, [name for name in arguments.peers.split(",") if name]
    if part not in PEERS or wanted == ["none"]:
        return []
    if part == "backward":
        return available(backward.peer_names(wanted))
    if part == "decode" and wanted:
        named = [name for name in wanted if name in decode.PEERS]
        return available(named) if named else []
    return available(wanted or PEERS[part])


def run_part(arguments: argparse.Namespace, chosen: Sequence[cases.Case], deadline: Deadline) -> None:
    """One of the parts that measure, on the current GPU."""
    env = results.environment()
    store = results.Store(arguments.json, env)
    part, counts = arguments.part, QUICK_ROUNDS if arguments.quick else ROUNDS
    rounds = arguments.rounds or counts.get(part, 1)
    print(f"{env['gpu']}, sources {env['source_hash'][:12]}, {env['versions']}")
    peers = peers_of(arguments)
    if part in ("forward", "backward", "matrix"):
        rated(chosen, peers, rounds, store, env, deadline)
    elif part == "decode":
        decode.run(chosen, [peer.name for peer in peers], rounds, store, env, deadline)
    elif part == "latency":
        forward.prewarm(chosen)
        latency.run(chosen, peers, rounds, store, env, deadline)
    elif part == "error":
        forward.prewarm(chosen)
        forward.prewarm(cases.gradients(*chosen), backward.sources)
        error.run(chosen, peers, store, env, deadline)
    elif part == "ablation":
        ablation.run(chosen, rounds, deadline)
        return
    elif part == "host":
        host.run(peers, host.QUICK_CALLS if arguments.quick else host.CALLS, store, env, deadline)
    elif part == "jit":
        jit.run(chosen, rounds, store, env, deadline)
    else:
        memory.run(chosen, peers, store, env, deadline)
    print(f"rows in {store.path}")


def rated(
    chosen: Sequence[cases.Case],
    peers: Sequence[Baseline],
    rounds: int,
    store: results.Store,
    env: results.Row,
    deadline: Deadline,
) -> None:
    """Parts whose time is GPU time: all kernels compiled first, then the cases in order, of either direction."""
    limits = ceilings.of(results.gpu_slug(env["gpu"]))
    print(f"ceilings: {limits}")
    modules = {False: forward, True: backward}
    for direction in sorted({case.backward for case in chosen}):
        forward.prewarm([case for case in chosen if case.backward == direction], modules[direction].sources)

    def run_case(case: cases.Case, *rest: Any) -> results.Row | None:
        row: results.Row | None = modules[case.backward].run_case(case, *rest)
        return row

    forward.run(chosen, peers, rounds, store, env, limits, deadline, run_case)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    warnings.simplefilter("ignore")  # PyTorch explains at length why a forced backend declines; measure() prints one line
    if arguments.part == "report":
        if arguments.json:
            take_in(arguments.json)
        return report()
    if arguments.part == "compare":
        return compare.compare(arguments.old, arguments.new, arguments.tolerance)
    if arguments.part == "ceilings":
        print(ceilings.measured())
        return 0
    chosen = selected(arguments)
    if arguments.list or not chosen:
        for case in chosen:
            print(f"{case!s:44} {case.flops() * 1e-9:10.1f} GFLOP {case.bytes() * 2**-20:8.1f} MiB")
        return 0 if chosen else 1
    info = cuattn.backend_info()
    if info.backend != "cuda":
        print(f"no GPU to measure: {info.reason}")
        return 1
    deadline = Deadline(arguments.time_limit)
    if arguments.part != "all":
        run_part(arguments, chosen, deadline)
        return 0
    for one in parts_of(arguments):
        if selected(one):
            run_part(one, selected(one), deadline)
    if arguments.report and arguments.json:
        take_in(arguments.json)
    return report() if arguments.report else 0


def report() -> int:
    """The sections of README.md and docs/peers.md, and docs/results.md with its figures."""
    summary.write(results.ROOT / "README.md", TITLES)
    summary.write_standing(results.ROOT / "docs" / "peers.md", TITLES)
    for path in figures.write(TITLES):
        print(path.relative_to(results.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
