"""Metrics of a score matrix: worked examples, and what must always hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.continual import metrics
from arma_mergekit.continual.metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    overall_performance,
    zero_shot_transfer,
)

# three tasks; rows: after training on each
EXAMPLE = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.75, 0.7]]


def test_the_worked_example():
    assert overall_performance(EXAMPLE) == pytest.approx((0.6 + 0.75 + 0.7) / 3)
    assert backward_transfer(EXAMPLE) == pytest.approx(((0.6 - 0.9) + (0.75 - 0.8)) / 2)
    assert forward_transfer(EXAMPLE, [0.9, 0.85, 0.6]) == pytest.approx((0.0 - 0.05 + 0.1) / 3)
    assert zero_shot_transfer(EXAMPLE, [0.5, 0.1, 0.1]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert forgetting(EXAMPLE) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.75)) / 2)
    assert learning_accuracy(EXAMPLE) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert average_accuracy(EXAMPLE) == pytest.approx((0.9 + (0.7 + 0.8) / 2 + (0.6 + 0.75 + 0.7) / 3) / 3)


def test_forgetting_counts_from_the_best_time_and_backward_transfer_from_the_first():
    risen = [[0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.6, 0.5, 0.5]]
    assert backward_transfer(risen) == pytest.approx((0.1 + 0.0) / 2)
    assert forgetting(risen) == pytest.approx((0.3 + 0.0) / 2)


def test_one_task_has_nothing_to_forget():
    assert overall_performance([[0.4]]) == learning_accuracy([[0.4]]) == average_accuracy([[0.4]]) == 0.4
    assert backward_transfer([[0.4]]) == forgetting([[0.4]]) == zero_shot_transfer([[0.4]], [0.1]) == 0.0


def test_entries_that_a_formula_does_not_use_may_be_missing():
    seen = [[v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(EXAMPLE)]
    for metric in (overall_performance, backward_transfer, forgetting, learning_accuracy, average_accuracy):
        assert metric(seen) == metric(EXAMPLE)
    with pytest.raises(ValueError, match=r"a\[0\]\[1\] must be a finite number, but got None"):
        zero_shot_transfer(seen, [0, 0, 0])


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [[1.0], [1.0, 2.0]]])
def test_a_matrix_must_be_square(matrix):
    with pytest.raises(ValueError, match="must be square"):
        overall_performance(matrix)


def test_what_is_not_a_score_is_named():
    with pytest.raises(ValueError, match=r"a\[1\]\[0\] must be a finite number, but got nan"):
        overall_performance([[1.0, 0.0], [float("nan"), 1.0]])
    with pytest.raises(ValueError, match="`alone` must have a score for each of 3 tasks, but got 2"):
        forward_transfer(EXAMPLE, [0.1, 0.2])


scores = st.floats(0, 1)
matrices = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(scores, min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(matrices)
def test_overall_is_learning_plus_backward_transfer(matrix):
    size = len(matrix)
    whole = learning_accuracy(matrix) + backward_transfer(matrix) * (size - 1) / size
    assert overall_performance(matrix) == pytest.approx(whole, abs=1e-12)


@given(matrices)
def test_forgetting_is_at_least_what_backward_transfer_says(matrix):
    assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-12


@given(matrices, scores)
def test_shifting_all_scores_moves_levels_and_no_differences(matrix, shift):
    moved = [[value + shift for value in row] for row in matrix]
    for level in (overall_performance, learning_accuracy, average_accuracy):
        assert level(moved) == pytest.approx(level(matrix) + shift)
    for difference in (backward_transfer, forgetting):
        assert difference(moved) == pytest.approx(difference(matrix), abs=1e-12)
    diagonal = [row[k] for k, row in enumerate(matrix)]
    assert forward_transfer(moved, diagonal) == pytest.approx(shift)


def test_every_metric_has_its_definition():
    assert len(metrics.DEFINITIONS) == len([name for name in metrics.__all__ if name != "DEFINITIONS"])
