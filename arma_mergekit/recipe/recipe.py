"""The recipe as a whole: mergekit's keys, and ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, PrivateAttr, ValidationError, model_validator

from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.recipe.document import read_yaml
from arma_mergekit.recipe.evals import TaskSpec
from arma_mergekit.recipe.settings import REST, Setting, check_setting
from arma_mergekit.recipe.strict import Strict, sentences
from arma_mergekit.recipe.tune import TuneConfig

__all__ = ["ModelEntry", "Recipe"]

# 28 passages in the public domain: presidential addresses, the World Factbook, books (recipes/icd10/SOURCES.md)
BUILTIN = {"builtin:prose": Path(__file__).parents[1] / "evals" / "prose.jsonl"}
Alpha = Annotated[Any, PlainValidator(check_setting)]
Rest = Annotated[Any, PlainValidator(lambda value: check_setting(value, REST))]
DType = Annotated[
    Literal["bfloat16", "float16", "float32", "float64"],
    BeforeValidator(lambda name: name.removeprefix("torch.") if isinstance(name, str) else name),
]


class ModelParameters(Strict):
    """What can be set for one model."""

    alpha: Alpha = None


class Parameters(ModelParameters):
    """What can be set for all; ``alpha`` counts where a model has none of its own."""

    rest: Rest = "finetuned"


class ModelEntry(Strict):
    """One entry of ``models``: a path, hub id or base+adapter, and its parameters."""

    model: str = Field(min_length=1)
    parameters: ModelParameters = ModelParameters()


class Recipe(Strict):
    """A recipe for `merge_method: arma`, frozen. Keys that mergekit knows and we only pass on are ``Any``."""

    merge_method: str
    base_model: str = Field(min_length=1)
    models: tuple[ModelEntry, ...] = Field(default=(), min_length=1, max_length=64)
    parameters: Parameters = Parameters()
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer: Any = None
    tokenizer_source: Any = None
    chat_template: str | None = None
    slices: Any = None
    modules: Any = None
    evals: dict[str, tuple[TaskSpec, ...]] = Field(default_factory=dict)
    tune: TuneConfig = TuneConfig()

    _path: Path = PrivateAttr(default=Path())
    _raw: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe; RecipeError with everything that is wrong with it, one sentence a line."""
        path = Path(path)
        return cls.parse(read_yaml(path), path)

    @classmethod
    def parse(cls, content: Mapping[str, Any], path: Path) -> Recipe:
        """Check what was read from ``path``; RecipeError as in `load`."""
        method = content.get("merge_method")
        if isinstance(method, str) and method != "arma":
            hint = unknown("merge_method", method, ["arma"]).partition("Did you mean")
            near = f" Did you mean{hint[2].partition('?')[0]}?" if hint[1] else " Run it with mergekit-yaml."
            raise RecipeError(
                f"{path}: merge_method {method!r} is not `arma`, the only one handled here.{near}"
            )
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError("\n".join(sentences(error, cls, str(path)))) from error
        recipe._path, recipe._raw = path, copy.deepcopy(dict(content))
        return recipe

    @model_validator(mode="after")
    def _whole_models(self) -> Recipe:
        problems = [
            f" `{key}` is not supported by merge_method arma; name whole models under `models`."
            for key in ("slices", "modules")
            if getattr(self, key) is not None
        ]
        if self.tokenizer is not None and self.tokenizer_source is not None:
            problems.append(" has both `tokenizer` and `tokenizer_source`; mergekit takes one.")
        return _or_raise(self, problems + self._model_problems() + self._suite_problems())

    def _model_problems(self) -> list[str]:
        names = [entry.model for entry in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems = [f".models names {name} more than once; keep one entry." for name in twice]
        if not self.finetuned:
            problems.append(".models names only the base; add the fine-tuned model.")
        for i, entry in enumerate(self.models):
            if entry.model == self.base_model and entry.parameters.alpha is not None:
                problems.append(
                    f".models[{i}].parameters.alpha has no effect, since {entry.model} is the base; drop it."
                )
        return problems

    def _suite_problems(self) -> list[str]:
        """Suites of the objective that are nearly one of `evals`; others may be lm-eval's."""
        problems = []
        for suite in self.tune.objective.suites:
            hint = unknown("suite", suite, self.evals)
            if suite not in self.evals and "Did you mean" in hint:
                problems.append(f".tune.objective: {hint}")
        return problems + [
            f".evals.{suite} has no tasks; give at least one." for suite, t in self.evals.items() if not t
        ]

    @property
    def path(self) -> Path:
        """The file it was read from."""
        return self._path

    @property
    def raw(self) -> dict[str, Any]:
        """What the YAML says, as plain data; a copy."""
        return copy.deepcopy(dict(self._raw))

    @property
    def finetuned(self) -> tuple[ModelEntry, ...]:
        """The models that are not the base; one alpha each."""
        return tuple(entry for entry in self.models if entry.model != self.base_model)

    def alpha_settings(self, entry: ModelEntry) -> tuple[Setting, ...]:
        """Settings of a model's alpha, by precedence; the first that has a value for a tensor counts."""
        return tuple(s for s in (entry.parameters.alpha, self.parameters.alpha) if s is not None)

    def data_path(self, path: str | Path) -> Path:
        """Where a file is that the recipe names: relative to the recipe, or part of this package (`builtin:prose`)."""
        if not str(path).startswith("builtin:"):
            return self.path.parent / path
        if str(path) not in BUILTIN:
            raise RecipeError(f"{self.path}: {unknown('data', str(path), BUILTIN)}")
        return BUILTIN[str(path)]

    def with_tune(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with these keys of `tune` replaced; RecipeError if they do not make sense."""
        content = self.raw
        content["tune"] = {**(content.get("tune") or {}), **changes}
        return Recipe.parse(content, self.path)


def _or_raise(recipe: Recipe, problems: list[str]) -> Recipe:
    if problems:
        raise ValueError("\n".join(problems))
    return recipe
