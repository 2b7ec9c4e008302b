"""From the files of a recipe to a live model: transformers builds it, the checkpoints supply the tensors.

It knows transformers, checkpoints and a recipe's model keys; no suites or searchers. Whatever transformers would
guess, initialise at random or run from a model's directory is refused instead.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, open_model
from arma_mergekit.checkpoint.model import some
from arma_mergekit.errors import CheckpointError, unknown
from arma_mergekit.plan.compare import shape_errors
from arma_mergekit.recipe import Recipe
from arma_mergekit.roles import roles

if TYPE_CHECKING:
    import torch

    from arma_mergekit.live import LiveModel

__all__ = [
    "Loaded",
    "adapted",
    "build_model",
    "default_device",
    "load_live",
    "load_model",
    "load_tokenizer",
    "open_tokenizer",
]

FLOATS = ("BF16", "F16", "F32", "F64")
DTYPES = ("bfloat16", "float16", "float32", "float64")  # torch's names of the same
# what transformers raises for a model directory it cannot make sense of; the Rust tokenizers raise a bare Exception
CAUSES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
LOCAL = {
    "local_files_only": True,
    "trust_remote_code": False,
}  # without the latter, transformers asks on stdin


@dataclass(frozen=True)
class Loaded:
    """A live model and what else its directory says.

    ``tensors``: names in the checkpoint, in the order of the alphas. ``aliases``: further stored name of one of
    them (the head of a tied model) to that name; both must get the same alpha. ``max_positions``: longest input in
    tokens, None if there is no limit. ``vocabulary``: rows of the input embeddings.
    """

    live: LiveModel
    tensors: tuple[str, ...]
    aliases: Mapping[str, str]
    max_positions: int | None
    vocabulary: int


def load_live(recipe: Recipe, device: str | None = None) -> Loaded:
    """The recipe's base model with its one fine-tuned model's differences, in the recipe's dtype, at alpha 0.

    CheckpointError for whatever cannot be loaded whole and finite.
    """
    from arma_mergekit.live import LiveModel

    if len(recipe.finetuned) != 1:
        raise CheckpointError(
            f"Searching needs exactly one fine-tuned model, but the recipe has {len(recipe.finetuned)}."
        )
    checkpoints = open_model(recipe.base_model), open_model(recipe.finetuned[0].model)
    base, tuned = checkpoints
    common = [n for n in base.tensors if n in tuned.tensors]
    if unlike := list(
        shape_errors(base, tuned, roles(common, base.config), common)
    ):  # all is scored, so all counts
        raise CheckpointError("\n".join(unlike))
    dtype = as_dtype(recipe.dtype, base)
    model = build_model(base.path, dtype)
    model.to(device or default_device())
    shared = [n for n in common if base.tensors[n].dtype in FLOATS]
    owners, aliases = assign(shared, model)
    sides = [{n: read_finite(c, n, model.device, dtype) for n in shared} for c in checkpoints]
    check_aliases(aliases, checkpoints, sides)
    if isinstance(base, AdaptedCheckpoint):  # transformers knows nothing of the adapter
        write(model, {owners[n]: sides[0][n] for n in owners if n in base.factors})
    live = LiveModel(model, *({owners[n]: side[n] for n in owners} for side in sides))
    stored = {parameter: n for n, parameter in owners.items()}
    tensors = tuple(stored[name] for name in live.tensors)
    averaged = {alias: n for alias, n in aliases.items() if n in tensors}
    return Loaded(
        live, tensors, averaged, max_positions(model.config), len(model.get_input_embeddings().weight)
    )


def adapted(model: Any, config: Any, name: str) -> Any:
    """The model, called ``name``, with a fresh adapter; CheckpointError if the adapter does not fit it."""
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():  # peft asks transformers for what it will rename
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, config)
    except (TypeError, ValueError) as error:  # no module of these names, or none that can be adapted
        raise CheckpointError(
            f"The adapter does not fit the model {name} ({str(error).rstrip('.')}); change its targets or rank."
        ) from error


def load_model(ref: str, device: str | None = None) -> Any:
    """The one model of a reference, frozen, an adapter folded in; CheckpointError as in `load_live`."""
    checkpoint = open_model(ref)
    dtype = as_dtype(None, checkpoint)
    model = build_model(checkpoint.path, dtype)
    model.to(device or default_device())
    if isinstance(checkpoint, AdaptedCheckpoint):
        owners, _ = assign(checkpoint.factors, model)
        write(model, {p: read_finite(checkpoint, n, model.device, dtype) for n, p in owners.items()})
    return model.eval().requires_grad_(False)


def default_device() -> str:
    """A GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(recipe: Recipe) -> Any:
    """The base model's tokenizer; no remote code."""
    return open_tokenizer(open_model(recipe.base_model).path)


def open_tokenizer(path: Path) -> Any:
    """The tokenizer in a model's directory; CheckpointError if it has none that knows words."""
    from transformers import AutoTokenizer

    remedy = "copy the tokenizer's files from the model it was trained from"
    with readable(f"The tokenizer of {path}", remedy):
        tokenizer = AutoTokenizer.from_pretrained(str(path), **LOCAL)
    # without files, some of transformers' classes make a tokenizer of their special tokens
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab()):
        raise CheckpointError(f"{path} has no vocabulary for its tokenizer; {remedy}.")
    return tokenizer


