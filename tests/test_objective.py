import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.objective import Bound, End, Objective, front, share

BASE = {"prose": 3.4, "words": 0.5, "codes": 2.5}
TUNED = {"prose": 4.0, "words": 1.5, "codes": 1.2}
ENDS = {t: End.of(BASE[t], TUNED[t]) for t in BASE}
SUITES = {"general": {"prose": 1.0, "words": 3.0}, "domain": {"codes": 1.0}}


def test_share_is_one_at_the_better_end_and_zero_at_the_worse():
    assert share(3.4, ENDS["prose"]) == pytest.approx(1)
    assert share(4.0, ENDS["prose"]) == pytest.approx(0)
    assert share(2.5, ENDS["codes"]) == pytest.approx(0)
    assert share(1.2, ENDS["codes"]) == pytest.approx(1)


def test_both_ends_have_balance_zero():
    objective = Objective(SUITES, ENDS)
    assert objective.reward(BASE).value == pytest.approx(0)
    assert objective.reward(TUNED).value == pytest.approx(0)


def test_keeping_both_sides_whole_has_balance_one():
    best = {"prose": 3.4, "words": 0.5, "codes": 1.2}
    assert Objective(SUITES, ENDS).reward(best).value == pytest.approx(1)


def test_a_suite_averages_its_tasks_by_weight_after_normalising():
    shares = Objective(SUITES, ENDS).shares({"prose": 4.0, "words": 0.5, "codes": 1.2})
    assert shares["general"] == pytest.approx(0.75)


def test_keep_that_fails_is_infeasible_and_costs_more_than_the_other_suite_can_gain():
    objective = Objective(SUITES, ENDS, maximize="general", keep={"domain": 0.95})
    giving_up = objective.reward({"prose": 3.4, "words": 0.5, "codes": 1.4})
    keeping = objective.reward({"prose": 3.55, "words": 0.75, "codes": 1.2})
    assert not giving_up.feasible
    assert keeping.feasible
    assert keeping.value > giving_up.value


def test_sum_weighs_the_shares():
    objective = Objective(SUITES, ENDS, weights={"general": 1.0, "domain": 2.0})
    assert objective.reward(TUNED).value == pytest.approx(2.0)


@given(
    st.lists(st.floats(-0.9, 1.9), min_size=3, max_size=3),
    st.sampled_from(
        [{}, {"maximize": "general", "keep": {"domain": 0.95}}, {"weights": {"general": 0.3, "domain": 0.7}}]
    ),
)
def test_slopes_are_the_derivative_of_the_value(shares, options):
    objective = Objective(SUITES, ENDS, **options)
    chances = [e.better - (1 - s) * e.gap for e, s in zip(ENDS.values(), shares, strict=True)]
    if min(chances) < 1e-3:
        return
    losses = {t: -math.log(p) for t, p in zip(ENDS, chances, strict=True)}
    kinks = [*objective.shares(losses).values()]
    if min(abs(k - x) for k in kinks for x in (0, 0.95, 1)) < 1e-3 or abs(kinks[0] - kinks[1]) < 1e-3:
        return
    reward, step = objective.reward(losses), 1e-7
    for task in ENDS:
        moved = objective.reward(losses | {task: losses[task] + step}).value
        assert np.isclose((moved - reward.value) / step, reward.slopes[task], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("95%", (0.95, "share")),
        (0.9, (0.9, "share")),
        ("2 se", (2.0, "se")),
        ("0.05nats", (0.05, "nats")),
        (".5", (0.5, "share")),
    ],
)
def test_bounds_are_read_in_three_units(text, bound):
    assert Bound.parse(text) == Bound(*bound)


@pytest.mark.parametrize("text", ["", "many", "-3%", "300%", "2 sigma", True, None, "1e9"])
def test_a_bound_without_sense_is_refused(text):
    with pytest.raises(ValueError, match="must be"):
        Bound.parse(text)


def test_an_emphasis_moves_the_best_trade_toward_its_suite():
    def best(emphasis):
        objective = Objective(SUITES, ENDS, emphasis=emphasis)
        candidates = [(0.1 * k, 1 - 0.1 * k) for k in range(1, 10)]
        return max(candidates, key=lambda c: objective._value({"general": c[0], "domain": c[1]})[0])[0]

    assert best({"domain": 4.0}) < best({}) < best({"general": 4.0})


def test_the_front_keeps_what_nothing_beats():
    points = [
        ("a", {"x": 1, "y": 0}),
        ("b", {"x": 0.5, "y": 0.5}),
        ("c", {"x": 0.4, "y": 0.5}),
        ("d", {"x": 0, "y": 1}),
    ]
    assert front(points) == ["a", "b", "d"]


def test_equal_points_do_not_beat_each_other():
    assert front([("a", {"x": 1.0}), ("b", {"x": 1.0})]) == ["a", "b"]
