"""The sections of the page, in the order a reader wants them; each is there only if the run has its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from arma_mergekit.errors import RunError
from arma_mergekit.report import charts, data, svg, words
from arma_mergekit.report.markup import Child, Markup, compact, duration, join, percent, score, tag
from arma_mergekit.report.pareto import looks, panels
from arma_mergekit.whole import write_whole

__all__ = ["render"]

Record = Mapping[str, Any]
Trials = Sequence[Record]

SHELL = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))


def render(summary: Record, trials: Trials) -> str:
    """The page. ``summary``: summary.json; ``trials``: records of the journal; any part of either may be missing."""
    makers = (tradeoff, compared, alphas, regret, tasks, divergence, cost, reproduce)
    body = join([verdict(summary), *(make(summary, trials) for make in makers)])
    return SHELL.substitute(title=join([words.headline(summary)]), chart_css=svg.CSS, body=body)


def section(title: str, caption: str, *children: Child) -> Markup:
    """A heading, how to read what follows, and what follows."""
    return tag("section", tag("h2", title), tag("p", caption, class_="caption"), *children)


def figures(found: Iterable[Child]) -> Markup:
    """Charts side by side where there is room."""
    return tag("div", [tag("figure", chart) for chart in found], class_="figures")


def table(
    heads: Sequence[Sequence[Markup]], rows: Iterable[Sequence[Child]], foot: Sequence[Child] = ()
) -> Markup:
    """A table whose first column names the row; it scrolls sideways on a narrow screen."""

    def row(cells: Sequence[Child]) -> Markup:
        return tag("tr", tag("th", cells[0], scope="row"), [tag("td", cell) for cell in cells[1:]])

    last = tag("tfoot", row(foot)) if foot else None
    top, body = tag("thead", [tag("tr", cells) for cells in heads]), tag("tbody", map(row, rows))
    return tag("div", tag("table", top, body, last), class_="scroll", tabindex="0")


def heading(words: Child, note: str = "", span: int = 1) -> Markup:
    """The head of a column, or of several."""
    small = tag("small", note) if note else None
    return tag(
        "th", words, small, scope="colgroup" if span > 1 else "col", colspan=span if span > 1 else None
    )


def named(summary: Record, c: Record) -> Markup:
    """A candidate's marker and name."""
    best = tag("b", " best") if c["name"] == summary.get("best") else None
    missed = None if c.get("feasible", True) else tag("em", " misses what to keep")
    return join([svg.glyph(looks(summary)[data.family(c["name"])]), c["name"], best, missed])


def verdict(summary: Record, _: Trials = ()) -> Markup:
    """Who won, by how much, and what to run."""
    found, notes = words.verdict(summary), [tag("li", line) for line in words.cautions(summary)]
    rival = data.candidate(summary, summary.get("rival")).get("share_kept", {})
    boxes = []
    for suite, difference in found.get("suites", {}).items():
        told = f"{100 * difference['mean']:+.1f} ± {100 * difference['stderr']:.1f} points"
        share = data.candidate(summary, found["name"]).get("share_kept", {}).get(suite)
        side = "good" if difference["mean"] > difference["stderr"] else None
        side = "bad" if -difference["mean"] > difference["stderr"] else side
        versus = [tag("b", told, class_=side), f" against {found['rival']} ({percent(rival.get(suite))})"]
        boxes.append(tag("div", tag("p", f"{suite} kept"), tag("strong", percent(share)), tag("p", versus)))
    commands = [tag("p", f"merge {what}: ", tag("code", line)) for what, line in words.next_commands(summary)]
    return tag(
        "header",
        tag("p", f"arma-tune {summary.get('version', '')} · {summary.get('recipe', '')}", class_="caption"),
        tag("h1", words.headline(summary)),
        tag("p", words.kept(summary), class_="lead"),
        tag("div", boxes, class_="tiles") if boxes else None,
        tag("ul", notes, class_="cautions") if notes else None,
        tag("div", tag("h2", "Run next"), commands, class_="next"),
    )


def tradeoff(summary: Record, trials: Trials) -> Markup | None:
    """The Pareto picture, and the table that is its legend."""
    names = data.suites(summary)
    if not names:
        return None
    rows = []
    for c in summary["candidates"]:
        errors, cost = c.get("share_stderr", {}), f"{c.get('evaluations') or 0:g}"
        shares = [percent(c["share_kept"].get(suite), errors.get(suite)) for suite in names]
        rows.append([named(summary, c), *shares, score(c.get("search_reward")), cost])
    heads = ["candidate", *(f"{suite} kept, held back" for suite in names), "search reward", "evaluations"]
    caption = (
        "Share kept: 0 % is the worse of base and fine-tuned, 100 % the better; ± and bars are one standard error. "
        "Held-back items decide: every candidate was scored on them once."
    )
    if len(names) > 1:
        caption += (
            " Searchers saw other items, and shares of the probability of right answers instead of scores, so panels "
            "differ by more than noise. The grey line is one alpha for everything."
        )
    shown = table([list(map(heading, heads))], rows)
    return section("What is kept", caption, figures(panels(summary, trials)), shown)


