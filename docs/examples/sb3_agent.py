"""A stable-baselines3 agent as a searcher: PPO in the place of our own `rl`.

    pip install stable-baselines3
    python docs/examples/sb3_agent.py [--seeds 5]

It prints how much of the way from start to optimum PPO, our `rl` and `random` go on quadratics with a known optimum,
at equal budget. An agent drives its environment itself, where a searcher is asked: `Sb3Searcher` runs it in a thread
that stops in `step` until the answer is told. It passes `check_searcher`. What agents draw from the global random
generators of numpy and torch is kept apart, so a run can be resumed whatever else uses them.
"""

from __future__ import annotations

import argparse
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Queue
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3 import PPO

from arma_mergekit.search import Problem, Query, Trial, find_searcher
from arma_mergekit.search.conformance import best, quadratic, run
from arma_mergekit.search.env import MergeEnv

SIZE, BUDGET = 9, 60
STEPS = 6  # evaluations from one update to the next


def ppo(env: MergeEnv, seed: int) -> PPO:
    """A policy with no hidden layer: one-step episodes always observe the same, so every step moves far."""
    policy = {"net_arch": [], "log_std_init": -2.0}
    return PPO(
        "MlpPolicy", env, n_steps=STEPS, batch_size=STEPS, n_epochs=5, learning_rate=1e-3,
        policy_kwargs=policy, seed=seed, device="cpu",
    )  # fmt: skip


class Gone(Exception):  # noqa: N818
    """Nobody will answer: the searcher was dropped."""


class Sb3Searcher:
    """Any stable-baselines3 agent; ``make_agent`` builds it from the environment and a seed."""

    concurrent: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int, make_agent: Callable[[MergeEnv, int], Any] = ppo) -> None:
        self._questions: Queue[Query | None] = Queue()
        self._answers: Queue[Trial | None] = Queue()
        weakref.finalize(self, self._answers.put, None)  # ends the thread
        self._random = random_state()
        with self._own_random():
            agent = make_agent(MergeEnv(problem, ask_through(self._questions, self._answers)), seed)
            threading.Thread(target=learn, args=(agent, self._questions), daemon=True).start()
            self._query = self._questions.get()

    def ask(self) -> Query | None:
        """What the agent waits for; None if it has stopped."""
        return self._query

    def tell(self, trial: Trial) -> None:
        """Let the agent go on, to its next question."""
        with self._own_random():
            self._answers.put(trial)
            self._query = self._questions.get()

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """The agent runs, and the caller waits, with the agent's state of the global generators."""
        callers = random_state()
        set_random_state(self._random)
        yield
        self._random = random_state()
        set_random_state(callers)


def ask_through(questions: Queue[Query | None], answers: Queue[Trial | None]) -> Callable[[Query], Trial]:
    """What the environment calls for a score."""

    def evaluate(query: Query) -> Trial:
        questions.put(query)
        trial = answers.get()
        if trial is None:
            raise Gone
        return trial

    return evaluate


def learn(agent: Any, questions: Queue[Query | None]) -> None:
    """The thread: it goes on until the searcher is gone."""
    try:
        with suppress(Gone):
            agent.learn(total_timesteps=10**9)
    finally:
        questions.put(None)


def random_state() -> tuple[Any, torch.Tensor]:
    """Of numpy and torch."""
    return np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple[Any, torch.Tensor]) -> None:
    """To what `random_state` said."""
    np.random.set_state(state[0])
    torch.set_rng_state(state[1])


def found(make: Callable[[Problem, int], Any], seed: int) -> float:
    """Exact score, start 0 and optimum 1, of the best trial."""
    test = quadratic(SIZE, seed, budget=BUDGET)
    return test.exact(best(run(make(test.problem, seed), test.evaluate, BUDGET)).query.values)


def main(seeds: int) -> None:
    """Print one line per searcher."""
    searchers = {name: find_searcher(name) for name in ("random", "rl")} | {"PPO": Sb3Searcher}
    print(f"{SIZE} values, {BUDGET} evaluations, {seeds} seeds: median share of the way to the optimum\n")
    for name, make in searchers.items():
        print(f"{name:8}{np.median([found(make, seed) for seed in range(seeds)]):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    main(parser.parse_args().seeds)
