"""What griffe calls when it has read the package for the pages of the interface: docstrings become Markdown.

A docstring here opens with a call that runs, as a doctest without a heading, and names things in single backticks.
Calls become blocks of code, names that have an entry on these pages become links to it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import griffe

NAME = re.compile(r"(?<![`\[])`(?:npp_kernels\.)?([A-Za-z_]\w*)((?:\.\w+)?)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package, once it is all there."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package."""
        if pkg.name != "npp_kernels":
            return
        public = {str(name) for name in pkg.exports or ()}
        classes = {thing.name: thing for thing in objects(pkg) if thing.is_class and thing.name in public}

        def linked(match: re.Match[str]) -> str:
            name, member = match.groups()
            known = name in public and (not member or member[1:] in classes[name].members)
            return f"[`{name}{member}`][npp_kernels.{name}{member}]" if known else match.group(0)

        for thing in objects(pkg):
            if thing.docstring is not None:
                text = fenced(thing.docstring.value)
                parts = re.split(r"(```.*?```\n)", text, flags=re.DOTALL)
                thing.docstring.value = "".join(p if p.startswith("```") else NAME.sub(linked, p) for p in parts)


def objects(parent: Any) -> Iterator[Any]:
    """Yield an object and all that is defined in it."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from objects(member)


def fenced(text: str) -> str:
    """Put doctests, and blocks announced by a double colon, between fences; make paragraphs of sections of our own."""
    text = re.sub(r"^(>>> .*?)(?=\n\s*\n|\Z)", r"```pycon\n\1\n```", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\n::\n\n((?:    .*\n?|\n)+)", _block, text)
    text = re.sub(r"::\n\n((?:    .*\n?|\n)+)", lambda match: ":\n" + _block(match), text)
    return re.sub(r"^(Numerics|Memory|Source):\n((?:    .*\n?|\n)+)", _paragraph, text, flags=re.MULTILINE)


def _paragraph(match: re.Match[str]) -> str:
    """Return a section that the style does not know as a paragraph; griffe would make a box of it."""
    name, body = match.groups()
    return f"**{name}:** {inspect.cleandoc(body)}\n\n"


def _block(match: re.Match[str]) -> str:
    lines = "\n".join(line.removeprefix("    ") for line in match.group(1).rstrip().splitlines())
    return f"\n```python\n{lines}\n```\n\n"
