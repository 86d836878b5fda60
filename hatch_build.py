"""Build hook: the wheel's copy of kernels/ lacks comments and most spaces, a third of its size; the repository has them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def shortened(line: str) -> str:
    """A line of C++ without the spaces that mean nothing; one with a string or for the preprocessor as it is."""
    if line[:1] == "#" or line[-1:] == "\\" or '"' in line:
        return line
    line = re.sub(r" *([{}()\[\];,?]|&&|\|\||(?<=[\w)\]] )=) *", r"\1", line)
    return re.sub(r"(?<=[\w)\]]) ([*/%&|:<>]|<<|>>|[=!<>*/%&|]=) (?=[\w(])", r"\1", line)


class KernelsWithoutComments(BuildHookInterface):  # type: ignore[type-arg]
    """Adds kernels/ to the wheel as cuattn/_kernels. An editable install reads the checkout's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        root, copy = Path(self.root) / "kernels", Path(self._folder.name)
        for source in root.rglob("*.cu*"):
            code = (shortened(line.split("//")[0].strip()) for line in source.read_text(encoding="utf-8").splitlines())
            target = copy / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(f"{line}\n" for line in code if line), encoding="utf-8")
        build_data["force_include"][str(copy)] = "cuattn/_kernels"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self._folder.cleanup()
