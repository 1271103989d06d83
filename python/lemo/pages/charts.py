"""Charts as inline SVG, drawn once in Python: they need no script, and take their colors from the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lemo.pages.html import details, escape, number, table

_WIDTH, _HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 18, 34
_MOST_POINTS = 1500


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a name; y None: unknown, the line has a gap. dots: points alone, no line."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot. low, high: its interval; front: whether no other point beats it."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    front: bool = False


@dataclass(frozen=True)
class _Scale:
    """Data to pixels along both axes."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= about)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float], margin: float = 0.05) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    return low - margin * (high - low), high + margin * (high - low)


def _label(tick: float, of: list[float]) -> str:
    """A tick in as many digits as tell it from the next."""
    step = of[1] - of[0] if len(of) > 1 else abs(tick) or 1.0
    digits = -math.floor(math.log10(step) + 1e-9)
    return f"{tick:.{digits}f}" if 0 < digits < 7 else number(tick)


def _axes(scale: _Scale, x_label: str, y_label: str) -> str:
    bottom, parts = _HEIGHT - _BOTTOM, []
    along_y, along_x = ticks(*scale.y), ticks(*scale.x, 8)
    for y in along_y:
        at = scale.py(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(_label(y, along_y))}</text>')
    for x in along_x:
        parts.append(
            f'<text x="{scale.px(x):.1f}" y="{bottom + 14}" text-anchor="middle">{escape(_label(x, along_x))}</text>'
        )
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="12">{escape(y_label)}</text>')
    return "".join(parts)


def _svg(title: str, body: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _path(scale: _Scale, series: Series, stride: int) -> str:
    out, pen = [], "M"
    for x, y in itertools.islice(zip(series.x, series.y, strict=True), 0, None, stride):
        if y is None:
            pen = "M"
            continue
        out.append(f"{pen}{scale.px(x):.1f} {scale.py(y):.1f}")
        pen = "L"
    return "".join(out)


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], bounds: Sequence[tuple[float, str]] = ()
) -> str:
    """A chart with its values as a table below it. bounds: x at which something begins, and its name.

    Of long series every n-th point is drawn and listed, and the caption states it. Raises ValueError if no point is
    known.
    """
    known = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if y is not None]
    if not known:
        raise ValueError(f"chart {title!r}: no value is known, so there is nothing to draw")
    scale = _Scale(_range([x for x, _ in known], 0.01), _range([y for _, y in known]))
    stride = -(-max(len(s.x) for s in series) // _MOST_POINTS)
    body = [_axes(scale, x_label, y_label)]
    for x, name in bounds:
        if not scale.x[0] <= x <= scale.x[1]:
            continue
        at = scale.px(x)
        body.append(f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        body.append(f'<text class="bound" x="{at + 3:.1f}" y="{_TOP + 8}">{escape(name)}</text>')
    for i, s in enumerate(series):
        if s.dots or sum(y is not None for y in s.y) == 1:
            for x, y in zip(s.x, s.y, strict=True):
                if y is not None:
                    body.append(f'<circle class="s{i}" cx="{scale.px(x):.1f}" cy="{scale.py(y):.1f}" r="4"/>')
        else:
            body.append(f'<path class="s{i}" d="{_path(scale, s, stride)}"/>')
    legend = "".join(f'<span class="key s{i}">{escape(s.name)}</span>' for i, s in enumerate(series))
    note = f" (every {stride}th point)" if stride > 1 else ""
    listed = "".join(
        table((x_label, s.name), itertools.islice(zip(s.x, s.y, strict=True), 0, None, stride), s.name + note)
        for s in series
    )
    caption = f"<figcaption>{escape(title + note)} {legend if len(series) > 1 else ''}</figcaption>"
    return f"<figure>{_svg(title, ''.join(body))}{caption}{details('Values', listed)}</figure>"


def scatter(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Points with their intervals; those of the front are joined."""
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    scale = _Scale(_range([p.x for p in points], 0.12), _range(ends, 0.1))
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    body = [_axes(scale, x_label, y_label)]
    steps = "L".join(f"{scale.px(p.x):.1f} {scale.py(p.y):.1f}" for p in front)
    body.append(f'<path class="front" d="M{steps}"/>')
    for p in points:
        x = scale.px(p.x)
        label = f"{p.name}: {x_label} {number(p.x)}, {y_label} {number(p.y)}"
        if p.low is not None and p.high is not None:
            body.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.py(p.low):.1f}" '
                        f'y2="{scale.py(p.high):.1f}"/>')  # fmt: skip
            label += f" [{number(p.low)}, {number(p.high)}]"
        kind = "s0" if p.front else "s1"
        body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{scale.py(p.y):.1f}" r="5"><title>{escape(label)}'
                    "</title></circle>")  # fmt: skip
        left = x > 0.65 * _WIDTH  # a name beyond the edge would be cut
        at, anchor = (x - 8, "end") if left else (x + 8, "start")
        body.append(f'<text x="{at:.1f}" y="{scale.py(p.y) - 6:.1f}" text-anchor="{anchor}">{escape(p.name)}</text>')
    return f"<figure>{_svg(title, ''.join(body))}<figcaption>{escape(title)}</figcaption></figure>"


def stacked_bars(title: str, unit: str, bars: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Horizontal bars of parts, all to one scale. bars: (name, [(part, value)])."""
    names = list(dict.fromkeys(part for _, parts in bars for part, _ in parts))
    longest = max(sum(v for _, v in parts) for _, parts in bars) or 1.0
    high, body = 34 * len(bars) + 8, []
    for row, (name, parts) in enumerate(bars):
        x, y = 130.0, 8 + 34 * row
        body.append(f'<text x="124" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for part, value in parts:
            width = value / longest * (_WIDTH - 140)
            body.append(
                f'<rect class="p{names.index(part) % 10}" x="{x:.1f}" y="{y}" width="{width:.2f}" height="26">'
                f"<title>{escape(f'{name}, {part}: {number(value)} {unit}')}</title></rect>"
            )
            x += width
    legend = "".join(f'<span class="key p{i % 10}">{escape(n)}</span>' for i, n in enumerate(names))
    svg = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {high}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
    return f"<figure>{svg}<figcaption>{escape(title)}<br>{legend}</figcaption></figure>"
