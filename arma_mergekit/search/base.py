"""What a searcher is: something that asks for points and is told how they did.

A searcher knows numbers only: no models, files, clocks or suites. The caller owns the loop:

    searcher = make_searcher("rl", problem, seed=0)
    while (query := searcher.ask()) is not None and spent + query.cost <= budget:
        searcher.tell(Trial(query, reward=...))

Rules every searcher keeps (tests: `check_searcher` in this package, usable on other people's classes):
`ask` depends only on the problem, the seed and what was told, in order; points lie within the bounds; a failed
trial (reward None) is accepted; nothing passed in is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Problem", "Query", "Searcher", "SearcherFactory", "Trial"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What a searcher may know before it asks.

    ``names`` (K,) of the values; ``low``, ``high``, ``start`` (K,) floats; ``features`` (K, F), standardised numbers
    that describe each value's group (depth, relative change, size, ...); ``budget``, the horizon to plan for, in full
    evaluations, where one forward pass over all search data costs 1 and one with gradient 3 (asking may go on after
    it); ``parts``, into how many parts of equal
    composition the search data can be cut for minibatches.
    """

    names: tuple[str, ...]
    low: Array
    high: Array
    start: Array
    features: Array
    budget: float
    parts: int = 1

    def clip(self, values: npt.ArrayLike) -> tuple[float, ...]:
        """The nearest point within the bounds."""
        return tuple(float(v) for v in np.clip(np.asarray(values, dtype=np.float64), self.low, self.high))


@dataclass(frozen=True)
class Query:
    """A question to the evaluator: how good are these values?

    ``gradient`` asks for dJ/dvalues too (cost: three forward passes instead of one); ``part`` = (i, n) asks about the
    i-th of n parts of the search data only (cost: 1/n), None about all of it.
    """

    values: tuple[float, ...]
    gradient: bool = False
    part: tuple[int, int] | None = None

    @property
    def cost(self) -> float:
        """In full evaluations."""
        return (3.0 if self.gradient else 1.0) / (self.part[1] if self.part else 1)


@dataclass(frozen=True)
class Trial:
    """The answer: ``reward`` J goes up when things get better and is None when the trial failed."""

    query: Query
    reward: float | None
    gradient: tuple[float, ...] | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether it counts for picking the best: scored on all search data, without failing."""
        return self.reward is not None and self.query.part is None


@runtime_checkable
class Searcher(Protocol):
    """Ask for a query (None: the searcher has no further question), then tell its trial."""

    def ask(self) -> Query | None:
        """The next question."""
        ...

    def tell(self, trial: Trial) -> None:
        """Its answer; called once per `ask`, in order."""
        ...


SearcherFactory = Callable[[Problem, int], Searcher]
