"""`python -m bench compare OLD NEW`: two files of rows, case by case; a regression check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.results import Row, key, load
from bench.tables import label

TOLERANCE = 5.0
"""Percent by which a time or a memory may grow; the spread of a case from run to run is of this size."""


class Change(NamedTuple):
    """One case that both files have."""

    name: str
    unit: str
    old: float
    new: float

    @property
    def percent(self) -> float:
        return 100 * (self.new / self.old - 1) if self.old else 0.0


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Of the cases in both, time where it was measured and bytes where they were; the largest growth first."""
    before = {key(row): row for row in old}
    found = []
    for row in new:
        other = before.get(key(row))
        if other is None:
            continue
        name = f"{row['bench']:20} {label(row).replace(' | ', ' ')}"
        for field, unit in (("us", "us"), ("bytes", "bytes")):
            if row.get(field) is not None and other.get(field) is not None:
                found.append(Change(name, unit, other[field], row[field]))
    return sorted(found, key=lambda change: -change.percent)


def compare(old: Path, new: Path, tolerance: float = TOLERANCE) -> int:
    """Print every case and the regressions; 1 if there is one, else 0. Raises ValueError where nothing can be compared."""
    rows = load(old), load(new)
    gpus = {row["gpu"] for part in rows for row in part}
    if len(gpus) > 1:
        raise ValueError(f"got rows of {', '.join(sorted(gpus))}, expected those of one GPU")
    found = changes(*rows)
    if not found:
        raise ValueError(f"{old} and {new} have no case in common")
    for change in found:
        mark = "slower" if change.percent > tolerance and change.unit == "us" else ""
        mark = "more" if change.percent > tolerance and change.unit == "bytes" else mark
        print(f"{change.name:70} {change.old:12.1f} -> {change.new:12.1f} {change.unit:5} {change.percent:+7.1f} % {mark}")
    ones = len(rows[0]) - len({key(r) for r in rows[0]} & {key(r) for r in rows[1]})
    worse = [change for change in found if change.percent > tolerance]
    print(f"{len(found)} compared, {len(worse)} worse by more than {tolerance:g} %; {ones} cases only in {old}")
    return 1 if worse else 0
