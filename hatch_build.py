"""Build hook: files of the wheel lack comments, kernels/ most spaces and ends of lines too; the repository has them."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tempfile
import tokenize
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def shortened(line: str) -> str:
    """A line of C++ without the spaces that mean nothing; one with a string or for the preprocessor as it is."""
    if line[:1] == "#" or line[-1:] == "\\" or '"' in line:
        return line
    line = re.sub(r" *([{}()\[\];,?]|&&|\|\||(?<=[\w)\]] )=) *", r"\1", line)
    return re.sub(r"(?<=[\w)\]]) ([*/%&|:<>]|<<|>>|[=!<>*/%&|]=) (?=[\w(])", r"\1", line)


def joined(lines: list[str]) -> str:
    """C++ on fewer lines: those for the preprocessor, and of a macro, stay alone, and no two tokens meet that might be one."""
    text = ""
    for before, line in itertools.pairwise(["#", *lines]):
        alone = "#" in (before[0], line[0]) or before[-1] == "\\"
        apart = before[-1] not in ";{}()," and line[0] not in "{}()"
        text += f"\n{line}" if alone or apart else line
    return text[1:] + "\n"


def without_comments(source: str) -> str:
    """Python, line by line the same, without comments and the texts that follow a name's definition; docstrings stay."""
    lines = source.splitlines()
    tree = ast.parse(source)
    holders = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef))]
    for text in (t for holder in holders for t in holder.body[1:]):
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            lines[text.lineno - 1 : text.end_lineno] = [""] * ((text.end_lineno or 0) - text.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "".join(f"{line}\n" for line in lines)


class WithoutComments(BuildHookInterface):  # type: ignore[type-arg]
    """Adds kernels/ to the wheel as cuattn/_kernels. An editable install reads the checkout's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        root, copy = Path(self.root) / "kernels", Path(self._folder.name) / "_kernels"
        for source in root.rglob("*.cu*"):
            code = (shortened(line.split("//")[0].strip()) for line in source.read_text(encoding="utf-8").splitlines())
            target = copy / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(joined([line for line in code if line]), encoding="utf-8")
        build_data["force_include"][str(copy)] = "cuattn/_kernels"
        for module in (Path(self.root) / "cuattn").rglob("*.py"):
            copy = Path(self._folder.name) / module.relative_to(self.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(without_comments(module.read_text(encoding="utf-8")), encoding="utf-8")
            build_data["force_include"][str(copy)] = str(module.relative_to(self.root))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()
