"""What is trained how. It knows words and numbers, no models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from arma_mergekit.errors import RunError, unknown
from arma_mergekit.siamese.config import SiameseConfig

__all__ = ["METHODS", "GateSettings", "Method", "Settings"]


@dataclass(frozen=True)
class Method:
    """Defaults of one way to fine-tune; ``peft_type`` as adapters spell it, None for all weights."""

    peft_type: str | None
    lr: float
    rank: int | None = None
    alpha: float | None = None


METHODS = {
    "curlora": Method("CURLORA", 2.5e-4, 16, 1.0),  # the paper's
    "lora": Method("LORA", 2e-4, 16, 32.0),
    "siamese": Method("LORA", 3e-4, 16, 16.0),  # the paper's, for the adapter
    "full": Method(None, 2e-5),
}


@dataclass(frozen=True)
class GateSettings:
    """Of method siamese: mode and rank of its `SiameseConfig`, and the gate's learning rate.

    ``joint``: the adapter of the base is trained further too; a new one always is.
    """

    mode: str = "full"
    rank: int = 8
    lr: float = 1e-3
    joint: bool = False

    @property
    def config(self) -> SiameseConfig:
        """The model's."""
        return SiameseConfig(self.mode, self.rank)


@dataclass(frozen=True)
class Settings:
    """What is trained how; ``None`` is the method's default. ``targets``: names of modules, empty for the method's.

    ``steps`` > 0 takes the place of ``epochs``; ``batch`` examples of at most ``length`` tokens make a step. ``gate``
    is for method siamese alone, where ``lr``, ``rank``, ``alpha`` and ``targets`` are the adapter's.
    """

    base: str
    data: Path
    method: str
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    lr: float | None = None
    epochs: float = 1.0
    steps: int = 0
    batch: int = 8
    length: int = 512
    seed: int = 0
    save_every: int = 200
    gate: GateSettings | None = None

    def complete(self) -> Settings:
        """Every default written out; RunError for a method nobody knows, or options that it does not have."""
        if self.method not in METHODS:
            raise RunError(unknown("method", self.method, METHODS))
        default = METHODS[self.method]
        if default.peft_type is None and (self.rank or self.alpha or self.targets):
            raise RunError("Method full trains every weight: rank, alpha and targets are an adapter's.")
        filled = {
            name: getattr(self, name) if getattr(self, name) is not None else getattr(default, name)
            for name in ("rank", "alpha", "lr")
        }
        gate = self._gate()
        if gate is not None and self.adapter is not None:
            filled |= {"rank": None, "alpha": None}  # its own
        return replace(self, **filled, targets=tuple(sorted(self.targets)), gate=gate)

    @property
    def adapter(self) -> str | None:
        """The adapter that ``base`` names after `+`, with its revision."""
        return self.base.partition("+")[2] or None

    def _gate(self) -> GateSettings | None:
        if self.method != "siamese":
            if self.gate is not None:
                raise RunError(f"Method {self.method} has no gate; its options are those of method siamese.")
            return None
        gate = self.gate or GateSettings()
        if self.adapter is None:
            return replace(gate, joint=True)
        if self.rank or self.alpha or self.targets:
            raise RunError(f"{self.base} has an adapter: rank, alpha and targets are those it was made with.")
        if not gate.joint and not gate.config.has_gate:
            raise RunError(
                f"Mode {gate.mode} has no gate, so nothing is trained; train the adapter too (joint)."
            )
        return gate