def compared(summary: Record, _: Trials) -> Markup | None:
    """Models that are no merges against the best merge: what they keep, what answering costs, and who wins."""
    found, names = summary.get("compared") or (), data.suites(summary)
    if not found:
        return None
    best = summary.get("best", "")
    rows = [_costing(summary, best, "any merge", found[0]["merge"], 1.0)]
    for c in found:
        speed = c["own"]["tokens_per_second"] / c["merge"]["tokens_per_second"]
        rows.append(_costing(summary, c["name"], f"{c['kind']} {c['model']}", c["own"], speed))
    costs = ("tokens/s", "of a merge's", "weights", "cache per token")
    heads = ["model", *(f"{suite} kept, held back" for suite in names), *costs]
    caption = (
        "Scored once on the held-back items. Speed is greedy decoding of one text on the machine of the run, in turns "
        "with a merge; every merge costs what the base does."
    )
    notes = [tag("p", c["verdict"]["sentence"]) for c in found]
    return section("Against other models", caption, notes, table([list(map(heading, heads))], rows))


def _costing(summary: Record, name: str, what: str, cost: Record, speed: float) -> list[Child]:
    """A row: what a candidate keeps, and what answering costs."""
    c = data.candidate(summary, name)
    errors = c.get("share_stderr", {})
    kept = [percent(c["share_kept"].get(s), errors.get(s)) for s in data.suites(summary)]
    sizes = [f"{compact(cost['weight_bytes'])}B", f"{compact(cost['cache_bytes'])}B"]
    told = join([named(summary, c), tag("small", what)])
    return [told, *kept, f"{cost['tokens_per_second']:.1f}", f"{speed:.2f}", *sizes]


def alphas(summary: Record, _: Trials) -> Markup | None:
    """Where winners lie between base and fine-tuned, by kind of matrix and layer; further seeds folded away."""
    picks = (summary.get("picks") or {}).values()
    leaders: dict[str, Markup] = {}
    others = []
    found = [c for c in summary.get("candidates", ()) if data.is_arm(c) and c.get("alphas")]
    for c in sorted(found, key=lambda c: -(c.get("search_reward") or -math.inf)):
        figure = join([tag("figcaption", c["name"]), charts.alpha_chart(c["name"], c["alphas"])])
        key = c["name"] if c["name"] in picks else data.family(c["name"])
        if key in leaders:
            others.append(figure)
        leaders.setdefault(key, figure)
    if not leaders:
        return None
    names = {-1.0: "−1", 0.0: "0", 0.5: "½", 1.0: "1", 2.0: "2"}
    scale = charts.color_scale(
        charts.ALPHA, "alpha: 0 = base, 1 = fine-tuned; a dot marks what is outside", names
    )
    more = tag("details", tag("summary", "Other seeds"), figures(others)) if others else None
    caption = (
        "The best of each searcher; a row ends with its mean. What is equal in both models has no alpha."
    )
    return section(
        "Alphas by layer", caption, tag("div", scale, class_="scale"), figures(leaders.values()), more
    )


def regret(summary: Record, trials: Trials) -> Markup | None:
    """How fast each searcher came close to the best reward of the run."""
    chart = charts.regret_chart(summary, trials)
    seeds = ", ".join(f"{name} {len(found)}" for name, found in data.seeds(trials).items())
    caption = (
        "The best reward of the run minus the best so far, on search items; lower is better. Lines are medians over "
        f"seeds, bands their range ({seeds}). A line begins with the first trial on all search items: minibatches "
        "cost, but do not count. The dashed line is the best one-knob average."
    )
    return section("Regret against cost", caption, tag("figure", chart, class_="wide")) if chart else None


def tasks(summary: Record, trials: Trials) -> Markup | None:
    """Headline scores by task: on the items searched on, and on those held back."""
    found = [c for c in summary.get("candidates", ()) if c.get("held_back")]
    if not found:
        return None
    separation = {s["task"]: s for s in summary.get("separation", ())}
    steering = summary.get("steering", [*separation])
    keys = sorted(found[0]["held_back"], key=lambda key: (key not in steering, key not in separation))
    groups, sides = [tag("td")], [tag("td")]
    for key in keys:
        role = "steers" if key in steering else "left out: too weak" if key in separation else "watched"
        note = f"{role} · {compact(separation[key]['sigmas'])} σ" if key in separation else role
        suite, _, task = key.partition("/")
        groups.append(heading([tag("small", suite), task], note, 2 if key in separation else 1))
        sides += [heading("searched", f"{separation[key]['items']} items")] if key in separation else []
        sides.append(heading("held back", f"{found[0]['held_back'][key]['items']} items"))
    rows = []
    for c in found:
        cells, searched = [], _searched(c, separation, trials)
        for key in keys:
            held = c["held_back"].get(key, {})
            cells += [score(*searched.get(key, (None,)))] if key in separation else []
            cells.append(score(held.get("score"), held.get("stderr")))
        rows.append([named(summary, c), *cells])
    caption = (
        "Score ± standard error; up is better. Steering tasks were searched on other items than are held back; no "
        "search sees a watched one. σ: how many standard errors apart base and fine-tuned are on search items."
    )
    return section("Scores by task", caption, table([groups, sides], rows))


