"""`arma plan recipe.yml`: what a recipe does to every tensor, from headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

from arma_mergekit.errors import RecipeError

if TYPE_CHECKING:
    from arma_mergekit.checkpoint import TensorInfo
    from arma_mergekit.plan import Plan, PlannedTensor

__all__ = ["command", "render"]

FAILED = 3
BLOCKS = "▁▂▃▄▅▆▇█"
PLOT_WIDTH = 64
PLOT_TITLE = "alpha by layer"
ORDER = (
    "q", "k", "v", "o", "qkv", "kv", "q_a", "q_b", "kv_a", "kv_b",
    "gate", "up", "gate_up", "down", "router", "norm", "embed", "head",
)  # fmt: skip
Profile: TypeAlias = tuple[float | None, ...]  # mean alpha of each layer; None: nothing there


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(recipe: Path, as_json: bool) -> int:
    """Show what RECIPE does to every tensor, reading headers only.

    Lists everything that is wrong with the recipe and its models at once, and then exits with code 3.
    """
    from arma_mergekit.plan import Plan, plan_file

    try:
        plan = plan_file(recipe)
    except RecipeError as error:
        plan = Plan(errors=tuple(str(error).splitlines()))
    if as_json:
        click.echo(json.dumps(plan.as_dict(), indent=2, allow_nan=False))
        return FAILED if plan.errors else 0
    if not plan.errors:
        click.echo(render(plan, recipe))
    for kind, sentences in (("Error", plan.errors), ("Warning", plan.warnings if plan.errors else ())):
        for sentence in sentences:
            click.echo(f"{kind}: {sentence}", err=True)
    return FAILED if plan.errors else 0


def render(plan: Plan, recipe: Path) -> str:
    """The plan as text."""
    blocks = [_header(plan, recipe), _table(plan), _plot(plan), _warnings(plan), [_totals(plan)]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _header(plan: Plan, recipe: Path) -> list[str]:
    assert plan.base is not None
    named = plan.base.config.get("architectures")
    kind = named[0] if isinstance(named, list) and named else plan.base.config.get("model_type", "model")
    layers = len({(t.role.stack, t.role.layer) for t in plan.tensors if t.role.layer is not None})
    parameters = count(sum(t.numel for t in plan.tensors))
    facts = (
        str(recipe),
        str(kind),
        f"{layers} layers",
        f"{len(plan.tensors)} tensors",
        f"{parameters} parameters",
    )
    sides = [("base", plan.base), *zip(_names(plan), plan.finetuned, strict=True)]
    rows = [f"  {side:<14}{c.ref}   {'/'.join(_dtypes(c.tensors.values()))}" for side, c in sides]
    return ["   ".join(facts), *rows]


def _names(plan: Plan) -> list[str]:
    """Short names of the fine-tuned models."""
    several = len(plan.finetuned) > 1
    return [f"fine-tuned {i}" if several else "fine-tuned" for i, _ in enumerate(plan.finetuned, 1)]


def _dtypes(tensors: Iterable[TensorInfo]) -> list[str]:
    return [dtype for dtype, _ in Counter(t.dtype for t in tensors).most_common()]


# The table: a line per projection.


def _groups(tensors: Iterable[PlannedTensor]) -> dict[tuple[bool, str], list[PlannedTensor]]:
    """Tensors by attention or not and by what they are, in the order of ORDER."""
    groups: dict[tuple[bool, str], list[PlannedTensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.role.attention, tensor.role.part), []).append(tensor)
    rank = {part: i for i, part in enumerate(ORDER)}
    return dict(
        sorted(groups.items(), key=lambda item: (not item[0][0], rank.get(item[0][1], len(rank)), item[0][1]))
    )


def _table(plan: Plan) -> list[str]:
    head = ("", "tensors", "params", "bytes", "action", "alpha")
    rows: list[tuple[str, ...]] = []
    section = None
    short = {c.ref: name for c, name in zip(plan.finetuned, _names(plan), strict=True)}
    for (attention, part), tensors in _groups(plan.tensors).items():
        if attention != section:
            section = attention
            rows.append(("attention" if attention else "rest", "", "", "", "", ""))
        rows.append((f"  {part}", *_sizes(tensors), _action(tensors, short), _alphas(tensors)))
    averaged = sum(t.action == "average" for t in plan.tensors)
    outcome = f"{averaged} averaged, {len(plan.tensors) - averaged} copied"
    rows.append(("total", *_sizes(plan.tensors), outcome, ""))
    return _aligned([head, *rows])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns: the first and the last two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if 1 <= i <= 3 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return lines


def _sizes(tensors: Sequence[PlannedTensor]) -> tuple[str, str, str]:
    return (
        str(len(tensors)),
        count(sum(t.numel for t in tensors)),
        size(sum(t.bytes_written for t in tensors)),
    )


def _action(tensors: Sequence[PlannedTensor], short: Mapping[str, str]) -> str:
    """`average`, `copy base`, or how many of each."""
    kinds = Counter(
        "average" if t.action == "average" else f"copy {short.get(t.source, t.source)}" for t in tensors
    )
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def _alphas(tensors: Sequence[PlannedTensor]) -> str:
    """Range of alpha, for each fine-tuned model."""
    return ", ".join(_range(column) for column in zip(*(t.alphas for t in tensors), strict=True))


def _range(values: Iterable[float]) -> str:
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "?"
    low, high = min(known), max(known)
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


# The plot: a character per layer, a line for all projections with the same alphas.


def _plot(plan: Plan) -> list[str]:
    names = _names(plan)
    panels = {name: found for i, name in enumerate(names) if (found := _profiles(plan.tensors, i))}
    labels = [" ".join(parts) for found in panels.values() for parts in found.values()]
    width = max(map(len, [*labels, PLOT_TITLE]))
    lines: list[str] = []
    for name, found in panels.items():
        lines += [*([""] if lines else []), *_panel(found, width, name if len(names) > 1 else "")]
    return lines


def _profiles(tensors: Sequence[PlannedTensor], model: int) -> dict[Profile, list[str]]:
    """Alphas over depth of what is averaged, with the projections that have them."""
    layered = [t for t in tensors if t.role.layer is not None and not math.isnan(t.alphas[model])]
    depth = 1 + max((t.role.layer or 0 for t in layered), default=0)
    found: dict[Profile, list[str]] = {}
    for (_, part), group in _groups(layered).items():
        if any(t.action == "average" for t in group):
            rows: list[list[float]] = [[] for _ in range(depth)]
            for tensor in group:
                rows[tensor.role.layer or 0].append(tensor.alphas[model])
            found.setdefault(tuple(sum(row) / len(row) if row else None for row in rows), []).append(part)
    return found


def _panel(profiles: Mapping[Profile, Sequence[str]], width: int, title: str) -> list[str]:
    values = [v for profile in profiles for v in profile if v is not None]
    low, high = min(0.0, *values), max(1.0, *values)
    layers = len(next(iter(profiles)))
    each = -(-layers // PLOT_WIDTH)
    scale = f"▁ {low:.3g}   █ {high:.3g}   {title}"
    lines = [f"  {PLOT_TITLE:<{width}}  {_axis(layers, each)}   {scale}".rstrip()]
    for profile, parts in profiles.items():
        drawn = "".join(_bars(profile, each, low, high))
        known = _range(v for v in profile if v is not None)
        lines.append(f"  {' '.join(parts):<{width}}  {drawn}   {known}")
    return lines


def _bars(profile: Profile, each: int, low: float, high: float) -> Iterator[str]:
    for start in range(0, len(profile), each):
        known = [v for v in profile[start : start + each] if v is not None]
        level = (sum(known) / len(known) - low) / (high - low) if known else 0.0
        yield BLOCKS[round(level * (len(BLOCKS) - 1))] if known else " "


def _axis(layers: int, each: int) -> str:
    """Numbers of layers above every tenth column and the last one."""
    columns = -(-layers // each)
    axis = [" "] * columns
    last = str(layers - 1)
    for column in range(0, columns, 10):
        text = str(column * each)
        if column + len(text) < columns - len(last):
            axis[column : column + len(text)] = text
    axis[max(0, columns - len(last)) :] = last
    return "".join(axis)[:columns] if columns >= len(last) else last


def _warnings(plan: Plan) -> list[str]:
    return [f"  Warning: {sentence}" for sentence in plan.warnings]


def _totals(plan: Plan) -> str:
    return (
        f"  read {size(plan.bytes_read)}   write {size(plan.bytes_written)}   "
        f"peak memory {size(plan.peak_memory_bytes)} of weights"
    )


def size(number: int) -> str:
    """Bytes, as `1.23 GB`."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def count(number: int) -> str:
    """Parameters, as `1.23 B`."""
    return _scaled(number, ("", "K", "M", "B", "T"))


def _scaled(number: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:,.3g} {units[-1]}"
