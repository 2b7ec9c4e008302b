"""Many values through three gradients: any searcher, in the space they span (ours).

    symbol   meaning                                                                          shape
    p_j      where gradients are asked: the start, all zeros (base), all ones (fine-tuned)     (3, K)
    g_j      dJ/dv there, over its mean absolute value: far from the optimum its units differ  (3, K)
    c        curvature: minus the slope of the line through g over p; at least FLOOR of its mean  (K,)
    n        from the start by Newton's step, as if values were independent: g_start / c       (K,)
    e        from the start to g_base / (g_base - g_tuned): 1 where only the domain cares, 0 where only the rest does
    z        what the searcher inside asks about                                               (3,)

    v = start + z_1 n + z_2 e + z_3 SHIFT,    clipped into the bounds

It is what makes searchers without gradients of their own comparable in hundreds of values: they choose how far to
go, along directions that cost six evaluations (the start on all search data, the ends on half of it). A gradient
that is missing counts as flat. A budget that has no room for it goes to the searcher as it is, in all values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from arma_mergekit.search import make_searcher
from arma_mergekit.search.base import Array, Problem, Query, Searcher, Trial

__all__ = ["SlopesSearcher", "bayes", "cmaes", "rl"]

FLOOR = 0.2
SHIFT = 0.3
LOW, HIGH, BEGIN = (-0.5, -0.5, -1.0), (2.0, 2.0, 1.0), (0.5, 0.0, 0.0)  # of z
LARGEST_SHARE = 2 / 3  # of the budget that gradients may cost


def bayes(problem: Problem, seed: int) -> SlopesSearcher:
    """`bayes:slopes`."""
    return SlopesSearcher(problem, seed, "bayes")


def cmaes(problem: Problem, seed: int) -> SlopesSearcher:
    """`cmaes:slopes`."""
    return SlopesSearcher(problem, seed, "cmaes")


def rl(problem: Problem, seed: int) -> SlopesSearcher:
    """`rl:slopes`."""
    return SlopesSearcher(problem, seed, "rl")


class SlopesSearcher:
    """Asks for the gradients, then what the searcher named ``inner`` asks, in all K values."""

    concurrent: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int, inner: str) -> None:
        self._problem, self._seed, self._inner = problem, seed, inner
        self._told: list[Trial] = []
        self._directions: Array | None = None  # (3, K); None: the searcher asks in all values
        self._searcher: Searcher | None = None  # once the gradients are known
        self._asked: Query | None = None  # by it
        self._queries = [Query(problem.clip(problem.start), gradient=True)]
        for k, end in enumerate((0.0, 1.0)):
            half = (k, 2) if problem.parts > 1 else None
            everywhere = np.full(len(problem.names), end)
            self._queries.append(Query(problem.clip(everywhere), gradient=True, part=half))
        if sum(query.cost for query in self._queries) > LARGEST_SHARE * problem.budget:
            self._searcher = make_searcher(inner, problem, seed)

    def ask(self) -> Query | None:
        """The next gradient, or what the searcher asks."""
        if self._searcher is None:
            return self._queries[len(self._told)]
        if self._asked is None:
            self._asked = self._searcher.ask()
        if self._asked is None or self._directions is None:
            return self._asked
        return Query(
            self._problem.clip(self._problem.start + np.array(self._asked.values) @ self._directions)
        )

    def tell(self, trial: Trial) -> None:
        """Keep a gradient; pass other answers on."""
        if self._searcher is not None and self._asked is not None:
            self._searcher.tell(replace(trial, query=self._asked))
            self._asked = None
            return
        self._told.append(trial)
        if len(self._told) == len(self._queries):
            self._begin()

    def _begin(self) -> None:
        """Set up the searcher in the space that the gradients span."""
        points = np.array([query.values for query in self._queries])
        slopes = np.array([slope(trial, points.shape[1]) for trial in self._told])
        self._directions = directions(points, slopes)
        left = self._problem.budget - sum(trial.paid for trial in self._told)
        names = ("newton", "ends", "shift")
        low, high, begin = (np.array(z) for z in (LOW, HIGH, BEGIN))
        inner = Problem(names, low, high, begin, np.zeros((len(names), 0)), left)
        self._searcher = make_searcher(self._inner, inner, self._seed)


def slope(trial: Trial, size: int) -> Array:
    """g of a trial (K,); zeros where it has none."""
    g = np.zeros(size) if trial.reward is None or trial.gradient is None else np.array(trial.gradient)
    g = np.where(np.isfinite(g), g, 0.0)
    return g / max(float(np.abs(g).mean()), 1e-300)


def directions(points: Array, slopes: Array) -> Array:
    """The steps that z multiplies (3, K), from ``points`` (start, base, fine-tuned) and g there, both (3, K)."""
    start, base, tuned = points
    away = points - points.mean(axis=0)
    c = -(away * slopes).sum(axis=0) / np.maximum((away**2).sum(axis=0), 1e-12)
    c = np.maximum(c, FLOOR * max(float(np.abs(c).mean()), 1e-12))
    up, down = np.maximum(slopes[1], 0) + 1e-9, np.maximum(-slopes[2], 0) + 1e-9
    middle = base + (tuned - base) * up / (up + down)
    return np.array([slopes[0] / c, middle - start, np.full_like(start, SHIFT)])
