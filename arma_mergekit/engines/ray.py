"""The engine on a Ray cluster: one live model per actor, as many actors as there are devices, none of them idle.

    submit -> queue -> an idle actor -> wait

It knows Ray and jobs; no searchers, scales or journals. An actor makes its worker when it is first asked something, so
whatever is wrong with a recipe, a model or data comes back as an answer, in the words of the local engine. One that
dies is replaced and its job queued again, first in line; a job that took `TRIES` actors with it has failed. A new actor
gets jobs when its model is loaded, and the others go on meanwhile.

Every node needs this package and Ray in the versions of the driver, and the files of the recipe under the paths they
have there. An actor works in the driver's directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arma_mergekit.errors import ArmaError, RunError, UsageError
from arma_mergekit.worker import Description, Done, Job, Worker

if TYPE_CHECKING:
    from arma_mergekit.cache import EvalCache
    from arma_mergekit.recipe import Recipe

__all__ = ["Host", "RayEngine", "Surroundings"]

TRIES = 3  # actors that a job may take with it, and deaths in a row per actor while models are loaded
MOST_ON_CPUS = 4  # actors unless asked for more: every one holds a copy of the models
INHERITED = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "OMP_WAIT_POLICY",
    "TQDM_DISABLE",
    "TRANSFORMERS_VERBOSITY",
)
SHORT = "memory is the usual cause: try fewer --workers."
# read when Ray is imported; what the user says counts
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # it is replaced; Ray would say so on stdout
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's ports ask nobody for a password


@dataclass(frozen=True)
class Surroundings:
    """What an actor takes over from the driver: directory, environment, and the cache of the driver's ``node``."""

    directory: str
    environment: Mapping[str, str]
    node: str
    cache: Path | None
    facts: Mapping[str, Any]

    @classmethod
    def here(cls, cache: EvalCache | None) -> Surroundings:
        """Those of this process."""
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        path, facts = (None, {}) if cache is None else (cache.path.absolute(), cache.facts)
        return cls(os.getcwd(), environment, node_id(), path, facts)

    def enter(self) -> None:
        """Make them those of this process; RunError if the directory is not there."""
        os.environ.update(self.environment)
        try:
            os.chdir(self.directory)
        except OSError as error:
            raise RunError(
                f"Cannot enter {self.directory} ({error.strerror}); the nodes of a cluster need storage that they "
                "share, under one path."
            ) from error

    def open_cache(self) -> EvalCache | None:
        """The evaluation cache on its own node, where SQLite's locks hold; None elsewhere."""
        from arma_mergekit.cache import EvalCache

        if self.cache is None or self.node != node_id():
            return None
        cache = EvalCache(self.cache)
        cache.describe(self.facts)
        return cache


class Host:
    """An actor: a worker that is made when it is first needed."""

    def __init__(self, recipe: Recipe, suites: Sequence[str], surroundings: Surroundings) -> None:
        self._recipe, self._suites, self._surroundings = recipe, suites, surroundings

    def describe(self) -> Description:
        """`Worker.describe`; whatever the worker cannot use, with the name of the node if it is another."""
        try:
            return self._worker.describe()
        except ArmaError as error:
            if self._surroundings.node == node_id():
                raise
            raise type(error)(f"{error} This is so on node {socket.gethostname()}.") from error

    def do(self, job: Job) -> Done:
        """`Worker.do`."""
        return self._worker.do(job)

    @cached_property
    def _worker(self) -> Worker:
        self._surroundings.enter()
        return Worker(self._recipe, self._suites, self._surroundings.open_cache())


@dataclass(frozen=True)
class Task:
    """What an actor is busy with: a job under its tag, or (None) loading its model."""

    actor: Any
    tag: str = ""
    job: Job | None = None


