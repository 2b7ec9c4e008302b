"""Settings of a CURLoRA adapter: what `adapter_config.json` holds.

It knows PEFT's base class of such settings; no models or tensors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from peft import PeftConfig

from arma_mergekit.errors import unknown

__all__ = ["SAMPLINGS", "CURLoRAConfig", "CURLoRAType"]

SAMPLINGS = ("inverted", "uniform", "normal")


class CURLoRAType(str, enum.Enum):
    """A `PeftType` of our own: an enumeration that has members cannot be extended. See register.py."""

    CURLORA = "CURLORA"


@dataclass
class CURLoRAConfig(PeftConfig):  # type: ignore[misc]  # PEFT has no types
    """Settings of `CURLoRAModel`; ValueError for one that makes no sense.

    - ``r``: how many columns and rows of each weight; r * r numbers are trained per matrix.
    - ``curlora_alpha``: what C U R is multiplied by; it is not divided by r.
    - ``target_modules``: as for LoRA: names, an expression, or "all-linear"; by default queries, keys and values.
    - ``exclude_modules``, ``modules_to_save``, ``layers_to_transform``, ``layers_pattern``: as for LoRA.
    - ``sampling``: probability of a column or row: "inverted" (the paper's: small ones first), "uniform", or "normal"
      (large ones first, as in a plain CUR decomposition).
    - ``legacy``: draw as the released code does: with replacement, from 1 / (p + 0.001), zero columns first.
    - ``seed``: of the draw; every module draws on its own, whatever else is adapted.
    """

    r: int = 16
    curlora_alpha: float = 1.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    sampling: str = "inverted"
    legacy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CURLoRAType.CURLORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"`r >= 1` must hold, but got r={self.r}.")
        if self.sampling not in SAMPLINGS:
            raise ValueError(unknown("sampling", self.sampling, SAMPLINGS))
        if self.legacy and self.sampling != "inverted":
            raise ValueError(f"legacy draws by inverted probabilities, but got sampling={self.sampling!r}.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ValueError(
                "layers_to_transform and layers_pattern need target_modules as a list of names, but got "
                f"{self.target_modules!r}."
            )
