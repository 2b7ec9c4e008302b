"""Heat maps over layers as HTML: a line of cells per row, bars for columns above and for rows on the right.

It knows numbers and names, no models. Cells fill a wide window and stay legible on a narrow one, where a picture would
shrink its text. Their colours are classes (`css`), a ramp of `LEVELS` for each kind, in light and in dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

from arma_mergekit.report.markup import Child, Markup, join, tag
from arma_mergekit.report.svg import blend

__all__ = ["KINDS", "HeatMap", "Kind", "Row", "css", "draw", "number", "scale"]

Values = Sequence[float | None]

LEVELS = 24
TEXT = 18  # pixels of a line of text


class Kind(NamedTuple):
    """Colours from nothing to the most, and the power of a value that they follow."""

    light: Sequence[str]
    dark: Sequence[str]
    power: float


KINDS = {
    "warm": Kind(
        ("#f5f1ea", "#f9dcb4", "#f0a35c", "#cc5a16", "#4d1400"),
        ("#201d1a", "#4d270e", "#a34c10", "#f2913f", "#ffe9cf"),
        power=1.0,
    ),
    # the square root lets small differences show beside a large one
    "cold": Kind(
        ("#eef3f6", "#b3dcef", "#4ba3d6", "#0b619f", "#01263d"),
        ("#181f25", "#0b3f63", "#1976b5", "#5fb8ec", "#e0f4ff"),
        power=0.5,
    ),
}


class Row(NamedTuple):
    """A line: its value in each column (None: there is none), that of the whole line, and a note.

    Where ``section`` changes from one row to the next there is a gap.
    """

    name: str
    values: Values
    whole: float | None
    note: str = ""
    section: object = None


class HeatMap(NamedTuple):
    """``columns``: depth of the layers; ``whole``: the value of each; ``heads``: of the columns on the right."""

    kind: str
    rows: Sequence[Row]
    columns: Sequence[int]
    whole: Values
    heads: Sequence[str]
    top: float  # of the scale
    height: float  # of a row, pixels


def css() -> Markup:
    """Classes of the parts, and of the levels of each kind."""
    light = join(_levels(name, kind.light) for name, kind in KINDS.items())
    dark = join(_levels(name, kind.dark) for name, kind in KINDS.items())
    rules = (files(__package__) / "heatmap.css").read_text(encoding="utf-8")
    return Markup(f"{light}@media screen and (prefers-color-scheme:dark){{{dark}}}{rules}")


def _levels(name: str, colors: Sequence[str]) -> Markup:
    stops = [(k / (len(colors) - 1), color) for k, color in enumerate(colors)]
    shades = [blend(stops, k / (LEVELS - 1)) for k in range(LEVELS)]
    rules = "".join(f".{name}{k}{{background:{shade}}}" for k, shade in enumerate(shades))
    return Markup(f"{rules}.{name}{{--bar:{shades[LEVELS * 3 // 5]}}}")


def draw(heat: HeatMap) -> Markup:
    """The map."""
    end = f"end of{len(heat.heads)}"
    heads = [tag("span", word, class_="more" if k else None) for k, word in enumerate(heat.heads)]
    top = (
        tag("span"),
        tag("div", _bars(heat), class_="top"),
        tag("span", tag("i"), heads, class_=f"{end} head"),
    )
    axis = (
        tag("span", "layer", class_="name foot"),
        tag("div", _axis(heat.columns), class_="axis"),
        tag("span"),
    )
    told = f"Heat map of {len(heat.rows)} rows and {len(heat.columns)} layers; the largest value is {number(heat.top)}."
    style = f"--h:{heat.height:g}px"
    return tag(
        "div",
        top,
        _lines(heat, end),
        axis,
        class_=f"heat {heat.kind}",
        role="img",
        aria_label=told,
        style=style,
    )


def _lines(heat: HeatMap, end: str) -> Iterable[Markup]:
    """Name, cells and bar of each row; rows lower than a line of text are not all named."""
    every = max(1, round(TEXT / heat.height))
    widest = max((row.whole for row in heat.rows if row.whole is not None), default=0.0) or 1.0
    before = heat.rows[0].section
    for k, row in enumerate(heat.rows):
        gap, named = "" if row.section == before else " gap", k % every == 0
        yield tag("span", row.name if named else "", class_=f"name{gap}")
        yield tag("div", _cells(heat, row), class_=f"row{gap}")
        yield tag("span", _ending(row, widest) if named else "", class_=f"{end}{gap}")
        before = row.section


def _cells(heat: HeatMap, row: Row) -> Iterable[Markup]:
    power = KINDS[heat.kind].power
    for layer, value in zip(heat.columns, row.values, strict=True):
        level = "none" if value is None else f"{heat.kind}{round((value / heat.top) ** power * (LEVELS - 1))}"
        yield tag("i", class_=level, data_tip=f"{row.name}, layer {layer}: {number(value)}")


def _bars(heat: HeatMap) -> Iterable[Markup]:
    highest = max((v for v in heat.whole if v is not None), default=0.0) or 1.0
    for layer, value in zip(heat.columns, heat.whole, strict=True):
        bar = tag("b", style=f"height:{100 * (value or 0) / highest:.1f}%")
        yield tag("i", bar, data_tip=f"layer {layer}: {number(value)}")


def _ending(row: Row, widest: float) -> list[Child]:
    bar = tag("b", style=f"width:{100 * (row.whole or 0) / widest:.1f}%")
    return [bar, tag("span", number(row.whole)), tag("span", row.note, class_="more") if row.note else None]


def _axis(columns: Sequence[int]) -> Iterable[Markup]:
    """Numbers under at most eight columns or so."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if len(columns) <= 8 * s or s == 100)
    return (tag("span", str(layer) if k % step == 0 else "") for k, layer in enumerate(columns))


def scale(kind: str, top: float, unit: str = "") -> Markup:
    """What the colours of a kind mean: nothing, the middle, the most."""
    levels = tag("div", [tag("i", class_=f"{kind}{k}") for k in range(LEVELS)])
    words = ("0", number(top * 0.5 ** (1 / KINDS[kind].power)), f"{number(top)} {unit}".strip())
    return tag("div", levels, tag("div", [tag("span", word) for word in words]), class_="scale-of-heat")


def number(value: float | None) -> str:
    """Three digits; a dash for what there is not."""
    return "–" if value is None else f"{value:.3g}"
