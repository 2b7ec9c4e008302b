"""`arma inspect BASE FINETUNED`: where two models differ, by layer, projection and head.

`arma inspect SIAMESE`: what the gate of a siamese model does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from arma_mergekit.cli.plan import BLOCKS, ORDER, PLOT_WIDTH, count
from arma_mergekit.cli.tune import quiet_libraries
from arma_mergekit.errors import UsageError

__all__ = ["command", "render"]

Record = Mapping[str, Any]
Values = Sequence[float | None]
Line = tuple[str, str, str, str, str, str, str]

HEADS = 5  # that are named
NAMED = 3  # tensors that could not be compared


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("base")
@click.argument("finetuned", required=False)
@click.option(
    "--text", "texts", metavar="FILE", multiple=True,
    help="Texts to compare attention on: JSONL, parquet, .txt, or builtin:prose. Of a siamese model: its tasks, again "
    "for each.",
)  # fmt: skip
@click.option(
    "--metric",
    type=click.Choice(["js", "kl", "mse", "cosine", "emd"]),
    default="js",
    show_default=True,
    help="Divergence of attention.",
)
@click.option("--field", default="text", show_default=True, help="Field of the records that holds the text.")
@click.option(
    "--max-tokens", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of text, at most."
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with heat maps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    base: str,
    finetuned: str | None,
    texts: tuple[str, ...],
    metric: str,
    field: str,
    max_tokens: int,
    html: Path | None,
    as_json: bool,
) -> int:
    """Show where FINETUNED differs from BASE, by layer and projection.

    Both are directories or hub ids in the local cache, as path[@revision][+adapter]. Weights are streamed; with --text
    the models are loaded too, and their attention is compared head by head.

    Alone, BASE is the directory of a siamese model: how much of its base every channel takes on each --text (prompt and
    answer, or text), and whether that changes from token to token.
    """
    quiet_libraries()
    if finetuned is None:
        return siamese(Path(base), texts, field, max_tokens, html, as_json)
    if len(texts) > 1:
        raise UsageError("Attention is compared on one --text; several are for a siamese model.")
    text = texts[0] if texts else None
    from arma_mergekit.checkpoint import open_model
    from arma_mergekit.difference import attention_difference, summary, weight_difference

    models = open_model(base), open_model(finetuned)
    weights = weight_difference(*models)
    attention = None
    if text is not None and any(change.difference for change in weights.changes.values()):
        attention = attention_difference(base, finetuned, text, metric, field, max_tokens)
    found = summary(*models, weights, attention)
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else render(found))
    if html is not None:
        from arma_mergekit.report.inspect import render as render_page
        from arma_mergekit.report.page import write_page

        click.echo(write_page(render_page(found), html), err=as_json)
    return 0


def siamese(
    path: Path, texts: Sequence[str], field: str, max_tokens: int, html: Path | None, as_json: bool
) -> int:
    """The gate of a siamese model on some files."""
    if not texts:
        raise UsageError(
            "Give FINETUNED to compare two models, or --text FILE for the gate of a siamese one."
        )
    from arma_mergekit.report.siamese import conclusion
    from arma_mergekit.siamese import SiameseForCausalLM
    from arma_mergekit.siamese.diagnose import diagnose, read_rows

    model = SiameseForCausalLM.from_pretrained(path)
    tokenizer = model.tokenizer()
    tasks = {Path(text).stem: read_rows(tokenizer, Path(text), field, max_tokens) for text in texts}
    found = {"model": str(path), **diagnose(model, tasks)}
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else gate(found, conclusion(found)))
    if html is not None:
        from arma_mergekit.report.page import write_page
        from arma_mergekit.report.siamese import render as render_page

        click.echo(write_page(render_page(found), html), err=as_json)
    return 0


def gate(found: Record, conclusion: str) -> str:
    """A line per task."""
    about = found["siamese"]
    lines: list[Line] = [("", "tokens", "mean", "tokens ±", "channels ±", "channels", "KL from one weight")]
    for task in found["tasks"]:
        numbers = (str(task["tokens"]), *(f"{task[k]:.3f}" for k in ("mean", "spread", "between_channels")))
        kl = "" if task["kl_one"] is None else f"{_number(task['kl_one'])} nats/token"
        lines.append((task["name"], *numbers, bars(sorted(task["by_channel"]), 1.0), kl))
    kind = f"{about['mode']}, rank {about['rank']}, {about['channels']} channels"
    head = f"  siamese      {found['model']}   {kind}"
    title = "  Gate: weight of the base, 0 to 1; channels sorted (█ 1)"
    return "\n".join([head, "", title, "", *_aligned(lines), "", f"  {conclusion}"])


def render(found: Record) -> str:
    """The differences as text."""
    blocks = [_header(found), _weights(found), _apart(found["not_compared"]), _attention(found["attention"])]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _header(found: Record) -> list[str]:
    changed = f"{found['changed']} of {found['tensors']} tensors changed"
    facts = "   ".join((found["model"], changed, f"{count(found['parameters'])} parameters"))
    return [f"  base         {found['base']}", f"  fine-tuned   {found['finetuned']}", "", f"  {facts}"]


def _weights(found: Record) -> list[str]:
    """A line per projection; blocks of one scale show the layers."""
    projections = sorted(found["projections"], key=_rank)
    top = max((v for row in projections for v in row["by_layer"] if v is not None), default=0.0)
    layers = max((len(row["by_layer"]) for row in projections), default=0)
    lines: list[Line] = [("", "tensors", "params", "change", "share", _axis(layers), "")]
    section = None
    for row in projections:
        if row["attention"] != section:
            section = row["attention"]
            lines.append(("attention" if section else "rest", "", "", "", "", "", ""))
        share, name = f"{row['share_of_change']:.1%}", " ".join(filter(None, (row["stack"], row["part"])))
        lines.append((f"  {name}", *_sizes(row), share, bars(row["by_layer"], top), _range(row["by_layer"])))
    lines.append(("all", *_sizes(found), "", "", ""))
    note = f"share of the squared change, change by layer (█ {_number(top)})"
    return [f"  Relative change ||W_ft - W_base|| / ||W_base||, {note}", "", *_aligned(lines)]


def _rank(row: Record) -> tuple[bool, str, int, str]:
    place = ORDER.index(row["part"]) if row["part"] in ORDER else len(ORDER)
    return not row["attention"], row["stack"], place, row["part"]


def _sizes(row: Record) -> tuple[str, str, str]:
    return str(row["tensors"]), count(row["parameters"]), _number(row["relative_change"])


def _aligned(lines: Sequence[Line]) -> list[str]:
    """Columns: the first and the last two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def placed(line: Line) -> str:
        cells = enumerate(zip(line, widths, strict=True))
        return "   ".join(c.rjust(w) if 1 <= i <= 4 else c.ljust(w) for i, (c, w) in cells)

    return [f"  {placed(line)}".rstrip() for line in lines]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _range(values: Values) -> str:
    known = [v for v in values if v is not None]
    return f"{_number(min(known))} … {_number(max(known))}" if known else ""


