"""What a candidate costs: setting it in memory, scoring it, and a gradient over it, on the real case.

OMP_WAIT_POLICY=passive python benchmarks/candidate.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from arma_mergekit.evals import make_suites
from arma_mergekit.load import load_live, load_tokenizer
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles
from arma_mergekit.scoring import Scorer
from arma_mergekit.search.base import Query
from arma_mergekit.space import make_space

CASE = Path("recipes/icd10/recipe.yml")


def seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median wall time."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def main() -> None:
    """Print the table."""
    recipe = Recipe.load(CASE)
    loaded = load_live(recipe)
    scorer = Scorer(loaded.live, make_suites(recipe, ["general", "domain"], load_tokenizer(recipe)), 0.5)
    scorer.use_ends(scorer.measure_ends())
    space = make_space(roles(loaded.tensors), "tensor", "tensor")
    alphas = iter(np.random.default_rng(0).uniform(0.2, 0.9, (100, len(space.names))))
    tokens = scorer.score(space, Query(tuple(next(alphas)))).tokens
    setting = seconds(lambda: loaded.live.set(space.alphas(next(alphas))))
    scoring = seconds(lambda: scorer.measure(scorer.steering), 3)
    gradient = seconds(lambda: scorer.score(space, Query(tuple(next(alphas)), gradient=True)), 3)
    print(f"| {tokens:,} forward tokens, {len(space.names)} alphas | seconds | of scoring |\n|---|---|---|")
    for name, value in (
        ("setting every tensor", setting),
        ("scoring", scoring),
        ("scoring with gradient", gradient),
    ):
        print(f"| {name} | {value:.2f} | {value / scoring:.1%} |")


if __name__ == "__main__":
    main()
