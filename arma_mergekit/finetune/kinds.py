"""What a method trains and saves: all weights, an adapter, or a siamese model's gate.

It knows PEFT, transformers and siamese models; data and the course of a run are others'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, ModelReference
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import locate
from arma_mergekit.checkpoint.lowrank import CONFIG
from arma_mergekit.errors import CheckpointError
from arma_mergekit.finetune.settings import METHODS, Settings
from arma_mergekit.load import as_dtype, build_model

__all__ = ["Kind", "make"]


class Kind(Protocol):
    """A model in training."""

    model: Any

    def optimizer(self) -> Any:
        """One with learning rates of its own, or None for Trainer's."""

    def save(self, out: Path, tokenizer: Any) -> None:
        """Write what was trained into ``out``."""


def make(settings: Settings, base: Checkpoint) -> Kind:
    """What is trained of ``base``, its new values drawn by the seed; CheckpointError if the method cannot train it.

    ``base`` has its adapter, but for method siamese, which loads it apart.
    """
    import torch

    torch.manual_seed(settings.seed)
    if settings.method == "siamese":
        return Siamese(settings, base)
    return Whole(base) if METHODS[settings.method].peft_type is None else Adapter(settings, base)


class Whole:
    """Every weight, in float32; saved in the base's dtype."""

    def __init__(self, base: Checkpoint) -> None:
        import torch

        if isinstance(base, AdaptedCheckpoint):
            raise CheckpointError(
                f"{base.ref} has an adapter, which method full cannot go on training; merge it."
            )
        self.model, self._dtype = build_model(base.path, torch.float32), as_dtype(None, base)

    def optimizer(self) -> Any:
        """Trainer's."""
        return None

    def save(self, out: Path, tokenizer: Any) -> None:
        """The model with its tokenizer."""
        self.model.to(self._dtype).save_pretrained(out)
        tokenizer.save_pretrained(out)


class Adapter:
    """A new adapter, or that of the base; the base in its own dtype."""

    def __init__(self, settings: Settings, base: Checkpoint) -> None:
        model = build_model(base.path, as_dtype(None, base))
        self.model = _adapted(settings, base, model)

    def optimizer(self) -> Any:
        """Trainer's."""
        return None

    def save(self, out: Path, tokenizer: Any) -> None:
        """The adapter."""
        self.model.save_pretrained(out)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's card of blanks


class Siamese:
    """The gate, and the adapter if it is new or both are wanted."""

    def __init__(self, settings: Settings, base: Checkpoint) -> None:
        from arma_mergekit.siamese import SiameseForCausalLM
        from arma_mergekit.siamese.files import Side, Source, load_adapter

        assert settings.gate is not None
        self._settings, self._gate = settings, settings.gate
        lm = build_model(base.path, as_dtype(None, base))
        if settings.adapter is None:
            adapted = _adapted(settings, base, lm)
        else:
            adapted = load_adapter(lm, located(settings), self._gate.joint)
        self.model = SiameseForCausalLM(adapted, self._gate.config, source=Source(Side.of(base)))

    def optimizer(self) -> Any:
        """AdamW, the gate with its own learning rate."""
        import torch

        assert self._settings.lr is not None
        groups = self.model.parameter_groups(self._settings.lr, self._gate.lr)
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def save(self, out: Path, tokenizer: Any) -> None:
        """Gate and adapter."""
        self.model.save_pretrained(out)


def located(settings: Settings) -> Path:
    """Directory of the base's adapter."""
    reference = ModelReference.parse(settings.base)
    assert reference.adapter is not None
    return locate(reference.adapter, reference.adapter_revision)


def _adapted(settings: Settings, base: Checkpoint, model: Any) -> Any:
    """The PeftModel with a new adapter, or the one of ``base`` to be trained further: the same U over many tasks."""
    from peft import PeftModel, get_peft_model

    import arma_mergekit.continual.curlora  # noqa: F401 - PEFT knows its adapters only then

    if not isinstance(base, AdaptedCheckpoint):
        return get_peft_model(model, _peft_config(settings))
    path = located(settings)
    kind = read_json(path / CONFIG).get("peft_type")
    if kind != METHODS[settings.method].peft_type:
        raise CheckpointError(
            f"{path} is a {kind} adapter; method {settings.method} cannot go on training it."
        )
    return PeftModel.from_pretrained(model, str(path), is_trainable=True)


def _peft_config(settings: Settings) -> Any:
    targets = list(settings.targets) or None
    if settings.method == "curlora":
        from arma_mergekit.continual.curlora import CURLoRAConfig

        assert settings.rank is not None
        assert settings.alpha is not None
        return CURLoRAConfig(
            r=settings.rank, curlora_alpha=settings.alpha, target_modules=targets, seed=settings.seed,
            task_type="CAUSAL_LM",
        )  # fmt: skip
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets or "all-linear", task_type="CAUSAL_LM",
        lora_dropout=0.1 if settings.method == "siamese" else 0.0,
    )  # fmt: skip
