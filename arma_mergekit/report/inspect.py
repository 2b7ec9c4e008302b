"""The page of `arma inspect`: heat maps of how two models differ, from the command's JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arma_mergekit.report import charts, heatmap, svg
from arma_mergekit.report.heatmap import HeatMap, Row, number
from arma_mergekit.report.markup import Markup, compact, join, percent, tag
from arma_mergekit.report.page import SHELL, heading, section, table

__all__ = ["render"]

Record = Mapping[str, Any]

UNITS = {"js": "nats", "kl": "nats", "emd": "key positions"}
ROW, ALL_ROWS = 26, 400  # height of one, and of all where they are many; pixels


def render(found: Record) -> str:
    """The page. ``found``: what `difference.summary` returns."""
    body = join([header(found), weights(found), attention(found["attention"]), numbers(found)])
    title = join([f"{found['finetuned']} against {found['base']}"])
    return SHELL.substitute(title=title, chart_css=join([svg.CSS, heatmap.css()]), body=body)


def header(found: Record) -> Markup:
    """What was compared, and the answer in a few numbers."""
    boxes = [
        ("relative change", number(found["relative_change"]), "‖W_ft − W_base‖ / ‖W_base‖ over all weights"),
        (
            "tensors changed",
            f"{found['changed']} of {found['tensors']}",
            f"{compact(found['parameters'])} parameters",
        ),
    ]
    if changed := [row for row in found["projections"] if row["relative_change"]]:
        most = max(changed, key=lambda row: row["relative_change"])
        boxes.append(("changed most", label(most), f"{number(most['relative_change'])} of its norm"))
    if heads := found["attention"]:
        value, layer, head = max(of_heads(heads))
        note = f"{number(value)} {UNITS.get(heads['metric'], '')}, mean {number(heads['mean'])}"
        boxes.append(("attention moved most", f"layer {layer}, head {head}", note))
    tiles = [tag("div", tag("p", name), tag("strong", value), tag("p", note)) for name, value, note in boxes]
    return tag(
        "header",
        tag("p", f"arma inspect · {found['model']}", class_="caption"),
        tag("h1", "Where the two models differ"),
        tag("p", tag("code", found["finetuned"]), " against ", tag("code", found["base"]), class_="lead"),
        tag("div", tiles, class_="tiles"),
    )


def weights(found: Record) -> Markup:
    """Projections by layer, a map for each stack of layers."""
    inside = [row for row in sorted(found["projections"], key=rank) if row["by_layer"]]
    top = max((v for row in inside for v in row["by_layer"] if v is not None), default=0.0)
    if not top:
        return section("Weights", "No tensor inside the layers changed.")
    maps = []
    for stack in found["layers"]:
        depths = range(len(stack["relative_change"]))
        rows = [projection(row, len(depths)) for row in inside if row["stack"] == stack["stack"]]
        if rows:
            heat = HeatMap("warm", rows, depths, stack["relative_change"], ("change", "share"), top, ROW)
            maps += [tag("h3", stack["stack"]) if stack["stack"] else None, heatmap.draw(heat)]
    caption = (
        "Relative change ‖W_ft − W_base‖ / ‖W_base‖ of each projection (rows) by layer (columns), attention first. "
        "Bars above: whole layers; on the right: whole projections, and their share of the model's squared change."
    )
    if any(v is None for row in inside for v in row["by_layer"]):
        caption += " Hatched: layers without that projection."
    return section("Weights", caption, maps, heatmap.scale("warm", top))


def projection(row: Record, layers: int) -> Row:
    """A row of the map; the last layers may have no such projection."""
    values = [*row["by_layer"], *[None] * (layers - len(row["by_layer"]))]
    return Row(row["part"], values, row["relative_change"], percent(row["share_of_change"]), row["attention"])


def attention(found: Record | None) -> Markup | None:
    """Heads by layer."""
    if found is None:
        return None
    rows = []
    for head in range(max(map(len, found["by_head"]))):
        values = [row[head] if head < len(row) else None for row in found["by_head"]]
        known = [v for v in values if v is not None]
        rows.append(Row(f"head {head}", values, sum(known) / len(known)))
    top, height = max(of_heads(found))[0] or 1.0, max(7, min(ROW, ALL_ROWS / len(rows)))
    heat = HeatMap("cold", rows, found["layers"], found["by_layer"], ("mean",), top, height)
    caption = (
        f"{found['metric'].upper()} divergence of attention rows from the base's, mean over query positions of "
        f"{found['texts']} texts ({found['tokens']:,} tokens), for each head (rows) of each layer (columns). Bars "
        "above: means of layers; on the right: of heads over layers."
    )
    if skipped := len(found["skipped"]):
        caption += f" {skipped} layers without softmax attention are not measured, and not shown."
    key = heatmap.scale("cold", top, UNITS.get(found["metric"], ""))
    return section("Attention", caption, heatmap.draw(heat), key)


def numbers(found: Record) -> Markup:
    """The same as a table, and what was not compared."""
    words = (
        "projection",
        "tensors",
        "parameters",
        "change",
        "lowest layer",
        "highest layer",
        "share of change",
    )
    rows = [cells(row) for row in sorted(found["projections"], key=rank)]
    total = [
        "all",
        str(found["tensors"]),
        compact(found["parameters"]),
        number(found["relative_change"]),
        "",
        "",
        "",
    ]
    apart = [[tag("dt", name), tag("dd", why)] for name, why in found["not_compared"].items()]
    more = tag("details", tag("summary", "Not compared"), tag("dl", apart)) if apart else None
    caption = "Relative change of each projection, attention first; what lies outside the layers has no lowest layer."
    return section("Numbers", caption, table([list(map(heading, words))], rows, total), more)


def cells(row: Record) -> list[str]:
    """A projection in the table."""
    known = [v for v in row["by_layer"] if v is not None]
    ends = [number(pick(known)) if known else "–" for pick in (min, max)]
    change, share = number(row["relative_change"]), percent(row["share_of_change"])
    return [label(row), str(row["tensors"]), compact(row["parameters"]), change, *ends, share]


def label(row: Record) -> str:
    """A projection with the stack it is in."""
    return f"{row['stack']} {row['part']}".strip()


def rank(row: Record) -> tuple[bool, str, int, str]:
    """Attention first, then as in a layer."""
    place = charts.KINDS.index(row["part"]) if row["part"] in charts.KINDS else len(charts.KINDS)
    return not row["attention"], row["stack"], place, row["part"]


def of_heads(found: Record) -> list[tuple[float, int, int]]:
    """(divergence, layer, head) of each."""
    rows = zip(found["layers"], found["by_head"], strict=True)
    return [(value, layer, head) for layer, row in rows for head, value in enumerate(row)]
