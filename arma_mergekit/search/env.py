"""A search as a reinforcement-learning environment, for agents of other libraries (docs/examples/sb3_agent.py).

    symbol   meaning                                                               shape
    a        action, in [-1, 1]; 0 is the start, -1 and 1 are the bounds            (K,)
    v        values: v = start + a (high - start) for a > 0, start + a (start - low) below    (K,)
    o        observation: the features of all values, then the share of the episode left      (K F + 1,)

One step is one evaluation and its reward is the trial's, J; a failed trial is rewarded like the worst one so far (0
before any). Nothing is carried from step to step, so an episode has one step unless ``horizon`` says otherwise.
Unlike a searcher, an environment waits for its answer: `evaluate` is called by `step`. Needs gymnasium, which is why
no other module here imports this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from arma_mergekit.search.base import Problem, Query, Trial

__all__ = ["MergeEnv"]

LARGEST_FEATURE = 10.0  # standard deviations; agents expect finite limits

Floats = npt.NDArray[np.float32]


class MergeEnv(gymnasium.Env[Floats, Floats]):
    """``evaluate`` scores a query; ``horizon`` steps make an episode."""

    def __init__(self, problem: Problem, evaluate: Callable[[Query], Trial], horizon: int = 1) -> None:
        self._problem, self._evaluate, self._horizon = problem, evaluate, horizon
        self._start = np.array(problem.clip(problem.start))
        self._features = np.clip(problem.features.ravel(), -LARGEST_FEATURE, LARGEST_FEATURE)
        self._steps = 0
        self._worst: float | None = None
        size = self._features.size + 1
        self.observation_space = gymnasium.spaces.Box(-LARGEST_FEATURE, LARGEST_FEATURE, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (len(problem.names),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        """Begin an episode; nothing here is random."""
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Score the values of an action (K,); the trial is in the info."""
        trial = self._evaluate(Query(self.values(action)))
        self._steps += 1
        ended = self._steps >= self._horizon
        return self._observation(), self._reward(trial), ended, False, {"trial": trial}

    def values(self, action: npt.ArrayLike) -> tuple[float, ...]:
        """Values (K,) of an action (K,), which is clipped to its box."""
        a = np.clip(np.asarray(action, dtype=np.float64), -1, 1)
        room = np.where(a > 0, self._problem.high - self._start, self._start - self._problem.low)
        return self._problem.clip(self._start + a * room)

    def _observation(self) -> Floats:
        left = 1 - self._steps / self._horizon
        return np.append(self._features, left).astype(np.float32)

    def _reward(self, trial: Trial) -> float:
        if trial.reward is None:
            return self._worst or 0.0
        self._worst = trial.reward if self._worst is None else min(self._worst, trial.reward)
        return trial.reward
