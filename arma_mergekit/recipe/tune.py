"""The `tune` block: space, objective, searchers and budget of a run.

It knows words and numbers. Which values a word stands for is decided by arma_mergekit/space.py and search/.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.objective import Bound
from arma_mergekit.recipe.settings import REST, check_setting
from arma_mergekit.recipe.strict import Strict, listed
from arma_mergekit.search import SEARCHERS
from arma_mergekit.space import WORDS

__all__ = ["Objective", "Regularizer", "TuneConfig"]

NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,39}", re.ASCII)
TAKEN = ("base", "fine-tuned", "finetuned", "merged", "safest", "knee")
WAYS = ("balance", "maximize", "sum", "pareto")
GROUP = re.compile(r"(global|kind|layer|tensor|block:[1-9]\d*)(:qkvo)?|kernel|everything", re.ASCII)
REST_WORDS = (*(word for word in WORDS if word != "everything"), *REST, "a number")


def _group(word: Any) -> Any:
    if not isinstance(word, str) or not GROUP.fullmatch(word):
        raise ValueError(f": {unknown('search space', str(word), WORDS)}")
    return word


def _rest(word: Any) -> Any:
    if word == "everything":
        raise ValueError(" must not be `everything`, which covers attention too; give it as `groups`.")
    if isinstance(word, str) and word not in REST and not GROUP.fullmatch(word):
        raise ValueError(f": {unknown('search space', word, REST_WORDS)}")
    if isinstance(word, bool) or not isinstance(word, str | int | float):
        raise ValueError(f" must be a search space, base, finetuned or a number, but got {word!r}.")
    return word if isinstance(word, str) else check_setting(word)


def _bound(value: Any) -> Bound:
    return value if isinstance(value, Bound) else Bound.parse(value)


def _limit(value: Any) -> Any:
    """A number freezes: [number, number]."""
    return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f" has the same entry twice: {', '.join(map(str, values))}.")
    return values


def _searchers(names: Any) -> Any:
    for name in listed(names):
        if not isinstance(name, str) or name not in SEARCHERS:
            raise ValueError(f": {unknown('searcher', str(name), SEARCHERS)}")
    return listed(names)


Keep = Annotated[Bound, BeforeValidator(_bound)]
Limit = Annotated[tuple[float, float], BeforeValidator(_limit)]
Suites = Annotated[tuple[str, ...], BeforeValidator(listed), AfterValidator(_distinct), Field(min_length=1)]


class SpaceConfig(Strict):
    """What is searched; None is the searcher's own default.

    ``limits``: bounds of single groups by name or pattern, a number freezes; ``tie``: groups that share a value.
    """

    groups: Annotated[str, BeforeValidator(_group)] | None = None
    rest: Annotated[str | float, BeforeValidator(_rest)] | None = None
    bounds: tuple[float, float] | None = None
    limits: dict[str, Limit] | None = None
    tie: tuple[tuple[str, ...], ...] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> SpaceConfig:
        if self.groups == "everything" and self.rest is not None:
            raise ValueError(
                "`groups: everything` is one value for attention and rest together; drop `rest`."
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"`bounds` must be [low, high] with low < high, but got {list(self.bounds)}.")
        for name, (low, high) in (self.limits or {}).items():
            if not low <= high:
                raise ValueError(f"`limits` of {name} must be [low, high], but got {[low, high]}.")
        if any(len(names) == 0 for names in self.tie or ()):
            raise ValueError("`tie` must hold lists of group names, as in [[attention.q, attention.k]].")
        return self


class Objective(Strict):
    """What makes a point better than another: one of four ways; by default, balance of all suites."""

    balance: Suites | None = None
    maximize: str | None = None
    keep: dict[str, Keep] = Field(default_factory=dict)
    sum: dict[str, float] | None = None
    pareto: Suites | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Objective:
        given = [way for way in WAYS if getattr(self, way) is not None]
        if len(given) > 1:
            raise ValueError(f"Give one of {', '.join(WAYS)}, but got {' and '.join(given)}.")
        if self.pareto is not None and len(self.pareto) < 2:
            raise ValueError("`pareto` needs two suites or more: one alone has no front.")
        if self.keep and self.maximize is None:
            raise ValueError("`keep` needs `maximize`: which suite should rise while the others are kept?")
        if self.sum is not None and not self.sum:
            raise ValueError("`sum` needs at least one suite with its weight.")
        return self

    @property
    def suites(self) -> tuple[str, ...]:
        """Suites it names, in order; none if it takes all that are chosen."""
        single = (self.maximize,) if self.maximize is not None else ()
        return (*(self.balance or ()), *single, *self.keep, *(self.sum or ()), *(self.pareto or ()))

    def options(self, chosen: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of scoring.Scale; RecipeError if it needs a suite that is not chosen."""
        missing = [suite for suite in self.suites if suite not in chosen]
        if missing:
            raise RecipeError(
                f"The objective needs suite {missing[0]}, the run has {', '.join(chosen)}; add it to --eval."
            )
        if self.maximize is not None:
            return {"maximize": self.maximize, "keep": dict(self.keep)}
        if self.sum is not None:
            return {"weights": dict(self.sum)}
        only = self.balance or self.pareto
        return {} if only is None else {"only": only}


class Regularizer(Strict):
    """Attention divergence from the base (``teacher``) on ``text``, times ``weight``, off every reward.

    In units of the divergence between base and fine-tuned. ``attention``: js, kl, mse, cosine or emd.
    """

    attention: Literal["js", "kl", "mse", "cosine", "emd"] = "js"
    text: Path
    field: str = "text"
    max_tokens: PositiveInt | None = 2048
    weight: PositiveFloat = 0.1
    teacher: Literal["base", "finetuned"] = "base"

    @property
    def task(self) -> dict[str, Any]:
        """The task that measures it, as a suite would name it."""
        options = {
            "data": self.text,
            "metric": self.attention,
            **self.model_dump(include={"field", "max_tokens", "teacher"}),
        }
        return {"divergence": options}


def _compared(models: dict[str, str]) -> dict[str, str]:
    for name in models:
        if not NAME.fullmatch(name):
            raise ValueError(f": a name is up to 40 letters, digits, `.`, `_` and `-`, but got {name!r}.")
        if name in (*TAKEN, *SEARCHERS):
            raise ValueError(f": {name} is what the run calls one of its own candidates; take another name.")
    return models


class TuneConfig(Strict):
    """One run. ``trials`` is the budget of each arm, an arm being a searcher with a seed.

    ``compare``: other models by name (references as under `models`), scored once on the items held back.
    ``keep_weak``: steer by tasks too that do not separate base from fine-tuned. ``rung`` = n: candidates are scored on
    a fixed n-th of the search items first, 1: on all at once. ``allow_test_sets``: steer by well-known test sets too.
    """

    space: SpaceConfig = SpaceConfig()
    objective: Objective = Objective()
    regularizer: Regularizer | None = None
    searchers: Annotated[
        tuple[str, ...], BeforeValidator(_searchers), AfterValidator(_distinct), Field(min_length=1)
    ] = ("bayes", "rl", "gradient")
    trials: PositiveInt = 40
    seeds: Annotated[
        tuple[NonNegativeInt, ...], BeforeValidator(listed), AfterValidator(_distinct), Field(min_length=1)
    ] = (0,)
    holdout: float = Field(default=0.5, gt=0, lt=1)
    keep_weak: bool = False
    rung: PositiveInt = 4
    allow_test_sets: bool = False
    compare: Annotated[dict[str, Annotated[str, Field(min_length=1)]], AfterValidator(_compared)] = Field(
        default_factory=dict
    )
