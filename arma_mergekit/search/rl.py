"""The reinforcement-learning controller: a one-step policy gradient over the groups (ours).

One episode is one evaluation: the state is what is known of each group before anything is scored, the action
is one value per group, the reward is the trial's. The caller scores on fixed data, so rewards differ by the
action only.

    symbol  meaning                                                          shape
    f       state: features of the groups, and a 1                           (K, F + 1)
    W, w    the small network that all groups share: h = tanh(f W)           (F + 1, H), (H,)
    b       bias of each group; starts where the squashed mean is the start  (K,)
    m       mean before squashing: m = b + h w; w starts at 0                 (K,)
    s       standard deviation, one for all groups; log s is learned         ()
    x       action before squashing: x = m + s e, e ~ N(0, 1)                 (K,)
    v       the values asked about: v = mid + half * tanh(c x)               (K,)
    c       scale that gives dv/dx = half at the start, wherever it lies     (K,)
    A       advantage of a trial: (J - baseline) / spread, both running      (B,)
    r       ratio of probabilities, new policy over the one that sampled     (B, K)

After every batch of B trials, several times over, a step up the clipped objective (PPO, arXiv 1707.06347)

    L = mean over the batch of sum_k min(r_k A, clip(r_k, 1 - c, 1 + c) A).

Each group is its own decision of one shared policy and so has its own ratio (independent PPO, arXiv
2011.09533): the joint ratio of 30 groups would be clipped before anything was learned. Where a ratio is not
clipped,

    dL/dm_k = mean(A r_k e_k) / s        dL/dlog s = mean over batch of sum_k A r_k (e_k^2 - 1),

both divided by the policy's Fisher information, 1 / s^2 and 2 K (natural gradient), so that a step has the
size of s whatever the reward's units. Actions come in pairs, +e and -e: half the noise. The floor under log
s is a floor under the entropy, K log s + const. A failed trial teaches nothing and is skipped. Answers may come
in any order: each is weighed by the policy that asked.

It suits 20 to 200 evaluations. The last question of a budget is the squashed mean itself, unless the caller
goes on. Constants were chosen on synthetic quadratics only: benchmarks/rl_synthetic.py.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import ClassVar

import numpy as np

from arma_mergekit.search.base import Array, Problem, Query, Spending, Trial

__all__ = ["PolicySearcher"]

HIDDEN = 16  # H
BATCH = 6  # B
EPOCHS = 3  # steps over each batch
RATE_BIAS, RATE_NETWORK, RATE_STD = 0.6, 0.8, 0.3  # natural-gradient step lengths, per batch
CLIP = 0.8  # c
STD_START, STD_FLOOR, STD_CEILING = 0.35, 0.05, 1.0  # s
MEMORY = 0.5  # how much of the running baseline and spread survives a batch
LARGEST_ADVANTAGE = 3.0
NEAREST_EDGE = 0.9  # half ranges: a start nearer to a bound is moved in, for tanh has no slope there


class PolicySearcher:
    """Samples from the policy, learns from what it is told; it never runs out of questions."""

    concurrent: ClassVar[bool] = True

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._mid, self._half = (problem.high + problem.low) / 2, (problem.high - problem.low) / 2
        self._free = self._half > 0
        self._spending = Spending(max(2.0, problem.budget))
        self._started = False
        self._mirror: Array | None = None  # noise of the last action, to be asked about with the other sign
        self._open: defaultdict[Query, deque[tuple[Array, Array]]] = defaultdict(deque)  # x, its log density
        self._batch: list[tuple[Array, Array, float]] = []  # the same with rewards
        self._moments: tuple[float, float] | None = None  # running mean and variance of rewards
        size = len(problem.names)
        self._f = np.column_stack([problem.features.reshape(size, -1), np.ones(size)])
        self._W = self._rng.standard_normal((self._f.shape[1], HIDDEN)) / np.sqrt(self._f.shape[1])
        self._w = np.zeros(HIDDEN)
        away = (problem.start - self._mid) / np.where(self._free, self._half, 1)
        away = np.clip(away, -NEAREST_EDGE, NEAREST_EDGE)
        self._c = 1 / (1 - away**2)
        self._b = np.arctanh(away) / self._c
        self._log_s = float(np.log(STD_START))

    def ask(self) -> Query:
        """The start; then actions of the policy; at the end of the budget, its mean."""
        x = self._mean()
        if self._started and not self._spending.at_last:
            x = x + np.exp(self._log_s) * self._noise()
        query = Query(self._squash(x) if self._started else self._problem.clip(self._problem.start))
        self._started = True
        self._spending.ask(query)
        self._open[query].append((x, self._log_density(x)))
        return query

    def tell(self, trial: Trial) -> None:
        """Keep it for the batch; learn when the batch is full and its last pair complete, or one more has come."""
        self._spending.tell(trial)
        action = self._open[trial.query].popleft()
        if trial.reward is None:
            return
        self._batch.append((*action, trial.reward))
        if len(self._batch) >= BATCH + (self._mirror is not None):
            x, sampled, rewards = (np.array(column) for column in zip(*self._batch, strict=True))
            self._batch = []
            self._learn(x, sampled, self._advantages(rewards))

    # ------------------------------------------------------------------ the policy

    def _mean(self) -> Array:
        """m (K,)."""
        mean: Array = self._b + np.tanh(self._f @ self._W) @ self._w
        return mean

    def _noise(self) -> Array:
        """e (K,), every second time the last one with the other sign."""
        if self._mirror is not None:
            noise, self._mirror = -self._mirror, None
        else:
            noise = self._mirror = self._rng.standard_normal(len(self._b))
        return noise

    def _squash(self, x: Array) -> tuple[float, ...]:
        return self._problem.clip(self._mid + self._half * np.tanh(self._c * x))

    # ------------------------------------------------------------------ learning

    def _advantages(self, rewards: Array) -> Array:
        """A (B,), after the running baseline and spread have seen these rewards."""
        now = float(rewards.mean()), float(rewards.var())
        before = self._moments or now
        baseline = MEMORY * before[0] + (1 - MEMORY) * now[0]
        variance = MEMORY * before[1] + (1 - MEMORY) * now[1]
        self._moments = baseline, variance
        standardised = (rewards - baseline) / (np.sqrt(variance) + 1e-12)
        limited: Array = np.clip(standardised, -LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
        return limited

    def _learn(self, x: Array, sampled: Array, advantage: Array) -> None:
        """The epochs over one batch: ``x`` and its log density when ``sampled`` (B, K), ``advantage`` (B,)."""
        for _ in range(EPOCHS):
            s, noise = np.exp(self._log_s), (x - self._mean()) / np.exp(self._log_s)
            r = np.exp(np.clip(self._log_density(x) - sampled, -20, 20))
            A = advantage[:, None]
            unclipped = np.where(A > 0, r < 1 + CLIP, r > 1 - CLIP)
            weight = A * r * unclipped * self._free
            d_mean = s * (weight * noise).mean(axis=0)  # s^2 dL/dm
            d_log_s = (weight * (noise**2 - 1)).mean(axis=0).sum() / (2 * max(1, self._free.sum()))
            self._step_mean(d_mean / EPOCHS)
            log_s = self._log_s + RATE_STD * d_log_s / EPOCHS
            self._log_s = float(np.clip(log_s, np.log(STD_FLOOR), np.log(STD_CEILING)))

    def _log_density(self, x: Array) -> Array:
        """log N(x; m, s) (B, K), up to a constant; the squashing cancels in ratios."""
        density: Array = -0.5 * ((x - self._mean()) / np.exp(self._log_s)) ** 2 - self._log_s
        return density

    def _step_mean(self, d_mean: Array) -> None:
        """Backward through m = b + tanh(f W) w; the network's own step never moves m further than asked."""
        h = np.tanh(self._f @ self._W)
        d_hidden = np.outer(d_mean, self._w) * (1 - h**2)
        self._W += RATE_NETWORK * self._f.T @ d_hidden / len(h)
        self._w += RATE_NETWORK * h.T @ d_mean / np.linalg.norm(h, 2) ** 2
        self._b += RATE_BIAS * d_mean
