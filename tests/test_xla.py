"""XLA's structures, made by hand: what a handler reads of them, and what it asks XLA for."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from cuattn import xla

ALLOCATED = 1 << 20
KEPT: list[Any] = []
"""XLA's own structures outlive every call, and readers of them are kept by their addresses."""


class Xla:
    """The memory of call frames and an Api of Python functions."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.freed: list[tuple[int, int]] = []
        self.errors: list[str] = []
        functions = {
            xla.STREAM_GET: self.stream,
            xla.MEMORY_ALLOCATE: self.allocate,
            xla.MEMORY_FREE: self.free,
            xla.ERROR_CREATE: self.error,
        }
        pointers = {n: xla._Function(function) for n, function in functions.items()}
        KEPT.append(pointers)
        self.api = self.words(
            *[ctypes.cast(pointers[n], ctypes.c_void_p).value or 0 if n in pointers else 0 for n in range(xla.API_WORDS)]
        )

    def words(self, *values: int) -> int:
        memory = (ctypes.c_uint64 * len(values))(*values)
        KEPT.append(memory)
        return ctypes.addressof(memory)

    def stream(self, request: int) -> None:
        """A stream for each context."""
        size, _, context, _ = (ctypes.c_uint64 * 4).from_address(request)
        assert size == 32
        self.asked.append(context)
        ctypes.c_uint64.from_address(request + 24).value = context + 1

    def allocate(self, request: int) -> None:
        ctypes.c_uint64.from_address(request + 40).value = ALLOCATED

    def free(self, request: int) -> None:
        _, _, _, size, address = (ctypes.c_uint64 * 5).from_address(request)
        self.freed.append((address, size))

    def error(self, request: int) -> int:
        text = ctypes.c_uint64.from_address(request + 16).value
        self.errors.append(ctypes.string_at(text).decode())
        return 1

    def frame(self, arguments: list[int], results: list[int], text: bytes, context: int) -> int:
        """The address of a call frame."""
        memory = ctypes.create_string_buffer(text, len(text))
        KEPT.append(memory)
        values = [self.words(*[self.words(48, 0, 11, data, 0, 0) for data in part]) for part in (arguments, results)]
        attribute = self.words(self.words(ctypes.addressof(memory), len(text)))
        lists = (0, 0, len(arguments), 0, values[0], 0, 0, len(results), 0, values[1], 0, 0, 1, 0, 0, attribute)
        return self.words(0, 0, self.api, context, 0, *lists)


def test_a_handler_reads_what_a_frame_holds_now() -> None:
    """XLA uses its memory again: the same addresses hold another call's buffers and another program."""
    made, seen = Xla(), list[tuple[Any, ...]]()

    def run(frame: xla.Frame) -> None:
        seen.append((frame.arguments, frame.results, frame.text, frame.stream(), frame.allocate(64)))
        frame.free(*seen[-1][-1])

    handler = xla.handler(run)
    first = made.frame([1 << 12, 2 << 12], [3 << 12], b"first", 70)
    other = made.frame([4 << 12], [5 << 12, 6 << 12], b"another text", 80)
    contents = [ctypes.string_at(frame, 8 * xla.FRAME_WORDS) for frame in (first, other)]
    for n in (0, 1, 0):
        ctypes.memmove(first, contents[n], len(contents[n]))
        assert handler(first) is None
    mine = ([1 << 12, 2 << 12], [3 << 12], b"first", 71, (ALLOCATED, 64))
    assert seen == [mine, ([4 << 12], [5 << 12, 6 << 12], b"another text", 81, (ALLOCATED, 64)), mine]
    assert made.asked == [70, 80, 70] and made.freed == [(ALLOCATED, 64)] * 3 and not made.errors


def test_each_question_for_a_stream_has_memory_of_its_own() -> None:
    """A handler in another thread asks while the first one still waits for its answer."""
    made, seen = Xla(), dict[int, int]()
    answer = made.stream

    def stream(request: int) -> None:
        context = ctypes.c_uint64.from_address(request + 16).value
        if context == 70:
            other = threading.Thread(target=lambda: handler(made.frame([], [], b"", 80)))
            other.start()
            other.join()
        answer(request)

    slow = xla._Function(stream)
    KEPT.append(slow)
    ctypes.c_uint64.from_address(made.api + 8 * xla.STREAM_GET).value = ctypes.cast(slow, ctypes.c_void_p).value or 0
    handler = xla.handler(lambda frame: seen.update({frame.context: frame.stream()}))
    for _ in range(2):
        seen.clear()
        assert handler(made.frame([], [], b"", 70)) is None
        assert seen == {70: 71, 80: 81}


def test_an_exception_is_an_error_of_the_program() -> None:
    made = Xla()

    def run(frame: xla.Frame) -> None:
        raise ValueError("q: got too little")

    assert xla.handler(run)(made.frame([], [], b"", 0)) == 1
    assert made.errors == ["ValueError: q: got too little"]
