import gc
import importlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache, partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest

from arma_mergekit.errors import RecipeError, RunError
from arma_mergekit.search import SEARCHERS, Query, Searcher, Trial, find_searcher, make_searcher
from arma_mergekit.search import cmaes as cmaes_module
from arma_mergekit.search import rl as rl_module
from arma_mergekit.search.bayes import write_studies
from arma_mergekit.search.cmaes import CmaesSearcher
from arma_mergekit.search.conformance import best, check_searcher, quadratic, run
from arma_mergekit.search.random import RandomSearcher
from arma_mergekit.search.rl import PolicySearcher
from arma_mergekit.search.slopes import directions

SEEDS = range(5)


@cache
def found(name, size, budget, seeds=SEEDS, **options):
    """Exact score (start 0, optimum 1) of what a run would pick, for several problems and seeds."""
    tests = [quadratic(size, 100 + seed, budget=budget, **options) for seed in seeds]
    runs = [
        run(make_searcher(name, t.problem, s), t.evaluate, budget) for s, t in zip(seeds, tests, strict=True)
    ]
    return [t.exact(best(trials).query.values) for t, trials in zip(tests, runs, strict=True)]


# ---------------------------------------------------------------------- the table of names


def test_unknown_searcher_is_one_line_with_the_nearest_name():
    with pytest.raises(
        RecipeError, match=r"Unknown searcher 'bayess'\. Did you mean bayes\? Known: bayes, bayes:gp, "
    ):
        make_searcher("bayess", quadratic(2).problem, 0)


@pytest.mark.parametrize("name", SEARCHERS)
def test_every_name_makes_a_searcher(name):
    searcher = make_searcher(name, quadratic(2).problem, 0)
    assert isinstance(searcher, Searcher)
    assert searcher.ask() is not None


def test_importing_the_package_loads_no_optimiser_and_making_the_light_ones_neither():
    code = """
import sys
from arma_mergekit.search import make_searcher
from arma_mergekit.search.conformance import quadratic
for name in ("random", "grid", "rl", "rl:slopes", "gradient"):
    make_searcher(name, quadratic(3).problem, 0).ask()
print(sorted({"cmaes", "optuna", "torch", "mergekit", "transformers", "scipy"} & sys.modules.keys()))
"""
    assert fresh(code) == "[]"


def fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


# ---------------------------------------------------------------------- the rules


@pytest.mark.parametrize("name", ["bayes", "cmaes", "random", "rl", "cmaes:slopes", "rl:slopes"])
def test_stochastic_searchers_conform(name):
    check_searcher(find_searcher(name))


@pytest.mark.parametrize("name", ["gradient", "grid"])
def test_deterministic_searchers_conform(name):
    check_searcher(find_searcher(name), stochastic=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bayes:gp", "bayes:slopes"])
def test_slower_searchers_conform(name):
    check_searcher(find_searcher(name), evaluations=20)


class OutOfBounds(RandomSearcher):
    def ask(self):
        return Query(tuple(v + 3 for v in super().ask().values))


class TooShort(RandomSearcher):
    def ask(self):
        return Query(super().ask().values[1:])


class NumpyNumbers(RandomSearcher):
    def ask(self):
        return Query(tuple(np.array(super().ask().values)))


class Unseeded(RandomSearcher):
    def __init__(self, problem, seed):
        super().__init__(problem, int(np.random.default_rng().integers(2**32)))


class Seedless(RandomSearcher):
    def __init__(self, problem, seed):
        super().__init__(problem, 0)


class Scribbler(RandomSearcher):
    def tell(self, trial):
        self._problem.features[:] = 0


class Annotator(RandomSearcher):
    def tell(self, trial):
        trial.details["seen"] = 1.0


class Stubborn(RandomSearcher):
    def ask(self):
        return Query(self._problem.clip(self._problem.start))


class Partial(RandomSearcher):
    def ask(self):
        return Query(super().ask().values, part=(0, 2))


class Fragile(RandomSearcher):
    def tell(self, trial):
        assert trial.reward > -np.inf


class Undecided(RandomSearcher):
    concurrent = "perhaps"


class InOrder(RandomSearcher):
    """Takes every answer for that to its oldest question."""

    def __init__(self, problem, seed):
        super().__init__(problem, seed)
        self._open = []

    def ask(self):
        self._open.append(super().ask())
        return self._open[-1]

    def tell(self, trial):
        assert self._open.pop(0) == trial.query, "oldest first"


class ForgetfulOnResume(RandomSearcher):
    """Depends on how often `ask` ran in this process, as a searcher with global state does."""

    asked = 0

    def ask(self):
        type(self).asked += 1
        return Query(self._problem.clip(self._problem.start + 0.001 * (type(self).asked % 97)))


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (OutOfBounds, "within the bounds"),
        (TooShort, "has 1 values"),
        (NumpyNumbers, "plain floats"),
        (Unseeded, "Same problem, seed"),
        (Seedless, "Different seeds"),
        (Scribbler, "must not be changed"),
        (Annotator, "Trials must not be changed"),
        (Stubborn, "Different seeds|better than the start"),
        (Partial, "about all search data"),
        (Undecided, "whether it is `concurrent`"),
        (InOrder, "oldest first"),
        (ForgetfulOnResume, "Same problem, seed"),
    ],
)
def test_the_suite_catches_a_broken_searcher(broken, rule):
    with pytest.raises(AssertionError, match=rule):
        check_searcher(broken)


