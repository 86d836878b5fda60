"""Rows of results: bench/results/<gpu>.json, one list per GPU."""

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

Row = dict[str, Any]

KEY = ("bench", "dtype", "precision", "d", "dv", "heads", "heads_kv", "batch", "seqlen_q", "seqlen_k", "mask", "mods")
"""The fields that say which case a row belongs to. The others: us (median microseconds), tflops, gbps, bound_pct (percent of
the measured bound), peers {name: us}, gpu, versions, source_hash, date; and where they apply, error (largest error against
the float64 reference, relative to the largest output), errors {name: {array: [largest, root of the mean square]}} of every
library on the same inputs, bytes (memory beyond inputs and outputs, of a backward also beyond gradients and lse), planned (the
bytes of it that the plan announces), peer_bytes {name: bytes}, p99 and peers_p99 (99 of 100 calls took less), whole (us
with the core calls beyond which us is counted), plain (us of the same forward without its score
modifications, in turn with it)."""
RATED = ("forward", "backward", "matrix", "matrix/backward")
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


def is_backward(row: Row) -> bool:
    """Whether a row is about gradients."""
    return not {"backward", "autograd"}.isdisjoint(row["bench"].split("/"))


def best_peer(row: Row) -> float:
    """Microseconds of the fastest peer of a row that has some."""
    return float(min(row["peers"].values()))
