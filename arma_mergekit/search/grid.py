"""One knob: evenly spaced values from 0 (base) to 1 (fine-tuned), the same for every coordinate.

    v_i = t_i * (1, ..., 1),    t_i = i / (n - 1),    i = 0 ... n - 1,    n = 2 ... 11, as the budget allows

Meant for spaces of one value; in larger ones it walks the diagonal. WiSE-FT (arXiv 2109.01903) sweeps the
same eleven values. It knows the bounds, into which it clips, and ignores the start, the seed and what it is
told.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from arma_mergekit.search.base import Problem, Query, Trial

__all__ = ["LARGEST", "GridSearcher"]

LARGEST = 11  # steps of 0.1


class GridSearcher:
    """The diagonal from 0 to 1, then no further question."""

    concurrent: ClassVar[bool] = True

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._values = iter(np.linspace(0.0, 1.0, int(np.clip(problem.budget, 2, LARGEST))))

    def ask(self) -> Query | None:
        """The next value from below; None after the last."""
        value = next(self._values, None)
        if value is None:
            return None
        return Query(self._problem.clip(np.full(len(self._problem.names), value)))

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""
