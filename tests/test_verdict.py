import numpy as np
import pytest

from arma_mergekit.evals.base import Measured
from arma_mergekit.verdict import compare, suite_shares

N = 400


def scores(accuracy, seed=0, flip=0.0, key="general/choice"):
    """Answers right with this chance; the same seed gives the same items right (paired)."""
    rng = np.random.default_rng(seed)
    value = (rng.random(N) < accuracy).astype(float)
    noise = np.random.default_rng(seed + 99).random(N) < flip
    value[noise] = 1 - value[noise]
    return {key: Measured(tuple(map(str, range(N))), 1 - value, value, np.ones(N), 0)}


BASE, TUNED = scores(0.9), scores(0.3)


def test_shares_are_zero_and_one_at_the_ends():
    assert suite_shares(BASE, BASE, TUNED) == {"general": 1.0}
    assert suite_shares(TUNED, BASE, TUNED) == {"general": 0.0}


def test_a_clear_gain_beats_the_rival():
    verdict = compare("ours", scores(0.85), "one knob", scores(0.6), BASE, TUNED)
    assert verdict.dominates
    assert verdict.sentence.startswith("ours beats one knob (share kept: general +0.4")


def test_a_difference_within_error_is_called_no_better():
    verdict = compare("ours", scores(0.60, flip=0.2), "one knob", scores(0.60), BASE, TUNED)
    assert not verdict.dominates
    assert "no better than one knob" in verdict.sentence
    assert verdict.sentence.endswith("use that.")


def test_gaining_here_and_losing_there_is_a_trade():
    def both(general, domain):
        return scores(general) | scores(domain, key="domain/exact")

    verdict = compare("ours", both(0.9, 0.5), "one knob", both(0.6, 0.8), both(0.9, 0.1), both(0.3, 0.9))
    assert not verdict.dominates
    assert "trades" in verdict.sentence


def test_a_loss_is_called_worse():
    assert "is worse than" in compare("ours", scores(0.5), "one knob", scores(0.8), BASE, TUNED).sentence


def test_pairing_removes_the_noise_the_items_share():
    paired = compare("a", scores(0.65, seed=0), "b", scores(0.6, seed=0), BASE, TUNED).suites["general"]
    unpaired = compare("a", scores(0.65, seed=0), "b", scores(0.6, seed=5), BASE, TUNED).suites["general"]
    assert paired.stderr < 0.6 * unpaired.stderr


def test_the_bootstrap_error_is_that_of_the_mean_difference():
    difference = compare("a", scores(0.7, seed=1), "b", scores(0.6, seed=2), BASE, TUNED).suites["general"]
    gap = BASE["general/choice"].score - TUNED["general/choice"].score
    expected = np.std(
        scores(0.7, seed=1)["general/choice"].value - scores(0.6, seed=2)["general/choice"].value
    )
    assert difference.stderr == pytest.approx(expected / np.sqrt(N) / gap, rel=0.1)
