"""``merge_method: arma``: the formula of kernel.py bound to mergekit's method API.

    tensor              alpha of each fine-tuned model
    inside attention    its parameter `alpha`
    any other           `rest`: base -> 0, finetuned -> 1 (one fine-tuned model only), a number -> that number

It sees one tensor at a time, with its name; where mergekit has the base open, the other names and config.json
settle what one name leaves open (roles.py). mergekit resolves numbers, lists over depth and filters before we
see them. Importing this module adds the method to mergekit's registry.

What is only copied is returned as it came: not converted, not read, and its other side not touched, so the
pages of a memory-mapped checkpoint that a recipe does not need are never loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import PlainValidator

from arma_mergekit.errors import CheckpointError, RecipeError
from arma_mergekit.kernel import average, one_thread, sole_operand
from arma_mergekit.roles import Role, role, roles

__all__ = ["Arma", "arma", "register"]


class Unusable(float):
    """What stands where a number belongs, kept through mergekit's interpolation until the tensor is known."""

    raw: Any

    def __new__(cls, raw: Any) -> Unusable:
        """Keep the value as the recipe spells it."""
        self = super().__new__(cls, "nan")
        self.raw = raw
        return self

    def _itself(self, _other: Any) -> Any:
        return self

    __add__ = __radd__ = __mul__ = __rmul__ = _itself


def number(value: Any) -> float | None:
    """A finite number, also when spelled as text; None for nothing given; `Unusable` for anything else."""
    if value is None or isinstance(value, Unusable):
        return value
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    return parsed if math.isfinite(parsed) else Unusable(value)


def number_or_word(value: Any) -> float | str | None:
    """`number`, or one of the two words that `rest` knows."""
    return value if value in ("base", "finetuned") else number(value)


class Arma(GroupMergeMethod):  # type: ignore[misc]
    """The merge method; `arma` is its one instance.

    It runs where the tensors are: reading and writing take the time, so nothing is moved to an accelerator.
    An optional tensor that only the base has is kept; one that only the fine-tuned model has is left out,
    with mergekit's warning, because the output gets the base's config.
    """

    spec = MergeMethodSpec(
        name="arma",
        pretty_name="ARMA",
        reference_url="https://github.com/leileicheng854/ARAM",
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.BASE_OR_SKIP,
        uses_accelerator=False,
        parameters=(
            ParameterSpec(
                "alpha",
                Annotated[Any, PlainValidator(number)],
                ParameterScope.NON_BASE,
                default=None,  # filters need not match outside attention; elsewhere `usable` asks for it
                description="Weight of a fine-tuned model in attention tensors: 0 = base, 1 = fine-tuned.",
            ),
            ParameterSpec(
                "rest",
                Annotated[Any, PlainValidator(number_or_word)],
                ParameterScope.SHARED,
                default="finetuned",
                description="What all other tensors take: base, finetuned, or an alpha of their own.",
            ),
        ),
    )

    def _execute_resolved(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        *,
        dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        batch_options: BatchOptions | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Skip mergekit's promotion of mixed inputs, which turns bf16 and fp16 into a float32 checkpoint."""
        for value in (dtype, out_dtype):
            if value is not None and not value.is_floating_point:
                raise ValueError(f"dtype and out_dtype must be floating-point types, but got {value}.")
        options, dtypes = batch_options or BatchOptions(), [dtype] * len(groups)
        return self._execute(groups, parameters, options, input_dtypes=dtypes, out_dtype=out_dtype)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """One tensor per group, in order; a dtype of None leaves tensors as they are."""
        results = []
        for group, values, dtype in zip(groups, parameters, input_dtypes, strict=True):
            merged = merge(group, dtype, **values)
            results.append(cast(merged, out_dtype))
        return tuple(results)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor; see `merge`."""
        return merge(group, None, **parameters)


def merge(group: TensorGroup, dtype: torch.dtype | None, *, alpha: Any, rest: Any) -> torch.Tensor:
    """The average of a group, or the very input it equals; errors name the tensor.

    ``alpha`` maps the id of each fine-tuned entry to its value, ``dtype`` converts what is read first.
    """
    name = group.metadata.name
    if not name:
        raise RecipeError("merge_method arma must know which tensor it merges: pass its name (name=...).")
    tuned = group.non_base
    if role_in(group.base.id, name).attention:
        alphas = [usable(alpha[entry.id], f"alpha of {entry.id}", name) for entry in tuned]
    else:
        alphas = rest_alphas(name, len(tuned), rest)
    tensors = [group.base.tensor, *(entry.tensor for entry in tuned)]
    if not all(tensor.is_floating_point() for tensor in tensors):
        return agreed(name, tensors)
    only = sole_operand(alphas)
    if only is not None:
        return cast(tensors[only + 1], dtype)
    packed = [str(tensor.dtype) for tensor in tensors if tensor.dtype.itemsize < 2]
    if packed:  # such values mean nothing without their scales, which are tensors of their own
        raise CheckpointError(
            f"{name} is quantised ({packed[0]}) and can't be averaged: name the unquantised model."
        )
    try:
        with torch.no_grad(), one_thread():
            base, *others = (cast(tensor, dtype) for tensor in tensors)
            return average(base, others, alphas)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def role_in(base: Hashable, name: str) -> Role:
    """What the tensor is: by its checkpoint if mergekit has opened one under that id, else by its name."""
    from mergekit.io.tasks import LoaderCache

    loader = LoaderCache.loaders.get(base)
    return (placed(loader).get(name) if loader else None) or role(name)


@lru_cache(maxsize=4)
def placed(loader: Any) -> dict[str, Role]:
    """Roles of all tensors of an open checkpoint."""
    file = Path(loader.index.base_path, "config.json")
    config = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return roles(loader.index.tensor_paths, config)


def rest_alphas(name: str, models: int, rest: Any) -> list[float]:
    """Alphas of a tensor outside attention, one per fine-tuned model; RecipeError if `rest` does not say."""
    if rest == "base":
        return [0.0] * models
    if rest != "finetuned":
        return [usable(rest, "rest", name)] * models
    if models > 1:
        raise RecipeError(
            f"Parameter rest is finetuned, but there are {models} fine-tuned models to take {name} from: "
            "give base, or a number as the alpha of each."
        )
    return [1.0]


def usable(value: float | None, parameter: str, tensor: str) -> float:
    """The value, or a RecipeError that names parameter and tensor and shows what the recipe has there."""
    if value is None:
        raise RecipeError(f"Parameter {parameter} is missing for {tensor}: give it a number.")
    if isinstance(value, Unusable):
        kind = "base, finetuned or a finite number" if parameter == "rest" else "a finite number"
        raise RecipeError(f"Parameter {parameter} must be {kind} for {tensor}, but got {value.raw!r}.")
    return value


def agreed(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A buffer of integers or booleans: the base's, if all sides have the same; else CheckpointError."""
    first = tensors[0]
    if any(tensor.dtype != first.dtype or not torch.equal(tensor, first) for tensor in tensors[1:]):
        kinds = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        raise CheckpointError(
            f"{name} ({kinds}) is not floating-point and differs between the models: it can't be averaged, "
            "so make it the same in all of them."
        )
    return first


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in that dtype, itself if it has it already or is not floating-point."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


arma = Arma()


def register() -> None:
    """Make mergekit know the method, unless it does already or has come to read entry points itself."""
    known = {method.spec.name for method in registry.registered_methods()}
    if "arma" not in known and not hasattr(registry, "entry_points"):
        registry.register(arma)


register()
