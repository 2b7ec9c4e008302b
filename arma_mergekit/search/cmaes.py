"""CMA-ES: a Gaussian that moves and stretches towards the better half of each generation (arXiv 1604.00772).

    symbol    meaning                                                           shape
    u         values as shares of their range: u = (v - low) / (high - low)      (n,) of the n coordinates that can move
    m, s, C   mean, step size and covariance: u ~ N(m, s^2 C) within [0, 1]      (n,), (), (n, n)
    lambda    answers that make a generation: 4 + 3 ln n, its equation 48        ()

The `cmaes` package keeps m, s and C; beyond `MOST_JOINT` coordinates C is diagonal (sep-CMA-ES, Ros and Hansen 2008),
since 1 / n^2 is how fast a full one learns. m begins at the start, which is asked first; the last question of a budget
is m. A failed trial ranks last; a generation of failed ones is dropped. The first lambda answers make a generation,
whichever distribution asked: late ones count in the next.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import ClassVar

import numpy as np

from arma_mergekit.search.base import Array, Problem, Query, Spending, Trial

__all__ = ["CmaesSearcher"]

SIGMA = 0.1  # s at first, in ranges
MOST_JOINT = 20  # coordinates


class CmaesSearcher:
    """Samples from the Gaussian, tells it whole generations; it never runs out of questions."""

    concurrent: ClassVar[bool] = True

    def __init__(self, problem: Problem, seed: int) -> None:
        from cmaes import CMA, SepCMA

        self._problem = problem
        self._range = problem.high - problem.low
        self._free = self._range > 0
        n = int(self._free.sum())
        self._spending = Spending(max(2.0, problem.budget))
        self._started = False
        self._open: defaultdict[Query, deque[Array | None]] = defaultdict(
            deque
        )  # u; None: no part of a generation
        self._generation: list[tuple[Array, float]] = []  # u, and a loss: the package minimises
        start = np.clip(problem.start, problem.low, problem.high)
        mean = ((start - problem.low) / np.where(self._free, self._range, 1))[self._free]
        bounds = np.tile([0.0, 1.0], (n, 1))
        kind = CMA if n <= MOST_JOINT else SepCMA
        self._cma = kind(mean=mean, sigma=SIGMA, bounds=bounds, seed=seed) if n else None

    def ask(self) -> Query:
        """The start; then samples; at the end of the budget, the mean."""
        u = None if self._cma is None or not self._started or self._spending.at_last else self._cma.ask()
        query = Query(self._values(u) if self._started else self._problem.clip(self._problem.start))
        self._started = True
        self._spending.ask(query)
        self._open[query].append(u)
        return query

    def tell(self, trial: Trial) -> None:
        """Keep it for the generation; move on when that is complete."""
        self._spending.tell(trial)
        u = self._open[trial.query].popleft()
        if u is None or self._cma is None:
            return
        self._generation.append((u, np.inf if trial.reward is None else -trial.reward))
        if len(self._generation) == self._cma.population_size:
            if any(np.isfinite(loss) for _, loss in self._generation):
                self._cma.tell(self._generation)
            self._generation = []

    def _values(self, u: Array | None) -> tuple[float, ...]:
        """Values (K,) of ``u`` (n,), None for the mean."""
        values = self._problem.low.copy()
        if self._cma is not None:
            values[self._free] += self._range[self._free] * (self._cma.mean if u is None else u)
        return self._problem.clip(values)