class RayEngine:
    """Scores jobs on a Ray cluster.

    ``workers``: actors, by default one per GPU, or per CPU up to `MOST_ON_CPUS`; ``address`` of the cluster, else
    $RAY_ADDRESS, else one of its own on this machine. UsageError for more workers than devices, RunError where there is
    no cluster, and the errors of `Worker`.
    """

    def __init__(
        self,
        recipe: Recipe,
        suites: Sequence[str],
        cache: EvalCache | None = None,
        workers: int | None = None,
        address: str | None = None,
    ) -> None:
        self._tasks: dict[Any, Task] = {}  # by what Ray calls its future
        self._idle: list[Any] = []
        self._queue: deque[tuple[str, Job]] = deque()
        self._deaths: Counter[str] = Counter()  # by tag; "" while loading, in a row
        self._about: Description | None = None
        self._ours = connect(address)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self.workers, needs = share_out(devices(), workers)
            self._new = partial(remote(needs).remote, recipe, tuple(suites), Surroundings.here(cache))
            for _ in range(self.workers):
                self._hire()
            self.describe()
            stack.pop_all()

    def describe(self) -> Description:
        """Facts as the first actor that is ready sees them."""
        while self._about is None:
            self._next()
        return self._about

    def submit(self, tag: str, job: Job) -> None:
        """Give a job to an idle actor, or queue it."""
        self._queue.append((tag, job))
        self._hand_out()

    def wait(self) -> tuple[str, Done]:
        """The next result, from whichever actor."""
        while (found := self._next()) is None:
            pass
        return found

    def close(self) -> None:
        """Stop the actors, and the cluster if it was started here."""
        import ray

        for actor in {task.actor for task in self._tasks.values()} | {*self._idle}:
            ray.kill(actor)
        self._tasks, self._idle = {}, []
        if self._ours:
            ray.shutdown()

    # ------------------------------------------------------------------ actors

    def _hire(self) -> None:
        actor = self._new()
        self._tasks[actor.describe.remote()] = Task(actor)

    def _hand_out(self) -> None:
        while self._idle and self._queue:
            actor, (tag, job) = self._idle.pop(), self._queue.popleft()
            self._tasks[actor.do.remote(job)] = Task(actor, tag, job)

    def _next(self) -> tuple[str, Done] | None:
        """Wait until an actor is ready, done or dead; the result, if that is what it is."""
        import ray

        (future,), _ = ray.wait([*self._tasks], num_returns=1)
        task = self._tasks.pop(future)
        try:
            found = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ArmaError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError:
            return self._replace(task)
        self._idle.append(task.actor)
        self._hand_out()
        if task.job is None:
            self._welcome(found)
            return None
        return task.tag, found

    def _welcome(self, about: Description) -> None:
        """A new actor is ready; RunError if it sees other models or data than the first."""
        del self._deaths[""]
        first = self._about = self._about or about
        same = (first.tensors, first.tasks) == (about.tensors, about.tasks)
        if not same or not np.allclose(first.changes, about.changes, rtol=1e-3):
            raise RunError(
                "Two nodes of the cluster see different models or data under the same paths; they need storage that "
                "they share."
            )

    def _replace(self, task: Task) -> tuple[str, Done] | None:
        """Hire another actor; its job comes first, unless it was the job that killed so many."""
        import ray

        ray.kill(task.actor)  # it may be out of reach rather than dead
        self._deaths[task.tag] += 1
        deaths = self._deaths[task.tag]
        if task.job is None and deaths == TRIES * self.workers:
            raise RunError(f"{deaths} workers died in a row while they loaded the models; {SHORT}")
        self._hire()
        if task.job is None:
            return None
        if deaths == TRIES:
            return task.tag, Done({}, {}, 0, 0.0, f"{deaths} workers died while they scored it; {SHORT}")
        self._queue.appendleft((task.tag, task.job))
        self._hand_out()
        return None


def connect(address: str | None) -> bool:
    """Join the cluster at this address, or start one; True if that is to be undone. RunError if there is none."""
    address = address or os.environ.get("RAY_ADDRESS")
    for name, value in {**SETTINGS, **({} if address else LOOPBACK)}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RunError(
            "--engine ray needs Ray; install it with: pip install 'arma-mergekit[ray]'."
        ) from error
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address and address != "auto":
            knock(address)
        ray.init(address or "local", **quiet, **({} if address else {"include_dashboard": False}))
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0].rstrip(".")
        raise RunError(f"No Ray cluster at {address} ({line}); start one with: ray start --head.") from error
    return True


def knock(address: str) -> None:
    """OSError or ValueError unless somebody listens there; Ray would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def devices() -> Mapping[str, float]:
    """What the cluster has."""
    import ray

    found: Mapping[str, float] = ray.cluster_resources()
    return found


def share_out(found: Mapping[str, float], workers: int | None) -> tuple[int, dict[str, float]]:
    """How many actors, and what each needs: a GPU, or its share of the CPUs (Ray sets OMP_NUM_THREADS to it)."""
    gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 1))
    count = workers or gpus or min(cpus, MOST_ON_CPUS)
    if count > (gpus or cpus):
        has = f"{gpus} GPUs" if gpus else f"{cpus} CPUs and no GPU"
        raise UsageError(f"--workers {count} needs as many devices, but the cluster has {has}.")
    return count, {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": cpus // count}


def remote(needs: Mapping[str, float]) -> Any:
    """The class of the actors."""
    import ray

    return ray.remote(Host).options(**needs, max_restarts=0)


def node_id() -> str:
    """Of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