def test_the_suite_catches_a_searcher_that_cannot_bear_failures():
    with pytest.raises(TypeError):
        check_searcher(Fragile)


def test_the_suite_catches_a_searcher_that_learns_nothing():
    with pytest.raises(AssertionError, match="better than the start"):
        check_searcher(Stubborn, stochastic=False)


def test_a_searcher_that_waits_for_answers_is_asked_one_question_at_a_time():
    class Waiting(InOrder):
        concurrent = False

    check_searcher(Waiting)


def test_what_was_estimated_is_paid_for_in_part_and_is_not_picked():
    query = Query((0.5,))
    scored = Trial(query, 0.2)
    estimated = Trial(query, 0.9, cost=0.25, estimated=True)
    assert (scored.paid, estimated.paid) == (1.0, 0.25)
    assert best([scored, estimated]) is scored


def test_open_questions_are_answered_in_any_order_within_the_budget():
    test = quadratic(3, budget=20)
    searcher = make_searcher("random", test.problem, 0)
    one_by_one = run(make_searcher("random", test.problem, 0), test.evaluate, 20)
    together = run(searcher, test.evaluate, 20, open_at_once=4)
    assert {t.query for t in together} == {t.query for t in one_by_one}
    assert [t.query for t in together] != [t.query for t in one_by_one]


def test_money_returned_by_estimates_buys_further_questions():
    test = quadratic(3, budget=10)
    cheap = partial(replace, cost=0.25, estimated=True)
    trials = run(make_searcher("random", test.problem, 0), lambda q: cheap(test.evaluate(q)), 10)
    assert len(trials) == 37  # 36 at a quarter leave less than 1 + 1/4
    assert sum(t.paid for t in trials) <= 10


@pytest.mark.parametrize("name", ["bayes", "cmaes", "gradient", "random", "rl", "rl:slopes"])
def test_a_fresh_process_resumes_from_a_journal_on_disk(name, tmp_path):
    test = quadratic(4, budget=16)
    trials = run(make_searcher(name, test.problem, 7), test.evaluate, 16)
    told, following = trials[:-2], trials[-2].query
    journal = tmp_path / "journal.json"
    journal.write_text(json.dumps([[t.reward, t.gradient] for t in told]))
    code = f"""
import json, pathlib
from arma_mergekit.search import make_searcher, Trial
from arma_mergekit.search.conformance import quadratic
searcher = make_searcher({name!r}, quadratic(4, budget=16).problem, 7)
for reward, gradient in json.loads(pathlib.Path({str(journal)!r}).read_text()):
    searcher.tell(Trial(searcher.ask(), reward, gradient and tuple(gradient)))
print(searcher.ask())
"""
    assert fresh(code) == str(following)


@pytest.mark.parametrize("name", ["bayes", "cmaes", "gradient", "random", "rl"])
def test_the_first_question_is_the_start(name):
    problem = quadratic(3).problem
    assert make_searcher(name, problem, 5).ask().values == tuple(problem.start)


# ---------------------------------------------------------------------- the test problems


def test_a_quadratic_scores_zero_at_the_start_and_one_at_the_optimum():
    test = quadratic(5)
    assert test.exact(test.problem.start) == pytest.approx(0)
    assert test.exact(test.optimum) == pytest.approx(1)


