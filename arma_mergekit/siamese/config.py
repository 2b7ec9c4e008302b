"""What a siamese model is set to. It knows words and numbers; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from arma_mergekit.errors import InputError, unknown

__all__ = ["MODES", "SiameseConfig"]

MODES = {
    "full": "a gate per token and channel that sees the prompt",
    "no_query": "a gate per token and channel that does not",
    "hidden_average": "hidden states averaged, the base's with weight `value`",
    "logit_average": "logits averaged, the base's with weight `value`",
}


@dataclass(frozen=True)
class SiameseConfig:
    """How two passes become one; InputError for what is none of the `MODES` or out of range.

    ``rank`` and ``dropout`` are the gate's; ``value`` in [0, 1] is the base's weight in the modes without a gate.
    """

    mode: str = "full"
    rank: int = 8
    dropout: float = 0.1
    value: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(unknown("mode", str(self.mode), MODES))
        if not _is_number(self.rank) or self.rank != int(self.rank) or self.rank < 1:
            raise InputError(f"rank must be a whole number >= 1, but got {self.rank!r}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"`0 <= dropout < 1` must hold, but got {self.dropout!r}.")
        if not _is_number(self.value) or not 0 <= self.value <= 1:
            raise InputError(f"`0 <= value <= 1` must hold, but got {self.value!r}.")

    @property
    def has_gate(self) -> bool:
        """Whether there is something to train."""
        return self.mode in ("full", "no_query")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiameseConfig:
        """What `to_json` was made of; InputError for keys it does not have."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise InputError(unknown("setting", str(key), known))
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
