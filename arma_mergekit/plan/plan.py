"""Recipe + headers -> what happens to every tensor, what it costs, and every error there is.

    tensor              alpha of each fine-tuned model
    inside attention    its parameter `alpha`
    any other           `rest`: base -> 0, finetuned -> 1 (one fine-tuned model only), a number -> that number
    not floating-point  0: copied from the base

A tensor is averaged unless its alphas make it equal one side, which is then copied. No weight is read; it
knows no torch and no mergekit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, open_model
from arma_mergekit.checkpoint.header import DTYPE_BITS, FLOATS
from arma_mergekit.checkpoint.model import some
from arma_mergekit.errors import CheckpointError, RecipeError
from arma_mergekit.kernel import round_alpha, sole_operand
from arma_mergekit.plan.compare import compare, examine, shape_errors
from arma_mergekit.plan.selectors import NEVER_USED, Scope, check_selectors
from arma_mergekit.recipe import ModelEntry, Recipe, resolve
from arma_mergekit.recipe.document import read_yaml
from arma_mergekit.recipe.settings import number
from arma_mergekit.roles import Role, role, roles

__all__ = ["Plan", "PlannedTensor", "plan", "plan_file"]

SHARD_SIZE = 5_000_000_000  # mergekit's default out_shard_size, collected in memory before it is written
SENSIBLE = (-1.5, 3.0)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the result.

    ``alphas``: one per fine-tuned model, as the kernel rounds them. ``source``: what is read, ``base``, the
    reference of a fine-tuned model, or ``both``. ``dtype`` is the result's, as safetensors spells it;
    ``converted`` tells that its source has another, or is read as another. NaN is an alpha that a search has yet to
    find.
    """

    name: str
    role: Role
    action: Literal["average", "copy"]
    alphas: tuple[float, ...]
    source: str
    dtype: str
    numel: int
    bytes_read: int
    bytes_written: int
    converted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As `arma plan --json` prints it; alpha is a list if there are several fine-tuned models."""
        alphas = [None if math.isnan(a) else a for a in self.alphas]
        return {
            "name": self.name,
            "layer": self.role.layer,
            "role": self.role.part,
            "action": self.action,
            "alpha": alphas[0] if len(alphas) == 1 else alphas,
            "source": self.source,
        }


@dataclass(frozen=True)
class Plan:
    """What a recipe does. With ``errors`` it cannot be done, and ``tensors`` may lack what they concern.

    ``peak_memory_bytes``: weights that `mergekit-yaml` with its default shard size holds at once, beside
    Python and libraries. ``base`` and ``finetuned`` are the checkpoints that could be opened.
    """

    tensors: tuple[PlannedTensor, ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    bytes_read: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    base: Checkpoint | None = None
    finetuned: tuple[Checkpoint, ...] = ()

    def check(self) -> Plan:
        """The plan itself; RecipeError with all its errors, one a line, if it has any."""
        if self.errors:
            raise RecipeError("\n".join(self.errors))
        return self

    def as_dict(self) -> dict[str, Any]:
        """The document that `arma plan --json` prints."""
        return {
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "errors": list(self.errors),
            "warnings": list(self.warnings),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def plan(recipe: Recipe, *, require_alpha: bool = True) -> Plan:
    """Plan a recipe; what is wrong with recipe or models is in ``errors``, nothing is raised.

    Without ``require_alpha``, attention tensors for which the recipe gives none are planned as averaged.
    """
    planner = _Planner(recipe, require_alpha)
    opened = [planner.open(ref) for ref in (recipe.base_model, *(e.model for e in recipe.finetuned))]
    base, tuned = opened[0], [c for c in opened[1:] if c is not None]
    known = next((c for c in opened if c is not None), None)
    if known is None:
        return planner.finish([], base, tuned)
    placed = roles(known.tensors, known.config)
    if base is not None:
        for checkpoint in tuned:
            placed = planner.compare(base, checkpoint, placed)
    planner.place(placed, known.config)
    planner.check_settings()
    if base is None or len(tuned) < len(recipe.finetuned):
        return planner.finish([], base, tuned)
    return planner.finish(planner.tensors(base, tuned), base, tuned)


def plan_file(path: str | Path) -> Plan:
    """`plan` of a file; errors in the recipe do not hide those of its models. RecipeError if it is no YAML.

    A recipe with suites and no alpha at all is one for arma-tune: its alphas are not missing but unknown.
    """
    path = Path(path)
    content = read_yaml(path)
    try:
        recipe = Recipe.parse(content, path)
        given = any(recipe.alpha_settings(entry) for entry in recipe.finetuned)
        return plan(recipe, require_alpha=given or not recipe.evals)
    except RecipeError as error:
        errors = str(error).splitlines()
    try:
        models = [{"model": entry["model"]} for entry in content["models"]]
        skeleton = {
            "merge_method": content["merge_method"],
            "base_model": content["base_model"],
            "models": models,
        }
        found = plan(Recipe.parse(skeleton, path), require_alpha=False)
    except (RecipeError, KeyError, TypeError):  # not even the models can be told
        return Plan(errors=tuple(errors))
    return Plan(errors=(*errors, *found.errors))


@dataclass
class _Planner:
    """Collects errors and warnings while the plan grows."""

    recipe: Recipe
    require_alpha: bool
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    placed: Mapping[str, Role] = field(default_factory=dict)
    scope: Scope = field(default_factory=lambda: Scope({}, {}))

    def open(self, ref: str) -> Checkpoint | None:
        """A model, or None and its errors."""
        try:
            checkpoint = open_model(ref)
        except CheckpointError as error:
            self.errors += str(error).splitlines()
            return None
        self.errors += examine(checkpoint)
        return checkpoint

    def compare(self, base: Checkpoint, tuned: Checkpoint, placed: Mapping[str, Role]) -> dict[str, Role]:
        """The tensors that the two have in common, after noting how they differ."""
        both = {**base.tensors, **tuned.tensors}
        found = compare(base, tuned, placed if both.keys() == placed.keys() else roles(both, base.config))
        self.errors += found.errors
        self.warnings += found.warnings
        return {n: r for n, r in placed.items() if n in tuned.tensors and n not in found.left_out}

    def place(self, placed: Mapping[str, Role], config: Mapping[str, Any]) -> None:
        """Fix roles and depths of all tensors."""
        self.placed = placed
        self.scope = Scope.of(placed, config)
        unlike = [n for n, r in placed.items() if role(n).attention != r.attention]
        if unlike:
            self.warnings.append(
                f"{some(unlike)} can only be placed by config.json and the tensors beside, which "
                "mergekit-yaml does not show a merge method: it confuses `alpha` and `rest` there."
            )

    def check_settings(self) -> None:
        """Filters that match nothing, lists of another length than the model has layers."""
        file, recipe = str(self.recipe.path), self.recipe
        own = {
            e.model: (f"models[{i}].parameters.alpha", e.parameters.alpha)
            for i, e in enumerate(recipe.models)
        }
        chains = [[own[e.model], ("parameters.alpha", recipe.parameters.alpha)] for e in recipe.finetuned]
        rest = [("parameters.rest", recipe.parameters.rest)]
        warnings: list[str] = []
        for attention, chain in [*((True, c) for c in chains), (False, rest)]:
            given = [(where, setting) for where, setting in chain if setting is not None]
            found = check_selectors(given, self.scope, attention, file)
            self.errors += found.errors
            warnings += found.warnings
        for warning, times in Counter(warnings).items():
            # the alpha of all models is of use if any model has none of its own
            shared = "parameters.alpha" in warning and "models[" not in warning
            if not (shared and warning.endswith(NEVER_USED) and times < len(chains)):
                self.warnings.append(warning)

    def tensors(self, base: Checkpoint, tuned: Sequence[Checkpoint]) -> list[PlannedTensor]:
        """Every tensor of the result."""
        missing: dict[str, list[str]] = {}
        planned = []
        for name, place in self.placed.items():
            if base.tensors[name].dtype not in FLOATS:
                alphas: list[float] = [0.0] * len(tuned)
            elif place.attention:
                alphas = [self._alpha(entry, name, missing) for entry in self.recipe.finetuned]
            else:
                alphas = self._rest(name, len(tuned))
            planned.append(self._planned(name, place, alphas, base, tuned))
        for i, side in enumerate(
            tuned
        ):  # what is not read of it may have any shape, as an embedding with new tokens
            read = [t.name for t in planned if t.alphas[i] != 0]
            self.errors += shape_errors(base, side, self.placed, read)
        self._note_missing(missing)
        self._note_unusual(planned)
        return planned

    def _alpha(self, entry: ModelEntry, name: str, missing: dict[str, list[str]]) -> float:
        for setting in self.recipe.alpha_settings(entry):
            value = resolve(setting, name, self.scope.depth[name], validate=number)
            if value is not None:
                return float(value)
        missing.setdefault(entry.model, []).append(name)
        return math.nan

    def _rest(self, name: str, count: int) -> list[float]:
        value = resolve(self.recipe.parameters.rest, name, self.scope.depth[name])
        if value in (None, "finetuned"):
            if count > 1:
                self.errors.append(
                    f"parameters.rest in {self.recipe.path} is finetuned, but there are {count} fine-tuned "
                    "models to take it from; give base, or a number as the alpha of each."
                )
            return [1.0] * count
        return [0.0 if value == "base" else float(value)] * count

    def _planned(
        self, name: str, place: Role, given: Sequence[float], base: Checkpoint, tuned: Sequence[Checkpoint]
    ) -> PlannedTensor:
        alphas = tuple(a if math.isnan(a) else round_alpha(a) for a in given)
        only = None if any(map(math.isnan, alphas)) else sole_operand(alphas)
        used = [c for c, a in zip(tuned, alphas, strict=True) if a != 0]
        read = [base, *used] if only is None else [base if only < 0 else tuned[only]]
        info = read[0].tensors[name]
        wanted = self.recipe.out_dtype or self.recipe.dtype
        floats = info.dtype in FLOATS
        dtype = DTYPES[wanted] if wanted and floats else info.dtype
        between = DTYPES[self.recipe.dtype] if self.recipe.dtype and floats else info.dtype
        return PlannedTensor(
            name,
            place,
            "average" if only is None else "copy",
            alphas,
            "both" if only is None else "base" if only < 0 else tuned[only].ref,
            dtype,
            info.numel,
            bytes_read=sum(c.bytes_read(name) for c in read),
            bytes_written=info.numel * DTYPE_BITS[dtype] // 8,
            converted={dtype, between} != {info.dtype},
        )

    def _note_missing(self, missing: Mapping[str, Sequence[str]]) -> None:
        if missing and not self.require_alpha:
            self.warnings.append(f"{self.recipe.path} does not give all alphas yet; arma-tune finds them.")
            return
        for model, names in missing.items():
            self.errors.append(
                f"{self.recipe.path} gives {model} no alpha for {some(names)}; set parameters.alpha, or "
                "add an entry without filter, or find alphas with arma-tune."
            )

    def _note_unusual(self, planned: Sequence[PlannedTensor]) -> None:
        low, high = SENSIBLE
        far = {a: t.name for t in planned for a in t.alphas if a < low or a > high}
        if far:
            worst = max(far, key=abs)
            self.warnings.append(
                f"Alpha leaves [{low:g}, {high:g}], the furthest is {worst:g} for {far[worst]}; extrapolating "
                "that far seldom helps."
            )
        if planned and all(t.action == "copy" for t in planned):
            sides = " and ".join(sorted({t.source for t in planned}))
            self.warnings.append(f"Nothing is averaged: every tensor is copied from {sides}.")

    def finish(
        self, tensors: Sequence[PlannedTensor], base: Checkpoint | None, tuned: Sequence[Checkpoint]
    ) -> Plan:
        """The plan of these tensors."""
        checkpoints = [c for c in (base, *tuned) if c is not None]
        return Plan(
            tuple(tensors),
            tuple(dict.fromkeys(self.errors)),
            tuple(dict.fromkeys(self.warnings)),
            sum(t.bytes_read for t in tensors),
            sum(t.bytes_written for t in tensors),
            max(_collected(tensors), _adapted(checkpoints)),
            base,
            tuple(tuned),
        )


def _collected(tensors: Iterable[PlannedTensor]) -> int:
    """Most bytes of new tensors in one shard; what is only copied stays a map of its file."""
    most = fresh = shard = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        if shard and shard + tensor.bytes_written > SHARD_SIZE:
            fresh = shard = 0
        shard += tensor.bytes_written
        fresh += tensor.bytes_written if tensor.action == "average" or tensor.converted else 0
        most = max(most, fresh)
    return most


def _adapted(checkpoints: Iterable[Checkpoint]) -> int:
    """Bytes of the largest model that mergekit-yaml would have to load whole to merge an adapter into it."""
    adapted = [c for c in checkpoints if isinstance(c, AdaptedCheckpoint)]
    return max((sum(t.nbytes for t in c.tensors.values()) for c in adapted), default=0)
