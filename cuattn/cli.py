"""The command line: python -m cuattn info | demo | compile | clear-cache | support."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def support_table() -> str:
    """The Markdown table of what each kernel serves, one row for each of `registry.support_rows()`."""
    from cuattn import registry

    rows = registry.support_rows()
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def replace_section(text: str, name: str, section: str) -> str:
    """The Markdown `text` with `section` between its <!-- name:begin --> and <!-- name:end -->; ValueError without them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"text: got no lines {begin} ... {end}, expected both")
    return f"{before}{begin}\n{section.strip()}\n{end}{after}"


def _info(args: argparse.Namespace) -> int:
    import cuattn

    print(cuattn.backend_info())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from cuattn import demo

    return demo.run(args.figure)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A callback (done, total, name) that shows a tqdm bar, or one line for each kernel where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done, total, name: print(f"[{done:3d}/{total}] {name}", file=sys.stderr, flush=True)
        return
    with tqdm(unit="kernel", dynamic_ncols=True) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def _compile(args: argparse.Namespace) -> int:
    from cuattn import jit

    for arch in args.arch:
        with _progress_bar() as progress:
            kernels = jit.prewarm(arch, args.all, progress)
        print(f"{arch}: {len(kernels)} kernels in the cache")
    return 0


def _clear_cache(args: argparse.Namespace) -> int:
    from cuattn import jit

    print(f"removed {jit.clear_cache()} cached kernels")
    return 0


def _support(args: argparse.Namespace) -> int:
    if args.write is None:
        print(support_table())
    else:
        text = replace_section(args.write.read_text(encoding="utf-8"), "support", support_table())
        args.write.write_text(text, encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cuattn", description="Exact attention for NumPy, CuPy, PyTorch and JAX arrays.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, handler: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=handler)
        return sub

    command("info", _info, "show the GPU, CuPy, NVRTC, the kernel cache, and which backend a NumPy call uses and why")
    demo = command("demo", _demo, "classify the UCI handwritten digits by attention, leave-one-out, and compare backends")
    demo.add_argument("--figure", type=Path, default=Path("demo_neighbours.png"), help="picture to write (%(default)s)")
    prewarm = command("compile", _compile, "compile kernels into the cache ahead of their first call; needs no GPU")
    prewarm.add_argument("--arch", nargs="+", required=True, help="architectures as NVRTC spells them: sm_80, sm_90a, ...")
    prewarm.add_argument("--all", action="store_true", help="every plan, not only the most used")
    command("clear-cache", _clear_cache, "remove every cached kernel")
    support = command("support", _support, "print the table of what each kernel serves, as Markdown")
    support.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers in FILE instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    return int(args.handler(args))
