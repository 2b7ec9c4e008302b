"""Uniform random search: the control every other searcher has to beat.

    v_0 = start,    v_i ~ U(low, high)    i = 1, 2, ...

It knows the bounds and nothing else; what it is told changes nothing.
"""

from __future__ import annotations

import numpy as np

from arma_mergekit.search.base import Problem, Query, Trial

__all__ = ["RandomSearcher"]


class RandomSearcher:
    """Points drawn uniformly within the bounds, after the start; it never runs out of them."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._started = False

    def ask(self) -> Query:
        """The start, then a new uniform point each time."""
        if not self._started:
            self._started = True
            return Query(self._problem.clip(self._problem.start))
        return Query(self._problem.clip(self._rng.uniform(self._problem.low, self._problem.high)))

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""
