"""Charts from small parts: axes, markers, labels that find a free place. It knows numbers and names, no runs.

Everything is drawn in the units of a view box; colours are classes, and `chart.css` says what they are in light, dark
and print. Families differ by shape as well as by colour (Okabe and Ito's, safe for the colour-blind).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import NamedTuple

from arma_mergekit.report.markup import Child, Markup, tag

__all__ = [
    "CSS", "SHAPES", "Axis", "Box", "Look", "along", "axes", "blend", "glyph", "label", "line", "marker", "picture",
    "place",
]  # fmt: skip

CSS = Markup((files(__package__) / "chart.css").read_text(encoding="utf-8"))
CHARACTER, LINE = 6.7, 14.0  # size of a label's character
SHAPES = {
    "circle": "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z",
    "square": "M-.9-.9H.9V.9H-.9Z",
    "diamond": "M0-1.3L1.1 0L0 1.3L-1.1 0Z",
    "up": "M0-1.2L1.15.9H-1.15Z",
    "hexagon": "M-.6-1H.6L1.2 0L.6 1H-.6L-1.2 0Z",
    "plus": "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
    "down": "M0 1.2L1.15-.9H-1.15Z",
    "pentagon": "M0-1.2L1.15-.35L.7 1H-.7L-1.15-.35Z",
}


class Look(NamedTuple):
    """Colour (a class) and shape of a family."""

    color: str
    shape: str


class Axis(NamedTuple):
    """Maps values from ``low`` to ``high`` to units from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About seven round values."""
        raw = (self.high - self.low) / 7 or 1.0
        unit = 10 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 10) for k in range(first, last + 1)]


class Box(NamedTuple):
    """A rectangle that something covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether they overlap."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def picture(width: float, height: float, title: str, told: str, *children: Child, **more: object) -> Markup:
    """An svg element, with its title and description for those who cannot see it."""
    body = (tag("title", title), tag("desc", told), *children)
    return tag("svg", *body, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title, **more)


def axes(x: Axis, y: Axis, titles: Sequence[str], shown: Sequence[Callable[[float], str]]) -> list[Markup]:
    """Grid, numbers and titles of two axes."""
    parts = [label((x.start + x.end) / 2, y.start + 36, titles[0], anchor="middle")]
    parts += [label(x.start - 36, y.end - 12, titles[1])]
    for v in x.ticks():
        parts += [line([(x(v), y.start), (x(v), y.end)], "grid")]
        parts += [label(x(v), y.start + 16, shown[0](v), "muted", "middle")]
    for v in y.ticks():
        parts += [line([(x.start, y(v)), (x.end, y(v))], "grid")]
        parts += [label(x.start - 7, y(v) + 4, shown[1](v), "muted", "end")]
    return parts


def label(x: float, y: float, words: str, class_: str | None = None, anchor: str | None = None) -> Markup:
    """Text with its baseline at y."""
    return tag("text", words, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def line(points: Iterable[tuple[float, float]], class_: str, element: str = "polyline") -> Markup:
    """Straight lines through points; ``element`` polygon: an area."""
    return tag(element, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes on a line, for labels to avoid."""
    spots = (
        (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]))
        for a, b in pairwise(points)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9)
    )
    return [Box(x - 2, y - 2, x + 2, y + 2) for x, y in spots]


def marker(look: Look, x: float, y: float, size: float, tip: str, more: str = "") -> Markup:
    """A marker with a tooltip; ``size`` is about its radius."""
    path = tag("path", tag("title", tip), d=SHAPES[look.shape], class_=f"mark {look.color} {more}".strip())
    return tag("g", path, transform=f"translate({x:.1f} {y:.1f}) scale({size:g})")


def glyph(look: Look) -> Markup:
    """The marker alone, for a line of text."""
    path = tag("path", d=SHAPES[look.shape], class_=f"mark {look.color}")
    return tag("svg", path, viewBox="-1.5 -1.5 3 3", class_="glyph", aria_hidden="true")


def place(points: Sequence[tuple[float, float, str]], frame: Box, avoid: Sequence[Box] = ()) -> list[Markup]:
    """Labels beside their points, the first ones first, off each other and if possible off what is to be avoided.

    One without a free place is left out; its tooltip stays.
    """
    taken, found = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points], []
    for x, y, words in points:
        width = CHARACTER * len(words) + 2
        right, left, middle = x + 9, x - 9 - width, x - width / 2
        corners = [(right, y - 7), (right - 2, y - 19), (right - 2, y + 5), (left, y - 7), (middle, y - 21)]
        corners += [(middle, y + 7), (left + 2, y - 19), (left + 2, y + 5)]
        boxes = [Box(left, top, left + width, top + LINE) for left, top in corners]
        boxes = [b for b in boxes if frame.left <= b.left and b.right <= frame.right and frame.top <= b.top]
        free = [b for b in boxes if b.bottom <= frame.bottom and not any(map(b.meets, taken))]
        if free:
            taken.append(min(free, key=lambda b: sum(map(b.meets, avoid))))
            found.append(label(taken[-1].left, taken[-1].bottom - 3.5, words, "halo"))
    return found


def blend(stops: Sequence[tuple[float, str]], value: float) -> str:
    """The colour at a value, between stops (value, #rrggbb) in rising order; beyond them the outer ones."""
    value = min(max(value, stops[0][0]), stops[-1][0])
    (low, first), (high, second) = next(pair for pair in pairwise(stops) if value <= pair[1][0])
    share = (value - low) / (high - low)
    pairs = ((int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)
