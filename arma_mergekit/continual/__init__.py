"""Fine-tuning on one task after another, and what is forgotten on the way.

    metrics      what a matrix of scores says: overall performance, backward and forward transfer
    controller   when AIMMerging merges, how much it replays, with which weights; knows no model
    memory       examples of past tasks that are kept and shown again
    callback     AIMMerging for `transformers.Trainer`
    baselines    SFA, EMA, MagMax, EWC and plain replay behind the same interface
    settings     what can be set of each, with the defaults
    plan, run    a sequence of tasks, several methods, one resumable run

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "AIMMergingCallback",
    "AIMSettings",
    "Controller",
    "EMACallback",
    "EMASettings",
    "EWCCallback",
    "EWCSettings",
    "MagMaxCallback",
    "Memory",
    "ReplayCallback",
    "ReplaySettings",
    "SFACallback",
    "SFASettings",
]

HOMES = {
    "AIMMergingCallback": "callback",
    "AIMSettings": "settings",
    "Controller": "controller",
    "EMACallback": "baselines",
    "EMASettings": "settings",
    "EWCCallback": "baselines",
    "EWCSettings": "settings",
    "MagMaxCallback": "baselines",
    "Memory": "memory",
    "ReplayCallback": "callback",
    "ReplaySettings": "settings",
    "SFACallback": "baselines",
    "SFASettings": "settings",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name when it is asked for."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
