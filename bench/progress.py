"""A bar over the cases of a part, above which their rows appear: on a terminal only, so that logs hold the rows alone."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from bench.timing import Deadline

Case = TypeVar("Case")


class Above(io.TextIOBase):
    """A terminal whose whole lines are written above the bar."""

    def __init__(self, terminal: TextIO, bar: Any) -> None:
        self._terminal, self._bar, self._line = terminal, bar, ""

    def write(self, text: str) -> int:
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            with self._bar.external_write_mode(file=self._terminal):
                self._terminal.write(lines + newline)
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()


def within(deadline: Deadline, cases: Sequence[Case], name: Callable[[Case], str] = str) -> Iterator[Case]:
    """The cases in order until the deadline; says which were left out, the first of them by its name."""
    with contextlib.ExitStack() as stack:
        advance = bar(len(cases), stack)
        for done, case in enumerate(cases):
            if deadline.passed:
                print(f"time limit: {len(cases) - done} of {len(cases)} not run, from {name(case)}")
                return
            yield case
            advance()


def bar(total: int, stack: contextlib.ExitStack) -> Any:
    """A function that advances a bar, which `stack` takes away; without a terminal or tqdm it does nothing."""
    terminal = sys.stdout
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda: None
    if not terminal.isatty():
        return lambda: None
    shown = stack.enter_context(tqdm(total=total, file=terminal, leave=False, unit="case"))
    stack.enter_context(contextlib.redirect_stdout(Above(terminal, shown)))
    return shown.update
