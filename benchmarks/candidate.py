"""What a candidate costs on the real case: setting it in memory, scoring it, a gradient; and what a run adds to that.

    OMP_WAIT_POLICY=passive python benchmarks/candidate.py

The run is 20 evaluations of TPE in the sizes of benchmarks/searchers.py, its models being loaded; about four minutes on
two cores.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import CASES, SUITES, table

from arma_mergekit.engines.local import LocalEngine
from arma_mergekit.run import open_run
from arma_mergekit.worker import Job, Worker


class Clock:
    """Seconds a model has spent in forward passes: its own, or its body's and its head's apart."""

    def __init__(self, model: Any) -> None:
        self.seconds, self._depth, self._since = 0.0, 0, 0.0
        for module in {model, getattr(model, model.base_model_prefix), model.get_output_embeddings()}:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._since = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._since


class Stopwatch:
    """Seconds spent in a method of an object."""

    def __init__(self, owner: Any, method: str) -> None:
        self.seconds, self._call = 0.0, getattr(owner, method)
        setattr(owner, method, self)

    def __call__(self, *args: Any) -> Any:
        """Call it and count."""
        started = time.perf_counter()
        try:
            return self._call(*args)
        finally:
            self.seconds += time.perf_counter() - started


def seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median wall time."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def candidate() -> str:
    """Setting, scoring and gradient of a candidate all of whose alphas are new."""
    worker = Worker(CASES["icd10"].load(0), SUITES)
    about = worker.describe()
    tasks = tuple(key for key, task in about.tasks.items() if not task.watch)
    alphas = iter(np.random.default_rng(0).uniform(0.2, 0.9, (100, len(about.tensors))))

    def score(gradient: bool = False) -> int:
        return worker.do(Job(tuple(next(alphas)), tasks, gradient=gradient)).tokens

    tokens = score()
    setting = seconds(lambda: worker.live.set(next(alphas)))
    scoring, gradient = seconds(score, 3), seconds(lambda: score(gradient=True), 3)
    rows = {"setting every tensor": setting, "set and scored": scoring, "with gradient": gradient}
    head = [f"{tokens:,} forward tokens, {len(about.tensors)} alphas", "seconds", "of scoring"]
    return table(head, ([name, f"{t:.2f}", f"{t / scoring:.1%}"] for name, t in rows.items()))


def overhead(trials: int = 20) -> str:
    """Where the time of a whole run goes, the loading of models left out."""
    recipe = CASES["icd10"].load(0, small=True, searchers=["bayes"], trials=trials)
    worker = Worker(recipe, SUITES)
    forward = Clock(worker.live.model)
    scoring, maps = Stopwatch(worker, "_measure"), Stopwatch(worker, "_heads")
    setting = Stopwatch(worker.live, "set")
    with (
        tempfile.TemporaryDirectory() as out,
        open_run(
            recipe, SUITES, Path(out), lambda *_: None, make_engine=lambda *_: LocalEngine(worker)
        ) as tuner,
    ):
        started = time.perf_counter()
        tuner.run()
        whole = time.perf_counter() - started
    inside = forward.seconds  # of scoring; the maps go through the layers one by one, past the clock
    rows = {
        "forward passes": inside,
        "losses over the vocabulary": scoring.seconds - setting.seconds - inside,
        "attention maps of the report": maps.seconds,
        "the harness: setting tensors, searcher, objective, journal": whole
        - scoring.seconds
        - maps.seconds
        + setting.seconds,
    }
    head = [f"a run of {trials} evaluations", "seconds", "share"]
    return table(head, ([name, f"{t:.1f}", f"{t / whole:.1%}"] for name, t in rows.items()))


def main() -> None:
    """Print the table."""
    print(candidate())
    print(f"\n{overhead()}")


if __name__ == "__main__":
    main()
