"""What can be set of each method, and which one it is. It imports nothing heavy, so plans are checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from arma_mergekit.continual.controller import ControllerSettings
from arma_mergekit.recipe.strict import Strict

__all__ = [
    "METHODS", "AIMSettings", "EMASettings", "EWCSettings", "ReplaySettings", "SFASettings", "Scope", "Settings",
]  # fmt: skip

Scope: TypeAlias = Literal["all", "attention"]


class Settings(Strict):
    """What every method has. ``scope``: which parameters take part; the others train on as they are."""

    scope: Scope = "all"


class AIMSettings(ControllerSettings, Settings):
    """The controller's numbers and switches, and the callback's (callback.py)."""

    PUBLISHED: ClassVar[Mapping[str, Any]] = {
        **ControllerSettings.PUBLISHED,
        "probe_mode": "train",
        "probe_share": 1.0,
        "probe_rows": "random",
        "moments": "keep",
    }

    probe_mode: Literal["eval", "train"] = "eval"
    probe_share: float = Field(default=0.125, gt=0, le=1)
    probe_rows: Literal["fixed", "random"] = "fixed"
    moments: Literal["damp", "keep", "reset"] = "damp"
    replay_lr: float | None = Field(default=None, gt=0)


class ReplaySettings(Settings):
    """One optimiser step on the memory after every ``every`` training steps (2: AIMMerging's share, if calm)."""

    every: int = Field(default=2, ge=1)
    replay_lr: float | None = Field(default=None, gt=0)


class SFASettings(Settings):
    """``period``: p, share of a task between averages; ``back``: b, weight of what the task began with (ours)."""

    period: float = Field(default=0.25, gt=0, le=1)
    back: float = Field(default=0.5, gt=0, lt=1)


class EMASettings(Settings):
    """``decay``: d."""

    decay: float = Field(default=0.999, ge=0, lt=1)


class EWCSettings(Settings):
    """``strength``: l; ``decay``: g, of older tasks' F; ``examples``: of a task that F is estimated from."""

    strength: float = Field(default=1000.0, ge=0)
    decay: float = Field(default=1.0, ge=0, le=1)
    examples: int = Field(default=64, ge=1)


METHODS: Mapping[str, type[Settings]] = {
    "sequential": Settings,
    "replay": ReplaySettings,
    "sfa": SFASettings,
    "ema": EMASettings,
    "magmax": Settings,
    "ewc": EWCSettings,
    "aimmerging": AIMSettings,
}
