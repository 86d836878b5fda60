"""The cubin cache on disk: what may go wrong with a file, a folder, or another process. Needs NVRTC but no GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuattn
from cuattn import jit
from cuattn.codegen import units

ARCH = "sm_80"
SOURCE = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1.0f; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing in memory."""
    pytest.importorskip("cupy")
    try:
        jit.key_of(SOURCE, ARCH)
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(folder))
    forget(monkeypatch)
    return folder


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would start."""
    monkeypatch.setattr(jit, "_memory", {})
    jit._warn_once.cache_clear()


def never(*args: Any) -> Any:
    raise AssertionError("compiled although the cache has it")


def test_second_process_reads_the_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = jit.build(SOURCE, ARCH)
    assert first.path is not None and first.path.parent == cache and first.path.read_bytes() == first.image
    assert first.path.with_suffix(".cu").read_text() == SOURCE
    forget(monkeypatch)
    monkeypatch.setattr(jit, "_compile", never)
    assert jit.build(SOURCE, ARCH) == first


def _truncate(cubin: Path) -> None:
    cubin.write_bytes(cubin.read_bytes()[:100])


def _empty(cubin: Path) -> None:
    cubin.write_bytes(b"")


def _flip(cubin: Path) -> None:
    image = bytearray(cubin.read_bytes())
    image[len(image) // 2] ^= 1
    cubin.write_bytes(image)


def _remove_sidecar(cubin: Path) -> None:
    cubin.with_suffix(".json").unlink()


def _garble_sidecar(cubin: Path) -> None:
    cubin.with_suffix(".json").write_bytes(b"\xff{")


def _foreign_sidecar(cubin: Path) -> None:
    cubin.with_suffix(".json").write_text(json.dumps(["not", "ours"]))


def _sidecar_of_another(cubin: Path) -> None:
    cubin.with_suffix(".json").write_text(json.dumps({"sha256": "0" * 64, "log": ""}))


@pytest.mark.parametrize(
    "damage",
    [_truncate, _empty, _flip, _remove_sidecar, _garble_sidecar, _foreign_sidecar, _sidecar_of_another],
    ids=lambda f: f.__name__.strip("_"),
)
def test_damaged_cubin_is_rebuilt(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    first = jit.build(SOURCE, ARCH)
    assert first.path is not None
    damage(first.path)
    forget(monkeypatch)
    assert jit.build(SOURCE, ARCH)[:2] == first[:2]  # path and image; the log holds a compile time
    assert first.path.read_bytes() == first.image
    forget(monkeypatch)
    monkeypatch.setattr(jit, "_compile", never)
    assert jit.build(SOURCE, ARCH)[:2] == first[:2]


def test_unwritable_folder_falls_back_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file where a folder should be: even root cannot write below it")
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot write") as seen:
        first = jit.build(SOURCE, ARCH)
        second = jit.build(SOURCE + "\n", ARCH)
    assert len(seen) == 1
    assert first.path is None and second.path is None
    assert first.image.startswith(b"\x7fELF")
    monkeypatch.setattr(jit, "_compile", never)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.build(SOURCE, ARCH) is first
        cuattn.backend_info()


def test_processes_fill_the_cache_at_once(cache: Path, tmp_path: Path) -> None:
    """Several processes, the same kernels, one folder: all succeed and agree, and no temporary file stays."""
    start = tmp_path / "start"
    code = f"""
import pathlib, time
from cuattn import jit
jit.key_of("", {ARCH!r})
print("ready", flush=True)
while not pathlib.Path({str(start)!r}).exists():
    time.sleep(0.001)
for n in range(8):
    cubin = jit.build({SOURCE!r} + "//" * n, {ARCH!r})
    assert cubin.path is not None and cubin.path.read_bytes() == cubin.image
"""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start.touch()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {p.suffix for p in cache.iterdir()} == {".cu", ".cubin", ".json"}
    assert len(list(cache.iterdir())) == 8 * 3


def test_threads_compile_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_one = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda *args: compiled.append(args) or compile_one(*args))
    barrier, results = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        results.append(jit.build(SOURCE, ARCH))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    assert len(results) == 8 and len(set(results)) == 1


def test_many_in_order() -> None:
    sources = [SOURCE + "//" * n for n in range(5)]
    built = jit.compile_many([(source, ARCH) for source in sources])
    assert built == [jit.build(source, ARCH) for source in sources]


def test_key_covers_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed header, source or architecture is another kernel; a touched file is not."""
    key = jit.key_of(SOURCE, ARCH)
    assert key == jit.key_of(SOURCE, ARCH)
    assert len({key, jit.key_of(SOURCE + " ", ARCH), jit.key_of(SOURCE, "sm_90a")}) == 3
    copy = tmp_path / "kernels"
    shutil.copytree(jit.kernel_folder(), copy)
    monkeypatch.setattr(jit, "kernel_folder", lambda: copy)
    try:
        jit._header_digest.cache_clear()
        assert jit.key_of(SOURCE, ARCH) == key
        header = next(copy.rglob("mask.cuh"))
        header.write_text(header.read_text() + "\n")
        jit._header_digest.cache_clear()
        assert jit.key_of(SOURCE, ARCH) != key
    finally:
        jit._header_digest.cache_clear()


def test_clear_cache_deletes_its_own_files_alone(cache: Path) -> None:
    jit.build(SOURCE, ARCH)
    (cache / "notes.txt").write_text("mine")
    assert jit.clear_cache() == 1
    assert [p.name for p in cache.iterdir()] == ["notes.txt"]
    assert jit.clear_cache() == 0


@pytest.mark.parametrize("expression", ["s\n + no_such_function(s)", "s + no_such_name"])
def test_user_code_that_does_not_compile(expression: str) -> None:
    """The error shows the compiler's message beside the user's own line, and where the source is."""
    q = np.zeros((1, 8, 1, 64), np.float16)
    plan = cuattn.explain(q, q, q, score_mod=cuattn.UserMod(expression), arch=ARCH)
    with pytest.raises(cuattn.CompileError) as error:
        jit.build(units(plan)["forward"].source, ARCH)
    message = str(error.value)
    assert message.startswith("score_mod")
    assert f"    {expression.splitlines()[-1]}\n" in message
    source = Path(message.rsplit("source: ", 1)[1].strip())
    assert expression in source.read_text()


@pytest.mark.gpu
def test_call_without_a_writable_cache(tmp_path: Path) -> None:
    """A kernel that is only in memory runs."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "CUATTN_CACHE_DIR": str(tmp_path / "file" / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import cupy, cuattn; q = cupy.ones((1, 8, 2, 64), 'f'); print(float(cuattn.attention(q, q, q).sum()))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(run.stdout) == 8 * 2 * 64
    assert run.stderr.count("cannot write") == 1


@pytest.mark.gpu
def test_damaged_cubin_is_rebuilt_before_a_call(cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import cupy, cuattn; q = cupy.ones((1, 8, 2, 64), 'f'); print(float(cuattn.attention(q, q, q).sum()))"
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert float(run.stdout) == 8 * 2 * 64
        for path in cache.glob("*.cubin"):
            _truncate(path)
