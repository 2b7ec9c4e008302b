"""The model side of a run: sets alphas in a live model and scores tasks with it.

It knows models, suites and items; no objective, space, searcher or journal. One worker holds one model: the engine in
this process has one, a cluster has as many as it has devices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arma_mergekit import __version__
from arma_mergekit.checkpoint import Checkpoint, open_model
from arma_mergekit.decode import Footprint, footprints
from arma_mergekit.errors import CheckpointError, DataError, RecipeError
from arma_mergekit.evals import REGULARIZER, make_suites
from arma_mergekit.evals.base import Measured, Part, Split, Task
from arma_mergekit.load import load_live, load_tokenizer
from arma_mergekit.models import Named, open_named
from arma_mergekit.recipe import Recipe
from arma_mergekit.search.base import GRADIENT_COST

if TYPE_CHECKING:
    from arma_mergekit.cache import EvalCache

__all__ = ["Description", "Done", "Job", "TaskInfo", "Worker"]

Array = npt.NDArray[np.float64]

HEAD_TOKENS = 1024  # of text that attention is compared on


@dataclass(frozen=True)
class Job:
    """Score ``tasks`` with the model of these ``alphas`` (N,), in the order of `Description.tensors`.

    On the search items, all or a ``part`` (with ``complement``: all but that part), or on those ``held`` back.
    ``gradient`` asks for dL/dalpha of every task too. ``heads``: how far each head's attention is from the base's, too.
    ``model``: instead of any alphas, the model that the recipe compares with under this name.
    """

    alphas: tuple[float, ...] = ()
    tasks: tuple[str, ...] = ()
    part: Part | None = None
    complement: bool = False
    held: bool = False
    gradient: bool = False
    heads: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Done:
    """What came of a job: scores by task, dL/dalpha (N,) by task if asked, forward tokens (backward counts double).

    ``error`` is the sentence of a candidate that could not be scored; the rest is then empty. ``heads``: divergence by
    layer (depth) and head, empty if not asked, or if there is no text or no softmax attention. ``footprints``: what
    answering costs a ``model`` ("own") and, measured in turns with it, any merge ("merge").
    """

    measured: Mapping[str, Measured]
    slopes: Mapping[str, Array]
    tokens: int
    seconds: float
    error: str | None = None
    heads: Mapping[int, list[float]] = field(default_factory=dict)
    footprints: Mapping[str, Footprint] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskInfo:
    """What the other side may know of a task."""

    ids: tuple[str, ...]
    unit: str
    weight: float
    watch: bool
    differentiable: bool
    content: str | None


@dataclass(frozen=True)
class Description:
    """What the other side may know of the models: tensor names in the order of the alphas, and numbers about them.

    ``aliases``: further stored names of one of them; ``changes`` (N,): ||W_ft - W_base|| / ||W_base||; ``sizes`` (N,):
    elements; ``config``: config.json of the base; ``prepared``: forward tokens spent before anything was scored.
    """

    tensors: tuple[str, ...]
    aliases: Mapping[str, str]
    changes: Array
    sizes: tuple[int, ...]
    config: Mapping[str, Any]
    tasks: Mapping[str, TaskInfo]
    prepared: int


class Worker:
    """A live model and the tasks of some suites. RunError, CheckpointError, DataError for what cannot be used."""

    def __init__(
        self,
        recipe: Recipe,
        suites: Sequence[str],
        cache: EvalCache | None = None,
        device: str | None = None,
    ) -> None:
        self.compared = {name: open_named(ref) for name, ref in recipe.tune.compare.items()}
        tokenizer = load_tokenizer(recipe)
        for name, named in self.compared.items():
            check_compared(name, named, open_model(recipe.base_model), tokenizer)
        self.loaded = load_live(recipe, device)
        self.live = self.loaded.live
        limits = {"max_positions": self.loaded.max_positions, "vocabulary": self.loaded.vocabulary}
        made = make_suites(recipe, suites, tokenizer, **limits)
        self.tasks: dict[str, Task] = {f"{suite}/{t.name}": t for suite, tasks in made.items() for t in tasks}
        self.splits = {key: Split(task.ids, recipe.tune.holdout) for key, task in self.tasks.items()}
        check_tasks(self.tasks, self.compared)
        self.cache = cache
        if cache is not None:
            cache.describe(arithmetic())
        self.live.set_all(0.0)
        self._prepared = sum(task.prepare(self.live) for task in self.tasks.values())

    def describe(self) -> Description:
        """Facts for the other side."""
        config: Any = self.live.model.config
        infos = {
            key: TaskInfo(t.ids, t.unit, t.weight, t.watch, t.differentiable, t.content)
            for key, t in self.tasks.items()
        }
        return Description(
            self.loaded.tensors, self.loaded.aliases, self.live.delta_norms(), tuple(self.live.sizes()),
            dict(config.to_dict()), infos, self._prepared,
        )  # fmt: skip

    def do(self, job: Job) -> Done:
        """Score; a loss that is not finite makes a failed job, not an exception."""
        started = time.monotonic()
        if job.model is not None:
            return self._compare(job, self.compared[job.model], started)
        try:
            found = {key: self._score(key, job) for key in job.tasks}
        except DataError as error:
            return Done({}, {}, 0, time.monotonic() - started, str(error))
        measured = {key: m for key, (m, _) in found.items()}
        slopes = {key: s for key, (_, s) in found.items() if s is not None}
        tokens = round((GRADIENT_COST if job.gradient else 1) * sum(m.tokens for m in measured.values()))
        heads, more = self._heads(job.alphas) if job.heads else ({}, 0)
        return Done(measured, slopes, tokens + more, time.monotonic() - started, heads=heads)

    def _compare(self, job: Job, named: Named, started: float) -> Done:
        """Score another model on held-back items, and let it go."""
        try:
            model = named.load(str(self.live.device))
            measured = {key: self.tasks[key].measure(model, self.splits[key].held) for key in job.tasks}
        except (CheckpointError, DataError) as error:
            return Done({}, {}, 0, time.monotonic() - started, f"{job.model}: {error}")
        tokens = sum(m.tokens for m in measured.values())
        found = footprints({"own": model, "merge": self.live.model})
        return Done(measured, {}, tokens, time.monotonic() - started, footprints=found)

    def _heads(self, alphas: Sequence[float]) -> tuple[Mapping[int, list[float]], int]:
        """Jensen-Shannon divergence from the base's attention by depth and head, and forward tokens."""
        import torch

        from arma_mergekit.attention import divergence_by_head, record

        texts = self._texts()
        batches = [{"input_ids": torch.tensor([text], device=self.live.device)} for text in texts]
        self.live.set_all(0.0)
        try:
            teacher = [record(self.live.model, inputs) for inputs in batches]
            self.live.set(alphas)
            found = divergence_by_head(self.live.model, teacher, batches) if batches else None
        except CheckpointError:  # a model without softmax attention has no heads to show
            found = None
        if found is None:
            return {}, 0
        rows = ([float(v) for v in row[~np.isnan(row)]] for row in found.values)
        return dict(zip(found.layers, rows, strict=True)), 2 * sum(map(len, texts))

    def _texts(self) -> list[tuple[int, ...]]:
        """Whole texts of the suites as tokens, within HEAD_TOKENS."""
        texts, left = list[tuple[int, ...]](), HEAD_TOKENS
        for task in self.tasks.values():
            for item in getattr(task, "items", ()):
                row = item.rows[0]
                if row.start == 1 and 1 < len(row.tokens) <= left:
                    texts.append(row.tokens)
                    left -= len(row.tokens)
        return texts

    def _score(self, key: str, job: Job) -> tuple[Measured, Array | None]:
        split = self.splits[key]
        items = split.held if job.held else split.part(job.part, job.complement)
        if self.cache is None:
            return self._measure(key, job, items)
        ids = [split.ids[i] for i in items]
        return self.cache.once(self.tasks[key], job, ids, lambda: self._measure(key, job, items))

    def _measure(self, key: str, job: Job, items: Sequence[int]) -> tuple[Measured, Array | None]:
        self.live.set(job.alphas)
        task = self.tasks[key]
        if not job.gradient:
            return task.measure(self.live, items), None
        with self.live.differentiable() as gradient:
            return task.measure(self.live, items, backward=lambda loss: loss.backward()), gradient()


