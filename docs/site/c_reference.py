"""The C interface as a page, from the declarations and comments of cpp/include/lemo/*.h.

It reads what these headers are made of, not C in general: comments before a declaration or after a field, `typedef
struct`, `typedef enum`, functions marked LEMO_API, and `#define LEMO_NAME value`. Anything else at the top level of a
header is an error, so that nothing is left out silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

# In the order of the steps of a layer; other headers follow.
HEADERS = ("types.h", "scores.h", "predict.h", "select.h", "rows.h", "attention.h", "tiles.h", "loss.h")

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_TYPEDEF = re.compile(r"typedef\s+(struct|enum)\s+(\w+)\s*\{(.*?)\}\s*\w+\s*;", re.DOTALL)
_FUNCTION = re.compile(r"LEMO_API\s+([^;]*?(\w+)\s*\([^;]*\))\s*;")
_DEFINE = re.compile(r"#define[ \t]+(\w+)[ \t]+(\S[^\n]*)")
_IGNORED = re.compile(r"#(?:\\\n|[^\n])*|extern \"C\" \{|\}")
# The three names of one operation share a heading.
_OPERATION = re.compile(r"(lemo_\w+?)(_args|_workspace)?$")


@dataclass
class Item:
    """One declaration: kind "struct", "enum", "function" or "constant", its code, its comment, its fields."""

    kind: str
    name: str
    code: str
    comment: str = ""
    fields: list[tuple[str, str, str]] = field(default_factory=list)  # name, type or value, comment


@dataclass
class Header:
    name: str
    comment: str
    items: list[Item]


def strip_comment(comment: str) -> str:
    """The text of a comment without its stars, indentation within it kept."""
    body = re.sub(r"^/\*+<?!?[ \t]?|[ \t]*\*+/$", "", comment.strip())
    return "\n".join(re.sub(r"^[ \t]*\*[ \t]?(?=[ \t]|\S|$)", "", line).rstrip() for line in body.splitlines()).strip(
        "\n"
    )


def read_header(path: Path) -> Header:
    """Raises ValueError, naming the place, for what this module does not know how to read."""
    text = path.read_text()
    position, comment, header_comment, items = 0, "", None, []
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        if match := _COMMENT.match(text, position):
            if header_comment is None:
                header_comment = strip_comment(match.group())
            else:
                comment = strip_comment(match.group())
        elif match := _TYPEDEF.match(text, position):
            kind, name, body = match.groups()
            read = _enum_fields if kind == "enum" else _struct_fields
            items.append(Item(kind, name, "", comment, read(body)))
            comment = ""
        elif match := _FUNCTION.match(text, position):
            items.append(Item("function", match[2], re.sub(r"\s+", " ", match[1]) + ";", comment))
            comment = ""
        elif (match := _DEFINE.match(text, position)) and not match[1].startswith("LEMO_API"):
            value, _, trailing = match[2].partition("/*")
            more = strip_comment("/*" + trailing) if trailing else comment
            items.append(Item("constant", match[1], value.strip(), more))
            comment = ""
        elif match := _IGNORED.match(text, position):
            comment = ""
        else:
            line = text.count("\n", 0, position) + 1
            raise ValueError(f"{path}:{line}: not a declaration that docs/site/c_reference.py reads")
        position = match.end()
    if header_comment is None:
        raise ValueError(f"{path}: expected a comment at its beginning that says what it is for")
    return Header(path.name, header_comment, items)


def _pieces(body: str, declaration: re.Pattern[str]) -> list[tuple[str, str]]:
    """(declaration, its trailing comment) in order; a comment on a separate line comes as ("", comment)."""
    found: list[tuple[str, str]] = []
    position = 0
    while match := re.compile(rf"{_COMMENT.pattern}|{declaration.pattern}", re.DOTALL).search(body, position):
        text = match.group()
        same_line = "\n" not in body[position : match.start()]
        if not text.startswith("/*"):
            found.append((re.sub(r"\s+", " ", text).strip(), ""))
        elif found and found[-1][0] and not found[-1][1] and (same_line or text.startswith(("/**<", "/*!<"))):
            found[-1] = (found[-1][0], strip_comment(text))
        else:
            found.append(("", strip_comment(text)))
        position = match.end()
    return found


def _struct_fields(body: str) -> list[tuple[str, str, str]]:
    fields = []
    for declaration, comment in _pieces(body, re.compile(r"[^;/]+;")):
        code = declaration.rstrip(";")
        if pointer := re.match(r"(.*?)\(\*(\w+)\)(.*)", code):
            fields.append((pointer[2], f"{pointer[1].strip()} (*){pointer[3]}", comment))
        elif code:
            kind, names = re.match(r"((?:const )?\w+\**)\s+(.*)", code).groups()  # type: ignore[union-attr]
            fields.append((names, kind, comment))
        else:
            fields.append(("", "", comment))
    return fields


def _enum_fields(body: str) -> list[tuple[str, str, str]]:
    fields = []
    for declaration, comment in _pieces(body, re.compile(r"LEMO_\w+\s*=\s*\d+")):
        name, _, value = declaration.partition("=")
        fields.append((name.strip(), value.strip(), comment))
    return fields


def _inline(text: str) -> str:
    """Prose of a comment as Markdown: code spans stay, characters that Markdown would read do not."""
    parts = re.split(r"(`[^`]*`)", _plain(text))
    escaped = (p if p.startswith("`") else re.sub(r"([*|\\])", r"\\\1", p).replace("<", "&lt;") for p in parts)
    return "".join(escaped)


def _plain(text: str) -> str:
    """Without the commands of Doxygen, which may mark what a comment is about."""
    text = re.sub(r"[@\\](?:brief|details|p|c|e|ref|a)\s+(?=(\S+))", "", text)
    text = re.sub(r"[@\\]file\b[^\n]*\n?|[@\\](?:defgroup|ingroup|addtogroup|name)\b[^\n]*\n?|[@\\][{}]", "", text)
    text = re.sub(r"[@\\]param(?:\[[\w,]+\])?\s+(\w+)", r"`\1`:", text)
    return re.sub(r"[@\\](return|note|warning|see|sa)s?\s+", lambda m: f"{m[1].capitalize()}: ", text)


def to_markdown(comment: str) -> str:
    """Paragraphs and lists of prose; other lines that the comment indents are formulas and stay as they are."""
    groups: list[tuple[str, list[str]]] = []
    for line in comment.splitlines():
        before = groups[-1][0] if groups else ""
        if re.match(r"\s*[@\\](end)?code\b", line):
            continue
        if not line.strip():
            kind = "blank"
        elif re.match(r" *- ", line):
            kind = "list"
        elif line.startswith("  "):
            kind = "list" if before == "list" else "code"
        else:
            kind = "prose"
        if kind != before:
            groups.append((kind, []))
        groups[-1][1].append(line)
    parts = []
    for kind, lines in groups:
        if kind == "code":
            parts.append("\n".join(["```text", *lines, "```"]))
        elif kind == "list":
            parts.append("\n".join(_inline(re.sub(r"^ *(?=- )", "", line)) for line in lines))
        elif kind == "prose":
            parts.append(_inline("\n".join(lines)))
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", _inline(text)).strip()


def _table(item: Item, types: set[str]) -> list[str]:
    lines = ["| field | type | |" if item.kind == "struct" else "| name | value | |", "|---|---|---|"]
    for name, kind, comment in item.fields:
        base = kind.rstrip("*")
        shown = f"[`{kind}`](#{base})" if base in types else f"`{kind}`"
        names = ", ".join(f"`{n.strip()}`" for n in name.split(","))
        lines.append(f"| {names} | {shown} | {_cell(comment)} |" if name else f"| | | *{_cell(comment)}* |")
    return lines


def _section(name: str, items: list[Item], types: set[str]) -> list[str]:
    lines = [f"### {name}", ""]
    functions = [item for item in items if item.kind == "function"]
    if functions:
        lines += ["```c", *(item.code for item in functions), "```", ""]
    for item in items:
        if item.kind == "constant":
            lines += ["```c", f"#define {item.name} {item.code}", "```", ""]
        if item.comment:
            lines += [to_markdown(item.comment), ""]
        if item.fields:
            if len(items) > 1:
                lines += [f"**{item.name}**", ""]
            lines += [*_table(item, types), ""]
    return lines


def page(folder: Path) -> str:
    """The whole reference as Markdown."""
    others = sorted({p.name for p in folder.glob("*.h")} - {*HEADERS, "lemo.h"})
    headers = [read_header(folder / name) for name in (*HEADERS, *others)]
    types = {item.name for header in headers for item in header.items if item.kind in ("struct", "enum")}
    lines = [
        "# C reference",
        "",
        "Made from the headers' own declarations and comments. The rules that hold for every call, and a worked layer,",
        "are in [C API](c-api.md). `lemo/lemo.h` includes the headers of all operations.",
        "",
    ]
    for header in headers:
        lines += [f"## {header.name}", "", to_markdown(header.comment), ""]
        sections: dict[str, list[Item]] = {}
        for item in header.items:
            match = _OPERATION.match(item.name)
            shared = match is not None and (item.kind == "function" or item.name.endswith("_args"))
            sections.setdefault(match[1] if match and shared else item.name, []).append(item)
        for name, items in sections.items():
            lines += _section(name, items, types - {f"{name}_args"})
    return "\n".join(lines)
