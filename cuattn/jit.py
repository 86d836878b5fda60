"""Step 4: text and headers to a cubin on disk, and a cubin to a CUDA function.

The compile half needs NVRTC but no GPU. A cubin's key is the hash of every byte that goes into it: the source, all of our
headers, the CUDA headers' and NVRTC's version, the architecture and the options. Files are written beside their name and
renamed into place, so any number of processes may fill one cache; a checksum in the sidecar finds a torn or edited file, which
is then built again. The source is kept beside the cubin for reading.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cuattn.chain import ChainedFunction, chains
from cuattn.codegen import Unit


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log and the path of the source."""


class Cubin(NamedTuple):
    """A compiled unit: `path` on disk, or None where the cache cannot be written; `log` is the compiler's."""

    path: Path | None
    image: bytes
    log: str


def kernel_folder() -> Path:
    """kernels/ of a checkout, or its copy inside the wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_kernels", here.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the kernel sources are missing: neither {here / '_kernels'} nor {here.parent / 'kernels'} exists")


def cache_folder() -> Path:
    """CUATTN_CACHE_DIR, or cuattn/ in the user's cache directory."""
    chosen = os.environ.get("CUATTN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuattn"


def clear_cache() -> int:
    """Delete the cubins on disk; returns their number."""
    count = 0
    for path in cache_folder().glob("*"):
        if re.fullmatch(r"(failed-)?[0-9a-f]{40}\.(cubin|json|cu)", path.name):
            count += path.suffix == ".cubin"
            path.unlink(missing_ok=True)
    return count


@functools.lru_cache(1)
def _header_digest() -> str:
    folder, digest = kernel_folder(), hashlib.sha256()
    for path in sorted(folder.rglob("*.cu*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.lru_cache(1)
def _nvrtc() -> tuple[Any, tuple[int, int], str]:
    """(CuPy's NVRTC binding, its version, folder of the CUDA headers)."""
    import ml_dtypes  # noqa: F401  # before CuPy, which looks for it once
    from cuda.pathfinder import find_nvidia_header_directory
    from cupy.cuda import nvrtc

    include = find_nvidia_header_directory("cudart")
    if include is None:
        raise CompileError("the CUDA headers are missing: install cuattn[cuda12] or cuattn[cuda13]")
    return nvrtc, nvrtc.getVersion(), include


def options(arch: str) -> tuple[str, ...]:
    """NVRTC's options, without include folders."""
    base = ("--std=c++17", f"-arch={arch}", "-default-device", "--ptxas-options=-v")
    return (*base, "-lineinfo") if os.environ.get("CUATTN_LINEINFO") else base


def key_of(source: str, arch: str) -> str:
    """Name of a cubin in the cache."""
    _, version, include = _nvrtc()
    text = json.dumps([source, _header_digest(), version, _header_version(include), options(arch)])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@functools.lru_cache(1)
def _header_version(include: str) -> str:
    match = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", (Path(include) / "cuda_runtime_api.h").read_text(errors="replace"))
    return match[1] if match else "unknown"


_memory: dict[str, Cubin] = {}
_locks: dict[str, threading.Lock] = {}
_guard = threading.Lock()


def build(source: str, arch: str) -> Cubin:
    """The cubin of a translation unit: from memory, from disk, or compiled and stored.

    CompileError if NVRTC refuses it. A cache that cannot be written costs one warning and the next process's time.
    """
    key = key_of(source, arch)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _memory:
            _memory[key] = _read(key) or _store(key, source, _compile(source, arch, key))
        return _memory[key]


def compile_many(jobs: Iterable[tuple[str, str]], workers: int | None = None) -> list[Cubin]:
    """`build` for each (source, arch), in parallel threads: NVRTC releases the interpreter."""
    _nvrtc()  # NOTE: before there are threads, of which one might find CuPy half imported and NVRTC without its library
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: build(*job), jobs))


def _read(key: str) -> Cubin | None:
    """A cubin from disk whose checksum holds."""
    path = cache_folder() / f"{key}.cubin"
    try:
        image = path.read_bytes()
        sidecar = json.loads(path.with_suffix(".json").read_text())
        if sidecar["sha256"] == hashlib.sha256(image).hexdigest():
            return Cubin(path, image, sidecar["log"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _store(key: str, source: str, built: Cubin) -> Cubin:
    folder = cache_folder()
    sidecar = json.dumps({"sha256": hashlib.sha256(built.image).hexdigest(), "log": built.log})
    files = ((".cu", source.encode()), (".cubin", built.image), (".json", sidecar.encode()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, data in files:
            _replace(folder / f"{key}{suffix}", data)
    except OSError as error:
        _warn_once(f"cuattn: cannot write compiled kernels to {folder} ({error}); they are kept in memory only")
        return built
    return Cubin(folder / f"{key}.cubin", built.image, built.log)


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.lru_cache(None)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _compile(source: str, arch: str, key: str) -> Cubin:
    nvrtc, _, include = _nvrtc()
    for attempt in range(ATTEMPTS):
        program = nvrtc.createProgram(source, "cuattn.cu", (), ())
        try:
            nvrtc.compileProgram(program, (*options(arch), f"-I{kernel_folder()}", f"-I{include}"))
            # NOTE: CuPy's getCUBIN drops the last byte, which cuobjdump and the ELF format need.
            return Cubin(None, nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program) or str(error)
            if "libnvrtc-builtins" not in log or attempt + 1 == ATTEMPTS:
                raise CompileError(_explain(log, source, arch, key)) from None
        finally:
            nvrtc.destroyProgram(program)
    raise AssertionError("unreachable")


ATTEMPTS = 3
"""NVRTC opens a library of its own for each program, which fails now and then while many processes and threads compile."""


def _explain(log: str, source: str, arch: str, key: str) -> str:
    """The compiler's message with the user's own line, when a user's expression is at fault, and the source's path."""
    user = re.search(r'"?score_mod (\w+)"?\((\d+)\): error: (.*)', log)
    path: Path | None = cache_folder() / f"failed-{key}.cu"
    try:
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, source.encode())
    except OSError:
        path = None
    where = f"\nsource: {path}" if path else ""
    if user is None:
        return f"NVRTC could not compile a kernel for {arch}:\n{log}{where}"
    body = source.split(f'#line 1 "score_mod {user[1]}"\n', 1)[1].splitlines()
    line = body[int(user[2]) - 1] if int(user[2]) <= len(body) else ""
    return f"score_mod: the {user[1]} expression does not compile: {user[3]}\n    {line}\n{log}{where}"


# Cubin -> function ----------------------------------------------------------------------------------------------------

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def load(cubin: Cubin, unit: Unit) -> Any:
    """The kernel as a `cupy.cuda.Function` (or called like one) on the current device, allowed the shared memory it needs."""
    import cupy
    from cupy.cuda import driver

    if cubin.path is not None:
        function = cupy.RawModule(path=str(cubin.path)).get_function(unit.entry).kernel
    else:
        module = cupy.cuda.Module()
        module.load(cubin.image)
        function = module.get_function(unit.entry)
    if unit.smem_bytes > 48 * 1024:
        driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED_SIZE_BYTES, unit.smem_bytes)
    return ChainedFunction(function) if unit.chained and chains() else function


def prewarm(
    arch: str, all_plans: bool = False, progress: Callable[[int, int, str], None] | None = None, workers: int | None = None
) -> list[Path]:
    """Compile the kernels of the common plans (or all that the compile test knows) for `arch` into the cache; needs no GPU.

    Forward, gradients and attention over a cache. `progress(done, total, name)` is called after each kernel. Returns the paths
    of the cubins.
    """
    from cuattn.catalogue import kernels

    jobs = kernels(arch, everything=all_plans)
    paths, done = [], 0
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for cubin, plan in zip(pool.map(lambda source: build(source, arch), jobs), jobs.values(), strict=True):
            done += 1
            if cubin.path is not None:
                paths.append(cubin.path)
            if progress is not None:
                progress(done, len(jobs), str(plan))
    return paths
