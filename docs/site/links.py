"""Links in Markdown, and the paths they lead to in the repository. Used by the site and by its test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^ *(`{3,}|~{3,})[^\n]*\n.*?^ *\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|\n)[ \t]*\n((?: {4}[^\n]*(?:\n|\Z)|[ \t]*\n)+)")
_SPAN = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^()\s]+)(?:\s+\"[^\"]*\")?\)|(?:src|href|srcset)=\"(?P<attribute>[^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True)
class Link:
    """A link's target and where it stands in the text."""

    target: str
    start: int
    end: int


def without_code(markdown: str) -> str:
    """The text with code blanked out, at unchanged offsets: what is in code links to nothing."""
    for pattern in (_FENCE, _INDENTED, _SPAN):
        markdown = pattern.sub(lambda m: re.sub(r"[^\n]", " ", m.group(0)), markdown)
    return markdown


def local_links(markdown: str) -> Iterator[Link]:
    """Links to files and anchors, in order; those to other sites are left out."""
    for match in _LINK.finditer(without_code(markdown)):
        group = "target" if match["target"] else "attribute"
        if not re.match(r"[a-z]+:", match[group]):
            yield Link(match[group], match.start(group), match.end(group))


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub and the site give a page's headings. Both agree on headings of plain words."""
    text = _FENCE.sub("", markdown)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in _HEADING.findall(text)]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def resolve(target: str, page: Path) -> tuple[Path, str]:
    """The file below ROOT that a link in `page` leads to, and the anchor ("" if there is none)."""
    path, _, anchor = target.partition("#")
    return ((page.parent / path).resolve() if path else page.resolve()), anchor
