"""What every searcher must keep, as a suite anybody can run on their own: `check_searcher(factory)`.

With it come the test problems: quadratics with a known optimum, cut into parts like search data.

    J_i(v) = 1 - sum_k w_k (v_k - o_k - s_ik)^2 / sum_k w_k (start_k - o_k)^2        of block i = 1 ... P
    J(v)   = mean of J_i over the blocks asked about, plus noise

    symbol  meaning                                                  shape
    o       optimum: share `structure` of its variance is linear in the features, the rest independent   (K,)
    w       curvature, lognormal                                      (K,)
    s       shift of each block's own optimum; sums to 0 over blocks  (P, K)

So J, up to a constant, is 0 at the start and 1 at the optimum. The noise is a function of the query: asking
twice gives the same answer, as fixed evaluation data does.

It knows searchers by their protocol only. A broken rule raises AssertionError with a sentence that names it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, repeat

import numpy as np

from arma_mergekit.search.base import Array, Problem, Query, Searcher, SearcherFactory, Trial

__all__ = ["Quadratic", "best", "check_searcher", "quadratic", "run"]

Evaluate = Callable[[Query], Trial]


@dataclass(frozen=True)
class Quadratic:
    """A test problem: ``problem`` for the searcher, `evaluate` for the loop, ``optimum`` (K,) for the judge.

    ``curvature`` (K,), normalised so that the start scores 0 and the optimum 1; ``shifts`` (P, K);
    ``noise``, the standard deviation of a full score; that of one part of n is sqrt(n) times larger.
    """

    problem: Problem
    optimum: Array
    curvature: Array
    shifts: Array
    noise: float

    def evaluate(self, query: Query) -> Trial:
        """Score a query, with the exact gradient of the part asked about if it wants one."""
        i, n = query.part or (0, 1)
        away = np.asarray(query.values) - self.optimum - self.shifts[i::n]
        reward = 1 - float(np.mean(away**2 @ self.curvature)) + self._error(query) * np.sqrt(n)
        gradient = tuple(map(float, -2 * self.curvature * away.mean(axis=0))) if query.gradient else None
        return Trial(query, float(reward), gradient)

    def exact(self, values: Sequence[float]) -> float:
        """Score without noise or shifts: 1 at the optimum, 0 at the start."""
        return 1 - float((np.asarray(values) - self.optimum) ** 2 @ self.curvature)

    def distance(self, values: Sequence[float]) -> float:
        """Root mean square distance to the optimum."""
        return float(np.sqrt(np.mean((np.asarray(values) - self.optimum) ** 2)))

    def _error(self, query: Query) -> float:
        key = zlib.crc32(repr((query.values, query.part)).encode())
        return self.noise * float(np.random.default_rng(key).standard_normal())


def quadratic(
    size: int,
    seed: int = 0,
    *,
    budget: float = 60,
    bounds: tuple[float, float] = (-0.5, 1.5),
    start: float = 0.75,
    centre: float = 0.45,
    spread: float = 0.3,
    structure: float = 0.5,
    noise: float = 0.02,
    parts: int = 8,
) -> Quadratic:
    """A problem of ``size`` values; optima lie around ``centre`` with standard deviation ``spread``."""
    rng = np.random.default_rng([size, seed])
    features = rng.standard_normal((size, 4))
    features[:, 0] = np.linspace(-np.sqrt(3), np.sqrt(3), size) if size > 1 else 0.0  # depth
    shared = features @ rng.dirichlet(np.ones(4)) ** 0.5
    offsets = np.sqrt(structure) * shared + np.sqrt(1 - structure) * rng.standard_normal(size)
    low, high = np.full(size, float(bounds[0])), np.full(size, float(bounds[1]))
    optimum = np.clip(centre + spread * offsets, low + 0.05, high - 0.05)
    curvature = np.exp(0.5 * rng.standard_normal(size))
    curvature /= curvature @ (np.full(size, start) - optimum) ** 2
    shifts = 0.3 * spread * rng.standard_normal((parts, size))
    names = tuple(f"group.{k}" for k in range(size))
    problem = Problem(names, low, high, np.full(size, start), features, budget, parts)
    return Quadratic(problem, optimum, curvature, shifts - shifts.mean(axis=0), noise)


def run(searcher: Searcher, evaluate: Evaluate, budget: float, *, open_at_once: int = 1) -> list[Trial]:
    """The caller's loop: ask and tell until the next question costs more than is left of the budget.

    With ``open_at_once`` questions in the air, any of them is answered next. Trials in the order told.
    """
    return [
        event for event in _converse(searcher, evaluate, budget, open_at_once) if isinstance(event, Trial)
    ]


def best(trials: Iterable[Trial]) -> Trial:
    """The trial a run would pick: highest reward among the full ones."""
    return max((t for t in trials if t.full), key=lambda t: t.reward or 0.0)


def check_searcher(factory: SearcherFactory, *, stochastic: bool = True, evaluations: int = 60) -> None:
    """Raise AssertionError for the first rule that searchers made by ``factory`` break.

    ``stochastic``: different seeds should ask different things. ``evaluations``: the budget within which the
    searcher should find something better than the start. One that is ``concurrent`` is asked up to four questions at
    once, too.
    """
    test = quadratic(6, budget=24)
    concurrent = factory(test.problem, 0).concurrent
    _require(isinstance(concurrent, bool), "A searcher says whether it is `concurrent`, True or False.")
    still, movable = (_pinned(quadratic(5, budget=12), pinned) for pinned in (range(5), [2]))
    for problem in (*(quadratic(size, budget=12) for size in (1, 6, 40)), still, movable):
        _check_answers(factory, 1, problem)
    _check_repeatable(factory, test, 1)
    if concurrent:
        for problem in (quadratic(6, budget=12), still):
            _check_answers(factory, 4, problem)
        _check_repeatable(factory, test, 4)
    _check_inputs_kept(factory, quadratic(6, budget=24))
    if stochastic:
        first, second = (run(factory(test.problem, seed), test.evaluate, 24) for seed in (0, 1))
        _require(_asked(first) != _asked(second), "Different seeds must ask different questions.")
    for size in (1, 3):
        _check_improves(factory, quadratic(size, seed=3, budget=evaluations), evaluations)


def _converse(
    searcher: Searcher, evaluate: Evaluate, budget: float, open_at_once: int
) -> list[Query | Trial]:
    """Questions asked and trials told, in that order; answers come in a random one that is always the same."""
    events, waiting = list[Query | Trial](), list[Query]()
    rng, left, asking = np.random.default_rng(0), budget + 1e-9, True
    while asking or waiting:
        query = searcher.ask() if asking and len(waiting) < open_at_once else None
        if query is not None and query.cost <= left:
            left -= query.cost
            events.append(query)
            waiting.append(query)
        elif waiting:
            asking = asking and len(waiting) == open_at_once
            trial = evaluate(waiting.pop(int(rng.integers(len(waiting)))))
            left += trial.query.cost - trial.paid
            events.append(trial)
            searcher.tell(trial)
        else:
            break
    return events


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise AssertionError(rule)


def _asked(trials: Iterable[Trial]) -> list[Query]:
    return [trial.query for trial in trials]


def _check_point(query: Query, problem: Problem) -> None:
    values = np.asarray(query.values)
    shape = (len(problem.names),)
    _require(values.shape == shape, f"A query has {shape[0]} values, but got shape {values.shape}.")
    _require(all(type(v) is float for v in query.values), "Values are plain floats: they go into a journal.")
    inside = bool(np.all((values >= problem.low) & (values <= problem.high)))
    _require(inside, f"Values lie within the bounds, but got {query.values}.")
    i, n = query.part or (0, 1)
    _require(0 <= i < n <= problem.parts, f"Parts are (i, n), i < n <= {problem.parts}, but got {(i, n)}.")


def _pinned(test: Quadratic, pinned: Sequence[int]) -> Quadratic:
    """The bounds of some coordinates coincide: they must stay where they are. With all of them, questions repeat."""
    low, high, start = test.problem.low.copy(), test.problem.high.copy(), test.problem.start.copy()
    low[pinned] = high[pinned] = start[pinned] = 0.25
    return replace(test, problem=replace(test.problem, low=low, high=high, start=start))


def _answer(test: Quadratic, kinds: Iterator[str], query: Query) -> Trial:
    """An evaluator that is strict about questions; its next answer is "full", "failed" or "estimated"."""
    _check_point(query, test.problem)
    kind = next(kinds)
    if kind == "failed":
        return Trial(query, None)
    if kind == "estimated" and query.part is None and not query.gradient:
        return replace(test.evaluate(query), cost=query.cost / 4, estimated=True)
    return test.evaluate(query)


def _check_answers(factory: SearcherFactory, open_at_once: int, test: Quadratic) -> None:
    """All scored; then all failed, every third, only the first; then every other one estimated, all of them."""
    budget = test.problem.budget
    evaluate = partial(_answer, test, repeat("full"))
    trials = run(factory(test.problem, 0), evaluate, budget, open_at_once=open_at_once)
    _require(bool(trials), "The first question must come, and within the budget.")
    _require(any(t.full for t in trials), "Some question must be about all search data, or no trial counts.")
    for kinds in (
        repeat("failed"),
        cycle(["full", "failed", "full"]),
        chain(["failed"], repeat("full")),
        cycle(["full", "estimated"]),
        repeat("estimated"),
    ):
        run(factory(test.problem, 0), partial(_answer, test, kinds), budget, open_at_once=open_at_once)


def _check_inputs_kept(factory: SearcherFactory, test: Quadratic) -> None:
    """The problem's arrays and the trials told are afterwards what they were before."""
    arrays = (test.problem.low, test.problem.high, test.problem.start, test.problem.features)
    before = [a.copy() for a in arrays]
    told: list[tuple[Trial, Trial]] = []

    def evaluate(query: Query) -> Trial:
        trial = test.evaluate(query)
        told.append((trial, Trial(query, trial.reward, trial.gradient, dict(trial.details))))
        return trial

    run(factory(test.problem, 0), evaluate, test.problem.budget)
    unchanged = all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
    _require(unchanged, "The problem's arrays must not be changed.")
    _require(all(a == b for a, b in told), "Trials must not be changed.")


