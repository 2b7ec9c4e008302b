"""Whether filters select what their author meant, and lists over depth have one value per layer.

It knows settings and tensor names; mergekit itself takes any filter and any list in silence.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arma_mergekit.checkpoint.model import some
from arma_mergekit.plan.compare import Findings, setting
from arma_mergekit.recipe import Setting
from arma_mergekit.recipe.settings import conditions
from arma_mergekit.roles import Role, depth, layer_counts

__all__ = ["NEVER_USED", "Scope", "check_selectors"]

SHOWN_WORDS = 12
LEAVES = ("weight", "bias")
NEVER_USED = " is never used: entries before it take all that it matches."


@dataclass(frozen=True)
class Scope:
    """All tensors with their roles, and their depth t in [0, 1] as mergekit counts it."""

    roles: Mapping[str, Role]
    depth: Mapping[str, float]

    @classmethod
    def of(cls, roles: Mapping[str, Role], config: Mapping[str, Any]) -> Scope:
        """Depth i / (n - 1) in a stack of n layers (1 if n is 1), 0 outside layers."""
        counts = layer_counts(roles)
        said = setting(config, "num_hidden_layers")
        if isinstance(said, int) and 0 < said < counts.get("", 0):
            counts[""] = said  # layers beyond are extra heads (multi-token prediction)
        return cls(roles, {name: depth(role, counts) for name, role in roles.items()})

    def layers(self, names: Iterable[str]) -> set[int]:
        """Numbers of layers of the stacks these tensors are in."""
        counts = layer_counts(self.roles)
        return {counts[self.roles[n].stack] for n in names if self.roles[n].layer is not None}


def check_selectors(
    chain: Sequence[tuple[str, Setting]], scope: Scope, attention: bool, file: str
) -> Findings:
    """Errors and warnings on settings in order of precedence, each with its place in ``file``."""
    found = Findings()
    ours = {n for n, r in scope.roles.items() if r.attention == attention}
    free = set(ours)
    for where, given in chain:
        for wanted, value in conditions(given):
            matched = {n for n in scope.roles if wanted is None or wanted in n}
            what = f"{where} in {file}" if wanted is None else f"Filter {wanted!r} of {where} in {file}"
            if wanted is not None:
                found.errors += _empty(wanted, what, matched, ours, scope, attention)
                found.warnings += _number_cut_short(wanted, what, matched & ours)
            if matched & ours and not matched & free:
                found.warnings.append(f"{what}{NEVER_USED}")
            found.warnings += _length(value, what, scope.layers(matched & free))
            free -= matched
    return found


def _empty(
    wanted: str, what: str, matched: Collection[str], ours: Collection[str], scope: Scope, attention: bool
) -> Iterator[str]:
    """A filter that selects nothing, or nothing that its parameter is about."""
    if not matched:
        yield f"{what} matches no tensor.{_hint(wanted, scope.roles)}"
    elif not any(name in ours for name in matched):
        kind, other = ("outside attention", "rest") if attention else ("inside attention", "alpha")
        yield f"{what} matches only tensors {kind} ({some(matched)}), which follow `{other}`; put it there."


def _hint(wanted: str, names: Iterable[str]) -> str:
    """Nearest part of a tensor's name, and the parts there are."""
    parts = Counter(
        part for name in names for part in name.split(".") if not part.isdigit() and part not in LEAVES
    )
    size = wanted.strip(".").count(".") + 1
    candidates = set(parts)
    if size > 1:
        split = [name.split(".") for name in names]
        candidates |= {".".join(p[i : i + size]) for p in split for i in range(len(p) - size + 1)}
    near = difflib.get_close_matches(wanted, sorted(candidates), n=1, cutoff=0.5)
    known = ", ".join(part for part, _ in parts.most_common(SHOWN_WORDS))
    return (f" Did you mean {near[0]}?" if near else "") + f" Known: {known}."


def _number_cut_short(wanted: str, what: str, matched: Iterable[str]) -> Iterator[str]:
    """`layers.1` is also in `layers.11`."""
    if not wanted[-1].isdigit():
        return
    found = {match[0] for name in matched if (match := re.search(rf"{re.escape(wanted)}\d+", name))}
    if found:
        yield f"{what} also matches {some(found)}; end it with a dot to mean one layer: {wanted + '.'!r}."


def _length(value: Any, what: str, layers: Collection[int]) -> Iterator[str]:
    """A list over depth with another number of values than there are layers."""
    if not isinstance(value, list) or len(value) == 1 or len(value) in layers:
        return
    if layers:
        counts = " or ".join(map(str, sorted(layers)))
        yield f"{what} has {len(value)} values for {counts} layers: mergekit interpolates over depth."
    else:
        yield f"{what} is a list, but selects tensors outside layers only: mergekit takes its first value."