def check_compared(name: str, named: Named, base: Checkpoint, tokenizer: Any) -> None:
    """CheckpointError unless the model reads the tokens that the suites are made of."""
    rows = [c.config.get("vocab_size") for c in (named.checkpoint, base)]
    own = named.checkpoint.path / "tokenizer.json"
    if rows[0] != rows[1] or (own.is_file() and named.tokenizer().get_vocab() != tokenizer.get_vocab()):
        raise CheckpointError(
            f"compare: {name} ({named.ref}) has another vocabulary than the base, so its scores would be of other "
            "tokens; only models of one tokenizer can be compared."
        )


def check_tasks(tasks: Mapping[str, Task], compared: Mapping[str, Named]) -> None:
    """RecipeError for a task that makes no sense for a model it would be asked of."""
    from arma_mergekit.evals.divergence import DivergenceTask

    counted = {key: task for key, task in tasks.items() if not key.startswith(f"{REGULARIZER}/")}
    attentive = [key for key, task in counted.items() if isinstance(task, DivergenceTask)]
    blind = [name for name, named in compared.items() if named.kind == "siamese"]
    if attentive and blind:
        raise RecipeError(
            f"Task {attentive[0]} compares attention, of which the siamese model {blind[0]} has two; leave the task or "
            "the model out."
        )


def arithmetic() -> dict[str, Any]:
    """Versions and settings that decide the last bits of a score."""
    import torch
    import transformers

    from arma_mergekit.evals.rows import BATCH_TOKENS

    return {
        "arma_mergekit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "batch tokens": BATCH_TOKENS,
    }