def _searched(
    c: Record, separation: Mapping[str, Record], trials: Trials
) -> dict[str, tuple[float | None, ...]]:
    """Scores of a candidate on search items, with errors where they are known."""
    if c["name"] in data.ENDS:
        return {key: (s["base" if c["name"] == "base" else "tuned"],) for key, s in separation.items()}
    trial = data.winner(c, trials)
    return {key: (value, trial.get("stderr", {}).get(key)) for key, value in trial.get("scores", {}).items()}


def divergence(summary: Record, _: Trials) -> Markup | None:
    """How far attention moved, by layer and head."""
    found = summary.get("divergence") or {}
    pairs: Mapping[str, Any] = found.get("pairs") or {}
    top = max((v for rows in pairs.values() for row in rows for v in row or () if v is not None), default=0.0)
    shown = [(name, charts.divergence_chart(name, rows, top)) for name, rows in pairs.items()]
    if not any(chart for _, chart in shown):
        return None
    skipped = f" Not measured: {', '.join(map(str, found['skipped']))}." if found.get("skipped") else ""
    names = {share: f"{share * top:.2g}" for share in (0.0, 0.5, 1.0)}
    scale = charts.color_scale(charts.DIVERGENCE, f"{str(found.get('metric', '')).upper()} divergence", names)
    drawn = [join([tag("figcaption", name), chart]) for name, chart in shown if chart]
    caption = f"How far the attention of each head is from the base's, on one scale.{skipped}"
    return section("Attention divergence", caption, tag("div", scale, class_="scale"), figures(drawn))


def cost(summary: Record, _: Trials) -> Markup | None:
    """Where forward tokens and time went."""
    ledger = summary.get("ledger", ())
    shown: dict[str, Callable[[float], str]] = {
        "evaluations": lambda n: f"{round(n, 1):g}", "forward_tokens": "{:,.0f}".format, "seconds": duration,
    }  # fmt: skip
    totals = {key: math.fsum(row[key] for row in ledger) for key in shown}
    rows = []
    for row in ledger:
        share = row["forward_tokens"] / (totals["forward_tokens"] or 1)
        bar = tag("span", class_="meter", style=f"width:{100 * share:.1f}px")
        rows.append([row["phase"], *(show(row[key]) for key, show in shown.items()), [bar, percent(share)]])
    heads = list(map(heading, ["phase", "evaluations", "forward tokens", "time", "share of tokens"]))
    foot = ["all", *(show(totals[key]) for key, show in shown.items()), ""]
    caption = "Forward tokens are the budget: padding is not counted, a backward pass counts double."
    return section("Cost", caption, table([heads], rows, foot)) if ledger else None


def reproduce(summary: Record, trials: Trials) -> Markup | None:
    """What made this run, and what tells it from another."""
    facts = {
        name: _flat(summary.get(name))
        for name in ("command", "version", "recipe", "objective", "seeds", "holdout")
    }
    marks = summary.get("fingerprint") or next((t for t in trials if t["key"] == "fingerprint"), {})
    prints = {name: _flat(value) for name, value in marks.items() if name != "key"}
    lists = [
        tag("dl", [[tag("dt", k), tag("dd", v)] for k, v in rows.items() if v]) for rows in (facts, prints)
    ]
    more = tag("details", tag("summary", "Fingerprint"), lists[1]) if prints else None
    caption = "The same command goes on with a run that is not finished, and asks the same questions anew."
    return section("Reproduce", caption, lists[0], more) if any(facts.values()) else None


def _flat(value: Any) -> Child:
    """A fact as text; nested ones have a line each."""
    if isinstance(value, Mapping):
        return [tag("div", f"{k}: ", _flat(v)) for k, v in value.items()]
    return (
        ", ".join(map(str, value)) if isinstance(value, list) else None if value in (None, "") else str(value)
    )


def write_page(page: str, path: Path) -> Path:
    """Write a page, whole or not at all; RunError if it cannot be written."""
    try:
        write_whole({path: page})
    except OSError as error:
        raise RunError(
            f"Cannot write {path}: {error.strerror}. Make room, or give another --html."
        ) from error
    return path