def test_parts_average_to_the_whole_and_gradients_are_slopes():
    test = replace(quadratic(4), noise=0.0)
    values = (0.1, 0.4, 0.9, -0.2)
    parts = [test.evaluate(Query(values, gradient=True, part=(i, 4))) for i in range(4)]
    whole = test.evaluate(Query(values, gradient=True))
    assert np.mean([t.reward for t in parts]) == pytest.approx(whole.reward)
    assert np.mean([t.gradient for t in parts], axis=0) == pytest.approx(np.array(whole.gradient))
    assert len({t.reward for t in parts}) == 4
    for k in range(4):
        sides = [np.array(values) + sign * 1e-5 * np.eye(4)[k] for sign in (1, -1)]
        up, down = (test.evaluate(Query(tuple(v))).reward for v in sides)
        assert (up - down) / 2e-5 == pytest.approx(whole.gradient[k], rel=1e-5)


# ---------------------------------------------------------------------- grid


def test_grid_walks_from_base_to_fine_tuned_and_stops():
    trials = run(make_searcher("grid", quadratic(1, budget=40).problem, 0), quadratic(1).evaluate, 40)
    assert [t.query.values[0] for t in trials] == pytest.approx(np.linspace(0, 1, 11))


def test_grid_fits_a_small_budget_with_both_ends_in_it():
    trials = run(make_searcher("grid", quadratic(2, budget=5).problem, 0), quadratic(2).evaluate, 5)
    assert [t.query.values for t in trials] == [(v, v) for v in (0, 0.25, 0.5, 0.75, 1)]


# ---------------------------------------------------------------------- random


def test_random_asks_at_all_distances_from_the_start_and_in_all_directions():
    problem = quadratic(30, start=0.5).problem
    searcher = RandomSearcher(problem, 0)
    steps = np.array([searcher.ask().values for _ in range(1001)])[1:] - problem.start
    shares = np.abs(steps).max(axis=1)  # of a half range, 1: the largest of 30 uniform steps is close to it
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.06)
    assert np.abs(np.sign(steps).mean(axis=0)).max() < 0.1


def test_random_improves_even_in_many_values():
    assert min(found("random", 40, 60)) > 0.1


# ---------------------------------------------------------------------- bayes


def test_bayes_leaves_loggers_and_output_as_they_were(capfd):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.INFO)
    run(make_searcher("bayes", quadratic(2, budget=13).problem, 0), quadratic(2).evaluate, 13)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


def test_bayes_gives_every_answer_to_the_question_it_belongs_to():
    test = quadratic(2)
    searcher = make_searcher("bayes", test.problem, 0)
    queries = [searcher.ask() for _ in range(6)]
    for query in reversed(queries):
        searcher.tell(test.evaluate(query))
    told = [(tuple(t.params.values()), t.value) for t in searcher._study.trials[:6]]
    assert told == [(q.values, test.evaluate(q).reward) for q in queries]


@pytest.fixture
def written(tmp_path):
    """A file with the trials of two searchers, written over an older one; what was told."""
    test = quadratic(3, budget=12)
    answers = chain(
        [lambda q: replace(test.evaluate(q), cost=0.25, estimated=True), lambda q: Trial(q, None)],
        repeat(test.evaluate),
    )
    told = {
        "gradient": run(make_searcher("gradient", test.problem, 0), test.evaluate, 12),
        "rl seed 1": run(make_searcher("rl", test.problem, 1), lambda q: next(answers)(q), 12),
    }
    path = tmp_path / "study.log"
    write_studies(path, {"old": (test.problem, told["gradient"])})
    write_studies(path, {name: (test.problem, trials) for name, trials in told.items()})
    return path, told


def test_a_fresh_process_opens_the_study_file_and_finds_every_full_trial(written):
    path, told = written
    code = f"""
import json, optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
storage = JournalStorage(JournalFileBackend({str(path)!r}))
studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
print(json.dumps({{s.study_name: [[t.state.name, t.value, list(t.params.values()), t.user_attrs["estimated"]]
                                  for t in s.trials] for s in studies}}))
"""
    expected = {
        name: [
            ["FAIL" if t.reward is None else "COMPLETE", t.reward, list(t.query.values), t.estimated]
            for t in trials if t.query.part is None
        ]
        for name, trials in told.items()
    }  # fmt: skip
    assert json.loads(fresh(code)) == expected
    assert [t[0] for t in expected["rl seed 1"][:3]] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_writing_a_study_leaves_nothing_but_the_file(written):
    path, _ = written
    assert list(path.parent.iterdir()) == [path]


