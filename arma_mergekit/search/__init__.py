"""Searchers: ask for points, tell how they did (`base`), one file each.

    searcher = make_searcher("rl", problem, seed=0)

`SEARCHERS` is the one table of names; each file is imported when its name is asked for, so this package
loads neither optuna nor torch. `conformance.check_searcher` tests anybody's searcher.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.search.base import Problem, Query, Searcher, SearcherFactory, Trial

__all__ = [
    "SEARCHERS",
    "WITH_GRADIENTS",
    "Problem",
    "Query",
    "Searcher",
    "SearcherFactory",
    "Trial",
    "find_searcher",
    "make_searcher",
]

SEARCHERS = {  # name in recipes and on the command line -> module, factory
    "bayes": ("bayes", "tpe"),
    "bayes:gp": ("bayes", "gp"),
    "bayes:slopes": ("slopes", "bayes"),
    "cmaes": ("cmaes", "CmaesSearcher"),
    "cmaes:slopes": ("slopes", "cmaes"),
    "gradient": ("gradient", "GradientSearcher"),
    "grid": ("grid", "GridSearcher"),
    "random": ("random", "RandomSearcher"),
    "rl": ("rl", "PolicySearcher"),
    "rl:slopes": ("slopes", "rl"),
}
WITH_GRADIENTS = frozenset(
    {"bayes:slopes", "cmaes:slopes", "gradient", "rl:slopes"}
)  # at home in fine spaces


def find_searcher(name: str) -> SearcherFactory:
    """The factory behind a name; RecipeError for a name that is not in `SEARCHERS`."""
    if name not in SEARCHERS:
        raise RecipeError(unknown("searcher", name, SEARCHERS))
    module, factory = SEARCHERS[name]
    return cast(SearcherFactory, getattr(import_module(f"{__name__}.{module}"), factory))


def make_searcher(name: str, problem: Problem, seed: int) -> Searcher:
    """A new searcher for this problem; RecipeError for an unknown name."""
    return find_searcher(name)(problem, seed)
