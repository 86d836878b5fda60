"""`python -m tests.source_hash`: the hash of kernels/ and cuattn/ as they stand.

A recorded GPU result carries this hash, so anybody can tell whether it was measured on the code at hand.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources() -> list[Path]:
    """Every file whose content decides what a kernel computes, in the order of their relative paths."""
    kernels = (p for p in (ROOT / "kernels").rglob("*") if p.is_file())
    package = (ROOT / "cuattn").rglob("*.py")
    return sorted((*kernels, *package), key=lambda p: p.relative_to(ROOT).as_posix())


def source_hash() -> str:
    """sha256 over the relative path and the bytes of every source file, each preceded by its length."""
    digest = hashlib.sha256()
    for path in sources():
        for part in (path.relative_to(ROOT).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_hash())