def test_a_study_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "study.log").mkdir()
    with pytest.raises(RunError, match=r"Cannot write .*study\.log: Is a directory\. Give another --out\."):
        write_studies(tmp_path / "study.log", {"arm": (quadratic(2).problem, [])})


# ---------------------------------------------------------------------- cmaes


def test_cmaes_in_the_unit_cube_is_the_package_itself_generation_by_generation():
    from cmaes import CMA

    test = quadratic(4, bounds=(0, 1), start=0.5, budget=1000, noise=0.0)
    ours = CmaesSearcher(test.problem, 3)
    theirs = CMA(mean=np.full(4, 0.5), sigma=cmaes_module.SIGMA, bounds=np.array([[0.0, 1.0]] * 4), seed=3)
    ours.tell(test.evaluate(ours.ask()))
    for _ in range(20):
        asked = [theirs.ask() for _ in range(theirs.population_size)]
        theirs.tell([(u, -test.evaluate(Query(tuple(map(float, u)))).reward) for u in asked])
        for u in asked:
            query = ours.ask()
            assert query.values == pytest.approx(tuple(u))
            ours.tell(test.evaluate(query))
    assert test.exact(theirs.mean) > 0.99


def test_cmaes_has_a_diagonal_covariance_in_high_dimensions():
    from cmaes import CMA, SepCMA

    assert type(CmaesSearcher(quadratic(20).problem, 0)._cma) is CMA
    assert type(CmaesSearcher(quadratic(21).problem, 0)._cma) is SepCMA


def test_cmaes_ranks_failed_trials_last_and_drops_a_generation_of_them():
    test = quadratic(3)
    searcher = CmaesSearcher(test.problem, 0)
    searcher.tell(test.evaluate(searcher.ask()))
    start, size = searcher._cma.mean.copy(), searcher._cma.population_size
    for _ in range(size):
        searcher.tell(Trial(searcher.ask(), None))
    assert np.array_equal(searcher._cma.mean, start)
    queries = [searcher.ask() for _ in range(size)]
    for query in queries:  # what lies above the start in the first coordinate fails
        searcher.tell(Trial(query, None if query.values[0] > 0.75 else 0.5))
    assert searcher._cma.mean[0] < start[0]


def test_cmaes_asks_for_its_mean_last_and_takes_its_answer_for_no_member():
    test = quadratic(3, budget=30)
    searcher = CmaesSearcher(test.problem, 0)
    trials = run(searcher, test.evaluate, 30)
    assert trials[-1].query.values == searcher._values(None)
    assert len(searcher._generation) == 28 % searcher._cma.population_size


# ---------------------------------------------------------------------- rl


def test_rl_asks_for_its_mean_once_at_the_end():
    test = quadratic(3, budget=40)
    searcher = make_searcher("rl", test.problem, 0)
    trials = run(searcher, test.evaluate, 40)
    again = PolicySearcher(test.problem, 0)
    for trial in trials[:-1]:
        again.ask()
        again.tell(trial)
    assert trials[-1].query.values == again._squash(again._mean())
    assert len(trials) == 40


def test_rl_asks_for_its_mean_with_the_last_that_estimates_left_of_the_budget():
    test = quadratic(3, budget=12)
    searcher = PolicySearcher(test.problem, 0)
    trials = run(searcher, lambda q: replace(test.evaluate(q), cost=0.75, estimated=True), 12)
    assert len(trials) == 15
    assert trials[-1].query.values == pytest.approx(searcher._squash(searcher._mean()))


