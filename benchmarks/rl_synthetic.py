"""How near the `rl` controller gets to a known optimum: RMSE of alpha after 40, 100 and 200 evaluations.

    python benchmarks/rl_synthetic.py [--seeds 60]
    python benchmarks/rl_synthetic.py --many [--seeds 5]

Quadratic rewards (`conformance.quadratic`) of K values in [0, 1], optima with standard deviation 0.18
around 0.5, the start; curvatures lognormal; noise with a standard deviation of 2 % of the expected gap
between start and optimum. What is judged is the last question of a run, the squashed mean of the policy;
for `random` and `bayes` it is the best point found. `independent`: optima unrelated to the features.
`structured`: 70 % of their variance is linear in them; `blank` is the same problem with the features
blanked. Under a minute on one core; `--bayes` adds minutes.

`--many`: the share of the way from start to optimum that searchers go in 40 and 210 values, with 16 and 40
evaluations, with and without three gradients to begin with (`search/slopes.py`; their cost is counted).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from arma_mergekit.search import make_searcher
from arma_mergekit.search.base import Trial
from arma_mergekit.search.conformance import Quadratic, best, quadratic, run

SIZES, BUDGETS = (1, 3, 8, 32), (40, 100, 200)
SPREAD, NOISE = 0.18, 0.02
MANY, FEW_BUDGETS = (40, 210), (16, 40)
MANY_SEARCHERS = ("random", "rl", "rl:slopes", "cmaes", "cmaes:slopes", "bayes", "bayes:slopes", "gradient")


def make(size: int, seed: int, budget: int, structure: float) -> Quadratic:
    test = quadratic(
        size, seed, budget=budget, bounds=(0, 1), start=0.5, centre=0.5, spread=SPREAD, structure=structure
    )
    return replace(test, noise=NOISE * SPREAD**2 * float(test.curvature.sum()))


def blank(test: Quadratic) -> Quadratic:
    return replace(test, problem=replace(test.problem, features=np.zeros_like(test.problem.features)))


def last(trials: Sequence[Trial]) -> Trial:
    return trials[-1]


def error(searcher: str, tests: Sequence[Quadratic], pick: Callable[[Sequence[Trial]], Trial]) -> float:
    """Root mean square distance to the optimum over problems; each has its own searcher seed."""
    squares = []
    for seed, test in enumerate(tests):
        trials = run(make_searcher(searcher, test.problem, seed), test.evaluate, test.problem.budget)
        squares.append(test.distance(pick(trials).query.values) ** 2)
    return float(np.sqrt(np.mean(squares)))


def row(title: str, cell: Callable[[int, int], float]) -> None:
    cells = ("/".join(f"{cell(size, budget):.3f}"[1:] for budget in BUDGETS) for size in SIZES)
    print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


def table(seeds: int, bayes: bool) -> None:
    def tests(size: int, budget: int, structure: float) -> list[Quadratic]:
        return [make(size, seed, budget, structure) for seed in range(seeds)]

    print(f"RMSE of alpha after {'/'.join(map(str, BUDGETS))} evaluations, {seeds} seeds\n")
    print("| | " + " | ".join(f"K = {size}" for size in SIZES) + " |")
    print("|---" * (1 + len(SIZES)) + "|")
    print(
        "| independent Gaussians, earlier | .053/.018/.012 | .103/.037/.019 | .146/.086/.035 | .180/.148/.104 |"
    )
    row("rl, independent", lambda k, n: error("rl", tests(k, n, 0.0), last))
    row("rl, structured", lambda k, n: error("rl", tests(k, n, 0.7), last))
    row("rl, structured, blank", lambda k, n: error("rl", [blank(t) for t in tests(k, n, 0.7)], last))
    for name in ("random", "bayes") if bayes else ("random",):
        row(f"{name}, independent", lambda k, n, name=name: error(name, tests(k, n, 0.0), best))  # type: ignore[misc]


def way(searcher: str, size: int, budget: int, seeds: int) -> float:
    """Median share of the way to the optimum."""
    shares = []
    for seed in range(seeds):
        test = quadratic(size, seed, budget=budget)
        trials = run(make_searcher(searcher, test.problem, seed), test.evaluate, budget)
        shares.append(test.exact(best(trials).query.values))
    return float(np.median(shares))


def many(seeds: int) -> None:
    columns = [(size, budget) for size in MANY for budget in FEW_BUDGETS]
    print(f"Share of the way to the optimum, median of {seeds} seeds\n")
    print("| | " + " | ".join(f"K = {size}, {budget} evaluations" for size, budget in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in MANY_SEARCHERS:
        cells = (f"{way(name, size, budget, seeds):.2f}" for size, budget in columns)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--bayes", action="store_true", help="TPE too")
    parser.add_argument("--many", action="store_true", help="many values, with and without gradients")
    options = parser.parse_args()
    if options.many:
        many(options.seeds or 5)
    else:
        table(options.seeds or 60, options.bayes)
