"""A small set of every kernel, for a slow tool: `compute-sanitizer --tool memcheck python -m tests.sanitize`.

Runs each arithmetic with each kind of memory access (aligned and not, tiled masks, packed, lengths, a split over the keys,
pages, clusters, deterministic sums) at small sizes, and checks the results; arguments choose among the parts `forward`,
`backward`, `decode` and `latent`. `--tool racecheck`, `initcheck` and `synccheck` work the same way. Kernels are compiled in
parallel first: a run without the tool leaves them in the cache on disk. Every array is an allocation of its own, so that
nothing beside it can be read unnoticed.

racecheck reports races in backward_sm90 that are none, between writes and reads of the rows' statistics of a stage: one lane of
each warp gives a stage back, after a barrier among all that have read it, and the tool takes the reads of that lane alone for
done. Where every lane arrives (at q_empty and do_empty, with their counts) it reports nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import cuattn
from cuattn import arrays, call, jit
from cuattn.codegen import backward_units, decode_units, units
from cuattn.decode import DecodePlan
from tests import test_decode, test_decode_latent
from tests.cases import KINDS, SMALL, Case
from tests.conftest import CuPyBackend
from tests.test_decode import Decode
from tests.tolerance import verify, verify_gradients

BACKEND = CuPyBackend()


class Check(NamedTuple):
    """One call and what must be true of it."""

    name: str
    sources: Callable[[], Iterator[tuple[str, str]]]
    """(source, arch) of its kernels"""
    run: Callable[[], None]
    """raises AssertionError"""


def _attention(case: Case) -> Check:
    def sources() -> Iterator[tuple[str, str]]:
        plan: Any = cuattn.explain(**case.arguments())
        yield from ((unit.source, plan.device.arch) for unit in units(plan).values())

    def run() -> None:
        out, lse = case.run(BACKEND.put, return_lse=True)
        verify(case, BACKEND.get(out), BACKEND.get(lse))

    return Check(f"forward {case}", sources, run)


def _gradients(case: Case, deterministic: bool = False) -> Check:
    def sources() -> Iterator[tuple[str, str]]:
        yield from _attention(case).sources()
        plan: Any = cuattn.explain(**case.arguments(), backward=True, deterministic=deterministic)
        yield from ((unit.source, plan.device.arch) for unit in backward_units(plan).values())

    def run() -> None:
        out, lse = case.run(BACKEND.put, return_lse=True)
        gradients = case.run_backward(BACKEND.put, out, lse, deterministic=deterministic)
        verify_gradients(case, gradients, BACKEND.get(lse), BACKEND.get)

    return Check(f"backward {case}{' deterministic' * deterministic}", sources, run)


def _of_decode(plan: DecodePlan) -> Iterator[tuple[str, str]]:
    yield from ((unit.source, plan.device.arch) for unit in decode_units(plan).values())


def _cached(case: Decode) -> Check:
    def run() -> None:
        made = test_decode.put(BACKEND, test_decode.arguments(case))
        out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)
        test_decode.verify(case, BACKEND, out, lse, made)

    return Check(f"decode {case}", lambda: _of_decode(test_decode.plan_of(BACKEND, case)), run)


def _latent(case: Decode) -> Check:
    def given() -> dict[str, Any]:
        return test_decode.put(BACKEND, test_decode_latent.latent(case))

    def sources() -> Iterator[tuple[str, str]]:
        return _of_decode(test_decode_latent.plan_of(arrays.CUPY, given(), case, call.device_of(0)))

    def run() -> None:
        made = given()
        out, lse = cuattn.attention_with_kvcache(**made, return_lse=True)
        test_decode_latent.verify(case, BACKEND, out, lse, made["k_cache"])

    return Check(f"latent {case}", sources, run)


def forward() -> Iterator[Check]:
    for dtype, precision in KINDS:
        yield _attention(Case(dtype, precision, 2, 70, 133, 4, 2, 64, mask="causal"))
        yield _attention(Case(dtype, precision, 1, 33, 65, 2, 1, 33, mask="window", layout="offset"))
        yield _attention(Case(dtype, precision, 2, 70, 133, 2, 1, 64, mask="block_sparse", mods=("bias",)))
        yield _attention(Case(dtype, precision, 4, 40, 70, 2, 1, 128, sequences="packed", dropout=0.2))
        yield _attention(Case(dtype, precision, 4, 40, 70, 2, 1, 64, sequences="lens", sinks=True))
        yield _attention(Case(dtype, precision, 1, 3, 2003, 2, 1, 64))
    yield _attention(Case("bfloat16", "ieee", 2, 130, 264, 2, 1, 128, mask="causal", mods=("bias",)))  # in tiles, by TMA
    yield from map(_attention, SMALL)


def backward() -> Iterator[Check]:
    for dtype, precision in KINDS:
        plain = Case(dtype, precision, 2, 70, 133, 4, 2, 64, mask="causal")
        yield _gradients(plain)
        yield _gradients(plain, deterministic=True)
    base = Case("bfloat16", "ieee", 2, 130, 264, 2, 1, 64)
    for mods in (("bias_pairs",), ("bias",), ("bias_keys",), ("softcap", "bias_pairs")):  # 264: whole 16 bytes, in tiles
        yield _gradients(replace(base, mods=mods))
        yield _gradients(replace(base, mods=mods, seqlen_k=133, mask="causal"), deterministic=mods != ("bias",))
    yield _gradients(replace(base, head_dim=128, mods=("bias_pairs",), mask="causal"), deterministic=True)
    yield _gradients(replace(base, head_dim=128, mask="window"), deterministic=True)
    yield _gradients(replace(base, head_dim=256, mask="causal", sinks=True), deterministic=True)
    yield _gradients(replace(base, batch=4, sequences="packed", dropout=0.2))
    yield _gradients(replace(base, batch=4, sequences="lens", mask="block_sparse"), deterministic=True)
    yield _gradients(Case("float32", "tf32x3", 2, 70, 133, 2, 1, 64, mods=("bias_pairs",)), deterministic=True)
    yield _gradients(Case("float64", "ieee", 2, 70, 133, 2, 1, 33, layout="offset", mods=("bias_queries",)), deterministic=True)


def decode() -> Iterator[Check]:
    for kind in test_decode.KINDS:
        yield _cached(replace(kind, new=2, seqlen_q=2, rotary=32, page=5, lengths=(130, 0, 33)))
        yield _cached(replace(kind, lengths=(300, 33), deterministic=True, sinks=True))
    yield _cached(Decode(lengths=(300,), heads=(32, 8), dims=(128, 128)))  # in clusters, on Hopper
    yield _cached(Decode(lengths=(300,), heads=(4, 1), new=1, mods=("softcap",)))
    yield _cached(Decode("bfloat16", "int8", lengths=(300,), heads=(8, 8), scales=1))
    yield _cached(Decode("bfloat16", "float8_e4m3fn", lengths=(300, 33), scales=2, new=1, page=7))
    yield _cached(Decode(lengths=(100, 20, 7, 130), packed=True, seqlen_q=5, new=1, page=0))
    yield _cached(Decode(lengths=(100, 33), dims=(100, 36), aligned=False, leftpad=True, batch_idx=True))
    yield _cached(Decode(lengths=(100, 33), mask="tree", seqlen_q=7, new=7, splits=3))
    yield _cached(Decode("float32", lengths=(100, 33), heads=(4, 2), dims=(512, 400)))


def latent() -> Iterator[Check]:
    case_of = test_decode_latent.case_of
    yield _latent(case_of(lengths=(200, 1, 77), heads=(16, 1)))
    yield _latent(case_of(lengths=(200, 0), heads=(128, 1), page=8, seqlen_q=2, new=2))
    yield _latent(case_of("float16", lengths=(200, 65), heads=(16, 1), deterministic=True, mask="window"))
    yield _latent(case_of(lengths=(700,), heads=(16, 1), page=0, splits=5))
    yield _latent(case_of(lengths=(65, 3), heads=(16, 1), page=1))  # by decode.cu


PARTS = {"forward": forward, "backward": backward, "decode": decode, "latent": latent}


def main(names: list[str]) -> int:
    import cupy

    cupy.cuda.set_allocator(None)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}")
        return 2
    checks = {check.name: check for name in names or PARTS for check in PARTS[name]()}
    jit.compile_many(dict.fromkeys(source for check in checks.values() for source in check.sources()))
    failures = 0
    for name, check in checks.items():
        try:
            print(name, flush=True)
            check.run()
        except AssertionError as error:
            failures += 1
            print(error)
    print(f"{len(checks)} calls, {failures} wrong results")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
