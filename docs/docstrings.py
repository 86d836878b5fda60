"""Docstrings as Markdown: their `name: meaning` lines become a list, their doctests a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^([a-z_][\w]*(?:, [a-z_][\w]*)*): (?=\S)")


class Docstrings(griffe.Extension):
    """Applied by mkdocstrings to everything that the reference shows."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """The text with a list item for every line at the margin that starts with names and a colon, and fenced doctests."""
    lines: list[str] = []
    listed = fenced = False
    for line in text.splitlines():
        if fenced and not line:
            lines.append("```")
            fenced = False
        if line.startswith(">>> ") and not fenced:
            lines += ["", "```pycon"] if lines and lines[-1] else ["```pycon"]
            fenced = True
        argument = None if fenced else ARGUMENT.match(line)
        if argument:
            lines += [] if listed else [""]
            line = f"- **{argument[1]}**: {line[argument.end() :]}"
        elif listed and not fenced and line and not line.startswith(" "):
            lines.append("")
        listed = bool(argument) or (listed and line.startswith(" "))
        lines.append(line)
    return "\n".join([*lines, "```"] if fenced else lines)
