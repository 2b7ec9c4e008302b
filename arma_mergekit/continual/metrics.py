"""What a matrix of scores says about a sequence of tasks. It knows numbers only; no models, tasks or files.

    symbol   meaning                                                          shape
    T        number of tasks
    a[i][j]  score on task j after training on tasks 0 .. i, larger = better  (T, T)
    s[j]     score on task j of a model trained on task j alone               (T,)
    b[j]     score on task j before any training                              (T,)

Entries that a formula does not use may be None. Names of the formulas differ between papers: AIMMerging's FWT
(arXiv:2509.17348) compares with models trained alone, GEM's (arXiv:1706.08840) with the untrained one, so ours are
`forward_transfer` and `zero_shot_transfer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TypeAlias

__all__ = [
    "DEFINITIONS",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "overall_performance",
    "zero_shot_transfer",
]

Scores: TypeAlias = Sequence[float | None]
Matrix: TypeAlias = Sequence[Scores]

DEFINITIONS = {
    "OP": "mean over j of a[T-1][j]: all tasks after the last one",
    "BWT": "mean over j < T-1 of a[T-1][j] - a[j][j]: what later tasks did to earlier ones; below 0 is forgetting",
    "FWT": "mean over j of a[j][j] - s[j], s[j] = the score when trained on task j alone: what earlier tasks did to "
    "later ones",
    "forgetting": "mean over j < T-1 of max over i < T-1 of a[i][j], minus a[T-1][j]: what was lost since the best",
    "learning accuracy": "mean over j of a[j][j]: each task just after it was learned",
    "average accuracy": "mean over i of the mean over j <= i of a[i][j]: all tasks seen, at all times",
    "zero-shot transfer": "mean over 0 < j of a[j-1][j] - b[j], b[j] = the score before any training",
}


def overall_performance(matrix: Matrix) -> float:
    """OP = mean_j a[T-1][j], the last row; ACC in GEM (arXiv:1706.08840, eq. 2), OP in arXiv:2509.17348."""
    size = _size(matrix)
    return fmean(_at(matrix, size - 1, j) for j in range(size))


def backward_transfer(matrix: Matrix) -> float:
    """BWT = mean_{j<T-1} (a[T-1][j] - a[j][j]); GEM (arXiv:1706.08840, eq. 3). 0 if there is one task."""
    size = _size(matrix)
    return _mean(_at(matrix, size - 1, j) - _at(matrix, j, j) for j in range(size - 1))


def forward_transfer(matrix: Matrix, alone: Scores) -> float:
    """FWT = mean_j (a[j][j] - s[j]), s (T,) = `alone`; as in arXiv:2509.17348."""
    size = _size(matrix)
    _same(size, alone, "alone")
    return fmean(_at(matrix, j, j) - _number(alone[j], f"alone[{j}]") for j in range(size))


def zero_shot_transfer(matrix: Matrix, before: Scores) -> float:
    """mean_{0<j} (a[j-1][j] - b[j]), b (T,) = `before`; FWT in GEM (arXiv:1706.08840, eq. 4). 0 for one task."""
    size = _size(matrix)
    _same(size, before, "before")
    return _mean(_at(matrix, j - 1, j) - _number(before[j], f"before[{j}]") for j in range(1, size))


def forgetting(matrix: Matrix) -> float:
    """mean_{j<T-1} (max_{j<=i<T-1} a[i][j] - a[T-1][j]); arXiv:1801.10112, section 3. 0 if there is one task.

    The maximum is over the times at which the task had been seen.
    """
    size = _size(matrix)
    best = [max(_at(matrix, i, j) for i in range(j, size - 1)) for j in range(size - 1)]
    return _mean(top - _at(matrix, size - 1, j) for j, top in enumerate(best))


def learning_accuracy(matrix: Matrix) -> float:
    """LA = mean_j a[j][j]; arXiv:1810.11910, section 5. OP = LA + BWT (T-1)/T."""
    return fmean(_at(matrix, j, j) for j in range(_size(matrix)))


def average_accuracy(matrix: Matrix) -> float:
    """mean_i mean_{j<=i} a[i][j]; average incremental accuracy in iCaRL (arXiv:1611.07725, section 4)."""
    return fmean(fmean(_at(matrix, i, j) for j in range(i + 1)) for i in range(_size(matrix)))


def _size(matrix: Matrix) -> int:
    size = len(matrix)
    if not size or any(len(row) != size for row in matrix):
        raise ValueError(
            f"The matrix must be square and not empty, but its rows have {[*map(len, matrix)]} entries."
        )
    return size


def _same(size: int, scores: Scores, name: str) -> None:
    if len(scores) != size:
        raise ValueError(f"`{name}` must have a score for each of {size} tasks, but got {len(scores)}.")


def _at(matrix: Matrix, i: int, j: int) -> float:
    return _number(matrix[i][j], f"a[{i}][{j}]")


def _number(value: float | None, name: str) -> float:
    if value is None or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, but got {value}.")
    return value


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0
