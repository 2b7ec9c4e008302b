"""The `tune` block: space, objective, regulariser, searchers and budget of a run.

It knows words and numbers. Which values a word stands for is decided by arma_mergekit/space.py and search/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.recipe.settings import REST
from arma_mergekit.recipe.strict import Strict, listed
from arma_mergekit.search import SEARCHERS
from arma_mergekit.space import WORDS

__all__ = ["Objective", "TuneConfig"]

GROUP = re.compile(f"({'|'.join(WORDS)})(:qkvo)?".replace("block:N", r"block:[1-9]\d*"))
PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def _group(word: Any) -> Any:
    if not isinstance(word, str) or not GROUP.fullmatch(word):
        raise ValueError(f": {unknown('search space', str(word), WORDS)}")
    return word


def _rest(word: Any) -> Any:
    if isinstance(word, str) and word not in REST and not GROUP.fullmatch(word):
        raise ValueError(f": {unknown('search space', word, [*WORDS, *REST, 'a number'])}")
    if isinstance(word, bool) or not isinstance(word, str | int | float):
        raise ValueError(f" must be a search space, base, finetuned or a number, but got {word!r}.")
    if not isinstance(word, str) and not math.isfinite(word):
        raise ValueError(f" must be finite, but got {word}.")
    return word


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
        if name not in SEARCHERS:
            raise ValueError(f": {unknown('searcher', str(name), SEARCHERS)}")
    return listed(names)


Share = Annotated[float, BeforeValidator(_share)]
Suites = Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)]


class SpaceConfig(Strict):
    """What is searched; None is the searcher's own default."""

    groups: Annotated[str, BeforeValidator(_group)] | None = None
    rest: Annotated[str | float, BeforeValidator(_rest)] | None = None
    bounds: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> SpaceConfig:
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"`bounds` must be [low, high] with low < high, but got {list(self.bounds)}.")
        return self


class Objective(Strict):
    """What makes a point better than another: one of four ways; by default, balance of all suites."""

    balance: Suites | None = None
    maximize: str | None = None
    keep: dict[str, Share] = Field(default_factory=dict)
    sum: dict[str, float] | None = None
    pareto: Suites | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Objective:
        given = [way for way in ("balance", "maximize", "sum", "pareto") if getattr(self, way) is not None]
        if len(given) > 1:
            raise ValueError(f"Give one of balance, maximize, sum and pareto, but got {' and '.join(given)}.")
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
        """Keyword arguments of objective.Objective; RecipeError if it needs a suite that is not chosen."""
        missing = [suite for suite in self.suites if suite not in chosen]
        if missing:
            raise RecipeError(
                f"The objective needs suite {missing[0]}, the run has {', '.join(chosen)}; add it to --eval."
            )
        if self.pareto is not None:
            raise RecipeError("`pareto` is not available yet; use balance, maximize with keep, or sum.")
        if self.maximize is not None:
            return {"maximize": self.maximize, "keep": dict(self.keep)}
        return {} if self.sum is None else {"weights": dict(self.sum)}


class Regularizer(Strict):
    """Attention divergence from the base on ``text`` as a penalty (METHODS.md 1.3)."""

    attention: Literal["js", "kl", "mse", "cosine", "emd"] = "js"
    text: Path
    weight: NonNegativeFloat = 0.1


class TuneConfig(Strict):
    """One run. ``trials`` is the budget of each arm, an arm being a searcher with a seed.

    ``keep_weak``: steer by tasks too that do not separate base from fine-tuned.
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
