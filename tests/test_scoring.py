import numpy as np
import pytest

from arma_mergekit.errors import RecipeError, RunError
from arma_mergekit.evals.base import Measured, Split
from arma_mergekit.objective import Bound
from arma_mergekit.scoring import Scale

N = 64
IDS = tuple(f"item-{i}" for i in range(N))
SPLIT = Split(IDS, 0.5)
NOISE = np.random.default_rng(0).normal(0, 0.05, N)


def scored(level, spread=0.0):
    """Losses of the search items around a level; the item's own noise is the same for every candidate."""
    loss = np.array([level + NOISE[i] + spread * (-1) ** i for i in SPLIT.search])
    return Measured(tuple(IDS[i] for i in SPLIT.search), loss, -loss, np.ones(len(loss)), 10)


def part_of(measured, part):
    place = {item: k for k, item in enumerate(measured.ids)}
    rows = [place[IDS[i]] for i in SPLIT.part(part)]
    ids, loss, weight = tuple(measured.ids[r] for r in rows), measured.loss[rows], measured.weight[rows]
    return Measured(ids, loss, -loss, weight, 1)


ENDS = {
    "base": {"general/a": scored(0.1), "domain/b": scored(2.0, 0.1)},
    "finetuned": {"general/a": scored(1.1, 0.1), "domain/b": scored(0.3)},
}


def scale(options=None, ends=None, **more):
    ends = ends or ENDS
    keys = list(ends["base"])
    return Scale(ends, dict.fromkeys(keys, SPLIT), dict.fromkeys(keys, 1.0), options or {}, **more)


def losses(general, domain):
    return {"general/a": scored(general).mean_loss, "domain/b": scored(domain).mean_loss}


def test_both_ends_have_balance_zero_and_the_best_of_both_has_one():
    for side in ENDS.values():
        assert scale().reward({key: m.mean_loss for key, m in side.items()}).value == pytest.approx(0)
    assert scale().reward(losses(0.1, 0.3)).value == pytest.approx(1)


def test_parts_share_the_noise_of_their_items_so_a_perfect_candidate_scores_one_on_each():
    judge = scale()
    for i in range(4):
        found = {
            k: part_of(m, (i, 4)).mean_loss
            for k, m in (("general/a", scored(0.1)), ("domain/b", scored(0.3)))
        }
        assert judge.reward(found, (i, 4)).value == pytest.approx(1)


def test_a_duel_is_the_difference_of_rewards_with_a_small_error_where_candidates_differ_alike_on_every_item():
    judge, part = scale(), (0, 4)
    ours = {k: part_of(m, part) for k, m in (("general/a", scored(0.2)), ("domain/b", scored(0.5)))}
    theirs = {k: part_of(m, part) for k, m in (("general/a", scored(0.2)), ("domain/b", scored(0.9)))}
    gap, error = judge.duel(ours, theirs, part, {})
    rewards = [judge.reward({k: m.mean_loss for k, m in side.items()}, part).value for side in (ours, theirs)]
    assert gap == pytest.approx(rewards[0] - rewards[1])
    assert 0 <= error < 1e-9
    noisy = {**ours, "domain/b": part_of(scored(0.5, 0.3), part)}
    assert judge.duel(noisy, theirs, part, {})[1] > 0.01


def test_a_bound_in_nats_is_the_share_at_that_loss():
    judge = scale({"maximize": "general", "keep": {"domain": Bound(0.2, "nats")}})
    assert judge.reward(losses(0.5, 0.3 + 0.199)).feasible
    assert not judge.reward(losses(0.5, 0.3 + 0.201)).feasible


def test_a_bound_in_standard_errors_shrinks_with_the_separation():
    one, three = (
        scale({"maximize": "general", "keep": {"domain": Bound(k, "se")}}).keep["domain"] for k in (1, 3)
    )
    sigmas = next(s.sigmas for s in scale().separation if s.task == "domain/b")
    assert 1 - one == pytest.approx(1 / sigmas)
    assert 1 - three == pytest.approx(3 / sigmas)


def test_a_bound_in_nats_needs_one_steering_task():
    ends = {side: {**scores, "domain/c": scores["domain/b"]} for side, scores in ENDS.items()}
    with pytest.raises(
        RecipeError, match=r"keep domain: 0.2 nats needs a suite of one steering task, but it has 2"
    ):
        scale({"maximize": "general", "keep": {"domain": Bound(0.2, "nats")}}, ends)


def test_a_regulariser_costs_its_weight_at_the_far_end_and_counts_in_no_suite():
    ends = {
        "base": {**ENDS["base"], "regularizer/js": scored(0.0)},
        "finetuned": {**ENDS["finetuned"], "regularizer/js": scored(0.4)},
    }
    judge, plain = scale({}, ends, penalty=0.1), scale()
    gap = scored(0.4).mean_loss - scored(0.0).mean_loss
    found = judge.reward(losses(0.2, 0.5) | {"regularizer/js": gap})
    assert found.value == pytest.approx(plain.reward(losses(0.2, 0.5)).value - 0.1)
    assert set(found.shares) == {"general", "domain"}
    assert found.slopes["regularizer/js"] == pytest.approx(-0.1 / gap)
    assert [s.task for s in judge.separation] == ["general/a", "domain/b"]


@pytest.mark.parametrize(("task", "parts"), [("regularizer/js", 7), ("domain/js", 3)])
def test_few_texts_of_a_regulariser_leave_a_search_its_minibatches(task, parts):
    few = Split(IDS, 0.5)
    few.search = few.search[:7]
    ends = {side: {**scores, task: scored(0.4 * (side == "base"))} for side, scores in ENDS.items()}
    splits = {**dict.fromkeys(ends["base"], SPLIT), task: few}
    judge = Scale(ends, splits, dict.fromkeys(splits, 1.0), {}, penalty=0.1)
    assert judge.parts == parts
    assert all(few.part((i, judge.parts)) for i in range(judge.parts))


def test_a_regulariser_that_is_the_same_for_both_models_is_refused():
    ends = {side: {**scores, "regularizer/js": scored(0.4)} for side, scores in ENDS.items()}
    with pytest.raises(RunError, match="leave the regularizer out"):
        scale({}, ends, penalty=0.1)


def test_a_suite_that_cannot_tell_the_ends_apart_is_refused_unless_kept():
    ends = {
        side: {**scores, "general/a": scored(0.1, 0.001 * (side == "base"))} for side, scores in ENDS.items()
    }
    with pytest.raises(RunError, match="Suite general has no task that tells base from fine-tuned"):
        scale({}, ends)
