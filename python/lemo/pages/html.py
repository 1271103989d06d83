"""The frame of a page, and what stands in it: tables, lists of values, data for its scripts.

A page is one file: styles, scripts and data are in it, and its content policy forbids loading anything else. What is
important stands in the HTML itself, so that it can be read without scripts.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any


def escape(value: Any) -> str:
    return html.escape(str(value))


def number(value: Any) -> str:
    """A value for people: numbers in a few digits, None as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.4g}"


@dataclass(frozen=True)
class Section:
    """A part of a page. body: HTML."""

    anchor: str
    title: str
    body: str


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", name: str = "") -> str:
    """An HTML table. Numbers are shown in a few digits; `data-value` holds them exactly. name: its id."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join("<tr>" + "".join(_cell(v, i) for i, v in enumerate(row)) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    of = f' id="{escape(name)}"' if name else ""
    return f'<div class="scroll"><table{of}>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any, column: int) -> str:
    tag = 'th scope="row"' if column == 0 else "td"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<{tag} class="n" data-value="{json.dumps(value)}">{escape(number(value))}</{tag.split()[0]}>'
    return f"<{tag}>{escape(number(value))}</{tag.split()[0]}>"


def values(pairs: Mapping[str, Any]) -> str:
    """A list of names and values; a nested mapping or list is shown as JSON."""
    rows = []
    for name, value in pairs.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else number(value)
        rows.append(f"<dt>{escape(name)}</dt><dd>{escape(shown)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def missing(what: str, how: str) -> str:
    """That the page lacks something, and how to get it."""
    return f'<p class="missing"><strong>{escape(what)}</strong> {escape(how)}</p>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("lemo.pages") / name).read_text(encoding="utf-8")


def page(title: str, lead: str, sections: Sequence[Section], data: Any = None, scripts: Sequence[str] = ()) -> str:
    """The whole file. lead: HTML below the title; data: what the scripts read; scripts: assets of this package."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    parts = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title"><h2 id="{s.anchor}-title">{escape(s.title)}</h2>'
        f"{s.body}</section>"
        for s in sections
    )
    code = "".join(f"<script>{_asset(name)}</script>" for name in ("page.js", *scripts))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_asset('page.css')}</style></head><body>"
        f'<header><h1>{escape(title)}</h1>{lead}<nav aria-label="Sections">{links}</nav></header>'
        f"<main>{parts}</main>"
        f'<script type="application/json" id="data">{_json(data)}</script>{code}</body></html>\n'
    )
