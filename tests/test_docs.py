"""Documentation: every Python snippet runs, every command exists, the manual lists every page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from bench.__main__ import parser as bench_parser
from cuattn import arrays, cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = {"cupy", "torch", "jax", "transformers", "scipy"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SNIPPETS = [(page, n, text) for page in PAGES for n, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))]


def imported(source: str) -> set[str]:
    return set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)) | set(re.findall(r"cuattn\.(torch|jax)\b", source))


@pytest.mark.parametrize(("page", "number", "source"), SNIPPETS, ids=[f"{name(p)}-{n}" for p, n, _ in SNIPPETS])
def test_snippet_runs(page: Path, number: int, source: str) -> None:
    """Each snippet stands alone; one that names CUDA or CuPy needs a GPU."""
    for module in imported(source) & OPTIONAL:
        pytest.importorskip(module)
    if "cuda" in source or "cupy" in source:
        usable, reason = arrays.gpu_available()
        if not usable:
            pytest.skip(reason)
    exec(compile(source, f"{name(page)}, snippet {number}", "exec"), {})


def test_the_pages_have_snippets() -> None:
    assert len(SNIPPETS) > 15 and {"README.md", "docs/index.md", "docs/guides/jax.md"} <= {
        name(page) for page, _, _ in SNIPPETS
    }


def test_every_page_is_in_the_manual() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


MEMBERS = re.compile(r"^::: ([\w.]+)\n(?:    .*\n)*?      members: \[(.*)\]$", re.M)


def test_the_reference_shows_every_public_name_and_no_other() -> None:
    shown: dict[str, set[str]] = {}
    for module, members in MEMBERS.findall((ROOT / "docs" / "reference.md").read_text(encoding="utf-8")):
        shown.setdefault(module, set()).update(members.split(", "))
    assert {"cuattn", "cuattn.torch", "cuattn.jax", "cuattn.flash_attn", "cuattn.flash_attn3"} <= set(shown)
    masks_and_mods = shown["cuattn.masks"] | shown["cuattn.score_mods"]
    elsewhere = {"cuattn": masks_and_mods, "cuattn.torch": {"attention", "attention_varlen"}}
    aliases = {"flash_attn_func_with_grad"}
    for name, members in shown.items():
        if name.rpartition(".")[2] in OPTIONAL | {"flash_attn", "flash_attn3"}:
            pytest.importorskip("jax" if name == "cuattn.jax" else "torch")
        module = importlib.import_module(name)
        assert all(getattr(module, member).__doc__ for member in members), name
        missing = set(getattr(module, "__all__", ())) - members - elsewhere.get(name, set()) - aliases
        assert not missing, f"{name}: {missing}"


COMMAND = re.compile(r"python -m (cuattn|bench|tests\.\w+) ?([a-z][\w-]*)?")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    known = {"cuattn": choices(cli._parser()), "bench": choices(bench_parser())}
    for module, command in COMMAND.findall(page.read_text(encoding="utf-8")):
        if module.startswith("tests."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
        elif command:
            assert command in known[module], f"python -m {module} {command}"


def choices(parser: object) -> set[str]:
    """Sub-commands of an argparse parser."""
    (actions,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))  # type: ignore[attr-defined]
    return set(actions)