def test_rl_weighs_a_late_answer_by_the_policy_that_asked(monkeypatch):
    test = quadratic(3)
    searcher = PolicySearcher(test.problem, 0)
    searcher.ask()
    late, mean, log_s = searcher.ask(), searcher._mean(), searcher._log_s
    for _ in range(13):
        searcher.tell(test.evaluate(searcher.ask()))
    assert not np.allclose(searcher._mean(), mean)
    learned = []
    monkeypatch.setattr(searcher, "_learn", lambda *batch: learned.append(batch))
    searcher._batch = []
    searcher.tell(test.evaluate(late))
    while not learned:
        searcher.tell(test.evaluate(searcher.ask()))
    x, sampled = learned[0][0][0], learned[0][1][0]
    assert searcher._squash(x) == late.values
    assert sampled == pytest.approx(-0.5 * ((x - mean) / np.exp(log_s)) ** 2 - log_s)


@pytest.mark.parametrize("open_at_once", [2, 3, 4, 5])
def test_rl_learns_however_many_questions_are_open(open_at_once):
    test = quadratic(3, budget=60, noise=0.0)
    searcher = PolicySearcher(test.problem, 0)
    for _ in range(60 // open_at_once):
        for query in [searcher.ask() for _ in range(open_at_once)]:
            searcher.tell(test.evaluate(query))
    assert test.exact(searcher._squash(searcher._mean())) > 0.5


def test_rl_mean_is_the_start_before_anything_is_told():
    problem = quadratic(5).problem
    searcher = PolicySearcher(problem, 3)
    assert searcher._squash(searcher._mean()) == pytest.approx(tuple(problem.start))


def test_rl_learns_what_is_told_whatever_the_units_of_the_reward():
    test = quadratic(3, budget=30)
    plain, scaled = PolicySearcher(test.problem, 0), PolicySearcher(test.problem, 0)
    for _ in range(29):
        trial = test.evaluate(plain.ask())
        plain.tell(trial)
        scaled.tell(Trial(scaled.ask(), 1000 * trial.reward - 7))
    assert scaled.ask().values == pytest.approx(plain.ask().values, abs=1e-6)


def test_rl_backward_is_the_derivative_of_its_forward():
    searcher = PolicySearcher(quadratic(4).problem, 0)
    rng = np.random.default_rng(0)
    searcher._w = rng.standard_normal(searcher._w.shape)
    direction, W, w = rng.standard_normal(4), searcher._W.copy(), searcher._w.copy()
    spectral = np.linalg.norm(np.tanh(searcher._f @ W), 2) ** 2
    slopes = {}
    for name, parameter in (("W", W), ("w", w)):
        slopes[name] = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            sides = []
            for sign in (1, -1):
                moved = parameter.copy()
                moved[index] += sign * 1e-6
                setattr(searcher, f"_{name}", moved)
                sides.append(searcher._mean() @ direction)
            slopes[name][index] = (sides[0] - sides[1]) / 2e-6
        setattr(searcher, f"_{name}", parameter.copy())
    searcher._step_mean(direction)
    assert pytest.approx(slopes["W"] / 4, abs=1e-6) == (searcher._W - W) / rl_module.RATE_NETWORK
    assert pytest.approx(slopes["w"] / spectral, abs=1e-6) == (searcher._w - w) / rl_module.RATE_NETWORK


def test_rl_with_one_epoch_and_no_network_is_the_plain_natural_policy_gradient(monkeypatch):
    monkeypatch.setattr(rl_module, "EPOCHS", 1)
    monkeypatch.setattr(rl_module, "RATE_NETWORK", 0.0)
    searcher = PolicySearcher(quadratic(3).problem, 0)
    rng = np.random.default_rng(1)
    noise, advantage = rng.standard_normal((6, 3)), rng.standard_normal(6)
    b, log_s = searcher._b.copy(), searcher._log_s
    x = b + np.exp(log_s) * noise
    searcher._learn(x, searcher._log_density(x), advantage)
    assert searcher._b - b == pytest.approx(0.6 * np.exp(log_s) * (advantage[:, None] * noise).mean(0))
    assert searcher._log_s - log_s == pytest.approx(0.3 * (advantage[:, None] * (noise**2 - 1)).mean() / 2)


def test_rl_entropy_never_falls_below_its_floor():
    test = quadratic(1, budget=300, noise=0.0)
    searcher = PolicySearcher(test.problem, 0)
    for _ in range(299):
        searcher.tell(test.evaluate(searcher.ask()))
    assert searcher._log_s >= np.log(rl_module.STD_FLOOR)
    assert searcher._log_s < np.log(rl_module.STD_START)


def test_rl_works_without_features_and_from_a_start_on_the_bounds():
    test = quadratic(3, budget=60)
    start = np.array([1.5, 1.5, -0.5])
    problem = replace(test.problem, features=np.zeros((3, 0)), start=start)
    trials = run(make_searcher("rl", problem, 0), test.evaluate, 60)
    assert trials[0].query.values == tuple(start)
    assert test.distance(best(trials).query.values) < 0.5 * test.distance(start)


# ---------------------------------------------------------------------- slopes


def test_slopes_asks_for_three_gradients_that_cost_eight_evaluations():
    test = quadratic(5, budget=18)
    trials = run(make_searcher("rl:slopes", test.problem, 0), test.evaluate, 18)
    asked = [t.query for t in trials if t.query.gradient]
    assert asked == [t.query for t in trials[:3]]
    assert [q.values[0] for q in asked] == [0.75, 0.0, 1.0]
    assert sum(q.cost for q in asked) == 8
    assert trials[0].full
    assert len(trials) == 3 + 10


def test_slopes_step_of_newton_ends_at_the_optimum_of_an_even_quadratic():
    test = quadratic(6, noise=0.0)
    test = replace(test, curvature=np.full(6, 0.2), shifts=0 * test.shifts, optimum=np.array([0.2, 0.8] * 3))
    points = np.array([np.full(6, v) for v in (0.5, 0.0, 1.0)])
    told = [test.evaluate(Query(tuple(map(float, p)), gradient=True)) for p in points]
    newton, ends, shift = directions(points, np.array([t.gradient for t in told]))
    assert points[0] + newton == pytest.approx(test.optimum)
    assert points[0] + ends == pytest.approx(test.optimum)
    assert shift == pytest.approx(np.full(6, 0.3))


@pytest.mark.parametrize("slope", [None, (float("nan"),) * 4])
def test_slopes_without_slopes_still_searches_and_stays_finite(slope):
    test = quadratic(4, budget=20)
    trials = run(
        make_searcher("cmaes:slopes", test.problem, 0),
        lambda q: replace(test.evaluate(q), gradient=slope),
        20,
    )
    assert np.all(np.isfinite([t.query.values for t in trials]))
    assert len({t.query.values for t in trials}) > 10


def test_slopes_with_no_budget_for_them_is_the_searcher_inside():
    test = quadratic(4, budget=8)
    inside = run(make_searcher("rl", test.problem, 0), test.evaluate, 8)
    assert run(make_searcher("rl:slopes", test.problem, 0), test.evaluate, 8) == inside


@pytest.mark.parametrize("size", [40, 210])
@pytest.mark.parametrize("name", ["cmaes", "rl"])
def test_slopes_find_more_in_many_values_at_equal_cost(name, size):
    assert min(found(f"{name}:slopes", size, 16)) > max(found(name, size, 16)) + 0.3


# ---------------------------------------------------------------------- other people's agents


@pytest.fixture
def make_env():
    return pytest.importorskip("arma_mergekit.search.env", exc_type=ModuleNotFoundError).MergeEnv


@pytest.mark.parametrize("horizon", [1, 4])
def test_the_environment_passes_gymnasiums_own_checker(make_env, horizon):
    from gymnasium.utils.env_checker import check_env

    test = quadratic(5)
    check_env(make_env(test.problem, test.evaluate, horizon), skip_render_check=True)


def test_actions_reach_from_bound_to_bound_and_nothing_is_the_start(make_env):
    problem = quadratic(4).problem
    env = make_env(problem, None)
    assert env.values(np.zeros(4)) == tuple(problem.start)
    assert env.values(np.full(4, 7.0)) == tuple(problem.high)
    assert env.values([-1, -0.5, 0.5, 1]) == pytest.approx((-0.5, 0.125, 1.125, 1.5))


def test_one_step_is_one_trial_and_one_episode(make_env):
    test = quadratic(3)
    env = make_env(test.problem, test.evaluate)
    observation, _ = env.reset(seed=0)
    assert observation == pytest.approx([*test.problem.features.ravel(), 1.0])
    observation, reward, ended, _, info = env.step(np.full(3, 0.2, np.float32))
    assert (reward, ended, observation[-1]) == (info["trial"].reward, True, 0.0)
    assert info["trial"] == test.evaluate(Query(env.values(np.full(3, 0.2, np.float32))))


def test_an_episode_lasts_as_many_steps_as_the_horizon_says(make_env):
    test = quadratic(3)
    env = make_env(test.problem, test.evaluate, horizon=4)
    env.reset()
    steps = [env.step(np.zeros(3)) for _ in range(4)]
    assert [s[0][-1] for s in steps] == [0.75, 0.5, 0.25, 0.0]
    assert [s[2] for s in steps] == [False, False, False, True]


def test_a_failed_step_is_rewarded_like_the_worst_one_so_far(make_env):
    rewards = iter([None, 0.5, -2.0, None, 0.1, None])
    env = make_env(quadratic(2).problem, lambda query: Trial(query, next(rewards)))
    env.reset()
    assert [env.step(np.zeros(2))[1] for _ in range(6)] == [0.0, 0.5, -2.0, -2.0, 0.1, -2.0]


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs" / "examples")
    return importlib.import_module("sb3_agent")


@pytest.mark.slow
def test_a_stable_baselines3_agent_is_a_searcher_like_others(example):
    check_searcher(example.Sb3Searcher)


@pytest.mark.slow
def test_a_stable_baselines3_agent_is_undisturbed_by_other_users_of_the_generators(example):
    test = quadratic(3, budget=20)
    plain = run(example.Sb3Searcher(test.problem, 0), test.evaluate, 20)
    torch = sys.modules["torch"]

    def evaluate(query):
        np.random.seed(1)
        torch.manual_seed(1)
        return test.evaluate(query)

    assert run(example.Sb3Searcher(test.problem, 0), evaluate, 20) == plain
    assert torch.initial_seed() == 1


@pytest.mark.slow
def test_the_threads_of_agents_end_with_their_searchers(example):
    gc.collect()
    before = threading.active_count()
    for seed in range(3):
        run(example.Sb3Searcher(quadratic(2).problem, seed), quadratic(2).evaluate, 3)
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.slow
def test_the_example_prints_that_the_agent_beats_random(example, capsys):
    example.main(seeds=3)
    scores = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[2:]}
    assert scores["PPO"] > scores["random"] + 0.2


