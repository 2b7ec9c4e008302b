"""The page of `arma inspect` for a siamese model: what its gate does, from the command's JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arma_mergekit.report import svg
from arma_mergekit.report.heatmap import number
from arma_mergekit.report.markup import Markup, join, tag
from arma_mergekit.report.page import SHELL, figures, heading, section, table
from arma_mergekit.report.svg import SHAPES, Axis, Look

__all__ = ["conclusion", "render"]

Record = Mapping[str, Any]

WIDTH, HEIGHT = 560.0, 300.0
POINTS = 60  # of a curve


def render(found: Record) -> str:
    """The page. ``found``: what `arma inspect DIR --json` prints."""
    body = join([_header(found), _channels(found), _numbers(found)])
    return SHELL.substitute(title=join([f"The gate of {found['model']}"]), chart_css=svg.CSS, body=body)


def conclusion(found: Record) -> str:
    """What the numbers say, in a sentence."""
    last = found["tasks"][-1]
    moves = f"{last['spread']:.3f}"
    if not found["constant"]:
        return f"The gate moves by {moves} over tokens: it decides token by token."
    loss = (
        ""
        if last["kl_one"] is None
        else f", which changes what it says by {number(last['kl_one'])} nats per token"
    )
    return (
        f"The gate is constant over tokens (it moves by {moves}): it amounts to averaging the two models' outputs, the "
        f"base's with weight {found['average']:.3f}{loss}."
    )


def _header(found: Record) -> Markup:
    gate = found["siamese"]
    last = found["tasks"][-1]
    boxes = [
        ("mean gate", f"{last['mean']:.3f}", "weight of the base: 0 is the tuned model, 1 the base"),
        ("over tokens", f"± {last['spread']:.3f}", "standard deviation, root mean square over channels"),
        ("between channels", f"± {last['between_channels']:.3f}", "standard deviation of their means"),
    ]
    tiles = [tag("div", tag("p", name), tag("strong", value), tag("p", note)) for name, value, note in boxes]
    kind = f"{gate['mode']}, rank {gate['rank']}, {gate['channels']} channels"
    return tag(
        "header",
        tag("p", f"arma inspect · siamese, {kind}", class_="caption"),
        tag("h1", "What the gate does"),
        tag("p", tag("code", found["model"]), ". ", conclusion(found), class_="lead"),
        tag("div", tiles, class_="tiles"),
    )


def _channels(found: Record) -> Markup:
    """Mean gate by channel, a curve for each task."""
    x, y = Axis(0, 100, 56, WIDTH - 110), Axis(0, 1, HEIGHT - 44, 24)
    parts = svg.axes(x, y, ("channels, sorted by their mean gate: %", "gate"), (_percent, _share))
    ends = []
    for k, task in enumerate(_tasks(found)):
        look = Look(f"s{k % 6}", list(SHAPES)[k % len(SHAPES)])
        curve = [(x(place), y(mean), spread) for place, mean, spread in _curve(task)]
        band = [(a, _within(y, b, s)) for a, b, s in curve]
        edge = [(a, _within(y, b, -s)) for a, b, s in reversed(curve)]
        parts.append(svg.line([*band, *edge], f"band {look.color}", "polygon"))
        parts.append(svg.line([(a, b) for a, b, _ in curve], f"curve {look.color}"))
        middle = curve[len(curve) // 2]
        parts.append(svg.marker(look, middle[0], middle[1], 5, f"{task['name']}: mean {task['mean']:.3f}"))
        ends.append((curve[-1][0] - 4, curve[-1][1], task["name"]))
    parts += svg.place(ends, svg.Box(56, 0, WIDTH, HEIGHT - 30))
    told = f"Mean gate of each channel, sorted, of {len(ends)} tasks; a band of one standard deviation over tokens."
    caption = (
        "Mean gate of the channels, sorted, for each task; the band is one standard deviation over tokens. A flat line "
        "with a thin band is an average with one weight; a wide band is a gate that decides token by token."
    )
    picture = svg.picture(WIDTH, HEIGHT, "Gate by channel", told, parts)
    return section("Channels", caption, figures([picture]))


def _curve(task: Record) -> list[tuple[float, float, float]]:
    """(% of channels, mean, spread) of at most `POINTS` groups of channels with similar means."""
    pairs = sorted(zip(task["by_channel"], task["spread_by_channel"], strict=True))
    count = min(POINTS, len(pairs))
    groups = [pairs[k * len(pairs) // count : (k + 1) * len(pairs) // count] for k in range(count)]
    return [
        (100 * (k + 0.5) / count, sum(m for m, _ in g) / len(g), sum(s for _, s in g) / len(g))
        for k, g in enumerate(groups)
    ]


def _within(y: Axis, place: float, spread: float) -> float:
    """The edge of a band, inside the chart."""
    return min(max(place + spread * (y.end - y.start), y.end), y.start)


def _tasks(found: Record) -> Sequence[Record]:
    return [task for task in found["tasks"] if task["name"] != "all"] or found["tasks"]


def _percent(value: float) -> str:
    return f"{value:.0f}"


def _share(value: float) -> str:
    return f"{value:g}"


def _numbers(found: Record) -> Markup:
    words = (
        "task",
        "texts",
        "tokens",
        "mean gate",
        "over tokens",
        "between channels",
        "KL from one weight, nats/token",
    )
    rows = [
        [
            task["name"], str(task["items"]), f"{task['tokens']:,}", f"{task['mean']:.3f}", f"± {task['spread']:.3f}",
            f"± {task['between_channels']:.3f}", number(task["kl_one"]),
        ]
        for task in found["tasks"]
    ]  # fmt: skip
    caption = (
        "The last column, in nats per token: how far the model is from one that averages the outputs of both with the "
        "mean gate as its only weight. Near 0, training a gate bought nothing that one number would not."
    )
    return section("Numbers", caption, table([list(map(heading, words))], rows))