def _check_repeatable(factory: SearcherFactory, test: Quadratic, open_at_once: int) -> None:
    """The same again in a new instance, and from recorded events at any point of the run."""
    kinds = ("full", "failed", "full", "estimated", "full")

    def events() -> list[Query | Trial]:
        evaluate = partial(_answer, test, cycle(kinds))
        return _converse(factory(test.problem, 0), evaluate, test.problem.budget, open_at_once)

    recorded = events()
    _require(recorded == events(), "Same problem, seed and answers must give the same questions.")
    asked = [k for k, event in enumerate(recorded) if isinstance(event, Query)]
    for length in sorted({asked[len(asked) * i // 4] for i in (1, 2, 3)} | {asked[-1]}):
        searcher = factory(test.problem, 0)
        for event in recorded[:length]:
            _replay(searcher, event)
        rule = f"Resumed from {length} recorded events, it must ask what the uninterrupted run asked."
        _require(searcher.ask() == recorded[length], rule)


def _replay(searcher: Searcher, event: Query | Trial) -> None:
    if isinstance(event, Trial):
        searcher.tell(event)
    else:
        searcher.ask()


def _check_improves(factory: SearcherFactory, test: Quadratic, evaluations: int) -> None:
    trials = run(factory(test.problem, 0), test.evaluate, evaluations)
    found = test.exact(best(trials).query.values)
    size, start = len(test.problem.names), test.exact(test.problem.clip(test.problem.start))
    rule = f"must find better than the start ({start:.3f}), but found {found:.3f}."
    _require(found > start, f"{evaluations} evaluations of a smooth problem of {size} values {rule}")
