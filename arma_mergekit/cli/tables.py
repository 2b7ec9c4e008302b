"""Results of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from arma_mergekit.cli.log import shown
from arma_mergekit.report import cautions
from arma_mergekit.report.markup import compact

if TYPE_CHECKING:
    from arma_mergekit.tune import Result
    from arma_mergekit.verdict import Difference

__all__ = ["render", "scores_table", "shares_table"]


def render(result: Result, summary: Mapping[str, Any]) -> str:
    """The table of held-back scores, the verdicts, and what to run next."""
    lines = ["", *scores_table(result), "", *shares_table(result.shares), ""]
    lines += [f"  {verdict.sentence}" for verdict in result.verdicts]
    lines += [
        *compared_table(result),
        *picks_table(result),
        "",
        f"Best on the search items: {result.best.name} (*).",
    ]
    if result.best.name in ("base", "fine-tuned"):
        lines.append(f"No average scores higher than {result.best.name} as it is.")
    return "\n".join([*lines, *cautions(summary), f"  {summary['next']}"])


def scores_table(result: Result) -> list[str]:
    """Headline scores on held-back items."""
    keys = list(result.candidates[0].held)
    widths = [max(len(key), 15) + 2 for key in keys]
    first = max(28, *(len(c.name) + 3 for c in result.candidates))
    lines = ["Held-back items (score ± standard error; up is better)", ""]
    lines.append(" " * first + "".join(f"{key:>{w}}" for key, w in zip(keys, widths, strict=True)))
    for candidate in result.candidates:
        cells = [f"{shown(m.score)} ± {m.stderr:.3f}" for m in candidate.held.values()]
        mark = "*" if candidate is result.best else " "
        row = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        lines.append(f"{f'{mark} {candidate.name}':<{first}}{row}")
    return lines


def shares_table(shares: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """Share kept of each suite: 0 % = the worse of base and fine-tuned, 100 % = the better."""
    suites = list(next(iter(shares.values())))
    first = max(28, *(len(name) + 3 for name in shares))
    lines = [f"{'Share kept':<{first}}" + "".join(f"{suite:>16}" for suite in suites)]
    for name, row in shares.items():
        cells = [f"{row[suite].mean:.0%} ± {row[suite].stderr:.0%}" for suite in suites]
        lines.append(f"{f'  {name}':<{first}}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def compared_table(result: Result) -> list[str]:
    """What answering costs other models and a merge, and how each fares against the best one."""
    if not result.compared:
        return []
    rows = [(f"{result.best.name}, or any merge", found.merge, 1.0) for found in result.compared[:1]]
    rows += [
        (found.guest.name, found.own, found.own.tokens_per_second / found.merge.tokens_per_second)
        for found in result.compared
    ]
    first = max(28, *(len(name) + 3 for name, _, _ in rows))
    heads = ("tokens/s", "of a merge's", "weights", "cache per token")
    lines = ["", f"{'Other models':<{first}}" + "".join(f"{head:>16}" for head in heads)]
    for name, cost, ratio in rows:
        sizes = (f"{compact(cost.weight_bytes)}B", f"{compact(cost.cache_bytes)}B")
        cells = (f"{cost.tokens_per_second:.1f}", f"{ratio:.2f}", *sizes)
        lines.append(f"{f'  {name}':<{first}}" + "".join(f"{cell:>16}" for cell in cells))
    return [*lines, "", *(f"  {found.verdict.sentence}" for found in result.compared)]


def picks_table(result: Result) -> list[str]:
    """Points of the front that have a name, and the recipe of each."""
    if not result.picks:
        return []
    lines = ["", "Picks of the front (share kept on search items)"]
    for name, pick in result.picks.items():
        shares = ", ".join(f"{suite} {share:.0%}" for suite, share in pick.searched.items())
        lines.append(f"  {name:<16}{shares:<36}tuned-{name.replace(' ', '-')}.yml")
    return lines
