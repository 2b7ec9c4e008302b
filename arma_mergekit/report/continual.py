"""The page and the figure of `arma continual`, from the command's summary.json alone: matrices, curves, merges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from arma_mergekit.report import svg
from arma_mergekit.report.charts import DIVERGENCE
from arma_mergekit.report.markup import Child, Markup, duration, join, percent, score, tag
from arma_mergekit.report.page import SHELL, figures, heading, section, table
from arma_mergekit.report.svg import Axis, Look

__all__ = ["render", "standalone"]

Record = Mapping[str, Any]

CELL, GAP, LEFT, TOP = 60.0, 40.0, 104.0, 52.0
SHAPES = ("circle", "square", "diamond", "up", "hexagon", "plus")
DARK = 0.55  # share of the scale from which text in a cell is white


def render(found: Record) -> str:
    """The page. ``found``: summary.json."""
    body = join(
        [header(found), results(found), matrices(found), curves(found), merges(found), definitions(found)]
    )
    return SHELL.substitute(title="Continual fine-tuning", chart_css=svg.CSS, body=body)


def header(found: Record) -> Markup:
    """What was run, and who forgot least."""
    best = max(found["methods"], key=lambda m: m["mean"]["BWT"])
    top = max(found["methods"], key=lambda m: m["mean"]["OP"])
    boxes = [
        ("highest overall performance", top["name"], f"OP {score(top['mean']['OP'], top['std']['OP'])}"),
        ("least forgetting", best["name"], f"BWT {score(best['mean']['BWT'], best['std']['BWT'])}"),
    ]
    tiles = [tag("div", tag("p", name), tag("strong", value), tag("p", note)) for name, value, note in boxes]
    runs = f"orders: {len(found['orders'])}, seeds: {', '.join(map(str, found['seeds']))}"
    lead = f"{len(found['tasks'])} tasks in sequence, {found['steps']} optimiser steps each, {runs}"
    return tag(
        "header",
        tag("p", f"arma continual · {found['model']}", class_="caption"),
        tag("h1", "What was learned, and what was forgotten"),
        tag("p", lead, class_="lead"),
        tag("div", tiles, class_="tiles"),
    )


def results(found: Record) -> Markup:
    """Every metric of every method."""
    names = [name for name in found["definitions"] if name in found["methods"][0]["mean"]]
    heads = [heading(h) for h in ("method", *names, "merges", "callback", "time")]
    rows = [
        [
            m["name"],
            *(score(m["mean"][name], m["std"][name]) for name in names),
            f"{m['merges']:g}",
            percent(m["overhead"]),
            duration(m["seconds"]),
        ]
        for m in found["methods"]
    ]
    caption = (
        "Mean ± standard deviation over orders and seeds. Callback: its time as a share of training, replay excluded; "
        "merges: in a whole sequence."
    )
    return section("Methods", caption, table([heads], rows))


def matrices(found: Record) -> Markup:
    """The matrix of each method."""
    caption = (
        "Score on each task (columns) after training on each (rows), mean over seeds, first order. Below the diagonal: "
        "what is left of a task; above it: what a task not yet trained gets."
    )
    return section("Scores", caption, tag("div", matrices_svg(found), class_="scroll"))


def curves(found: Record) -> Markup:
    """A chart for each task of the first order."""
    caption = "Score on each task from when it was learned to the end, mean over seeds, first order; a line per method."
    return section("Forgetting", caption, legend(found), figures(curves_of(found)))


def legend(found: Record) -> Markup:
    """Which line is whose."""
    return tag("p", [tag("span", svg.glyph(look), name, " \u2003") for name, look in looks(found).items()])


def looks(found: Record) -> dict[str, Look]:
    """Colour and shape of each method."""
    return {m["name"]: Look(f"s{k % 6}", SHAPES[(k + k // 6) % 6]) for k, m in enumerate(found["methods"])}


def mean_matrix(found: Record, method: str, order: int = 0) -> list[list[float | None]]:
    """Entry by entry over the seeds; None where a task was not scored."""
    runs = [r["matrix"] for r in found["runs"] if r["method"] == method and r["order"] == order]
    size = range(len(runs[0]))
    cells = [[[run[i][j] for run in runs] for j in size] for i in size]
    return [[None if None in cell else fmean(cell) for cell in row] for row in cells]


def matrices_svg(found: Record) -> Markup:
    """All matrices side by side, as one picture; `CSS` of svg.py colours it."""
    tasks, names = found["orders"][0], [m["name"] for m in found["methods"]]
    side = CELL * len(tasks)
    across = min(3, len(names))
    width = LEFT + across * (side + GAP)
    height = -(-len(names) // across) * (side + TOP + GAP)
    parts = []
    for k, name in enumerate(names):
        left, top = LEFT + (k % across) * (side + GAP), TOP + (k // across) * (side + TOP + GAP)
        cells = _matrix(mean_matrix(found, name), tasks, name, k % across == 0)
        parts.append(tag("g", cells, transform=f"translate({left:g} {top:g})"))
    return svg.picture(
        width, height, "Score matrices", "Score on each task after each task, by method.", parts
    )


def _matrix(
    matrix: Sequence[Sequence[float | None]], tasks: Sequence[str], name: str, named: bool
) -> Iterable[Markup]:
    yield svg.label(0, -26, name)
    for j, task in enumerate(tasks):
        yield svg.label((j + 0.5) * CELL, -8, task[:8], "muted", "middle")
        if named:
            yield svg.label(-8, (j + 0.5) * CELL + 4, f"after {task[:9]}", "muted", "end")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is not None:
                yield _cell(i, j, value, f"{name}: {tasks[j]} after {tasks[i]}: {score(value)}")


def _cell(i: int, j: int, value: float, tip: str) -> Markup:
    place = {"x": j * CELL, "y": i * CELL, "width": CELL - 2, "height": CELL - 2}
    box = tag("rect", fill=svg.blend(DIVERGENCE, value), stroke="currentColor" if i == j else None, **place)
    style = f"fill:{'#fff' if value > DARK else '#1d2329'}"
    words = tag(
        "text",
        f"{value:.2f}",
        x=(j + 0.5) * CELL - 1,
        y=(i + 0.5) * CELL + 3,
        text_anchor="middle",
        style=style,
    )
    return tag("g", tag("title", tip), box, words)


def curves_of(found: Record) -> list[Markup]:
    """One chart a task that others follow."""
    matrices = {m["name"]: mean_matrix(found, m["name"]) for m in found["methods"]}
    return [curves_svg(found, matrices, j) for j in range(len(found["orders"][0]) - 1)]


def curves_svg(found: Record, matrices: Mapping[str, Sequence[Sequence[float | None]]], j: int) -> Markup:
    """Score on task j of the first order after it and every later one."""
    tasks = found["orders"][0]
    x, y = Axis(1, len(tasks), 52, 440), Axis(0, 1, 250, 30)
    lines: list[Child] = []
    for name, look in looks(found).items():
        points = [(i + 1, row[j]) for i, row in enumerate(matrices[name]) if i >= j]
        known = [(x(i), y(v), v, i) for i, v in points if v is not None]
        dots = [
            svg.marker(look, a, b, 4, f"{name}, after {tasks[i - 1]}: {score(v)}") for a, b, v, i in known
        ]
        lines.append(tag("g", svg.line([(a, b) for a, b, _, _ in known], f"curve {look.color}"), dots))
    grid = svg.axes(x, y, ("tasks trained →", f"↑ {tasks[j]}"), (whole, lambda v: f"{v:.1f}"))
    return svg.picture(460, 290, f"Score on {tasks[j]}", "Score after each task, by method.", grid, lines)


def whole(value: float) -> str:
    """Whole numbers only."""
    return f"{value:g}" if value == int(value) else ""


def merges(found: Record) -> Markup | None:
    """When each method merged, and how long its intervals were."""
    charts = [chart for run in found["runs"] if run["order"] == 0 and (chart := merges_svg(found, run))]
    if not charts:
        return None
    caption = (
        "Steps since the last merge at each merge, task after task (dashed lines); first order, every seed."
    )
    return section("Merges", caption, figures(charts))


def merges_svg(found: Record, run: Record) -> Markup | None:
    """Interval lengths of one run."""
    starts = [sum(run["steps"][:i]) for i in range(len(run["steps"]) + 1)]
    spots = [(starts[i] + m["step"], m["elapsed"], m) for i, task in enumerate(run["merges"]) for m in task]
    if not spots:
        return None
    x, y = Axis(0, starts[-1], 52, 440), Axis(0, 1.1 * max(spot[1] for spot in spots), 200, 30)
    look = looks(found)[run["method"]]
    dots = [
        svg.marker(
            look,
            x(at),
            y(n),
            3.5,
            told(m),
        )
        for at, n, m in spots
    ]
    rules = [svg.line([(x(at), y.start), (x(at), y.end)], "rule") for at in starts[1:-1]]
    title = f"{run['method']}, seed {run['seed']}"
    grid = svg.axes(x, y, ("training steps →", f"↑ steps between merges, {title}"), (whole, whole))
    return svg.picture(460, 240, f"Merges of {title}", "Interval lengths over training.", grid, rules, dots)


def told(merge: Record) -> str:
    """A merge's tooltip."""
    return f"step {merge['step']}: weights {merge['inner']}, {merge['outer']}; {merge['replayed']} steps replayed"


def definitions(found: Record) -> Markup:
    """What the metrics mean."""
    caption = "a[i][j]: score on task j after training on tasks 0 to i; T tasks."
    pairs = [(tag("dt", name), tag("dd", words)) for name, words in found["definitions"].items()]
    return section("Definitions", caption, tag("dl", pairs))


def standalone(found: Record) -> str:
    """The matrices as an SVG file."""
    start, _, rest = str(matrices_svg(found)).partition("<title>")
    head = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}{tag('style', svg.CSS)}<title>{rest}\n"
