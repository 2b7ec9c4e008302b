import numpy as np
import pytest

from arma_mergekit.evals.base import Measured
from arma_mergekit.verdict import Difference, Verdict, compare, kept

N = 400


def scores(accuracy, seed=0, flip=0.0, key="general/choice"):
    """Answers right with this chance; the same seed gives the same items right (paired)."""
    rng = np.random.default_rng(seed)
    value = (rng.random(N) < accuracy).astype(float)
    noise = np.random.default_rng(seed + 99).random(N) < flip
    value[noise] = 1 - value[noise]
    return {key: Measured(tuple(map(str, range(N))), 1 - value, value, np.ones(N), 0)}


BASE, TUNED = scores(0.9), scores(0.3)
ONE = {"general/choice": 1.0, "general/other": 1.0, "domain/exact": 1.0}


def test_shares_are_zero_and_one_at_the_ends():
    assert kept(BASE, BASE, TUNED, ONE)["general"].mean == pytest.approx(1)
    assert kept(TUNED, BASE, TUNED, ONE)["general"] == Difference(0, 0)


def test_a_clear_gain_beats_the_rival():
    verdict = compare("ours", scores(0.85), "one knob", scores(0.6), BASE, TUNED, ONE)
    assert verdict.dominates
    assert verdict.sentence.startswith("ours beats one knob (share kept: general +0.4")


def test_a_difference_within_error_is_called_no_better():
    verdict = compare("ours", scores(0.60, flip=0.2), "one knob", scores(0.60), BASE, TUNED, ONE)
    assert not verdict.dominates
    assert "no better than one knob" in verdict.sentence
    assert verdict.sentence.endswith("use that.")


def test_gaining_here_and_losing_there_is_a_trade():
    def both(general, domain):
        return scores(general) | scores(domain, key="domain/exact")

    verdict = compare("ours", both(0.9, 0.5), "one knob", both(0.6, 0.8), both(0.9, 0.1), both(0.3, 0.9), ONE)
    assert not verdict.dominates
    assert "trades" in verdict.sentence


def test_a_loss_is_called_worse():
    assert "is worse than" in compare("ours", scores(0.5), "one knob", scores(0.8), BASE, TUNED, ONE).sentence


def test_pairing_removes_the_noise_the_items_share():
    paired = compare("a", scores(0.65, seed=0), "b", scores(0.6, seed=0), BASE, TUNED, ONE).suites["general"]
    unpaired = compare("a", scores(0.65, seed=0), "b", scores(0.6, seed=5), BASE, TUNED, ONE).suites[
        "general"
    ]
    assert paired.stderr < 0.6 * unpaired.stderr


def test_the_bootstrap_error_is_that_of_the_mean_difference():
    difference = compare("a", scores(0.7, seed=1), "b", scores(0.6, seed=2), BASE, TUNED, ONE).suites[
        "general"
    ]
    gap = BASE["general/choice"].score - TUNED["general/choice"].score
    expected = np.std(
        scores(0.7, seed=1)["general/choice"].value - scores(0.6, seed=2)["general/choice"].value
    )
    assert difference.stderr == pytest.approx(expected / np.sqrt(N) / gap, rel=0.1)


def twice(measured, key="general/other"):
    """The same items and answers under a second task."""
    return measured | {key: measured["general/choice"]}


def test_tasks_on_the_same_items_do_not_count_as_independent():
    one = compare("a", scores(0.7, seed=1), "b", scores(0.6, seed=2), BASE, TUNED, ONE).suites["general"]
    ours, theirs = twice(scores(0.7, seed=1)), twice(scores(0.6, seed=2))
    two = compare("a", ours, "b", theirs, twice(BASE), twice(TUNED), ONE).suites["general"]
    assert two.stderr == pytest.approx(one.stderr, rel=1e-6)


def test_a_task_that_cannot_tell_the_ends_apart_on_held_back_items_has_no_share():
    same = BASE | scores(0.5, key="domain/exact")
    other = TUNED | scores(0.5, key="domain/exact", flip=0.05)
    assert set(kept(same, same, other, ONE)) == {"general"}
    assert set(compare("a", same, "b", other, same, other, ONE).suites) == {"general"}


def test_nothing_to_tell_by_is_no_better():
    verdict = compare("a", BASE, "b", BASE, BASE, BASE, ONE)
    assert not verdict.dominates
    assert "no better" in verdict.sentence


def test_a_large_uncertain_loss_is_not_no_worse():
    assert not Difference(-0.6, 0.413).no_worse
    assert Difference(-0.01, 0.03).no_worse
    assert not Verdict("a", "b", {"g": Difference(-0.6, 0.413), "d": Difference(1.0, 0.1)}).dominates


def test_weights_of_tasks_count_in_the_share():
    ours = scores(0.9) | scores(0.3, key="general/other")
    base, tuned = twice(BASE), twice(TUNED)
    light = kept(ours, base, tuned, {"general/choice": 3.0, "general/other": 1.0})["general"]
    assert light.mean == pytest.approx(0.75)
