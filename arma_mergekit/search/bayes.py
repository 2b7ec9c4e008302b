"""Bayesian optimisation: Optuna's samplers behind ask/tell.

    bayes       TPE, the tree-structured Parzen estimator (arXiv 2304.11127), all values jointly
    bayes:gp    a Gaussian process with a Matern kernel and log expected improvement; needs torch and scipy

The first question is the start, the next nine are the sampler's own random ones. The study lives in memory:
a run resumes by asking and telling its journal again. Optuna is imported when the first searcher is made,
and its logger is quiet only while a study is created or asked.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from arma_mergekit.search.base import Problem, Query, Trial

__all__ = ["BayesSearcher", "gp", "tpe"]


def tpe(problem: Problem, seed: int) -> BayesSearcher:
    """`bayes`: the sampler for most budgets; its cost grows with values times trials."""
    import optuna

    return BayesSearcher(problem, lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True))


def gp(problem: Problem, seed: int) -> BayesSearcher:
    """`bayes:gp`: dearer to ask (seconds), often better for few values."""
    import optuna

    return BayesSearcher(problem, lambda: optuna.samplers.GPSampler(seed=seed))


class BayesSearcher:
    """An Optuna study of one objective, asked and told; ``make_sampler`` returns the sampler to use."""

    def __init__(self, problem: Problem, make_sampler: Callable[[], Any]) -> None:
        import optuna

        self._problem = problem
        self._failed = optuna.trial.TrialState.FAIL
        bounds = zip(problem.low.tolist(), problem.high.tolist(), strict=True)
        axes = (optuna.distributions.FloatDistribution(*pair) for pair in bounds)
        self._axes = dict(zip(problem.names, axes, strict=True))
        self._pending: deque[Any] = deque()
        with _quiet(optuna):
            self._study = optuna.create_study(direction="maximize", sampler=make_sampler())
            self._study.enqueue_trial(dict(zip(problem.names, problem.clip(problem.start), strict=True)))

    def ask(self) -> Query:
        """The study's next point."""
        import optuna

        with _quiet(optuna):
            trial = self._study.ask(self._axes)
        self._pending.append(trial)
        return Query(self._problem.clip([trial.params[name] for name in self._problem.names]))

    def tell(self, trial: Trial) -> None:
        """Score of the oldest point that has none yet; a failed one is told as failed."""
        asked = self._pending.popleft()
        if trial.reward is None:
            self._study.tell(asked, state=self._failed)
        else:
            self._study.tell(asked, trial.reward)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """No log lines and no notices about experimental options, and everything as it was afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
