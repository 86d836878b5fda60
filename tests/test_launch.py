"""Parameter structs of launches, and the memory in which the driver reads them, without a GPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cuattn import chain, tma
from cuattn.backward import POINTERS as BACKWARD_POINTERS
from cuattn.backward import WORKSPACE, ZEROED, make_backward_plan
from cuattn.catalogue import backward_problem_of, problem_of
from cuattn.chain import ChainedFunction
from cuattn.codegen import Unit, units
from cuattn.launch import Launch, Struct, backward_struct, forward_struct
from cuattn.plan import make_plan
from cuattn.problem import POINTERS, SLOT
from cuattn.registry import DEVICES

pytest.importorskip("cupy")

PLAN = make_plan(problem_of("bfloat16"), DEVICES["sm_90a"])
GIVEN = ("q", "k", "v", "out", "seed")
POSITION = {SLOT[name]: n for n, name in enumerate(GIVEN)}
MAPS = ("q", "k", "v")


class Kernel:
    """What `jit.load` gives: keeps the bytes that each launch would copy."""

    def __init__(self, size: int) -> None:
        self.size, self.seen, self.before = size, list[bytes](), lambda: None

    def __call__(self, grid: Any, block: Any, arguments: Sequence[Any], smem_bytes: int, stream: Any) -> None:
        self.before()
        (argument,) = arguments
        self.seen.append(ctypes.string_at(argument.ptr, self.size))


def driver(place: int) -> Any:
    """An encoder that writes the address of the array into one word of its map."""

    def encode(operand: Any, box: Any, address: int) -> bytes:
        words = [0xABCD] * (tma.MAP_BYTES // 8)
        words[place] = address
        return struct.pack(f"<{len(words)}Q", *words)

    return encode


def launch_of(made: Struct) -> tuple[Launch, Kernel]:
    kernel = Kernel(len(made.image))
    unit: Unit = units(PLAN)["forward"]
    return Launch(kernel, 1, unit.threads, unit.smem_bytes, made, POSITION), kernel


def words_of(image: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(image) // 8}Q", image)


@pytest.mark.parametrize("place", [0, 3])
def test_a_launch_reads_its_own_words_and_maps(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Wherever the driver puts an address: memory is used again only where that is known."""
    monkeypatch.setattr(tma, "encode", driver(place))
    made = forward_struct(PLAN, True)
    launch, kernel = launch_of(made)
    calls = [[base + 16 * n for n in range(len(GIVEN))] for base in (1 << 12, 1 << 20, 1 << 33)]
    for words in calls:
        launch(words, None)
    assert PLAN.uses_tma
    first = len(MAPS) * tma.MAP_BYTES // 8
    for words, image in zip(calls, kernel.seen, strict=True):
        found = words_of(image)
        assert [found[n * tma.MAP_BYTES // 8 + place] for n in range(len(MAPS))] == words[: len(MAPS)]
        assert [found[first + SLOT[name]] for name in GIVEN] == words
        others = [found[first + n] for n, name in enumerate(POINTERS) if name not in GIVEN]
        assert others == [0] * len(others)
        assert image[8 * (first + len(POINTERS)) :] == made.image[8 * (first + len(POINTERS)) :]


def test_launches_at_the_same_time_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's launch may begin before the driver has read the words of this one."""
    monkeypatch.setattr(tma, "encode", driver(0))
    launch, kernel = launch_of(forward_struct(PLAN, True))
    mine, others = [1 << 12] * len(GIVEN), [1 << 20] * len(GIVEN)

    def other() -> None:
        kernel.before = lambda: None
        launch(others, None)

    for _ in range(2):
        kernel.seen.clear()
        kernel.before = other
        launch(mine, None)
        assert [words_of(image)[0] for image in kernel.seen] == [others[0], mine[0]]


def test_kernels_that_attend_read_pairs_in_the_place_of_inputs() -> None:
    problem = problem_of("float32", precision="tf32x3")
    plan = make_backward_plan(backward_problem_of(problem), DEVICES["sm_90a"])
    assert plan.split_inputs
    first = plan.backward.first_slot
    for attends in (False, True):
        places = dict(backward_struct(plan, plan.launches[0], attends).words)
        assert places[SLOT["q"]] == SLOT["split_q" if attends else "q"]
        dq = next(place for place, slot in places.items() if slot == plan.backward.slot("dq"))
        dout = dq + BACKWARD_POINTERS.index("dout") - BACKWARD_POINTERS.index("dq")
        assert places[dout] == first + BACKWARD_POINTERS.index("split_dout" if attends else "dout")


def test_a_chained_launch_tells_the_driver_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's structs as cuda.h lays them out: CUlaunchConfig, and one CUlaunchAttribute of 72 bytes."""
    seen = []

    def driver(config: int, function: int, pointers: int, extra: None) -> int:
        grid_and_block = struct.unpack("<7I", ctypes.string_at(config, 28))
        stream, attributes, count = struct.unpack("<QQI", ctypes.string_at(config + 32, 20))
        argument = struct.unpack("<Q", ctypes.string_at(pointers, 8))[0]
        seen.append((grid_and_block, stream, ctypes.string_at(attributes, 72), count, function, argument))
        return len(seen) - 1

    monkeypatch.setattr(chain, "_launch", lambda: driver)
    handle = ChainedFunction(SimpleNamespace(ptr=77))
    arguments, stream = handle.arguments(1234), SimpleNamespace(ptr=55)
    handle((8, 16, 1), (256, 1, 1), arguments, 4096, stream)
    allowed = struct.pack("<iiii", 6, 0, 1, 0)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    ((sizes, *rest),) = seen
    assert sizes == (8, 16, 1, 256, 1, 1, 4096)
    assert (rest[0], rest[1][:16], rest[2:]) == (55, allowed, [1, 77, 1234])
    with pytest.raises(RuntimeError, match="error 1"):
        handle((8, 16, 1), (256, 1, 1), arguments, 4096, stream)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_that_prepares_rows_knows_what_to_clear(dtype: str, deterministic: bool) -> None:
    """All that others add to, which lies at the start of the workspace."""
    backward = backward_problem_of(problem_of(dtype), deterministic=deterministic)
    plan = make_backward_plan(backward, DEVICES["sm_90a"])
    made = backward_struct(plan, plan.launches[0], False)
    first = dict((slot, place) for place, slot in made.words)[backward.slot("dout")]
    # After the pointers: strides of six arrays, rows_kv, q_slabs, dq_split.
    words = words_of(made.image)[first + len(BACKWARD_POINTERS) + 18 :]
    assert words[:4] == (plan.rows_kv, plan.slabs, plan.dq_elements, plan.zeroed // 16)
    assert 0 < plan.zeroed == sum(plan.workspace[: len(ZEROED)]) and plan.zeroed % 16 == 0
    assert WORKSPACE[: len(ZEROED)] == ZEROED and plan.workspace[ZEROED.index("dq_sum")]