def bars(values: Values, top: float) -> str:
    """A block per layer, at most `PLOT_WIDTH` of them; a dot where nothing changed, a space where nothing is."""
    each = _each(len(values))
    runs = ([v for v in values[i : i + each] if v is not None] for i in range(0, len(values), each))
    return "".join(_block(sum(run) / len(run), top) if run else " " for run in runs)


def _block(value: float, top: float) -> str:
    return BLOCKS[round(value / top * (len(BLOCKS) - 1))] if value else "·"


def _each(layers: int) -> int:
    """Layers to a block."""
    return max(1, -(-layers // PLOT_WIDTH))


def _axis(layers: int) -> str:
    """`0    29` over the blocks."""
    last, width = str(layers - 1), -(-layers // _each(layers))
    return f"0{last:>{width - 1}}" if width > len(last) else ""


def _apart(found: Mapping[str, str]) -> list[str]:
    if not found:
        return []
    named = [f"    {name}: {reason}" for name, reason in list(found.items())[:NAMED]]
    more = [f"    and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return ["  Not compared", *named, *more]


def _attention(found: Record | None) -> list[str]:
    if found is None:
        return []
    unit = {"js": ", nats", "kl": ", nats", "emd": ", key positions"}.get(found["metric"], "")
    top, skipped = max(found["by_layer"]), len(found["skipped"])
    return [
        f"  Attention divergence ({found['metric']}{unit}) on {found['texts']} texts, {found['tokens']} tokens",
        "",
        f"    mean {_number(found['mean'])}   {bars(found['by_layer'], top)}   {_range(found['by_layer'])}",
        f"    heads that moved most: {', '.join(_moved(found))}",
        *([f"    {skipped} layers without softmax attention are not measured"] if skipped else []),
    ]


def _moved(found: Record) -> Iterable[str]:
    rows = zip(found["layers"], found["by_head"], strict=True)
    heads = sorted(((v, layer, head) for layer, row in rows for head, v in enumerate(row)), reverse=True)
    return (f"layer {layer} head {head} ({_number(v)})" for v, layer, head in heads[:HEADS])
