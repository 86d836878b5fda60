"""XLA's typed foreign function interface, from Python: handlers that XLA calls with the buffers of a compiled program.

The C structures are those of xla/ffi/api/c_api.h, whose ABI only grows at the end. Everything in them is a word of 8 bytes or
padded to one, so a structure is read as a list of words:

    CallFrame  struct_size extension api context stage Args Rets Attrs future
    Args, Rets struct_size extension size types values           values: pointers to Buffer
    Attrs      struct_size extension size types names values     a string's value points to a ByteSpan
    Buffer     struct_size extension dtype data rank dims
    ByteSpan   pointer length
    Api        struct_size extension Version(3) internal Error_Create Error_GetMessage Error_Destroy Handler_Register
               Stream_Get Type_Register ExecutionContext_Get State_Set State_Get DeviceMemory_Allocate DeviceMemory_Free
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

EXTENSION, API, CONTEXT, ARGUMENTS, RESULTS, ATTRIBUTES = 1, 2, 3, 5, 10, 15
FRAME_WORDS = 21
COUNT, ARGUMENT_VALUES, ATTRIBUTE_VALUES = 2, 4, 5
"""Words of Args, Rets and Attrs."""
DATA = 3
ERROR_CREATE, ERROR_MESSAGE, ERROR_DESTROY, STREAM_GET, MEMORY_ALLOCATE, MEMORY_FREE = 6, 7, 8, 10, 15, 16
API_WORDS = 17
METADATA_EXTENSION = 1
VERSION = (0, 1)
"""The oldest ABI that has all of this: jaxlib 0.5."""
ALIGNMENT = 16
"""The largest that XLA may be asked for, and the widest access to a workspace; its allocator aligns to more."""
INTERNAL, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 13, 3, 8, 12
"""XLA's error codes."""

_Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_Quick = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
"""For functions that wait for nothing: Python's lock is kept."""
_words = functools.cache(lambda count: ctypes.c_uint64 * count)


@functools.lru_cache(4096)
def _at(address: int, count: int) -> memoryview:
    """Memory at an address, as words that can be read. XLA keeps its structures, so the same addresses come again."""
    return memoryview(_words(count).from_address(address)).cast("B").cast("Q")


@functools.lru_cache(4096)
def _text_at(address: int, length: int) -> memoryview:
    """Memory at an address, as bytes."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


class Frame(NamedTuple):
    """One execution of a call: addresses of its buffers, and the text that was compiled into it."""

    arguments: list[int]
    results: list[int]
    text: bytes
    api: _Api
    context: int

    def stream(self) -> int:
        """The CUDA stream of the program."""
        return self.api.stream(self.context)

    def allocate(self, size: int) -> tuple[int, int]:
        """Device memory from XLA's allocator as (address, size), until `free`: reused in the order of the stream."""
        if not size:
            return 0, 0
        request = _words(6)(48, 0, self.context, size, ALIGNMENT, 0)
        error = self.api.call(MEMORY_ALLOCATE, request)
        if error:
            raise MemoryError(f"XLA has no room for a workspace of {size} bytes: {self.api.message(error)}")
        return int(request[5]), size

    def free(self, address: int, size: int) -> None:
        """Give back what `allocate` gave."""
        if not size:
            return
        self.api.call(MEMORY_FREE, _words(5)(40, 0, self.context, size, address))


_frame = tuple.__new__  # half the time of Frame(...): that one packs its arguments twice


class _Api:
    """XLA's functions by their place in Api."""

    def __init__(self, address: int) -> None:
        words = _at(address, API_WORDS)
        errors, memory = (ERROR_CREATE, ERROR_MESSAGE, ERROR_DESTROY), (MEMORY_ALLOCATE, MEMORY_FREE)
        self._functions = {n: _Function(words[n]) for n in (*errors, *memory)}
        self._stream_get = _Quick(words[STREAM_GET])
        self._free: list[tuple[memoryview, int]] = []

    def stream(self, context: int) -> int:
        """The CUDA stream of an execution."""
        try:
            request, address = self._free.pop()  # each question has memory of its own, whatever other threads ask
        except IndexError:
            words = _words(4)(32)
            request, address = memoryview(words).cast("B").cast("Q"), ctypes.addressof(words)
        request[2] = context
        self._stream_get(address)
        found = request[3]
        self._free.append((request, address))
        return found

    def call(self, function: int, request: Any) -> int | None:
        """The error that a function returns, an address; None if all is well."""
        result: int | None = self._functions[function](ctypes.addressof(request))
        return result

    def message(self, error: int) -> str:
        """What an error that XLA returned says; the error is gone afterwards."""
        request = _words(4)(32, 0, error, 0)
        self.call(ERROR_MESSAGE, request)
        text = ctypes.string_at(request[3]).decode(errors="replace")
        self.call(ERROR_DESTROY, _words(3)(24, 0, error))
        return text

    def error(self, error: BaseException) -> int | None:
        """An XLA error with the message of an exception."""
        kinds: dict[type[BaseException], int] = {MemoryError: RESOURCE_EXHAUSTED, NotImplementedError: UNIMPLEMENTED}
        user = INVALID_ARGUMENT if isinstance(error, (ValueError, TypeError)) else INTERNAL
        message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
        return self.call(ERROR_CREATE, _words(4)(32, 0, ctypes.addressof(message), kinds.get(type(error), user)))


_api = functools.cache(_Api)


def handler(run: Callable[[Frame], None]) -> Any:
    """A C function that XLA can call, kept alive by the caller; exceptions of `run` become errors of the program."""

    def execute(address: int) -> int | None:
        words = _at(address, FRAME_WORDS).tolist()
        if words[EXTENSION] and _answer_metadata(words[EXTENSION]):
            return None
        api = _api(words[API])
        try:
            arguments = _buffers(words[ARGUMENTS + COUNT], words[ARGUMENTS + ARGUMENT_VALUES])
            results = _buffers(words[RESULTS + COUNT], words[RESULTS + ARGUMENT_VALUES])
            span = _at(words[ATTRIBUTES + ATTRIBUTE_VALUES], 1)[0]
            text = _text_at(*_at(span, 2)).tobytes()
            run(_frame(Frame, (arguments, results, text, api, words[CONTEXT])))
        except BaseException as error:  # nothing may pass through a C function
            return api.error(error)
        return None

    return _Function(execute)


def _buffers(count: int, values: int) -> list[int]:
    return [_at(buffer + 8 * DATA, 1)[0] for buffer in _at(values, count).tolist()] if count else []


def _answer_metadata(extension: int) -> bool:
    """Whether XLA asks for the handler's version instead of calling it; the answer is written where it asks for it."""
    while extension:
        _, kind, following = _at(extension, 3)
        if kind & 0xFFFFFFFF == METADATA_EXTENSION:
            metadata = _at(extension + 24, 1)[0]
            # Metadata: struct_size, Version (struct_size, extension, two ints), traits
            ctypes.c_int32.from_address(metadata + 24).value, ctypes.c_int32.from_address(metadata + 28).value = VERSION
            ctypes.c_uint32.from_address(metadata + 32).value = 0
            return True
        extension = following
    return False
