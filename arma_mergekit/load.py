"""From the files of a recipe to a live model: transformers builds it, the checkpoints supply the tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arma_mergekit.checkpoint import Checkpoint, open_model
from arma_mergekit.errors import CheckpointError
from arma_mergekit.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from arma_mergekit.live import LiveModel

__all__ = ["Loaded", "load_live", "load_tokenizer"]

FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Loaded:
    """A live model and, in the order of its alphas, the names its tensors have in the checkpoint."""

    live: LiveModel
    tensors: tuple[str, ...]


def load_live(recipe: Recipe, device: str | None = None) -> Loaded:
    """The recipe's base model with its one fine-tuned model's differences, in the recipe's dtype, at alpha 0."""
    import torch
    from transformers import AutoModelForCausalLM

    from arma_mergekit.live import LiveModel

    if len(recipe.finetuned) != 1:
        raise CheckpointError(
            f"Searching needs exactly one fine-tuned model, but the recipe has {len(recipe.finetuned)}."
        )
    base, tuned = open_model(recipe.base_model), open_model(recipe.finetuned[0].model)
    dtype = getattr(
        torch, recipe.dtype or base.config.get("dtype") or base.config.get("torch_dtype") or "float32"
    )
    model = AutoModelForCausalLM.from_pretrained(str(base.path), dtype=dtype, local_files_only=True)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = {name for name, _ in model.named_parameters()}
    names = parameter_names(base.tensors, known, model.base_model_prefix)
    shared = [name for name in names if name in tuned.tensors and base.tensors[name].dtype in FLOATS]
    here = next(model.parameters()).device
    sides = [{names[n]: as_torch(side, n).to(here, dtype) for n in shared} for side in (base, tuned)]
    live = LiveModel(model, *sides)
    stored = {names[n]: n for n in shared}
    return Loaded(live, tuple(stored[name] for name in live.tensors))


def load_tokenizer(recipe: Recipe) -> Any:
    """The base model's tokenizer; no remote code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(open_model(recipe.base_model).path), local_files_only=True)


def parameter_names(tensors: Iterable[str], parameters: set[str], prefix: str) -> dict[str, str]:
    """Checkpoint name to parameter name: equal, or with the base model's prefix added or taken away.

    Names without a counterpart stay as they are; a tied head needs none.
    """
    result = {}
    for name in tensors:
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        result[name] = next((c for c in candidates if c in parameters), name)
    return result


def as_torch(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint, sharing its pages; read-only by contract."""
    import torch

    array = checkpoint.read(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if checkpoint.tensors[name].dtype == "BF16" else tensor
