"""AIMMerging's controller: when to merge, how long to replay, with which weights.

It knows no model: it is told losses and norms, one after each optimiser step, and answers `TRAIN`, `Replay` (so many
optimiser steps on the memory) or `Merge` (with these weights). Source: arXiv:2509.17348, section 3, and, where the
paper gives no values, the published recurrences. One controller per task; the first has no memory and needs none.

    symbol  meaning                                                        here
    k       optimiser steps in this task, replay not counted               step
    S, M    planned steps between merges; replay steps of the next merge   interval, replay
    J       the step from which on a merge is due                          due
    h       loss on a batch of the memory                                  argument of `after_step`
    delta   threshold: factor * mean of the first int(2S/3)+1 h's          threshold
    flag    times h reached delta (or the wait was too long)               flag
    Lambda  learning signal: sum |theta_k - theta_t| / steps               signals

After each step, once delta is known:    flag += 1 if h >= delta, else if k >= J + S
Merge if (k >= J and flag >= 1) or flag >= 3, with

    theta_{t+1} = theta_t + w_in (theta_k - theta_t) + w_out (theta' - theta_k)       theta' = after M replay steps
    (w_in, w_out) = (.5, .5) if S <= 70 else (.4, .6)    for flag > 1
                    (.6, .4) if S <= 70 else (.5, .5)    for flag = 1

Then S follows Lambda (after `cold_start` merges without change), and J = k + S:

    Lambda >= Lambda_last:  S = max(S_min, int(S Lambda_last/Lambda)), halved if still >= 64
    else:                   S = min(S_max, int(S (Lambda_last/Lambda + (1 if S < 64 else .5))))
    M = int(S M_0/S_0)

`controller: published` is this to the letter, with Lambda over the *planned* S steps and nothing done when a task ends
inside an interval. The default divides by the steps that really passed (`signal: elapsed`), and merges at the end
(`merge_at_end`). `controller: window` is the rule of the paper's text, whose factors are not published: over the last
`window` changes of Lambda, S = S/shrink if rises outnumber falls, S*grow if falls outnumber rises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from arma_mergekit.recipe.strict import Strict

__all__ = ["TRAIN", "Answer", "Controller", "ControllerSettings", "Merge", "Replay", "Train"]

LONG = 70  # an interval beyond which what was learned counts less
COARSE = 64  # from here on intervals are halved, and grow by less


class ControllerSettings(Strict):
    """The recurrences' numbers and switches; ``controller: published`` sets those not given to what was published."""

    PUBLISHED: ClassVar[Mapping[str, Any]] = {"signal": "planned", "merge_at_end": False}

    controller: Literal["default", "published", "window"] = "default"
    interval: int = Field(default=8, ge=1)
    replay_steps: int = Field(default=8, ge=0)
    interval_min: int = Field(default=2, ge=1)
    interval_max: int = Field(default=128, ge=1)
    threshold_factor: float = Field(default=2.0, gt=0)
    cold_start: int = Field(default=3, ge=1)
    signal: Literal["elapsed", "planned"] = "elapsed"
    merge_at_end: bool = True
    window: int | None = Field(default=None, ge=1)
    shrink: float | None = Field(default=None, gt=1)
    grow: float | None = Field(default=None, gt=1)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("controller") == "published":
            return {**cls.PUBLISHED, **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> ControllerSettings:
        if not self.interval_min <= self.interval <= self.interval_max:
            raise ValueError(
                f".interval must lie between interval_min {self.interval_min} and interval_max {self.interval_max}, "
                f"but got {self.interval}."
            )
        given = [key for key in ("window", "shrink", "grow") if getattr(self, key) is not None]
        if self.controller == "window" and len(given) < 3:
            raise ValueError(
                " needs window, shrink and grow for controller window; their values were not published."
            )
        if self.controller != "window" and given:
            raise ValueError(f".{given[0]} needs controller: window.")
        return self


@dataclass(frozen=True)
class Train:
    """Go on training."""


@dataclass(frozen=True)
class Replay:
    """Tell `merge` how far the parameters went, then take ``steps`` optimiser steps on the memory."""

    steps: int


@dataclass(frozen=True)
class Merge:
    """theta = theta_t + ``inner`` (theta_k - theta_t) + ``outer`` (theta' - theta_k), and what led to it."""

    inner: float
    outer: float
    step: int
    elapsed: int
    interval: int
    replay: int
    flag: int
    signal: float


Answer: TypeAlias = Train | Replay
TRAIN = Train()


@dataclass
class State:
    """Everything that changes; plain numbers."""

    step: int = 0
    due: int = 0
    interval: int = 0
    replay: int = 0
    flag: int = 0
    merged_at: int = 0
    waiting: bool = False
    losses: list[float] = field(default_factory=list)
    signals: list[float] = field(default_factory=list)


class Controller:
    """The recurrences of one task; ``state``: what `to_json` gave, to go on exactly there."""

    def __init__(self, settings: ControllerSettings, state: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        first = {"due": settings.interval, "interval": settings.interval, "replay": settings.replay_steps}
        known = {f.name for f in fields(State)}
        if state is not None and state.keys() != known:
            raise ValueError(f"A controller's state has {sorted(known)}, but got {sorted(state)}.")
        self.state = State(**(first if state is None else dict(state)))

    def to_json(self) -> dict[str, Any]:
        """Plain data from which another controller goes on exactly as this one."""
        return asdict(self.state)

    @property
    def threshold(self) -> float | None:
        """delta; None until enough steps of this interval are over."""
        state = self.state
        known = state.losses and state.step - state.merged_at > int(2 * state.interval / 3)
        return self.settings.threshold_factor * fmean(state.losses) if known else None

    def after_step(self, loss: float | None) -> Answer:
        """What to do after an optimiser step, told h; None if it was not measured, which says nothing either way."""
        state, delta = self._idle(), self.threshold
        state.step += 1
        if loss is not None:
            _check("A memory loss", loss)
        if delta is None:
            state.losses += [] if loss is None else [float(loss)]
        elif (loss is not None and loss >= delta) or state.step >= state.due + state.interval:
            state.flag += 1
        if (state.step >= state.due and state.flag >= 1) or state.flag >= 3:
            return self._replay()
        return TRAIN

    def at_end(self) -> Answer:
        """What to do when the task is over."""
        state = self._idle()
        return self._replay() if self.settings.merge_at_end and state.step > state.merged_at else TRAIN

    def last_replay(self) -> int:
        """Steps to replay if the task ended soon: at most M, and not more for each step trained than M to S."""
        state = self.state
        return min(state.replay, (state.step - state.merged_at) * state.replay // state.interval)

    def merge(self, change: float) -> Merge:
        """The weights, told sum |theta_k - theta_t| as it was before the replay; plans the next interval."""
        state = self.state
        if not state.waiting:
            raise ValueError("There is nothing to merge: the controller did not ask for a replay.")
        _check("sum |theta_k - theta_t|", change)
        elapsed = state.step - state.merged_at
        signal = change / (elapsed if self.settings.signal == "elapsed" else state.interval)
        done = Merge(
            *weights(state.interval, state.flag),
            state.step,
            elapsed,
            state.interval,
            state.replay,
            state.flag,
            signal,
        )
        state.signals.append(signal)
        state.interval = self._next_interval()
        state.replay = int(state.interval * self.settings.replay_steps / self.settings.interval)
        state.merged_at, state.due = state.step, state.step + state.interval
        state.flag, state.waiting, state.losses = 0, False, []
        return done

    def _idle(self) -> State:
        if self.state.waiting:
            raise ValueError("The controller waits for a merge; call `merge` first.")
        return self.state

    def _replay(self) -> Replay:
        self.state.waiting = True
        return Replay(self.state.replay)

    def _next_interval(self) -> int:
        settings, now, signals = self.settings, self.state.interval, self.state.signals
        if len(signals) <= settings.cold_start:
            return now
        if settings.controller == "window":
            return self._by_trend()
        last, new = signals[-2:]
        ratio = last / new if new else (math.inf if last else 1.0)
        if new >= last:
            shorter = max(settings.interval_min, int(now * ratio))
            return shorter // 2 if shorter >= COARSE else shorter
        return int(min(settings.interval_max, now * (ratio + (1 if now < COARSE else 0.5))))

    def _by_trend(self) -> int:
        settings, now = self.settings, self.state.interval
        assert settings.window is not None
        assert settings.shrink is not None
        assert settings.grow is not None
        steps = list(pairwise(self.state.signals[-settings.window - 1 :]))
        trend = sum(b > a for a, b in steps) - sum(b < a for a, b in steps)
        if trend > 0:
            return max(settings.interval_min, int(now / settings.shrink))
        return min(settings.interval_max, int(now * settings.grow)) if trend < 0 else now


def weights(interval: int, flag: int) -> tuple[float, float]:
    """(w_in, w_out) of a merge after an interval planned as S = ``interval`` steps."""
    if flag > 1:
        return (0.5, 0.5) if interval <= LONG else (0.4, 0.6)
    return (0.6, 0.4) if interval <= LONG else (0.5, 0.5)


def _check(what: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} must be finite and not negative, but got {value}; lower the learning rate.")
