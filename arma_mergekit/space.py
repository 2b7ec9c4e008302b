"""Search spaces: which tensors share an alpha, and the one place where points become alphas and back.

It knows tensor names, roles and numbers; no models, searchers or files.

    symbol   meaning                                          shape
    v        a point: the values a searcher proposes          (K,), K = len(space.names)
    a        alphas of the tensors, in the order of `tensors`  (N,)
    a = A v + c                                                A: (N, K) of 0 and 1, c: alphas of what is not searched

The word `kernel` is the exception: four numbers shape a profile over depth x = layer / (layers - 1),

    a(x) = floor + (peak - floor) * exp(-((x - position) / width)^2 / 2).

Words for `groups` (attention) and `rest` (everything else):

    global    one value                          block:N   one per N consecutive layers
    kind      one per kind of matrix             layer     one per layer
    kernel    four numbers, a profile            tensor    one per weight matrix
    layer:qkvo, block:N:qkvo                     the same, each kind of matrix apart

`groups: everything` is one value for attention and rest together, the knob of WiSE-FT (arXiv 2109.01903).
`rest` may also be `base` (alpha 0), `finetuned` (alpha 1) or a number: not searched. Tensors outside the layers
(embeddings, head, final norm) form one group of their own under `block`, `layer` and `tensor`.

`limits` gives values bounds of their own by name or pattern, one number freezes them; `tie` makes several values one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from arma_mergekit.errors import RecipeError, unknown
from arma_mergekit.roles import Role

__all__ = ["WORDS", "Space", "fixed_alpha", "make_space"]

Array = npt.NDArray[np.float64]
Key = Callable[[Role], Hashable]

WORDS = ("global", "kind", "block:N", "kernel", "layer", "tensor", "everything")
PROFILE = ("peak", "position", "floor", "width")
PROFILE_BOUNDS = {"position": (0.0, 1.0), "width": (0.05, 1.0)}


@dataclass(frozen=True)
class Space:
    """A map from points to alphas, with the gradient's way back.

    ``names`` and ``low``/``high`` describe the K values of a point; ``tensors`` the N alphas. ``matrix`` (N, K) and
    ``constant`` (N,) are the linear part; ``profiles`` holds, for each `kernel`, its first column, the rows it
    shapes and their depths.
    """

    tensors: tuple[str, ...]
    names: tuple[str, ...]
    low: Array
    high: Array
    matrix: Array
    constant: Array
    profiles: tuple[tuple[int, npt.NDArray[np.int64], Array], ...] = ()

    def alphas(self, values: npt.ArrayLike) -> Array:
        """Alphas (N,) of a point (K,); values outside the bounds are used as they are."""
        v = np.asarray(values, dtype=np.float64)
        if v.shape != (len(self.names),):
            raise ValueError(f"A point of this space has {len(self.names)} values, but got shape {v.shape}.")
        alphas: Array = np.asarray(self.matrix @ v + self.constant)
        for column, rows, depth in self.profiles:
            peak, position, floor, width = v[column : column + 4]
            alphas[rows] = floor + (peak - floor) * np.exp(-(((depth - position) / width) ** 2) / 2)
        return alphas

    def pullback(self, values: npt.ArrayLike, gradient: npt.ArrayLike) -> Array:
        """dJ/dv (K,) from dJ/da (N,), at the point ``values``."""
        v, g = np.asarray(values, dtype=np.float64), np.asarray(gradient, dtype=np.float64)
        result: Array = self.matrix.T @ g
        for column, rows, depth in self.profiles:
            peak, position, floor, width = v[column : column + 4]
            offset = (depth - position) / width
            bump = np.exp(-(offset**2) / 2)
            slope = (peak - floor) * bump * offset / width
            parts = (bump, slope, 1 - bump, slope * offset)
            result[column : column + 4] = [float(g[rows] @ part) for part in parts]
        return result

    def constant_point(self, alpha: float) -> Array:
        """The point whose every searched tensor has this alpha, clipped to the bounds."""
        point = np.full(len(self.names), alpha)
        for column, _, _ in self.profiles:
            point[column + PROFILE.index("position")] = 0.5
            point[column + PROFILE.index("width")] = 0.3
        clipped: Array = np.clip(point, self.low, self.high)
        return clipped

    def members(self) -> dict[str, tuple[str, ...]]:
        """Tensors shaped by each value of a point."""
        uses = self.matrix != 0
        for column, rows, _ in self.profiles:
            uses[rows, column : column + 4] = True
        return {
            name: tuple(t for t, used in zip(self.tensors, uses[:, k], strict=True) if used)
            for k, name in enumerate(self.names)
        }


def fixed_alpha(word: str | float) -> float | None:
    """Alpha of a `rest` that is not searched (`base`, `finetuned`, a number), else None."""
    if isinstance(word, str):
        return {"base": 0.0, "finetuned": 1.0}.get(word)
    return float(word)


def make_space(
    roles: Mapping[str, Role],
    groups: str | float,
    rest: str | float,
    bounds: tuple[float, float] = (-1.0, 2.5),
    limits: Mapping[str, tuple[float, float]] | None = None,
    tie: Sequence[Sequence[str]] = (),
) -> Space:
    """Build the space over ``roles`` (tensor name to role); RecipeError for unknown words or an empty space.

    ``limits``: name or pattern of values to (low, high), in the order they apply; ``tie``: names or patterns of values
    that are to be one value.
    """
    space = _grouping(roles, groups, rest, bounds)
    for patterns in tie:
        space = _tied(space, sorted({k for pattern in patterns for k in _columns(space, pattern)}))
    for pattern, pair in (limits or {}).items():
        space = _limited(space, _columns(space, pattern), pair)
    return space


def _columns(space: Space, pattern: str) -> list[int]:
    found = [k for k, name in enumerate(space.names) if fnmatchcase(name, pattern)]
    if not found:
        raise RecipeError(unknown("group of this search space", pattern, space.names))
    return found


def _tied(space: Space, columns: Sequence[int]) -> Space:
    """One value, named like the first, in place of several."""
    if any(start <= k < start + len(PROFILE) for k in columns for start, _, _ in space.profiles):
        raise RecipeError("The values of a `kernel` profile cannot be tied.")
    first, others = columns[0], list(columns[1:])
    matrix = space.matrix.copy()
    matrix[:, first] = space.matrix[:, columns].sum(1)
    names = tuple(name for k, name in enumerate(space.names) if k not in others)
    moved = tuple((start - sum(k < start for k in others), rows, x) for start, rows, x in space.profiles)
    low, high = np.delete(space.low, others), np.delete(space.high, others)
    return Space(space.tensors, names, low, high, np.delete(matrix, others, 1), space.constant, moved)


def _limited(space: Space, columns: Sequence[int], pair: tuple[float, float]) -> Space:
    low, high = space.low.copy(), space.high.copy()
    low[columns], high[columns] = pair
    return replace(space, low=low, high=high)


def _grouping(
    roles: Mapping[str, Role], groups: str | float, rest: str | float, bounds: tuple[float, float]
) -> Space:
    """The space of two words."""
    if groups == "everything":
        return _assemble(tuple(roles), [("everything", list(roles))], {}, [], bounds)
    attention = [t for t, r in roles.items() if r.attention]
    others = [t for t, r in roles.items() if not r.attention]
    searched: list[tuple[str, list[str]]] = []
    profiles: list[tuple[str, list[str], list[float]]] = []
    constants: dict[str, float] = {}
    for word, members, prefix in ((groups, attention, "attention"), (rest, others, "rest")):
        alpha = fixed_alpha(word)
        if alpha is not None:
            constants.update(dict.fromkeys(members, alpha))
        elif word == "kernel":
            inside, outside = _by_depth(members, roles)
            profiles.append((prefix, list(inside), list(inside.values())))
            if outside:
                searched.append((f"{prefix}.outside", outside))
        else:
            searched += _grouped(members, roles, _key(str(word)), prefix)
    return _assemble(tuple(roles), searched, constants, profiles, bounds)


def _key(word: str) -> Key:
    """The function that tells which group a role belongs to."""
    head, _, split = word.partition(":")
    if head == "block":
        size_text, _, split = split.partition(":")
        if not size_text.isdigit() or int(size_text) < 1:
            raise RecipeError(f"{word!r} needs a positive number of layers, as in block:6.")
        size = int(size_text)
        return _with_kind(lambda r: None if r.layer is None else (r.stack, r.layer // size), split)
    simple: dict[str, Key] = {
        "global": lambda r: "",
        "kind": lambda r: r.kind,
        "layer": lambda r: None if r.layer is None else (r.stack, r.layer),
        # the norms of a layer share one, and so does everything outside the layers: too few parameters to tell apart
        "tensor": lambda r: None if r.layer is None else (r.stack, r.layer, r.kind),
    }
    if head not in simple:
        raise RecipeError(unknown("search space", word, WORDS))
    return _with_kind(simple[head], split)


def _with_kind(key: Key, split: str) -> Key:
    if split not in ("", "qkvo"):
        raise RecipeError(unknown("split of a search space", split, ["qkvo"]))
    return (lambda r: (key(r), r.kind)) if split else key


def _grouped(
    members: Sequence[str], roles: Mapping[str, Role], key: Key, prefix: str
) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for tensor in members:
        groups.setdefault(_label(key(roles[tensor]), prefix), []).append(tensor)
    return list(groups.items())


def _label(key: Hashable, prefix: str) -> str:
    """A readable name of a group: `q`, `rest.3`, `12.gate`, `rest.outside`."""
    flat: list[Any] = []
    for part in key if isinstance(key, tuple) else (key,):
        flat += part if isinstance(part, tuple) else (part,)
    words = ["outside" if part is None else str(part) for part in flat if part != ""]
    return ".".join([prefix, *words])


def _by_depth(members: Sequence[str], roles: Mapping[str, Role]) -> tuple[dict[str, float], list[str]]:
    layers = {t: layer for t in members if (layer := roles[t].layer) is not None}
    last = max(layers.values(), default=0) or 1
    return {t: layer / last for t, layer in layers.items()}, [t for t in members if t not in layers]


def _assemble(
    tensors: tuple[str, ...],
    searched: Sequence[tuple[str, list[str]]],
    constants: Mapping[str, float],
    profiles: Sequence[tuple[str, list[str], list[float]]],
    bounds: tuple[float, float],
) -> Space:
    names = [name for name, _ in searched]
    names += [f"{prefix}.{part}" for prefix, members, _ in profiles if members for part in PROFILE]
    if not names:
        raise RecipeError(
            "The search space is empty: nothing is left to search with these `groups` and `rest`."
        )
    row = {tensor: i for i, tensor in enumerate(tensors)}
    matrix = np.zeros((len(tensors), len(names)))
    for column, (_, members) in enumerate(searched):
        matrix[[row[t] for t in members], column] = 1
    constant = np.array([constants.get(t, 0.0) for t in tensors])
    placed, column = [], len(searched)
    for _, members, depths in profiles:
        if members:
            placed.append((column, np.array([row[t] for t in members]), np.array(depths)))
            column += len(PROFILE)
    limits = [PROFILE_BOUNDS.get(name.rpartition(".")[2], bounds) for name in names]
    low, high = (np.array([limit[i] for limit in limits]) for i in (0, 1))
    return Space(tensors, tuple(names), low, high, matrix, constant, tuple(placed))
