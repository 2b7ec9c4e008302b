"""The plan of a run: tasks in order, a model, how to train, which methods to compare. It knows YAML; no models.

    model: models/base
    adapter: {rank: 8, alpha: 32, targets: [q_proj, v_proj]}      # without it, all parameters train
    tasks:
      - {name: topics, train: topics/train.jsonl, test: topics/test.jsonl}
      - {folder: cl_benchmark/SC/amazon}
    train: {steps: 200, batch: 8, lr: 3.0e-4, max_length: 256}
    methods: [sequential, replay, aimmerging, {name: attention only, aimmerging: {scope: attention}}]
    seeds: [0, 1]

Paths are relative to the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from arma_mergekit.continual.memory import SHARE
from arma_mergekit.continual.settings import METHODS, Settings
from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.recipe.document import read_yaml
from arma_mergekit.recipe.strict import Strict, sentences

__all__ = ["Adapter", "Method", "Plan", "TaskSpec", "Training", "slug"]

Count = Annotated[int, Field(ge=1)]
ALONE = "alone"  # the name of sequences of one task
Rate = Annotated[float, Field(gt=0)]


def slug(name: str) -> str:
    """A name as it stands in a directory's."""
    return name.replace(" ", "-")


class TaskSpec(Strict):
    """A task: two JSONL files, a folder with train.json, test.json and labels.json, or a dataset (data.py)."""

    name: str = Field(min_length=1, pattern=r"^[^/\\]+$")
    train: str | None = None
    test: str | None = None
    folder: str | None = None
    dataset: str | None = None
    prompt: str | None = None
    answer: str = "label"
    splits: tuple[str, str] = ("train", "test")
    instruction: str | None = None
    limit_train: Count | None = None
    limit_test: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "name" not in given and isinstance(given.get("folder"), str):
            return {**given, "name": Path(given["folder"]).name}
        return given

    @model_validator(mode="after")
    def _whole(self) -> TaskSpec:
        sources = [self.train, self.folder, self.dataset]
        if sources.count(None) != 2 or (self.train is None) != (self.test is None):
            raise ValueError(" needs either train and test, or folder, or dataset.")
        if (self.dataset is None) != (self.prompt is None):
            raise ValueError(" needs dataset and prompt together, as in prompt: '{text} Topic:'.")
        return self


class Adapter(Strict):
    """A LoRA adapter (arXiv:2106.09685); defaults as in arXiv:2509.17348. ``targets``: names of modules."""

    rank: Count = 8
    alpha: Rate = 32.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)


class Training(Strict):
    """How each task is trained. ``steps``: optimiser steps of a task, replay included if ``count_replay``."""

    steps: Count
    batch: Count = 8
    accumulation: Count = 1
    lr: Rate = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    max_length: int = Field(default=256, ge=8)
    max_grad_norm: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    count_replay: bool = True
    save_steps: Count = 50


class Method(Strict):
    """A method by its name in reports, its kind and settings."""

    name: str = Field(min_length=1, pattern=r"^[^/\\]+$")
    kind: str
    settings: Settings

    @model_validator(mode="before")
    @classmethod
    def _parsed(cls, given: Any) -> Any:
        found = {given: {}} if isinstance(given, str) else given
        if not isinstance(found, Mapping) or "settings" in found:
            return found
        kinds = [key for key in found if key != "name"]
        if len(kinds) != 1:
            raise ValueError(f" needs exactly one of {', '.join(METHODS)}.")
        if kinds[0] not in METHODS:
            raise ValueError(f": {unknown('method', kinds[0], METHODS)}")
        settings = METHODS[kinds[0]]
        try:
            parsed = settings.model_validate(found[kinds[0]] or {})
        except ValidationError as error:
            raise ValueError("\n".join(f": {s}" for s in sentences(error, settings, kinds[0]))) from error
        return {"name": found.get("name", kinds[0]), "kind": kinds[0], "settings": parsed}


class Plan(Strict):
    """A whole plan, frozen. ``orders``: each a list of all task names; ``evaluate``: all tasks, or those seen."""

    model: str = Field(min_length=1)
    tasks: tuple[TaskSpec, ...] = Field(min_length=2)
    train: Training
    adapter: Adapter | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    methods: tuple[Method, ...] = Field(
        default=("sequential", "replay", "aimmerging"), min_length=1, validate_default=True
    )
    memory_share: float = Field(default=SHARE, ge=0, le=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    orders: tuple[tuple[str, ...], ...] = ()
    evaluate: Literal["all", "seen"] = "all"
    alone: bool = False
    save_model: bool = True

    _path: Path = PrivateAttr(default=Path())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan; RecipeError with everything that is wrong with it, one sentence a line."""
        return cls.parse(read_yaml(path), path)

    @classmethod
    def parse(cls, content: Mapping[str, Any], path: Path) -> Plan:
        """Check what was read from ``path``."""
        try:
            plan = cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError("\n".join(sentences(error, cls, str(path)))) from error
        plan._path = path
        return plan

    @field_validator("methods")
    @classmethod
    def _not_reserved(cls, found: tuple[Method, ...]) -> tuple[Method, ...]:
        if any(slug(method.name) == ALONE for method in found):
            raise ValueError(
                f" has a method named {ALONE!r}, which is that of `alone: true`; name it otherwise."
            )
        return found

    @field_validator("tasks", "methods", "seeds")
    @classmethod
    def _once(cls, found: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [entry if isinstance(entry, int) else slug(entry.name) for entry in found]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f" has {twice[0]!r} more than once; give each its own.")
        return found

    @model_validator(mode="after")
    def _orders_whole(self) -> Plan:
        names = sorted(task.name for task in self.tasks)
        for k, order in enumerate(self.orders):
            if sorted(order) != names:
                raise ValueError(f".orders[{k}] must name every task once: {', '.join(names)}.")
        return self

    @property
    def sequences(self) -> tuple[tuple[str, ...], ...]:
        """The orders, or the one in which tasks are given."""
        return self.orders or (tuple(task.name for task in self.tasks),)

    def place(self, path: str) -> Path:
        """Where a path of the plan leads."""
        return self._path.parent / path
