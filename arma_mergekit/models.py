"""Any model a user can name: a checkpoint, or base+adapter.

It knows references, and how what they name is loaded; no recipes, suites or runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, open_model
from arma_mergekit.load import load_model, tokenizer_of

__all__ = ["Named", "open_named"]


@dataclass(frozen=True)
class Named:
    """A model by its reference; nothing of it is loaded. ``kind``: checkpoint or adapter."""

    ref: str
    kind: str
    checkpoint: Checkpoint

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that says what it is."""
        return self.checkpoint.files

    def load(self, device: str | None = None) -> Any:
        """The transformers model, frozen, in the dtype of its config; CheckpointError if it cannot be loaded whole."""
        return load_model(self.ref, device)

    def tokenizer(self) -> Any:
        """Its tokenizer; CheckpointError if it has none."""
        return tokenizer_of(self.checkpoint.path)


def open_named(ref: str) -> Named:
    """What a reference names, by headers alone; CheckpointError for what is no model."""
    checkpoint = open_model(ref)
    return Named(ref, "adapter" if isinstance(checkpoint, AdaptedCheckpoint) else "checkpoint", checkpoint)
