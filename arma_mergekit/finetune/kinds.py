"""What a method trains and saves: all weights, an adapter, or a siamese model's gate.

It knows PEFT, transformers and siamese models; data and the course of a run are others'.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, ModelReference
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import locate
from arma_mergekit.checkpoint.lowrank import CONFIG
from arma_mergekit.errors import CheckpointError
from arma_mergekit.finetune.settings import METHODS, Settings
from arma_mergekit.load import adapted, as_dtype, build_model, readable

__all__ = ["Kind", "load_adapted", "make"]


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
        if isinstance(base, AdaptedCheckpoint):
            self.model = load_adapted(base, settings.method)
        else:
            model = build_model(base.path, as_dtype(None, base))
            self.model = adapted(model, _peft_config(settings), settings.base)

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
            tuned = adapted(lm, _peft_config(settings), settings.base)
        else:
            tuned = load_adapter(lm, located(settings.base), self._gate.joint)
        self.model = SiameseForCausalLM(tuned, self._gate.config, source=Source(Side.of(base)))

    def optimizer(self) -> Any:
        """AdamW, the gate with its own learning rate."""
        import torch

        assert self._settings.lr is not None
        groups = self.model.parameter_groups(self._settings.lr, self._gate.lr)
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def save(self, out: Path, tokenizer: Any) -> None:
        """Gate and adapter."""
        self.model.save_pretrained(out)


def located(reference: str) -> Path:
    """Directory of the adapter that BASE+ADAPTER names."""
    parsed = ModelReference.parse(reference)
    assert parsed.adapter is not None
    return locate(parsed.adapter, parsed.adapter_revision)


def load_adapted(base: Checkpoint, method: str) -> Any:
    """The PeftModel of ``base``, its adapter to be trained further: the same U over a sequence of tasks.

    CheckpointError if it has no adapter of that method.
    """
    from peft import PeftModel

    import arma_mergekit.continual.curlora  # noqa: F401 - PEFT knows its adapters only then

    if not isinstance(base, AdaptedCheckpoint):
        raise CheckpointError(f"{base.ref} has no adapter; name it as BASE+ADAPTER.")
    path = located(base.ref)
    kind = read_json(path / CONFIG).get("peft_type")
    if kind != METHODS[method].peft_type:
        raise CheckpointError(f"{path} is a {kind} adapter, but this needs one of method {method}.")
    model = build_model(base.path, as_dtype(None, base))
    with readable(f"The adapter {path}", "train it again"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
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
