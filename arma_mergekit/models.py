"""Any model a user can name: a checkpoint, base+adapter, or a siamese directory.

It knows references, and how what they name is loaded; no recipes, suites or runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, ModelReference, open_model
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import SIAMESE, locate
from arma_mergekit.errors import CheckpointError
from arma_mergekit.load import default_device, load_model, open_tokenizer

__all__ = ["Named", "open_named"]


@dataclass(frozen=True)
class Named:
    """A model by its reference; nothing of it is loaded.

    ``kind``: checkpoint, adapter or siamese; ``checkpoint``: it, or the base of a siamese model; ``files``: every one
    that says what it is.
    """

    ref: str
    kind: str
    checkpoint: Checkpoint
    files: tuple[Path, ...]

    def load(self, device: str | None = None) -> Any:
        """The transformers model, frozen, in the dtype of its config; CheckpointError if it cannot be loaded whole."""
        if self.kind != "siamese":
            return load_model(self.ref, device)
        from arma_mergekit.siamese import SiameseForCausalLM

        model = SiameseForCausalLM.from_pretrained(located(self.ref))
        return model.to(device or default_device()).requires_grad_(False)

    def tokenizer(self) -> Any:
        """Its tokenizer; CheckpointError if it has none."""
        return open_tokenizer(self.checkpoint.path)


def open_named(ref: str) -> Named:
    """What a reference names, by headers alone; CheckpointError for what is no model."""
    if ModelReference.parse(ref).adapter is None and (located(ref) / SIAMESE).is_file():
        return _siamese(ref)
    checkpoint = open_model(ref)
    kind = "adapter" if isinstance(checkpoint, AdaptedCheckpoint) else "checkpoint"
    return Named(ref, kind, checkpoint, checkpoint.files)


def located(ref: str) -> Path:
    """The directory of a model without an adapter."""
    reference = ModelReference.parse(ref)
    return locate(reference.model, reference.revision)


def _siamese(ref: str) -> Named:
    """A siamese directory: its own files, and those of the checkpoints it mixes."""
    from arma_mergekit.siamese.files import Side

    path = located(ref)
    file = path / SIAMESE
    record = read_json(file)
    sides = [Side.from_json(record[key], file) for key in ("base", "second") if key in record]
    if not sides:
        raise CheckpointError(f"{file} names no base; save the model again.")
    mixed = [open_model(side.ref) for side in sides]
    own = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors"))
    return Named(ref, "siamese", mixed[0], (*own, *(file for c in mixed for file in c.files)))