@contextlib.contextmanager
def readable(what: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises into one CheckpointError: what, the first line of the cause, the remedy."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except Exception as error:
        if not isinstance(error, (*CAUSES, StrictDataclassError)) and type(error) is not Exception:
            raise
        line = next(iter(str(error).strip().splitlines()), "").rstrip(" .:")
        cause = (
            f"{type(error).__name__}: {line}" if isinstance(error, LookupError | ArithmeticError) else line
        )
        raise CheckpointError(f"{what} cannot be loaded ({cause}); {remedy}.") from error


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Without the table transformers logs for tensors that do not fit; `check_complete` says it in a sentence."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def build_model(path: Path, dtype: torch.dtype, device_map: Any = None) -> Any:
    """The model in a directory, every parameter from its files; ``device_map``: transformers'."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    remedy = "correct its config.json, or update transformers if the model is newer"
    with readable(f"The model {path}", remedy), unreported():
        config = AutoConfig.from_pretrained(str(path), dtype=dtype, **LOCAL)
        if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"{path}: model_type {config.model_type!r} is no causal language model, and only those can be "
                "searched; merge it with a fixed alpha instead."
            )
        model, report = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            device_map=device_map, **LOCAL,
        )  # fmt: skip
    check_complete(path, report)
    check_tied(path, model)
    return model


def check_complete(path: Path, report: Mapping[str, Any]) -> None:
    """CheckpointError for parameters that transformers initialised at random."""
    remedy = "correct config.json or download the model again"
    if report["missing_keys"]:
        raise CheckpointError(
            f"{path} has no weights for {some(report['missing_keys'])}, which its config.json asks for; {remedy}."
        )
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        others = {other for other, _, _ in report["mismatched_keys"]} - {name}
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(stored)}, but its config.json asks for {tuple(wanted)}"
            f"{f' (so with {some(others)})' if others else ''}; {remedy}."
        )


def check_tied(path: Path, model: Any) -> None:
    """CheckpointError if config.json ties two parameters that the files give different values."""
    ties = getattr(model, "_tied_weights_keys", None)
    if not isinstance(ties, Mapping) or not model.config.get_text_config().tie_word_embeddings:
        return
    everything = dict(model.named_parameters(remove_duplicate=False))
    for alias, name in ties.items():
        if everything.get(alias) is not everything.get(name, everything.get(alias)):
            raise CheckpointError(unequal(str(path), alias, name))


def unequal(where: str, alias: str, name: str) -> str:
    """Sentence for two stored tensors that should be one."""
    return (
        f"{where}: {alias} and {name} differ, but config.json ties them to one parameter; set tie_word_embeddings to "
        "false in both models, or save the model again."
    )


def as_dtype(wanted: str | None, base: Checkpoint) -> torch.dtype:
    """The recipe's dtype, else the one in config.json, else float32."""
    import torch

    text = base.config.get("text_config")
    configs = [base.config, text if isinstance(text, Mapping) else {}]
    told = [value for config in configs for key in ("dtype", "torch_dtype") if (value := config.get(key))]
    name = str(wanted or (told[0] if told else "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(
            f"{base.path / 'config.json'}: {unknown('dtype', name, DTYPES)} Give one of them as `dtype` in the recipe."
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def assign(stored: Iterable[str], model: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Stored name to the parameter it fills, and every further stored name of a parameter to its first."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = parameter_names(stored, everything, model.base_model_prefix)
    canonical = {n: first[id(everything[p])] if p in everything else p for n, p in names.items()}
    owners: dict[str, str] = {}
    aliases: dict[str, str] = {}
    by_parameter: dict[str, str] = {}
    for n in sorted(
        names, key=lambda n: names[n] != canonical[n]
    ):  # a parameter's own name before its aliases
        owner = by_parameter.setdefault(canonical[n], n)
        if owner == n:
            owners[n] = canonical[n]
        else:
            aliases[n] = owner
    return owners, aliases


def check_aliases(
    aliases: Mapping[str, str],
    checkpoints: Sequence[Checkpoint],
    sides: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """CheckpointError if two stored tensors that fill one parameter differ."""
    import torch

    for alias, n in aliases.items():
        for checkpoint, side in zip(checkpoints, sides, strict=True):
            if not torch.equal(side[alias], side[n]):
                raise CheckpointError(unequal(str(checkpoint.tensors[alias].file), alias, n))


def parameter_names(tensors: Iterable[str], parameters: Collection[str], prefix: str) -> dict[str, str]:
    """Checkpoint name to parameter name: equal, or with the base model's prefix added or taken away.

    Names without a counterpart stay as they are.
    """
    result = {}
    for name in tensors:
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        result[name] = next((c for c in candidates if c in parameters), name)
    return result


def read_finite(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a checkpoint on a device in a dtype; CheckpointError if a value is not finite there."""
    stored = as_torch(checkpoint, name)
    tensor = stored.to(device, dtype)
    if is_finite(tensor):
        return tensor
    where = f"{checkpoint.tensors[name].file}, tensor {name!r}"
    if is_finite(stored):
        raise CheckpointError(f"{where} has values too large for {dtype}; use dtype bfloat16 or float32.")
    raise CheckpointError(f"{where} has NaN or infinite values; download it again or retrain.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; reads once, ten times as fast as isfinite().all()."""
    import torch

    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def write(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Overwrite parameters in place."""
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data.copy_(values[name])


def max_positions(config: Any) -> int | None:
    """Longest input the configuration allows, in tokens."""
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def as_torch(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint, sharing its pages; read-only by contract."""
    import torch

    array = checkpoint.read(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if checkpoint.tensors[name].dtype == "BF16" else tensor
