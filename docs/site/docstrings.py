"""Shows the docstrings' lists of arguments and fields ("name: what it is") as lists on the site.

The project writes such lines as prose, which Markdown would run together into one paragraph. A line is taken for an
entry if every word before the colon names a parameter of the function or a member of the class.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import griffe

_ENTRY = re.compile(r"(?P<names>\**[A-Za-z_]\w*(?:, \**[A-Za-z_]\w*)*): +")


def _names(match: re.Match[str], known: set[str]) -> bool:
    return all(name.strip("* ") in known for name in match["names"].split(","))


def as_list(text: str, known: set[str]) -> str:
    """`text` with its entries as list items; several may share a line, separated by "; "."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        parts = [line]
        if not line.startswith(" "):
            # "a: one thing; b: another" are two entries, if both are names.
            cuts = [
                m.end()
                for m in re.finditer(r"; +|\\. {2,}", line)
                if (n := _ENTRY.match(line, m.end())) and _names(n, known)
            ]
            bounds = [0, *cuts, len(line)]
            parts = [line[a:b] for a, b in itertools.pairwise(bounds)]
        for part in parts:
            match = _ENTRY.match(part)
            if match and _names(match, known):
                if not inside and lines and lines[-1].strip():
                    lines.append("")
                names = ", ".join(f"`{name.strip()}`" for name in match["names"].split(","))
                lines.append(f"- {names}: {part[match.end() :].rstrip(' ;')}")
                inside = True
            elif inside and part.strip():
                if re.match(r"Raises? |Returns? ", part):
                    lines += ["", part]
                    inside = False
                else:
                    lines.append("    " + part.strip())
            else:
                inside = False
                lines.append(part)
    return "\n".join(lines)


class Lists(griffe.Extension):
    """Rewrites the docstrings of functions and classes before they are rendered."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = as_list(func.docstring.value, {p.name.strip("*") for p in func.parameters})

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring is not None:
            known = set(cls.members)
            if isinstance(init := cls.members.get("__init__"), griffe.Function):
                known |= {p.name.strip("*") for p in init.parameters}
            cls.docstring.value = as_list(cls.docstring.value, known)
