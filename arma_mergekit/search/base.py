"""What a searcher is: something that asks for points and is told how they did.

A searcher knows numbers only: no models, files, clocks or suites. The caller owns the loop:

    searcher = make_searcher("rl", problem, seed=0)
    while (query := searcher.ask()) is not None and spent + query.cost <= budget:
        searcher.tell(Trial(query, reward=...))

Rules every searcher keeps (tests: `check_searcher` in this package, usable on other people's classes):
`ask` depends only on the problem, the seed and the calls of `ask` and `tell` before it; points lie within the bounds;
a failed trial (reward None) and an estimated one are accepted; nothing passed in is changed. One whose class says
``concurrent`` may be asked again while questions are open, equal ones among them, and is told in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["GRADIENT_COST", "Problem", "Query", "Searcher", "SearcherFactory", "Spending", "Trial"]

Array = npt.NDArray[np.float64]
GRADIENT_COST = 4.0  # measured: 2.8 to 4.5 on two cores (benchmarks/candidate.py)


@dataclass(frozen=True)
class Problem:
    """What a searcher may know before it asks.

    ``names`` (K,) of the values; ``low``, ``high``, ``start`` (K,) floats; ``features`` (K, F), standardised numbers
    that describe each value's group (depth, relative change, size, ...); ``budget``, the horizon to plan for, in full
    evaluations, where one forward pass over all search data costs 1 and one with gradient 4 (asking may go on after
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

    ``gradient`` asks for dJ/dvalues too (cost: GRADIENT_COST forward passes instead of one); ``part`` = (i, n) asks
    about the i-th of n parts of the search data only (cost: 1/n), None about all of it.
    """

    values: tuple[float, ...]
    gradient: bool = False
    part: tuple[int, int] | None = None

    @property
    def cost(self) -> float:
        """In full evaluations."""
        return (GRADIENT_COST if self.gradient else 1.0) / (self.part[1] if self.part else 1)


@dataclass(frozen=True)
class Trial:
    """The answer: ``reward`` J goes up when things get better and is None when the trial failed.

    ``cost``: full evaluations actually paid, None when that is the query's. ``estimated``: ruled out on a share of the
    search data, so the reward is what the rest was expected to say.
    """

    query: Query
    reward: float | None
    gradient: tuple[float, ...] | None = None
    details: dict[str, float] = field(default_factory=dict)
    cost: float | None = None
    estimated: bool = False

    @property
    def paid(self) -> float:
        """In full evaluations."""
        return self.query.cost if self.cost is None else self.cost

    @property
    def full(self) -> bool:
        """Whether it counts for picking the best: scored on all search data, without failing."""
        return self.reward is not None and self.query.part is None and not self.estimated


@dataclass
class Spending:
    """What a searcher has used of its budget: open questions at their price, answered ones at what was paid."""

    budget: float
    spent: float = 0.0

    def ask(self, query: Query) -> None:
        """Reserve the price of a question."""
        self.spent += query.cost

    def tell(self, trial: Trial) -> None:
        """Get back what was not needed."""
        self.spent += trial.paid - trial.query.cost

    @property
    def at_last(self) -> bool:
        """Whether one more full evaluation fits into the budget and not two; beyond it, into a further one."""
        left = self.budget - self.spent % self.budget
        return 1 - 1e-9 <= left < 2 - 1e-9


@runtime_checkable
class Searcher(Protocol):
    """Ask for a query (None: the searcher has no further question), then tell its trial.

    ``concurrent``: whether it may be asked again before earlier questions are answered; if not, the caller waits.
    """

    concurrent: ClassVar[bool]

    def ask(self) -> Query | None:
        """The next question."""
        ...

    def tell(self, trial: Trial) -> None:
        """The answer to the open question ``trial.query``; called once per `ask`."""
        ...


SearcherFactory = Callable[[Problem, int], Searcher]
