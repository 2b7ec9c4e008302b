"""The `tune` block: space, objective, searchers and budget of a run.

It knows words and numbers. Which values a word stands for is decided by arma_mergekit/space.py and search/.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.recipe.settings import REST, check_setting
from arma_mergekit.recipe.strict import Strict, listed
from arma_mergekit.search import SEARCHERS
from arma_mergekit.space import WORDS

__all__ = ["Objective", "TuneConfig"]

GROUP = re.compile(r"(global|kind|layer|tensor|block:[1-9]\d*)(:qkvo)?|kernel|everything", re.ASCII)
REST_WORDS = (*(word for word in WORDS if word != "everything"), *REST, "a number")
PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


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


def _share(value: Any) -> float:
    """`95%` or 0.95 as 0.95."""
    percent = PERCENT.fullmatch(value) if isinstance(value, str) else None
    share = float(percent[1]) / 100 if percent else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 2:
        raise ValueError(f" must be a share such as 95% or 0.95, but got {value!r}.")
    return float(share)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f" has the same entry twice: {', '.join(map(str, values))}.")
    return values


def _searchers(names: Any) -> Any:
    for name in listed(names):
        if not isinstance(name, str) or name not in SEARCHERS:
            raise ValueError(f": {unknown('searcher', str(name), SEARCHERS)}")
    return listed(names)


def _planned(value: Any, instead: str) -> None:
    if value is not None:
        raise ValueError(f" is not available yet; {instead}.")


Share = Annotated[float, BeforeValidator(_share)]
Suites = Annotated[tuple[str, ...], BeforeValidator(listed), AfterValidator(_distinct), Field(min_length=1)]
NoPareto = Annotated[None, BeforeValidator(lambda v: _planned(v, "use balance, maximize with keep, or sum"))]
NoRegularizer = Annotated[None, BeforeValidator(lambda v: _planned(v, "leave it out"))]


class SpaceConfig(Strict):
    """What is searched; None is the searcher's own default."""

    groups: Annotated[str, BeforeValidator(_group)] | None = None
    rest: Annotated[str | float, BeforeValidator(_rest)] | None = None
    bounds: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> SpaceConfig:
        if self.groups == "everything" and self.rest is not None:
            raise ValueError(
                "`groups: everything` is one value for attention and rest together; drop `rest`."
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"`bounds` must be [low, high] with low < high, but got {list(self.bounds)}.")
        return self


class Objective(Strict):
    """What makes a point better than another: one of three ways; by default, balance of all suites."""

    balance: Suites | None = None
    maximize: str | None = None
    keep: dict[str, Share] = Field(default_factory=dict)
    sum: dict[str, float] | None = None
    pareto: NoPareto = None

    @model_validator(mode="after")
    def _one_way(self) -> Objective:
        given = [way for way in ("balance", "maximize", "sum") if getattr(self, way) is not None]
        if len(given) > 1:
            raise ValueError(f"Give one of balance, maximize and sum, but got {' and '.join(given)}.")
        if self.keep and self.maximize is None:
            raise ValueError("`keep` needs `maximize`: which suite should rise while the others are kept?")
        if self.sum is not None and not self.sum:
            raise ValueError("`sum` needs at least one suite with its weight.")
        return self

    @property
    def suites(self) -> tuple[str, ...]:
        """Suites it names, in order; none if it takes all that are chosen."""
        single = (self.maximize,) if self.maximize is not None else ()
        return (*(self.balance or ()), *single, *self.keep, *(self.sum or ()))

    def options(self, chosen: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of objective.Objective; RecipeError if it needs a suite that is not chosen."""
        missing = [suite for suite in self.suites if suite not in chosen]
        if missing:
            raise RecipeError(
                f"The objective needs suite {missing[0]}, the run has {', '.join(chosen)}; add it to --eval."
            )
        if self.maximize is not None:
            return {"maximize": self.maximize, "keep": dict(self.keep)}
        if self.sum is not None:
            return {"weights": dict(self.sum)}
        return {} if self.balance is None else {"only": self.balance}


class TuneConfig(Strict):
    """One run. ``trials`` is the budget of each arm, an arm being a searcher with a seed.

    ``keep_weak``: steer by tasks too that do not separate base from fine-tuned.
    """

    space: SpaceConfig = SpaceConfig()
    objective: Objective = Objective()
    regularizer: NoRegularizer = None
    searchers: Annotated[
        tuple[str, ...], BeforeValidator(_searchers), AfterValidator(_distinct), Field(min_length=1)
    ] = ("bayes", "rl", "gradient")
    trials: PositiveInt = 40
    seeds: Annotated[
        tuple[NonNegativeInt, ...], BeforeValidator(listed), AfterValidator(_distinct), Field(min_length=1)
    ] = (0,)
    holdout: float = Field(default=0.5, gt=0, lt=1)
    keep_weak: bool = False
