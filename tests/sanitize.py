"""A small set of every kernel, for a slow tool: `compute-sanitizer --tool memcheck python -m tests.sanitize`.

Runs each arithmetic with each kind of memory access (aligned and not, tiled masks, packed, lengths, a split over the keys) at
small sizes, and checks the results. `--tool racecheck`, `initcheck` and `synccheck` work the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.cases import KINDS, SMALL, Case
from tests.tolerance import verify


def cases() -> Iterator[Case]:
    for dtype, precision in KINDS:
        yield Case(dtype, precision, 2, 70, 133, 4, 2, 64, mask="causal")
        yield Case(dtype, precision, 1, 33, 65, 2, 1, 33, mask="window", layout="offset")
        yield Case(dtype, precision, 2, 70, 133, 2, 1, 64, mask="block_sparse", mods=("bias",))
        yield Case(dtype, precision, 4, 40, 70, 2, 1, 128, sequences="packed", dropout=0.2)
        yield Case(dtype, precision, 4, 40, 70, 2, 1, 64, sequences="lens", sinks=True)
        yield Case(dtype, precision, 1, 3, 2003, 2, 1, 64)
    yield from SMALL


def main() -> int:
    import cupy

    failures = 0
    for case in dict.fromkeys(cases()):
        out, lse = case.run(cupy.asarray, return_lse=True)
        try:
            verify(case, cupy.asnumpy(out), cupy.asnumpy(lse))
        except AssertionError as error:
            failures += 1
            print(f"{case}: {error}")
    print(f"{failures} wrong results")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
