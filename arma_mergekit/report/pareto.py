"""Share kept of one suite against another: what was found, on held-back items and on those the search saw.

They are panels of their own: items differ, and so does the scale (headline scores on held-back items, for a search
the probability of right answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from arma_mergekit.objective import front
from arma_mergekit.report import data, svg
from arma_mergekit.report.markup import Markup, join, percent, tag
from arma_mergekit.report.svg import Axis, Box, Look

__all__ = ["held_panel", "looks", "panels", "pareto_svg", "search_panel"]

Record = Mapping[str, Any]
Pair = tuple[str, str]

WIDTH, HEIGHT = 460.0, 430.0
FRAME = Box(52, 36, 448, 380)
OUTSIDE = -0.15  # trials below this share are counted, not drawn
SHAPES = ("circle", "square", "diamond", "up", "hexagon", "plus")


class Dot(NamedTuple):
    """A point of a panel; without ``label`` it is not named beside itself, ``size`` is in units."""

    shares: Record
    look: Look
    name: str
    label: str
    size: float
    errors: Record = {}  # noqa: RUF012
    more: str = ""

    def told(self) -> str:
        """Its tooltip."""
        shares = (f"{suite} {percent(share, self.errors.get(suite))}" for suite, share in self.shares.items())
        return f"{self.name}: {', '.join(shares)}"


def looks(summary: Record) -> dict[str, Look]:
    """Colour and shape of each family of candidates."""
    families = dict.fromkeys(data.family(c["name"]) for c in summary.get("candidates", ()))
    found = {"base": Look("end", "down"), "fine-tuned": Look("end", "pentagon")}
    found |= {
        name: Look("knob", SHAPES[k % 2])
        for k, name in enumerate(n for n in families if n.startswith(data.KNOB))
    }
    others = (name for name in families if name not in found)
    return found | {name: Look(f"s{k % 6}", SHAPES[(k + k // 6) % 6]) for k, name in enumerate(others)}


def panels(summary: Record, trials: Sequence[Record]) -> list[Markup]:
    """Two panels for each pair of suites."""
    pairs = list(combinations(data.suites(summary), 2))
    made = (p for pair in pairs for p in (held_panel(summary, pair), search_panel(summary, trials, pair)))
    return [panel for panel in made if panel]


def pareto_svg(summary: Record, trials: Sequence[Record]) -> str:
    """The panels of the first two suites as one picture that stands alone; "" for a run with fewer."""
    found = panels(summary, trials)[:2]
    placed = [tag("svg", p, x=k * WIDTH, width=WIDTH, height=HEIGHT) for k, p in enumerate(found)]
    told = "Share kept of each suite by each candidate, with standard errors."
    style = tag("style", svg.CSS)
    size = (WIDTH * len(found), HEIGHT, "Share kept", told)
    own: dict[str, Any] = {"xmlns": "http://www.w3.org/2000/svg", "style": "background:var(--paper)"}
    return svg.picture(*size, style, placed, **own) if found else ""


def held_panel(summary: Record, pair: Pair) -> Markup | None:
    """Candidates on held-back items with their standard errors."""
    told = f"Share kept of {pair[0]} (across) and {pair[1]} (up) by candidate; the table has the numbers."
    return _picture(summary, pair, "Held-back items", told, _candidates(summary, "share_kept"))


def search_panel(summary: Record, trials: Sequence[Record], pair: Pair) -> Markup | None:
    """Candidates and all trials on the search items, the curve of one knob and, where it is searched, the front."""
    looked, faint = looks(summary), list[Dot]()
    curve = sorted(summary.get("curve", ()), key=lambda p: float(p["alpha"]))
    values = [
        Dot(p["shares"], Look("knob", "circle"), f"one knob, everything {p['alpha']:g}", f"{p['alpha']:g}", 3)
        for p in curve
    ]
    full = [t for t in trials if data.is_full(t) and set(pair) <= t.get("shares", {}).keys()]
    for t in full:
        look = looked.get(t["key"].partition("/")[0])
        if look and look.color != "knob":
            faint.append(Dot(t["shares"], look, f"{t['key']}, reward {t['reward']:.3f}", "", 4, more="faint"))
    lines = {"curve knob": [p["shares"] for p in curve if set(pair) <= p["shares"].keys()]}
    if "pareto" in (summary.get("objective") or {}):
        best = front((t["shares"], {s: t["shares"][s] for s in pair}) for t in full)
        lines["front"] = sorted(best, key=lambda shares: float(shares[pair[0]]))
    told = f"Share kept of {pair[0]} (across) and {pair[1]} (up) by trial, on the items that searchers saw."
    return _picture(
        summary, pair, "Search items", told, [*_candidates(summary, "search_share"), *values, *faint], lines
    )


def _candidates(summary: Record, kind: str) -> list[Dot]:
    """The best first, then picks and ends; named is the best of each family, and every pick."""
    picks, best = (summary.get("picks") or {}).values(), summary.get("best")

    def rank(c: Record) -> tuple[bool, bool, bool, float]:
        end = c["name"] in data.ENDS
        return c["name"] != best, c["name"] not in picks, not end, -(c.get("search_reward") or 0.0)

    looked, named, dots = looks(summary), set[str](), list[Dot]()
    for c in sorted(summary["candidates"], key=rank):
        family, errors = data.family(c["name"]), c.get("share_stderr", {}) if kind == "share_kept" else {}
        name = c["name"] if c["name"] in picks or family not in named else ""
        named |= {family} - ({family} if c["name"] in picks else set())
        size = 7.0 if c["name"] == best else 5.0
        dots.append(Dot(c.get(kind, {}), looked[family], c["name"], name, size, errors))
    return dots


class Panel(NamedTuple):
    """Two suites and their axes."""

    pair: Pair
    x: Axis
    y: Axis

    def spot(self, shares: Record) -> tuple[float, float]:
        """Where these shares lie."""
        return self.x(shares[self.pair[0]]), self.y(shares[self.pair[1]])

    def draw(self, dot: Dot) -> tuple[Markup, list[Box]]:
        """A point with its error bars, and what it covers."""
        (x, y), axes = self.spot(dot.shares), (self.x, self.y)
        dx, dy = (abs(axis(dot.errors.get(s, 0)) - axis(0)) for axis, s in zip(axes, self.pair, strict=True))
        path = f"M{x - dx:.1f} {y:.1f}h{2 * dx:.1f}M{x:.1f} {y - dy:.1f}v{2 * dy:.1f}"
        bars = tag("path", d=path, class_=f"bar {dot.look.color}") if dot.errors else None
        boxes = [
            Box(x - 4, y - 4, x + 4, y + 4),
            Box(x - dx, y - 1, x + dx, y + 1),
            Box(x - 1, y - dy, x + 1, y + dy),
        ]
        return join([bars, svg.marker(dot.look, x, y, dot.size, dot.told(), dot.more)]), boxes

    def kept(self, keep: Record) -> list[Markup]:
        """Lines of the least shares that were asked for."""
        ends, parts = (FRAME.left, FRAME.right), list[Markup]()
        for suite, least in keep.items():
            words, x, y = f"keep {least:.0%}", self.x(least), self.y(least)
            if suite == self.pair[0]:
                parts.append(svg.line([(x, FRAME.top), (x, FRAME.bottom)], "rule"))
                parts.append(svg.label(x - 4, FRAME.bottom - 6, words, "muted halo", "end"))
            elif suite == self.pair[1]:
                parts.append(svg.line([(end, y) for end in ends], "rule"))
                parts.append(svg.label(FRAME.left + 6, y - 5, words, "muted halo"))
        return parts


def _picture(
    summary: Record,
    pair: Pair,
    title: str,
    told: str,
    dots: Sequence[Dot],
    lines: Mapping[str, list[Record]] = {},
) -> Markup | None:

    def inside(shares: Record) -> bool:
        return all(shares[suite] >= OUTSIDE for suite in pair)

    known = [dot for dot in dots if set(pair) <= dot.shares.keys()]
    shown = [dot for dot in known if inside(dot.shares)]
    if not shown:
        return None
    panel = Panel(
        pair, _axis(shown, pair[0], FRAME.left, FRAME.right), _axis(shown, pair[1], FRAME.bottom, FRAME.top)
    )
    curves = {class_: list(map(panel.spot, filter(inside, points))) for class_, points in lines.items()}
    marks, boxes = zip(*map(panel.draw, reversed(shown)), strict=True)
    avoid = [box for found in [*boxes, *map(svg.along, curves.values())] for box in found]
    labels = [(*panel.spot(dot.shares), dot.label) for dot in shown if dot.label]
    missing = len(known) - len(shown)
    note = f"{title}; {missing} below {OUTSIDE:.0%} not drawn" if missing else title
    axes = (f"{pair[0]}: share kept →", f"↑ {pair[1]}: share kept")
    grid = svg.axes(panel.x, panel.y, axes, ["{:.0%}".format] * 2)
    corner = svg.label(FRAME.right, FRAME.top - 12, note, "muted", "end")
    parts = (
        grid,
        corner,
        panel.kept(summary.get("keep") or {}),
        [svg.line(c, k) for k, c in curves.items()],
        marks,
    )
    names = svg.place(labels, FRAME._replace(top=FRAME.top - 8), avoid)
    return svg.picture(WIDTH, HEIGHT, f"{title}: {pair[0]} and {pair[1]}", told, *parts, names)


def _axis(dots: Sequence[Dot], suite: str, start: float, end: float) -> Axis:
    """With room for error bars, and for 0 to 100 % in any case."""
    values = [dot.shares[suite] + k * dot.errors.get(suite, 0) for dot in dots for k in (-1, 1)]
    return Axis(min(0, *values) - 0.04, max(1, *values) + 0.06, start, end)