# ---------------------------------------------------------------------- gradient


def test_gradient_takes_its_slopes_elsewhere_than_where_it_looks():
    test = quadratic(10, budget=24)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, 24)
    assert 24 - 1 <= sum(t.query.cost for t in trials) <= 24
    slopes = [t.query.part for t in trials if t.query.gradient]
    assert slopes[:7] == [(i, 8) for i in (0, 1, 2, 4, 5, 6, 0)]
    looks = [t.query.part for t in trials if not t.query.gradient and not t.full]
    assert set(looks) == {(3, 4)}  # of 8 parts: 3 and 7
    assert trials[-1].full


@pytest.mark.parametrize(("parts", "slopes"), [(4, 3), (6, 3), (3, 1), (1, 1)])
def test_gradient_holds_a_quarter_aside_where_the_data_can_be_cut_in_four(parts, slopes):
    test = quadratic(10, budget=24, parts=parts)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, 24)
    assert len({t.query.part for t in trials if t.query.gradient}) == slopes
    assert any(t.query.part == (3, 4) for t in trials) == (slopes == 3)


def test_gradient_scores_in_full_what_looked_best_and_stops_when_looks_get_worse():
    """What is held aside likes only the start's neighbourhood: the longer the walk, the worse."""
    test = quadratic(4, budget=40)

    def evaluate(query):
        trial = test.evaluate(query)
        if query.part != (3, 4):
            return trial
        return replace(trial, reward=-abs(sum(query.values) - sum(test.problem.start) - 0.3))

    trials = run(make_searcher("gradient", test.problem, 0), evaluate, 40)
    full = [i for i, t in enumerate(trials) if t.full]
    looks = [t for t in trials[: full[0]] if t.query.part == (3, 4)]
    assert trials[full[0]].query.values == max(looks, key=lambda t: t.reward).query.values
    assert [t.reward < max(x.reward for x in looks) for t in looks[-3:]] == [True] * 3
    assert full[0] < 30  # a third of the steps that the budget pays for


