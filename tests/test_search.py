import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from arma_mergekit.errors import RecipeError
from arma_mergekit.search import SEARCHERS, Query, Searcher, Trial, find_searcher, make_searcher
from arma_mergekit.search import rl as rl_module
from arma_mergekit.search.conformance import best, check_searcher, quadratic, run
from arma_mergekit.search.random import RandomSearcher
from arma_mergekit.search.rl import PolicySearcher

SEEDS = range(5)


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
for name in ("random", "grid", "rl", "gradient"):
    make_searcher(name, quadratic(3).problem, 0).ask()
print(sorted({"optuna", "torch", "mergekit", "transformers", "scipy"} & sys.modules.keys()))
"""
    assert fresh(code) == "[]"


def fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


# ---------------------------------------------------------------------- the rules


@pytest.mark.parametrize("name", ["bayes", "random", "rl"])
def test_stochastic_searchers_conform(name):
    check_searcher(find_searcher(name))


@pytest.mark.parametrize("name", ["gradient", "grid"])
def test_deterministic_searchers_conform(name):
    check_searcher(find_searcher(name), stochastic=False)


@pytest.mark.slow
def test_gaussian_process_conforms():
    check_searcher(find_searcher("bayes:gp"), evaluations=20)


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


@pytest.mark.parametrize("name", ["bayes", "gradient", "random", "rl"])
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


@pytest.mark.parametrize("name", ["bayes", "gradient", "random", "rl"])
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


# ---------------------------------------------------------------------- bayes


def test_bayes_leaves_loggers_and_output_as_they_were(capfd):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.INFO)
    run(make_searcher("bayes", quadratic(2, budget=13).problem, 0), quadratic(2).evaluate, 13)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


def test_bayes_takes_answers_to_several_open_questions_in_order():
    test = quadratic(2)
    searcher = make_searcher("bayes", test.problem, 0)
    for _ in range(4):
        for query in [searcher.ask() for _ in range(4)]:
            searcher.tell(test.evaluate(query))
    assert searcher.ask() is not None


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
    searcher._learn(b + np.exp(log_s) * noise, advantage)
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


# ---------------------------------------------------------------------- gradient


def test_gradient_spends_its_budget_on_rotating_parts_and_keeps_full_scores():
    test = quadratic(10, budget=24)
    trials = run(make_searcher("gradient", test.problem, 0), test.evaluate, 24)
    assert 24 - 3 / 8 < sum(t.query.cost for t in trials) <= 24
    parts = [t.query.part for t in trials if t.query.gradient]
    assert parts[:9] == [(i % 8, 8) for i in range(9)]
    assert [i for i, t in enumerate(trials) if t.full] == [0, 27, len(trials) - 2, len(trials) - 1]


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
    further = [searcher.ask()]
    assert further[0].values == best(first).query.values
    for _ in range(60):
        trial = test.evaluate(searcher.ask())
        further.append(trial.query)
        searcher.tell(trial)
    assert max(test.exact(q.values) for q in further) > test.exact(best(first).query.values)


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
    """Slopes that point the wrong way: the full score in the middle tells."""
    test = quadratic(4, budget=24)

    searcher = make_searcher("gradient", test.problem, 0)
    full = []
    while len(full) < 2:
        trial = test.evaluate(searcher.ask())
        if trial.full:
            full.append(trial.reward)
        else:
            trial = replace(trial, gradient=tuple(-g for g in trial.gradient))
        searcher.tell(trial)
    assert full[1] < full[0]
    assert searcher.ask().values == tuple(test.problem.start)
    searcher.tell(Trial(searcher.ask(), None))
    assert searcher.ask().values == tuple(test.problem.start)


# ---------------------------------------------------------------------- who finds more


@pytest.mark.parametrize("size", [1, 8, 30])
@pytest.mark.parametrize("name", ["bayes", "rl"])
def test_guided_search_is_no_worse_than_random(name, size):
    budget = 40 if size == 1 else 60
    assert np.median(found(name, size, budget)) >= np.median(found("random", size, budget)) - 0.005


@pytest.mark.parametrize(("name", "size", "least"), [("bayes", 8, 0.6), ("rl", 8, 0.75), ("rl", 30, 0.5)])
def test_guided_search_closes_most_of_the_gap_to_the_optimum(name, size, least):
    assert np.median(found(name, size, 60)) > least


def test_gradient_reaches_in_12_evaluations_what_tpe_does_not_in_60():
    gradient, bayes = found("gradient", 30, 12), found("bayes", 30, 60)
    assert min(gradient) > 0.95
    assert max(bayes) < 0.8
