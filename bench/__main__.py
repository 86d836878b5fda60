"""Command line: see `python -m bench --help`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import cuattn
from bench import ablation, backward, cases, ceilings, compare, decode, figures, forward, host, jit, memory, results
from bench.baselines import TITLES, available
from bench.timing import Deadline

ROUNDS = {"forward": 7, "backward": 5, "decode": 7, "ablation": 7, "jit": 3}
QUICK_ROUNDS = {"forward": 3, "backward": 3, "decode": 5, "ablation": 3, "jit": 1}
TIME_LIMIT = 480.0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of cuattn beside its peers.")
    parts = top.add_subparsers(dest="part", required=True)
    summaries = {
        "forward": "GPU time of the forward pass",
        "backward": "GPU time of the gradients",
        "decode": "GPU time of attention over a KV cache",
        "ablation": "GPU time of the Hopper forward with single choices undone",
        "host": "host time of a warm call, its backward, and autograd",
        "jit": "first call of a process, cold and warm cache",
        "memory": "memory beyond inputs and outputs",
        "ceilings": "measure matrix products and read bandwidth of this GPU, and print them",
        "all": "every part that stores rows, one after the other",
        "report": "write the tables of bench/results/ into README.md, and tables and figures into docs/",
        "compare": "two files of rows, case by case; fails when one is slower",
    }
    for name, summary in summaries.items():
        part = parts.add_parser(name, help=summary, description=summary)
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
        part.add_argument("--time-limit", type=float, default=TIME_LIMIT, metavar="SECONDS", help="start no case after this")
        part.add_argument("--list", action="store_true", help="print the cases and stop; needs no GPU")
        if name == "all":
            part.add_argument("--report", action="store_true", help="write tables and figures afterwards")
    return top


JSON_HELP = {
    "run": "write rows there instead of bench/results/<gpu>.json",
    "report": "first take the rows of this file into bench/results/<gpu>.json",
}


STORED = ("forward", "backward", "decode", "host", "jit", "memory")
"""The parts of `all`."""


def selected(arguments: argparse.Namespace) -> list[cases.Case | decode.DecodeCase]:
    """The cases of a part that --quick and --only leave."""
    if arguments.part == "all":
        return [case for part in STORED for case in selected(argparse.Namespace(**{**vars(arguments), "part": part}))]
    everything: Sequence[cases.Case | decode.DecodeCase] = {
        "forward": cases.QUICK if arguments.quick else cases.FORWARD,
        "backward": cases.BACKWARD_QUICK if arguments.quick else cases.BACKWARD,
        "decode": decode.QUICK if arguments.quick else decode.CASES,
        "ablation": cases.ABLATION,
        "host": [cases.HOST],
        "jit": cases.JIT,
        "memory": [*cases.MEMORY, *cases.MEMORY_BACKWARD],
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


def run_part(arguments: argparse.Namespace, chosen: Sequence[cases.Case]) -> None:
    """One of forward, backward, host, jit, memory, on the current GPU."""
    deadline = Deadline(arguments.time_limit)
    env = results.environment()
    store = results.Store(arguments.json, env)
    counts = QUICK_ROUNDS if arguments.quick else ROUNDS
    rounds = arguments.rounds or counts.get(arguments.part, 1)
    print(f"{env['gpu']}, sources {env['source_hash'][:12]}, {env['versions']}")
    peers = []
    if arguments.part == "decode":
        named = [name for name in arguments.peers.split(",") if name in decode.PEERS]
        wanted = named or [name for name in decode.PEERS if not arguments.peers]
        decode.run(chosen, wanted, rounds, store, env, deadline)
        print(f"rows in {store.path}")
        return
    if arguments.part in ("forward", "backward", "host") and arguments.peers != "none":
        named = [name for name in arguments.peers.split(",") if name]
        peers = available(backward.peer_names(named) if arguments.part == "backward" else named)
    if arguments.part == "forward":
        forward.prewarm(chosen)
        limits = ceilings.of(results.gpu_slug(env["gpu"]))
        print(f"ceilings: {limits}")
        forward.run(chosen, peers, rounds, store, env, limits, deadline)
    elif arguments.part == "backward":
        forward.prewarm(chosen, backward.sources)
        limits = ceilings.of(results.gpu_slug(env["gpu"]))
        forward.run(chosen, peers, rounds, store, env, limits, deadline, backward.run_case)
    elif arguments.part == "ablation":
        ablation.run(chosen, rounds, deadline)
        return
    elif arguments.part == "host":
        host.run(peers, host.QUICK_CALLS if arguments.quick else host.CALLS, store, env, deadline)
    elif arguments.part == "jit":
        jit.run(chosen, rounds, store, env, deadline)
    else:
        memory.run(chosen, store, env, deadline)
    print(f"rows in {store.path}")


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
    if arguments.part != "all":
        run_part(arguments, chosen)
        return 0
    for part in STORED:
        one = argparse.Namespace(**{**vars(arguments), "part": part})
        run_part(one, selected(one))
    if arguments.report and arguments.json:
        take_in(arguments.json)
    return report() if arguments.report else 0


def report() -> int:
    """The tables of README.md, and docs/results.md with its figures."""
    results.report(results.ROOT / "README.md", TITLES)
    for path in figures.write(TITLES):
        print(path.relative_to(results.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
