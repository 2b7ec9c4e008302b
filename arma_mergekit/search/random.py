"""Random search: the control every other searcher has to beat.

    v_0 = start,    v_i = start + t_i (u_i - start),    u_i ~ U(low, high)^K,    t_i ~ U(0, 1)    i = 1, 2, ...

A random share of the way to a random point. Points drawn uniformly within the bounds (t = 1) are no fair control in
many values: all of them lie about equally far from everything, and none of hundreds beats the start in 40 values, where
this control goes a fifth of the way to the optimum. It knows start and bounds and nothing else; what it is told
changes nothing.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from arma_mergekit.search.base import Problem, Query, Trial

__all__ = ["RandomSearcher"]


class RandomSearcher:
    """Points between the start and random ones, after the start; it never runs out of them."""

    concurrent: ClassVar[bool] = True

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._started = False

    def ask(self) -> Query:
        """The start, then a new point each time."""
        start = np.array(self._problem.clip(self._problem.start))
        if not self._started:
            self._started = True
            return Query(self._problem.clip(start))
        u = self._rng.uniform(self._problem.low, self._problem.high)
        return Query(self._problem.clip(start + self._rng.uniform() * (u - start)))

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""
