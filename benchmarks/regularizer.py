"""Does attention regularisation help? Searchers with and without it: equal budgets, several fine-tunes, held-back data.

    python benchmarks/regularizer.py --out runs/regularizer              # hours on two cores
    python benchmarks/regularizer.py --objective domain --cases icd10    # no general suite in the objective

On each fine-tune every searcher runs without a regulariser, with it at each weight (the divergence of attention from
the base's on the general suite's texts), and without it but with as many more evaluations as its tokens would have
bought. The best of each by its own search reward is scored once on held-back items; with and without are compared
within one fine-tune and search seed. ``balance``: the recipes' objective, where KL(base || merged) on such texts steers
too. ``domain``: the domain suite alone, so that nothing but the regulariser speaks for what must not be forgotten.

Sizes are those of benchmarks/searchers.py. Every part is a run with a journal; started again, it scores nothing twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import CASES, SUITES, Shares, label, shares, shares_cells, spread, table, tuned

from arma_mergekit.recipe import Recipe
from arma_mergekit.tune import Result

OBJECTIVES: Mapping[str, Mapping[str, Any]] = {"balance": {}, "domain": {"objective": {"sum": {"domain": 1}}}}
NONE, MORE = "none", "none, same tokens"


class Arm(NamedTuple):
    """What one arm came to."""

    kept: Shares
    tokens: float
    evaluations: float


Key = tuple[int, str]  # fine-tune, name of the arm: `gradient`, `rl seed 1`
Found = dict[str, dict[Key, Arm]]  # by variant


def arms(result: Result, fine_tune: int, searchers: Sequence[str]) -> dict[Key, Arm]:
    """The arms of a run, with what they cost."""
    kept, cost = shares(result), {phase.phase: phase for phase in result.ledger}
    names = [c.name for c in result.candidates if label(c.name) in searchers]
    return {
        (fine_tune, name): Arm(kept[name], cost[name].forward_tokens, cost[name].evaluations)
        for name in names
    }


def regularizer(recipe: Recipe, args: argparse.Namespace, weight: float) -> dict[str, Any]:
    """The key of `tune`: texts of the general suite's first task, of which the search sees its own half."""
    text = recipe.data_path(recipe.evals["general"][0].data).resolve()
    return {
        "regularizer": {
            "attention": args.metric, "text": str(text), "weight": weight, "max_tokens": args.tokens,
        }
    }  # fmt: skip


def run(case: str, fine_tune: int, variant: str, args: argparse.Namespace, **tune: Any) -> dict[Key, Arm]:
    """One variant on one fine-tune."""
    options = {
        "searchers": args.searchers,
        "trials": args.trials,
        "seeds": args.seeds,
        **OBJECTIVES[args.objective],
    }
    recipe = CASES[case].load(fine_tune, small=True, **{**options, **tune})
    name = f"{args.objective}-{fine_tune}-{variant.replace(' ', '-').replace(',', '')}-{args.trials}"
    with tuned(recipe, args.out / case / name) as (_, result):
        return arms(result, fine_tune, args.searchers)


def compare(case: str, args: argparse.Namespace) -> Found:
    """All variants on all fine-tunes."""
    found: Found = {}
    for fine_tune in args.fine_tunes:
        recipe = CASES[case].load(fine_tune)
        plain = run(case, fine_tune, NONE, args)
        found.setdefault(NONE, {}).update(plain)
        price = 1.0
        for weight in args.weights:
            variant = f"{args.metric} {weight:g}"
            arms = run(case, fine_tune, variant, args, **regularizer(recipe, args, weight))
            found.setdefault(variant, {}).update(arms)
            price = per_evaluation(arms) / per_evaluation(plain)
        more = run(case, fine_tune, MORE, args, trials=round(price * args.trials))
        found.setdefault(MORE, {}).update(more)
    return found


def per_evaluation(arms: Mapping[Key, Arm]) -> float:
    """Forward tokens of an evaluation."""
    return sum(arm.tokens for arm in arms.values()) / sum(arm.evaluations for arm in arms.values())


def harmonic(kept: Shares) -> float:
    """Harmonic mean of the shares, 0 unless all are positive."""
    values = [kept[suite] for suite in SUITES]
    return len(values) / sum(1 / v for v in values) if min(values) > 0 else 0.0


def rows(found: Found, searcher: str) -> list[list[str]]:
    """A row per variant: shares kept, cost, and the difference from the same arm without."""
    lines = []
    for variant, all_arms in found.items():
        ours = {key: arm for key, arm in all_arms.items() if label(key[1]) == searcher}
        apart = [harmonic(arm.kept) - harmonic(found[NONE][key].kept) for key, arm in ours.items()]
        versus = (
            ["", ""]
            if variant == NONE
            else [spread(apart, "+.1%"), f"{sum(d > 0 for d in apart)} of {len(apart)}"]
        )
        tokens = spread([arm.tokens for arm in ours.values()], ",.0f")
        lines.append([searcher, variant, *shares_cells([arm.kept for arm in ours.values()]), *versus, tokens])
    return lines


def main() -> None:
    """Run what is asked, case by case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--objective", choices=OBJECTIVES, default="balance")
    parser.add_argument("--searchers", nargs="+", default=["gradient", "rl"])
    parser.add_argument("--metric", choices=["js", "kl", "mse", "cosine", "emd"], default="js")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument(
        "--tokens", type=int, default=3200, help="of the regulariser's texts, searched and held back"
    )
    parser.add_argument("--fine-tunes", type=int, nargs="+", default=[0, 1, 2], help="their seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the searchers")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/regularizer"))
    args = parser.parse_args()
    head = [
        "searcher",
        "regulariser",
        "general kept",
        "domain kept",
        "harmonic mean",
        "against none",
        "better",
        "tokens",
    ]
    for case in args.cases:
        found = compare(case, args)
        times = f"{len(args.fine_tunes)} fine-tunes and {len(args.seeds)} search seeds"
        print(f"\n### {case}, {args.objective}: {args.trials} evaluations, median (range) over {times}\n")
        print(table(head, [row for searcher in args.searchers for row in rows(found, searcher)]), flush=True)


if __name__ == "__main__":
    main()