@pytest.mark.parametrize("slope", [None, (float("nan"),) * 4])
def test_gradient_gives_up_a_start_that_has_no_slope(slope):
    test = quadratic(4, budget=12)
    trials = run(
        make_searcher("gradient", test.problem, 0), lambda q: replace(test.evaluate(q), gradient=slope), 12
    )
    assert {t.query.values for t in trials} == {tuple(test.problem.start)}
    assert any(t.full for t in trials)


@pytest.mark.parametrize("parts", [1, 3, 8, 16])
@pytest.mark.parametrize("budget", [1, 2, 6, 12])
def test_gradient_gets_a_full_score_out_of_any_budget(budget, parts):
    test = quadratic(6, budget=budget, parts=parts)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, budget)
    assert any(t.full for t in trials)
    if budget >= 6:
        assert test.exact(best(trials).query.values) > 0.4


def test_gradient_tries_other_starts_when_the_budget_is_large():
    test = quadratic(3, budget=120)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, 120)
    asked = {t.query.values for t in trials if t.query.gradient}
    assert {(0.75,) * 3, (1.0,) * 3, (0.0,) * 3} <= asked


def test_gradient_goes_on_from_its_best_when_asked_beyond_its_budget():
    test = quadratic(8, budget=6)
    searcher = make_searcher("gradient", test.problem, 0)
    first = run(searcher, test.evaluate, 6)
    assert searcher.ask().values == best(first).query.values
    further = run(searcher, test.evaluate, 30)
    assert test.exact(best(further).query.values) > test.exact(best(first).query.values)


