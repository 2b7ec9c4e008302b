"""Heat maps over layers (alphas, attention divergence), and regret against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any, NamedTuple

from arma_mergekit.report import data, svg
from arma_mergekit.report.markup import Markup, compact, tag
from arma_mergekit.report.pareto import looks
from arma_mergekit.report.svg import Axis, Look
from arma_mergekit.roles import Role, roles

__all__ = ["ALPHA", "DIVERGENCE", "alpha_chart", "color_scale", "divergence_chart", "regret_chart"]

Record = Mapping[str, Any]
Stops = Sequence[tuple[float, str]]

WIDTH, LEFT, RIGHT = 460.0, 84.0, 408.0
ALPHA = ((-1.0, "#01263d"), (0.0, "#0072b2"), (0.5, "#f4f1e8"), (1.0, "#d55e00"), (2.0, "#4d1d00"))
DIVERGENCE = ((0.0, "#f1f4f6"), (0.35, "#7cc3ea"), (0.7, "#0072b2"), (1.0, "#01263d"))
KINDS = (
    "q", "k", "v", "qkv", "kv", "o", "gate", "up", "gate_up", "down", "router", "mixer", "norms", "other",
)  # fmt: skip


class Strip(NamedTuple):
    """A row of a heat map: values by layer, or one (at layer -1) of what lies outside the layers."""

    name: str
    values: Mapping[int, float]
    note: str = ""


def alpha_chart(name: str, alphas: Mapping[str, float]) -> Markup | None:
    """Mean alpha of each kind of matrix (rows) by layer (across); a row's mean is written at its end."""
    found: dict[tuple[bool, str, int, str], dict[int, list[float]]] = {}
    for tensor, role in roles(alphas).items():
        layer = -1 if role.layer is None else role.layer
        found.setdefault(_order(role), {}).setdefault(layer, []).append(alphas[tensor])
    strips = []
    for (_, stack, _, kind), row in sorted(found.items()):
        values = {layer: fmean(row[layer]) for layer in sorted(row)}
        strips.append(Strip(f"{stack} {kind}".strip(), values, f"{fmean(values.values()):.2f}"))
    told = f"Alpha of each kind of matrix by layer for {name}; 0 is the base, 1 the fine-tuned model."
    return _heat_map(f"Alphas of {name}", told, strips, ALPHA, 18)


def _order(role: Role) -> tuple[bool, str, int, str]:
    """Attention first, what lies outside the layers last."""
    place = KINDS.index(role.kind) if role.kind in KINDS else len(KINDS)
    return role.layer is None, role.stack, place, role.kind


def divergence_chart(name: str, rows: Sequence[Any], top: float) -> Markup | None:
    """Divergence of each head (rows) by layer (across). ``rows``: per layer, per head; None where there is none."""
    heads = range(max((len(row or ()) for row in rows), default=0))
    layers = [{head: v for head, v in enumerate(row or ()) if v is not None} for row in rows]
    strips = [Strip(f"head {h}", {n: row[h] for n, row in enumerate(layers) if h in row}) for h in heads]
    stops = [(share * (top or 1), color) for share, color in DIVERGENCE]
    told = f"Divergence of attention by layer and head, {name}; the darkest is {top:.3g}."
    return _heat_map(name, told, strips, stops, min(18, 320 / (len(heads) or 1)))


def _heat_map(name: str, told: str, strips: Sequence[Strip], stops: Stops, height: float) -> Markup | None:
    layers = 1 + max((layer for strip in strips for layer in strip.values), default=-1)
    if not layers:
        return None
    x, parts, bottom = Axis(0, layers, LEFT, RIGHT), [], len(strips) * height
    every = max(1, round(12 / height))  # rows lower than a line of text are not all named
    for k, strip in enumerate(strips):
        parts += _cells(strip, x, k * height, height - (2 if height > 8 else 0), stops)
        if k % every == 0:
            parts.append(svg.label(LEFT - 8, (k + 0.5) * height + 3, strip.name, None, "end"))
        if strip.note:
            parts.append(svg.label(RIGHT + 8, (k + 0.5) * height + 3, strip.note, "muted"))
    ticks = [t for t in Axis(0, layers - 1, 0, 1).ticks() if t == int(t)] if layers > 1 else [0.0]
    parts += [svg.label(x(t + 0.5), bottom + 12, f"{t:.0f}", "muted", "middle") for t in ticks]
    parts.append(svg.label((LEFT + RIGHT) / 2, bottom + 27, "layer →", "muted", "middle"))
    return svg.picture(WIDTH, bottom + 34, name, told, parts)


