"""Bayesian optimisation: Optuna's samplers behind ask/tell.

    bayes       TPE, the tree-structured Parzen estimator (arXiv 2304.11127), all values jointly
    bayes:gp    a Gaussian process with a Matern kernel and log expected improvement; needs torch and scipy

The first question is the start. TPE's next nine are those of `random`, so it begins where the control does: its own,
uniform within the bounds, are mostly far worse than the start. The Gaussian process makes its own. The study lives in
memory: a run resumes by asking and telling its journal again. Optuna is imported when the first searcher is made,
and its logger is quiet only while a study is created or asked.

`write_studies` puts the trials of any searchers, once a run is over, where `optuna-dashboard FILE` shows them.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from arma_mergekit.errors import RunError
from arma_mergekit.search.base import Problem, Query, Trial
from arma_mergekit.search.random import RandomSearcher

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BayesSearcher", "gp", "tpe", "write_studies"]

STARTUP = 10  # questions before TPE's own


def tpe(problem: Problem, seed: int) -> BayesSearcher:
    """`bayes`: the sampler for most budgets; its cost grows with values times trials."""
    import optuna

    control = RandomSearcher(problem, seed)
    first = [control.ask().values for _ in range(STARTUP)]
    options = {"seed": seed, "multivariate": True, "n_startup_trials": STARTUP}
    return BayesSearcher(problem, lambda: optuna.samplers.TPESampler(**options), first)


def gp(problem: Problem, seed: int) -> BayesSearcher:
    """`bayes:gp`: dearer to ask (seconds), often better for few values."""
    import optuna

    start = [problem.clip(problem.start)]
    return BayesSearcher(problem, lambda: optuna.samplers.GPSampler(seed=seed), start)


class BayesSearcher:
    """An Optuna study of one objective, asked and told; ``first``: the questions before the sampler's."""

    concurrent: ClassVar[bool] = True

    def __init__(
        self, problem: Problem, make_sampler: Callable[[], Any], first: Iterable[tuple[float, ...]]
    ) -> None:
        import optuna

        self._problem = problem
        self._failed = optuna.trial.TrialState.FAIL
        self._axes = _axes(optuna, problem)
        self._pending: defaultdict[Query, deque[Any]] = defaultdict(deque)
        with _quiet(optuna):
            self._study = optuna.create_study(direction="maximize", sampler=make_sampler())
            for values in first:
                self._study.enqueue_trial(dict(zip(problem.names, values, strict=True)))

    def ask(self) -> Query:
        """The study's next point."""
        import optuna

        with _quiet(optuna):
            trial = self._study.ask(self._axes)
        query = Query(self._problem.clip([trial.params[name] for name in self._problem.names]))
        self._pending[query].append(trial)
        return query

    def tell(self, trial: Trial) -> None:
        """Score of the point it asked about; a failed one is told as failed."""
        asked = self._pending[trial.query].popleft()
        if trial.reward is None:
            self._study.tell(asked, state=self._failed)
        else:
            self._study.tell(asked, trial.reward)


def write_studies(path: Path, arms: Mapping[str, tuple[Problem, Iterable[Trial]]]) -> None:
    """Write an Optuna journal with one study per name, in place of what the file held before.

    Trials on parts of the search data are left out. RunError where the file cannot be written.
    """
    import optuna

    storages = optuna.storages
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.unlink(missing_ok=True)
        with _quiet(optuna):
            file = storages.journal.JournalFileBackend(str(unfinished), lock_obj=_Unshared())
            storage = storages.JournalStorage(file)
            for name, (problem, trials) in arms.items():
                study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
                study.add_trials([_frozen(optuna, problem, t) for t in trials if t.query.part is None])
        unfinished.replace(path)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}. Give another --out.") from error


class _Unshared:
    """In place of Optuna's lock, which ends with an error of its own if a signal comes: nobody else has this file."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _axes(optuna: Any, problem: Problem) -> dict[str, Any]:
    """The range of each value, by name."""
    bounds = zip(problem.low.tolist(), problem.high.tolist(), strict=True)
    axes = (optuna.distributions.FloatDistribution(*pair) for pair in bounds)
    return dict(zip(problem.names, axes, strict=True))


def _frozen(optuna: Any, problem: Problem, trial: Trial) -> Any:
    """A finished trial as Optuna keeps it; what it cost and the caller's details are user attributes."""
    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        state=states.FAIL if trial.reward is None else states.COMPLETE,
        value=trial.reward,
        params=dict(zip(problem.names, trial.query.values, strict=True)),
        distributions=_axes(optuna, problem),
        user_attrs={"cost": trial.paid, "estimated": trial.estimated, **trial.details},
    )


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