@pytest.mark.parametrize("size", [8, 210])
def test_gradient_gives_back_what_no_longer_gains_anything(size):
    test = quadratic(size, budget=200)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, 200)
    assert sum(t.paid for t in trials) < 180
    assert test.exact(best(trials).query.values) > 0.995


def test_gradient_goes_on_with_the_rest_of_its_budget_after_its_first_walk():
    test = quadratic(8, budget=74)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, 74)
    first = next(i for i, t in enumerate(trials) if t.full)
    assert trials[first + 1].query.values == trials[first].query.values
    assert any(t.query.gradient for t in trials[first + 1 :])


def test_gradient_halves_its_step_back_to_the_last_good_point_after_a_failure():
    test = quadratic(4, budget=12)
    searcher = make_searcher("gradient", test.problem, 0)
    good = test.evaluate(searcher.ask())
    searcher.tell(good)
    failed = searcher.ask()
    searcher.tell(Trial(failed, None))
    middle = (np.array(good.query.values) + failed.values) / 2
    assert searcher.ask().values == pytest.approx(tuple(middle))


def test_gradient_returns_to_the_start_when_it_diverged():
    """Slopes that point the wrong way: what is held aside tells."""
    test = quadratic(4, budget=24)

    def evaluate(query):
        trial = test.evaluate(query)
        return replace(trial, gradient=trial.gradient and tuple(-g for g in trial.gradient))

    trials = run(make_searcher("gradient", test.problem, 0), evaluate, 24)
    assert best(trials).query.values == tuple(test.problem.start)


# ---------------------------------------------------------------------- who finds more


@pytest.mark.parametrize("size", [1, 8, 30])
@pytest.mark.parametrize("name", ["bayes", "cmaes", "rl"])
def test_guided_search_is_no_worse_than_random(name, size):
    budget = 40 if size == 1 else 60
    slack = 0.05 if size == 30 else 0.01  # nobody without gradients gets far in 30 values with 60 evaluations
    assert np.median(found(name, size, budget)) >= np.median(found("random", size, budget)) - slack


def test_tpe_begins_with_the_questions_of_the_control():
    test = quadratic(7)
    trials, control = (run(make_searcher(n, test.problem, 3), test.evaluate, 12) for n in ("bayes", "random"))
    assert [t.query for t in trials[:10]] == [t.query for t in control[:10]]
    assert [t.query for t in trials[10:]] != [t.query for t in control[10:]]


@pytest.mark.parametrize(
    ("name", "size", "least"), [("bayes", 8, 0.6), ("cmaes", 8, 0.6), ("rl", 8, 0.75), ("rl", 30, 0.5)]
)
def test_guided_search_closes_most_of_the_gap_to_the_optimum(name, size, least):
    assert np.median(found(name, size, 60)) > least


def test_gradient_reaches_in_12_evaluations_what_tpe_does_not_in_60():
    gradient, bayes = found("gradient", 30, 12), found("bayes", 30, 60)
    assert min(gradient) > 0.95
    assert max(bayes) < 0.8
