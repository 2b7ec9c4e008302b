"""HTML and SVG elements that escape what they are given, and numbers as people read them. It knows no runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

__all__ = ["Child", "Markup", "compact", "duration", "join", "percent", "score", "tag"]


class Markup(str):
    """Text that is markup already; `tag` escapes every other text, so a name cannot become an element."""

    __slots__ = ()


Child: TypeAlias = "str | float | Iterable[Child] | None"


def tag(name: str, *children: Child, **attributes: object) -> Markup:
    """An element. `class_` is class, `stroke_width` is stroke-width; attributes that are None are left out."""
    given = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    pairs = "".join(f' {key}="{escape(_plain(value))}"' for key, value in given)
    return Markup(f"<{name}{pairs}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after another, escaped unless they are markup; None is nothing."""
    return Markup("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None or isinstance(child, Markup):
        return child or ""
    return escape(_plain(child)) if isinstance(child, str | int | float) else join(child)


def _plain(value: object) -> str:
    return (
        f"{value:.1f}" if isinstance(value, float) else str(value)
    )  # a tenth of a unit is enough for a place


def score(value: float | None, stderr: float | None = None) -> str:
    """`0.473 ± 0.041`; no minus before a zero."""
    if value is None:
        return "–"
    return f"{round(value, 3) + 0.0:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def percent(share: float | None, stderr: float | None = None) -> str:
    """A share as `91.9 ± 2.4 %`."""
    if share is None:
        return "–"
    return f"{round(100 * share, 1) + 0.0:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}") + " %"


def compact(number: float) -> str:
    """481490 as `481k`."""
    if math.isinf(number):
        return "∞"
    unit, size = next(
        ((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if abs(number) >= s), ("", 1.0)
    )
    return f"{number / size:.3g}{unit}"


def duration(seconds: float) -> str:
    """748.4 as `12 min 28 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
