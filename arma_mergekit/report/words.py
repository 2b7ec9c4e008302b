"""The verdict of a run in sentences, and what to run next; from the summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arma_mergekit.report import data
from arma_mergekit.report.markup import percent, score

__all__ = ["cautions", "headline", "kept", "markdown", "next_commands", "verdict"]

Record = Mapping[str, Any]


def verdict(summary: Record) -> Record:
    """The comparison of the best with its rival; empty if the best was not searched."""
    return next((v for v in summary.get("verdicts", ()) if v["name"] == summary.get("best")), {})


def headline(summary: Record) -> str:
    """Who won, without numbers."""
    if found := verdict(summary):
        return str(found["sentence"]).partition(" (share kept")[0]
    best = summary.get("best", "not known")
    return f"No searched merge is better than {best}" if summary.get("verdicts") else f"The best is {best}"


def kept(summary: Record) -> str:
    """`On held-back items bayes keeps 91.9 ± 2.1 % of general and 84.7 ± 3.9 % of domain.`"""
    best = data.candidate(summary, summary.get("best"))
    errors = best.get("share_stderr", {})
    parts = [
        f"{percent(share, errors.get(suite))} of {suite}"
        for suite, share in best.get("share_kept", {}).items()
    ]
    told = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    return f"On held-back items {best['name']} keeps {told}." if told else ""


def cautions(summary: Record) -> list[str]:
    """What speaks against taking the best as it is."""
    best, lines = data.candidate(summary, summary.get("best")), []
    for suite, least in (summary.get("keep") or {}).items():
        share = best.get("share_kept", {}).get(suite)
        if not summary.get("feasible", True):
            lines.append(
                f"No candidate keeps {percent(least)} of {suite} on the search items; this one comes closest."
            )
        if share is not None and share < least:
            lines.append(f"On held-back items it keeps {percent(share)} of {suite}, not {percent(least)}.")
    found = verdict(summary)
    if found and not found["dominates"]:
        lines.append(f"It does not beat {found['rival']} on held-back items: consider one-knob.yml.")
    return lines


def next_commands(summary: Record) -> list[tuple[str, str]]:
    """(what it merges, command): the best, and before it the simple one that it does not beat."""
    tuned, found = summary.get("next") or "mergekit-yaml tuned.yml merged/", verdict(summary)
    simple = (
        [(found["rival"], tuned.replace("tuned.yml", "one-knob.yml"))]
        if found and not found["dominates"]
        else []
    )
    return [*simple, (summary.get("best", ""), tuned)]


def markdown(summary: Record) -> str:
    """For a CI step or a model card: verdict, a table of shares kept, cautions, the next command."""
    names = data.suites(summary)
    rows = [
        ["", *(f"{cell(name)} kept" for name in names), "search reward"],
        ["---", *["---:"] * (len(names) + 1)],
    ]
    for c in summary.get("candidates", ()):
        errors, mark = c.get("share_stderr", {}), "**" if c["name"] == summary.get("best") else ""
        shares = [percent(c["share_kept"].get(name), errors.get(name)) for name in names]
        rows.append([f"{mark}{cell(c['name'])}{mark}", *shares, score(c.get("search_reward"))])
    blocks = [
        [f"### {cell(headline(summary))}"],
        [cell(kept(summary))],
        [f"| {' | '.join(row)} |" for row in rows],
        [f"- {cell(line)}" for line in cautions(summary)],
        [f"    {command}" for _, command in next_commands(summary)],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if any(block)) + "\n"


def cell(text: object) -> str:
    """Text that stays within its cell and means what it says: no element, row, link or emphasis."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\|*_`[]" else c for c in plain)
