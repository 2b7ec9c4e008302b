"""Alphas per tensor, written as a recipe that mergekit runs: filters, and lists with one value per layer.

mergekit's filters are substrings and the first that matches wins; a list over depth with one value per layer is exact.
What is written is resolved again with mergekit's rules and compared, so a recipe that says something else cannot
leave this module. It knows names, roles and numbers; no tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arma_mergekit.errors import RecipeError
from arma_mergekit.recipe import resolve
from arma_mergekit.roles import Role, depth, layer_counts

__all__ = ["stock_recipe", "tuned_recipe"]

OURS = ("evals", "tune")
Values = tuple[float | None, ...]  # one per layer; None: any value will do


@dataclass(frozen=True)
class Template:
    """Tensors that differ only in their layer; outside the layers, one tensor."""

    filter: str
    values: Values
    layered: bool


def tuned_recipe(
    raw: Mapping[str, Any], roles: Mapping[str, Role], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """The recipe ``raw`` with ``alpha`` and ``rest`` that give each tensor of ``roles`` its alpha.

    Tensors without an alpha (equal in both models) may get any.
    """
    result = {k: copy.deepcopy(v) for k, v in raw.items() if k not in OURS}
    attention = {t: r for t, r in roles.items() if r.attention}
    others = {t: r for t, r in roles.items() if not r.attention}
    alpha = _setting(attention, alphas, default=0.0)
    rest = _setting(others, alphas, default=0.0)
    finetuned(result)["parameters"] = {"alpha": alpha}
    result["parameters"] = {"rest": rest}
    return result


def stock_recipe(
    raw: Mapping[str, Any], roles: Mapping[str, Role], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """The same merge for a mergekit without this package: `linear` with weights 1 - alpha and alpha."""
    result = {
        k: copy.deepcopy(v) for k, v in raw.items() if k not in (*OURS, "parameters", "models", "base_model")
    }
    result["merge_method"] = "linear"
    sides = (
        (raw["base_model"], {t: round(1 - a, 7) for t, a in alphas.items()}, 1.0),
        (finetuned(raw)["model"], dict(alphas), 0.0),
    )
    result["models"] = []
    for model, weights, default in sides:
        setting = _setting(roles, weights, default)
        result["models"].append({"model": model, "parameters": {"weight": setting}})
    # extrapolated weights still add up to 1, so there is nothing to normalise
    result["parameters"] = {"normalize": False}
    return result


def finetuned(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the one model that is not the base."""
    entry: dict[str, Any] = next(m for m in raw["models"] if m["model"] != raw["base_model"])
    return entry


def _setting(roles: Mapping[str, Role], values: Mapping[str, float], default: float) -> Any:
    """The shortest setting that gives each tensor its value; RecipeError if mergekit's filters cannot say it."""
    short = _by_template(roles, values, default)
    if _disagreement(roles, values, short) is None:
        return short
    # two stacks whose tensors differ in nothing after the layer's number: name every tensor
    whole = [{"filter": t, "value": values[t]} for t in sorted(values, key=lambda t: -len(t)) if t in roles]
    setting = [*whole, {"value": default}]
    wrong = _disagreement(roles, values, setting)
    if wrong is not None:
        raise RecipeError(
            f"mergekit's filters cannot tell {wrong} from another tensor. Use a coarser search space."
        )
    return setting


def _by_template(roles: Mapping[str, Role], values: Mapping[str, float], default: float) -> Any:
    """A number, a list over depth, or filters before a default: one filter for tensors that differ in layer only."""
    templates = _templates(roles, values)
    layered = [t for t in templates if t.layered]
    common = _most_common([t.values for t in layered]) if layered else (default,)
    rest = common[0] if len(set(common)) == 1 else list(common)
    filters = [
        {"filter": t.filter, "value": _shortest(t.values, common)}
        for t in sorted(templates, key=lambda t: -len(t.filter))
        if not _fits(t, common)
    ]
    return [*filters, {"value": rest}] if filters else rest


def _fits(template: Template, common: Sequence[float]) -> bool:
    """Whether the default gives the template its values; outside the layers, lists give their first."""
    wanted = common if template.layered else common[:1]
    return all(v is None or v == c for v, c in zip(template.values, wanted, strict=False)) and (
        not template.layered or len(template.values) == len(common)
    )


def _shortest(values: Values, common: Sequence[float]) -> Any:
    """Values with the gaps filled: a number if they all agree, else a list."""
    known = [v for v in values if v is not None]
    if len(set(known)) <= 1:
        return known[0] if known else common[0]
    return [known[0] if v is None else v for v in values]


def _most_common(rows: Sequence[Values]) -> tuple[float, ...]:
    """The row most templates share; gaps filled with 0."""
    best = max(rows, key=lambda row: sum(row == other for other in rows))
    fill = next((v for v in best if v is not None), 0.0)
    return tuple(fill if v is None else v for v in best)


def _templates(roles: Mapping[str, Role], values: Mapping[str, float]) -> list[Template]:
    """Tensors grouped by their name without the layer's number."""
    layers = max(layer_counts(roles).values(), default=0)
    rows: dict[str, list[float | None]] = {}
    single: list[Template] = []
    for tensor, role in roles.items():
        suffix = layer_suffix(tensor, role.layer)
        if suffix is None or role.layer is None:
            single.append(Template(tensor, (values.get(tensor),), layered=False))
        else:
            rows.setdefault(suffix, [None] * layers)[role.layer] = values.get(tensor)
    return [Template(suffix, tuple(row), layered=True) for suffix, row in rows.items()] + single


def layer_suffix(tensor: str, layer: int | None) -> str | None:
    """What follows the layer's number in a tensor's name: `self_attn.q_proj.weight`; None outside the layers."""
    if layer is None:
        return None
    found = re.search(rf"\.{layer}\.(.+)$", f".{tensor}")
    return found.group(1) if found else None


def _disagreement(roles: Mapping[str, Role], wanted: Mapping[str, float], setting: Any) -> str | None:
    """The first tensor to which mergekit's rules give another value than wanted, or None."""
    counts = layer_counts(roles)
    for tensor, role in roles.items():
        got = resolve(setting, tensor, depth(role, counts))
        if tensor in wanted and (not isinstance(got, (int, float)) or abs(got - wanted[tensor]) > 1e-9):
            return tensor
    return None
