"""Which searcher? All of them on two real cases with equal budgets in forward tokens; the verdict on held-back items.

    python benchmarks/searchers.py                # about two hours on two cores
    python benchmarks/searchers.py --long         # TPE with 200 evaluations against gradient with fewer

Each searcher in its default space, with three seeds: 40 evaluations of about 2,700 forward tokens each, of which a
gradient counts three. The best of each by search reward is scored once on held-back items, beside one-knob averaging.
Then `gradient` on two more fine-tunes. `--spaces tensor` adds TPE and rl in that space.

Sizes: 11 texts of 96 tokens and 60 diagnoses (33 texts with topics) to search on; 21 texts, 130 diagnoses (77 topics)
held back, and of what no search sees 200 words, 114 capitals and about 100 choices: 17,000 tokens a verdict.
Every part has a run directory with a journal, and they share an evaluation cache: nothing is scored twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from common import CASES, Shares, label, shares, shares_cells, spread, table, tuned

from arma_mergekit.tune import Result

SEARCHERS = ("random", "grid", "bayes", "bayes:gp", "cmaes", "rl", "bayes:slopes", "rl:slopes", "gradient")
IN_OTHER_SPACES = ("bayes", "rl")
LONG, SHARES = 200, (0.05, 0.1, 0.25)  # evaluations of TPE; of them, what gradient gets

Row = list[str]


def rows(result: Result) -> dict[str, Row]:
    """Cells by what the candidates are repetitions of: search reward, shares kept, cost, wins over one knob."""
    repeated: dict[str, list[str]] = {}
    for candidate in result.candidates:
        repeated.setdefault(label(candidate.name), []).append(candidate.name)
    rewards = {c.name: c.reward for c in result.candidates if c.reward is not None}
    cost = {phase.phase: phase.forward_tokens for phase in result.ledger}
    wins = {verdict.name: verdict.dominates for verdict in result.verdicts}
    kept = shares(result)
    return {
        name: [
            spread([rewards[n] for n in names], ".3f"),
            *shares_cells([kept[n] for n in names]),
            f"{np.median([cost[n] for n in names]):,.0f}" if names[0] in cost else "",
            f"{sum(wins[n] for n in names)} of {len(names)}" if names[0] in wins else "",
        ]
        for name, names in repeated.items()
    }


def compare(case: str, args: argparse.Namespace) -> None:
    """All searchers on one fine-tune, some of them in other spaces too."""
    budget = {"trials": args.trials, "seeds": args.seeds}
    recipe = CASES[case].load(0, small=True, searchers=args.searchers, **budget)
    with tuned(recipe, args.out / case / f"all-{args.trials}") as (_, result):
        found = rows(result)
    for words in args.spaces:
        space = {"groups": words, "rest": words}
        recipe = CASES[case].load(0, small=True, searchers=IN_OTHER_SPACES, space=space, **budget)
        with tuned(recipe, args.out / case / f"{words.replace(':', '-')}-{args.trials}") as (_, result):
            found |= {
                f"{name}, {words}": row for name, row in rows(result).items() if name in IN_OTHER_SPACES
            }
    print(f"\n### {case}: {args.trials} evaluations, median (range) over {len(args.seeds)} search seeds\n")
    head = ["", "search reward", "general kept", "domain kept", "harmonic mean", "forward tokens"]
    print(table([*head, "beats one knob"], ([name, *row] for name, row in found.items())))


def fine_tunes(case: str, args: argparse.Namespace) -> None:
    """`gradient` against one-knob averaging on several fine-tunes."""
    found: dict[str, list[Shares]] = {}
    sentences = []
    for seed in args.fine_tunes:
        recipe = CASES[case].load(seed, small=True, searchers=["gradient"], trials=args.trials)
        with tuned(recipe, args.out / case / f"fine-tune-{seed}-{args.trials}") as (_, result):
            sentences += [f"- fine-tune {seed}: {verdict.sentence}" for verdict in result.verdicts]
            for name, kept in shares(result).items():
                found.setdefault(label(name), []).append(kept)
    print(f"\n### {case}: gradient on {len(args.fine_tunes)} fine-tunes, median (range)\n")
    head = ["", "general kept", "domain kept", "harmonic mean"]
    print(table(head, ([name, *shares_cells(kept)] for name, kept in found.items())))
    print("\n" + "\n".join(sentences))


def reached(records: Sequence[Mapping[str, Any]], reward: float) -> int | None:
    """Forward tokens until a point scored on all search items has this reward; None if none has."""
    spent = accumulate(record["tokens"] for record in records)
    whole = ((r, total) for r, total in zip(records, spent, strict=True) if r["part"] is None)
    return next((total for r, total in whole if r["reward"] is not None and r["reward"] >= reward), None)


def long(case: str, args: argparse.Namespace) -> None:
    """TPE with many evaluations against gradient with few: for how much of TPE's cost is gradient as good?"""
    head = [
        "",
        "evaluations",
        "forward tokens",
        "share of TPE's",
        "best search reward",
        "as good as TPE after",
    ]
    lines, aim, whole = list[Row](), 0.0, 0.0
    arms = [
        ("bayes", args.long, args.seeds),
        *(("gradient", max(1, round(x * args.long)), [0]) for x in SHARES),
    ]
    for searcher, count, seeds in arms:
        recipe = CASES[case].load(0, small=True, searchers=[searcher], trials=count, seeds=seeds)
        with tuned(recipe, args.out / case / f"{searcher}-{count}") as (tuner, result):
            records = [arm.records for arm in tuner.arms if label(arm.name) == searcher]
            best = [c.reward for c in result.candidates if label(c.name) == searcher and c.reward is not None]
        tokens = float(np.median([sum(record["tokens"] for record in found) for found in records]))
        if searcher == "bayes":
            aim, whole = max(best), tokens
        after = reached(records[0], aim) if searcher == "gradient" else None
        told = f"{after / whole:.1%} of its tokens" if after else ""
        lines.append(
            [searcher, f"{count}", f"{tokens:,.0f}", f"{tokens / whole:.0%}", spread(best, ".3f"), told]
        )
    print(
        f"\n### {case}: TPE with {args.long} evaluations, best of {len(args.seeds)} seeds, against gradient\n"
    )
    print(table(head, lines))


def main() -> None:
    """Run what is asked, case by case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the searchers")
    parser.add_argument(
        "--fine-tunes", type=int, nargs="+", default=[0, 1, 2], help="their seeds, for gradient"
    )
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument(
        "--spaces", nargs="+", default=[], help="further spaces for bayes and rl: tensor, block:6"
    )
    parser.add_argument("--long", type=int, nargs="?", const=LONG, help="evaluations of TPE against gradient")
    parser.add_argument("--out", type=Path, default=Path("runs/searchers"))
    args = parser.parse_args()
    for case in args.cases:
        if args.long:
            long(case, args)
        else:
            compare(case, args)
            fine_tunes(case, args)


if __name__ == "__main__":
    main()
