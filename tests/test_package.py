"""The package as a whole: lazy imports, the layers of kernels/, documentation that tells the truth, the wheel."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from cuattn import cli, jit
from tests.source_hash import source_hash, sources

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
LAYERS = ("ptx", "tile", "attention", "mainloop", "kernel")
"""From the bottom up: a file includes its own layer and those below. Kernel files lie in kernels/ itself."""
CUDA_HEADERS = {"cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h"}
"""All that kernels/ may take from outside, so that NVRTC needs nothing but the CUDA runtime's own header folder."""
LAZY = ("cupy", "torch", "jax", "scipy", "pycparser", "sklearn", "matplotlib", "tqdm", "transformers")
WHEEL_LIMIT = 300_000


def run_python(*args: str, cwd: Path = ROOT, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@cache
def tracked_files() -> tuple[str, ...]:
    """Paths of the repository's own files: tracked, or new and not ignored."""
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return tuple(f for f in listing.stdout.splitlines() if (ROOT / f).is_file())


def test_import_loads_no_optional_or_slow_package() -> None:
    assert not set(LAZY) & set(run_python("-c", "import sys, cuattn; print(*sys.modules)").split())


def test_command_line_starts_without_optional_packages() -> None:
    script = "import sys, cuattn.cli as c; c._parser(); print(*sys.modules)"
    assert not set(LAZY) & set(run_python("-c", script).split())


@pytest.mark.parametrize("module", sorted(p.stem for p in (ROOT / "cuattn").glob("*.py") if not p.stem.startswith("__")))
def test_no_optional_package_is_imported_at_the_top_of_a_module(module: str) -> None:
    adapters = {"torch": {"torch"}, "flash_attn": {"torch"}, "flash_attn3": {"torch"}, "jax": {"jax"}}
    tree = ast.parse((ROOT / "cuattn" / f"{module}.py").read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not ({n.partition(".")[0] for n in names} & {"cupy", "torch", "jax"}) - adapters.get(module, set())


# kernels/: layers


def kernel_files() -> list[Path]:
    return sorted(p for p in KERNELS.rglob("*") if p.suffix in (".cu", ".cuh"))


def layer(path: Path) -> str:
    parts = path.relative_to(KERNELS).parts
    return parts[0] if len(parts) > 1 else "params" if path.name == "params.cuh" else "kernel"


def without_comments(path: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(encoding="utf-8"), flags=re.S)


def resolve(path: Path, name: str) -> Path:
    """The file that `#include "name"` in `path` means: relative to kernels/, or to the file's own folder."""
    for folder in (KERNELS, path.parent):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise AssertionError(f"{path.relative_to(ROOT)} includes {name!r}, which is not in kernels/")


def may_include(above: str, below: str) -> bool:
    if below == "params":
        return above in ("attention", "mainloop", "kernel")
    return above != "params" and LAYERS.index(below) <= LAYERS.index(above)


@pytest.mark.parametrize("path", kernel_files(), ids=lambda p: p.relative_to(KERNELS).as_posix())
def test_includes_point_downward(path: Path) -> None:
    assert layer(path) in (*LAYERS, "params")
    for opening, name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)', without_comments(path), re.M):
        if opening == "<":
            assert name in CUDA_HEADERS
        else:
            target = resolve(path, name)
            assert target.is_relative_to(KERNELS)
            assert may_include(layer(path), layer(target)), f"{layer(path)} includes {layer(target)}: {name}"


@pytest.mark.parametrize("path", kernel_files(), ids=lambda p: p.relative_to(KERNELS).as_posix())
def test_each_layer_keeps_to_its_own_words(path: Path) -> None:
    text = without_comments(path)
    if layer(path) != "ptx":
        assert not re.search(r"\b(asm|__asm__)\b", text), "assembly belongs into kernels/ptx/"
    if layer(path) == "attention":
        assert not re.search(r"\b(threadIdx|__shared__|__syncthreads|mbarrier\w*)\b", text), "attention/ is pure mathematics"
    assert "__CUDA_ARCH__" not in text, "the plan chooses the file, not the preprocessor"


def test_there_are_kernels_to_check() -> None:
    assert KERNELS / "params.cuh" in kernel_files()
    assert {layer(p) for p in kernel_files()} == {*LAYERS, "params"}


# Documentation


def markdown_files() -> list[str]:
    return [f for f in tracked_files() if f.endswith(".md")]


PATH = re.compile(r"(?<![\w./<$-])((?:cuattn|kernels|tests|bench|docs|examples|shared|\.ci)/[\w./*-]*[\w*/])(?![\w<{])")
FILE_NAME = re.compile(r"`([\w-]+\.(?:py|md|cu|cuh|toml|json|yaml))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def named_paths(text: str) -> set[str]:
    """Paths that a Markdown text names: by a known top-level folder, as a link, or as a bare `file.ext` (found anywhere)."""
    links = {link.partition("#")[0] for link in LINK.findall(text) if "://" not in link}
    return {m.rstrip("/") for m in PATH.findall(text)} | {link for link in links if link}


def test_every_path_named_in_the_documentation_exists() -> None:
    files = tracked_files()
    known = {*files, *(p.as_posix() for f in files for p in Path(f).parents)}
    missing = []
    for name in markdown_files():
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in named_paths(text):
            spellings = (path, (Path(name).parent / path).as_posix(), os.path.normpath(Path(name).parent / path))
            if not any(fnmatch(k, s) for k in known for s in spellings):
                missing.append(f"{name}: {path}")
        missing += [f"{name}: {base}" for base in FILE_NAME.findall(text) if not any(Path(f).name == base for f in files)]
    assert not missing


def test_the_path_patterns_see_what_they_should() -> None:
    text = "cuattn/jit.py, `kernels/attention/` and [x](docs/algorithm.md#top), not https://x.org/docs/y or bench/<gpu>.json"
    assert named_paths(text) == {"cuattn/jit.py", "kernels/attention", "docs/algorithm.md"}


def test_readme_support_table_is_the_generated_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cli.replace_section(readme, "support", cli.support_table()) == readme, (
        "run: python -m cuattn support --write README.md"
    )


# Recorded evidence and the wheel


def test_source_hash_covers_the_kernels_and_the_package() -> None:
    paths = {p.relative_to(ROOT).as_posix() for p in sources()}
    assert {"cuattn/__init__.py", "cuattn/masks.py", "kernels/params.cuh"} <= paths
    assert not any("__pycache__" in p for p in paths)
    assert run_python("-m", "tests.source_hash").strip() == source_hash()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_is_small_pure_and_complete(wheel: Path) -> None:
    assert wheel.stat().st_size < WHEEL_LIMIT
    assert wheel.name.endswith("-py3-none-any.whl")
    content = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    package = {f"cuattn/{p.relative_to(ROOT / 'cuattn').as_posix()}" for p in (ROOT / "cuattn").rglob("*.py")}
    kernels = {f"cuattn/_kernels/{p.relative_to(KERNELS).as_posix()}" for p in kernel_files()}
    assert content == package | kernels | {"cuattn/py.typed"}


COMPILE_ONE = """
import os
import cuattn.jit

def stop_after_the_first(done, total, name):
    if done:
        print(cuattn.__file__, flush=True)
        os._exit(0)

cuattn.jit.prewarm("sm_80", False, stop_after_the_first)
raise SystemExit("nothing was compiled")
"""


@pytest.mark.slow
def test_unpacked_wheel_compiles_its_kernels(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("cupy")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    out = run_python("-c", COMPILE_ONE, cwd=tmp_path, PYTHONPATH=str(site), CUATTN_CACHE_DIR=str(tmp_path / "cache"))
    assert out.startswith(str(site))
    cubins = list((tmp_path / "cache").rglob("*.cubin"))
    assert cubins
    for cubin in cubins:  # the checkout compiles the same source to the same bytes: what the wheel leaves out is no code
        assert cubin.read_bytes() == jit.build(cubin.with_suffix(".cu").read_text(), "sm_80").image