def _cells(strip: Strip, x: Axis, top: float, height: float, stops: Stops) -> list[Markup]:
    """A cell for each run of neighbouring layers with one value; a dot marks an alpha outside [0, 1]."""
    cells, ranked = [], [(layer - k, layer, value) for k, (layer, value) in enumerate(strip.values.items())]
    for (_, value), run in groupby(ranked, key=lambda row: (row[0], round(row[2], 4))):
        layers = [layer for _, layer, _ in run]
        first, last = (layers[0], layers[-1]) if layers[0] >= 0 else (x.low, x.high - 1)
        inside = f"layer {first}" if first == last else f"layers {first} to {last}"
        span = "outside layers" if layers[0] < 0 else inside
        size = {"width": x(last + 1) - x(first) - 0.4, "height": float(height)}
        cell = tag("rect", x=x(first), y=float(top), fill=svg.blend(stops, value), **size)
        middle = (x(first) + x(last + 1)) / 2, top + height / 2
        dot = (
            None
            if 0 <= value <= 1 or stops is not ALPHA
            else svg.line([middle, (middle[0] + 0.1, middle[1])], "dots")
        )
        cells.append(tag("g", tag("title", f"{strip.name}, {span}: {value:.3g}"), cell, dot))
    return cells


def color_scale(stops: Stops, words: str, names: Mapping[float, str]) -> Markup:
    """What the colours of a heat map mean; ``names`` of values."""
    low, high, count = stops[0][0], stops[-1][0], 54
    x, step = Axis(low, high, LEFT, RIGHT), (high - low) / count
    size = {"y": 18, "width": x(low + step) - LEFT + 0.4, "height": 10}
    starts = [low + step * k for k in range(count)]
    bar = [tag("rect", x=x(v), fill=svg.blend(stops, v + step / 2), **size) for v in starts]
    marks = [svg.label(x(v), 42, name, "muted", "middle") for v, name in names.items()]
    return svg.picture(WIDTH, 48, "Scale of colours", words, svg.label(LEFT, 12, words, "muted"), bar, marks)


def regret_chart(summary: Record, trials: Sequence[Record]) -> Markup | None:
    """Best known reward minus best so far against forward tokens: median and range over seeds."""
    top = data.best_known(summary, trials)
    arms = {name: [data.regrets(t, top) for t in ours.values()] for name, ours in data.seeds(trials).items()}
    found = {name: data.spread(curves) for name, curves in arms.items()}
    found = {name: curves for name, curves in found.items() if curves[1]}
    if not found:
        return None
    x = Axis(0, 1.02 * max(curve[-1][0] for _, curve, _ in found.values()), 58, 470)
    # bad first guesses must not hide how searchers differ later on: what is above the chart runs along its edge
    y = Axis(0, 1.1 * max(curve[len(curve) // 4][1] for _, _, curve in found.values()) or 1.0, 300, 26)
    known = looks(summary)
    lines = [_regret_curve(n, c, known.get(n, Look("knob", "circle")), x, y) for n, c in found.items()]
    ends = [(x(c[-1][0]), y(c[-1][1]), name) for name, (_, c, _) in found.items()]
    rival = data.candidate(summary, summary.get("rival")).get("search_reward")
    if rival is not None and top - rival <= y.high:
        lines.append(svg.line([(x.start, y(top - rival)), (x.end, y(top - rival))], "rule"))
        ends.insert(0, (x.end - 3, y(top - rival), data.KNOB))
    titles = ("forward tokens spent (a backward pass counts double) →", "↑ regret")
    names = svg.place(ends, svg.Box(x.start, y.end - 10, 545, y.start))
    told = "Regret of each searcher against its cost; lower is better, 0 is the best reward of the run."
    grid = svg.axes(x, y, titles, [compact] * 2)
    return svg.picture(545, 345, "Regret against cost", told, grid, lines, names)


def _regret_curve(name: str, curves: Sequence[data.Curve], look: Look, x: Axis, y: Axis) -> Markup:
    low, middle, high = ([(x(c), y(min(v, y.high))) for c, v in _steps(curve)] for curve in curves)
    median = curves[1]
    turns = [b for a, b in pairwise([median[0], *median]) if b[1] < a[1]]
    dots = [
        svg.marker(look, x(c), y(min(v, y.high)), 4, f"{name}: regret {v:.3g} after {compact(c)} tokens")
        for c, v in [median[0], *turns, median[-1]]
    ]
    band = svg.line([*low, *reversed(high)], f"band {look.color}", "polygon")
    return tag("g", band, svg.line(middle, f"curve {look.color}"), dots)


def _steps(points: data.Curve) -> data.Curve:
    """Points with the corners of a step curve between them."""
    return [points[0], *(p for a, b in pairwise(points) for p in ((b[0], a[1]), b))]
