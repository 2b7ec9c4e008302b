"""Average two transformers models in memory, and find the alpha whose attention stays near both.

It knows torch models and batches of tokens; no files, recipes, suites or labels.

    W(alpha) = W_1 + alpha (W_2 - W_1)
    J(alpha) = D(alpha; 1, X) / D(2; 1, X) + rho D(alpha; 2, Y) / D(1; 2, Y)

    symbol       meaning                                                        unit
    1, 2         model_1 (the base) and model_2 (the fine-tuned one)
    alpha        weight of model_2, for attention tensors; `rest` says the others'
    D(s; t, X)   divergence of attention rows of s from those of t on texts X   of the metric; mean over heads
    X, Y         texts for the side of model_1 and of model_2; Y = X if not given
    J            rho for model_1 itself, 1 for model_2 itself                   none

J needs no labels. It falls from both ends, so its optimum lies between them, unlike that of ARMA's script
(`model_merge_optimizer`, GitHub leileicheng854/ARAM), whose function names these are: there J is the difference of the
first layer from model_2 alone, so the best average is model_2 itself (``legacy=True`` shows it). The two sides and
the label-free mode are ours.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from arma_mergekit.attention import (
    DIVERGENCES,
    LEGACY,
    Inputs,
    Layer,
    by_head,
    compare_rows,
    divergence,
    over_heads,
    over_queries,
    query_positions,
    record,
    visit,
)
from arma_mergekit.errors import CheckpointError, DataError, RecipeError, unknown
from arma_mergekit.kernel import average, one_thread
from arma_mergekit.live import LiveModel
from arma_mergekit.roles import Role, roles_from_model
from arma_mergekit.space import Space, fixed_alpha, make_space

__all__ = ["ModelDifference", "OptimalAlpha", "find_optimal_alpha", "merge_models", "model_difference"]

Array = npt.NDArray[np.float64]
Alpha = float | Sequence[float] | Mapping[str, float]
Heads = Mapping[int, Tensor]
Evaluate = Callable[[Array], tuple[Array, Array]]  # from alphas (N,) to the parts of J and dJ/dalpha (N,)

BOUNDS = (0.0, 1.0)  # an average lies between its models
GROWTH = 1.75  # of a step, at most
TOLERANCE = 2e-3  # a move of alpha below which the search ends
INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch, what models get


# --- averaging


@torch.no_grad()
def merge_models(
    model_1: nn.Module, model_2: nn.Module, alpha: Alpha = 0.5, rest: str | float = "base"
) -> Any:
    """A new model, ``W_1 + alpha (W_2 - W_1)``; both inputs stay as they are.

    ``alpha``, the weight of model_2: one number, for everything inside softmax attention; one per layer, likewise; or
    numbers by name: of a tensor, else of a projection (``q``, ``q_proj``, also ``gate``). ``rest``, for all that alpha
    does not speak of: ``base`` (model_1, what the published script does), ``finetuned`` (model_2), or a number. The
    result has dtypes, device and buffers of model_1. CheckpointError if the parameters of the two differ in names or
    shapes or cannot be averaged; RecipeError for a name that nothing has, another number of layers, or no number.
    """
    pairs = _parameters(model_1, model_2)
    alphas = _alphas(roles_from_model(model_1), alpha, rest)
    merged = copy.deepcopy(model_1)
    with one_thread():
        for name, parameter in merged.named_parameters():
            average(pairs[name][0], [pairs[name][1]], [alphas[name]], out=parameter.data)
    return merged


def _parameters(model_1: nn.Module, model_2: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters of both models by name; of a tied one the first name."""
    _check_loaded(model_1, model_2)
    ours, theirs = dict(model_1.named_parameters()), dict(model_2.named_parameters())
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise CheckpointError(
            f"Only one of the two models has {odd[0]} ({len(odd)} such); average a model with its own fine-tune, tie "
            "embeddings alike (tie_word_embeddings), and fold adapters first (PEFT: merge_and_unload)."
        )
    pairs = {name: (tensor.detach(), theirs[name].detach()) for name, tensor in ours.items()}
    for name, pair in pairs.items():
        if pair[0].shape != pair[1].shape:
            shapes = " and ".join(str(tuple(t.shape)) for t in pair)
            raise CheckpointError(
                f"{name} has shapes {shapes} in the two models; average a model with its own fine-tune, and resize "
                "embeddings alike (resize_token_embeddings)."
            )
        if any(t.is_meta or not t.is_floating_point() for t in pair):
            kinds = " and ".join(f"{t.dtype} on {t.device}" for t in pair)
            raise CheckpointError(
                f"{name} is {kinds} in the two models; load them in full precision and into memory to average them."
            )
    return pairs


def _check_loaded(*models: Any) -> None:
    for model in models:
        if not isinstance(model, nn.Module):
            raise CheckpointError(
                f"{model!r} is no model; load it first (AutoModelForCausalLM.from_pretrained)."
            )


def _alphas(roles: Mapping[str, Role], alpha: Alpha, rest: str | float) -> dict[str, float]:
    """Alpha of every tensor."""
    others = fixed_alpha(rest) if isinstance(rest, str) else float(_numbers("rest", rest, 0))
    if others is None:
        raise RecipeError(unknown("rest", str(rest), ["base", "finetuned"]) + " Or give a number.")
    if isinstance(alpha, Mapping):
        given = _by_name(roles, alpha)
    elif (values := _numbers("alpha", alpha, 1)).ndim:
        given = _by_layer(roles, values)
    else:
        given = {name: float(values) for name, role in roles.items() if role.attention}
    return {name: given.get(name, others) for name in roles}


def _numbers(what: str, given: Any, most_dimensions: int) -> Array:
    """A number, or a sequence of them; RecipeError for anything else, NaN and infinity too."""
    try:
        values = np.asarray(given, np.float64)
    except (TypeError, ValueError, RuntimeError):
        values = np.array(np.nan)
    if values.ndim > most_dimensions or isinstance(given, str) or not np.isfinite(values).all():
        numbers = ["a finite number", "a finite number or a sequence of them"][most_dimensions]
        raise RecipeError(f"{what} must be {numbers}, but got {given!r}.")
    return values


def _by_layer(roles: Mapping[str, Role], alpha: Array) -> dict[str, float]:
    layers = 1 + max((r.layer for r in roles.values() if r.layer is not None), default=-1)
    if len(alpha) != layers:
        raise RecipeError(f"One alpha per layer is {layers} numbers for this model, but got {len(alpha)}.")
    inside = {name: r.layer for name, r in roles.items() if r.attention and r.layer is not None}
    return {name: float(alpha[layer]) for name, layer in inside.items()}


def _by_name(roles: Mapping[str, Role], alpha: Mapping[str, float]) -> dict[str, float]:
    """A tensor's own name goes before its projection's."""
    known = {name: {name, role.part, role.kind, *name.split(".")[-2:-1]} for name, role in roles.items()}
    found: dict[str, float] = {}
    for key, value in sorted(alpha.items(), key=lambda item: item[0] in roles):
        names = [key] if key in roles else [name for name, words in known.items() if key in words]
        if not names:
            raise RecipeError(unknown("tensor or projection", str(key), {r.part for r in roles.values()}))
        found.update(dict.fromkeys(names, float(_numbers(f"alpha of {key}", value, 0))))
    return found


# --- the alpha


@dataclass(frozen=True)
class OptimalAlpha:
    """What was found, and the way there.

    ``alpha``: of one group a number, else by tensor; with ``legacy`` the weight of model_1. ``alphas`` (steps, groups)
    and ``objective`` (steps,): everything tried, in order; ``parts`` (steps, 2): the share of each side in the
    objective (one with ``legacy``). ``converged``: the search ended by itself.
    """

    alpha: float | dict[str, float]
    alphas: Array
    objective: Array
    parts: Array
    converged: bool


def find_optimal_alpha(
    model_1: nn.Module, model_2: nn.Module, data_loader: Iterable[Any], initial_alpha: float = 0.5,
    learning_rate: float = 0.05, steps: int = 60, *, metric: str | None = None, rho: float = 1.0,
    domain_loader: Iterable[Any] | None = None, groups: str = "global", rest: str | float = "base",
    heads: Mapping[int, Tensor] | None = None, legacy: bool = False,
) -> OptimalAlpha:  # fmt: skip
    """The alpha of attention, in [0, 1], that minimises J, by descent along its exact gradient; models on one device.

    ``data_loader``: batches as dicts with ``input_ids`` (B, T) and, where there is padding, ``attention_mask``, where
    texts are packed, ``position_ids``; tensors of ids; or tuples that begin with either. They are read once, and the
    attention of both models on them is kept: layers x tokens x (query and key heads) x head size numbers each.
    ``domain_loader``: texts for the side of model_2.
    ``learning_rate``: the first step; the next ones follow the secant of the gradient (Quickprop), and the search ends
    when no alpha moves by 0.002. ``metric``: js (default), kl, mse, cosine or emd. ``groups``: which tensors share an
    alpha, global, kind, block:N, layer, tensor (space.py). ``heads``: weights (H,) of heads by layer, as from
    `attention.head_weights`. ``rest``: as of `merge_models`.

    ``legacy``: objective and convention of ARMA's script: the first layer's difference from model_2, where alpha weighs
    model_1 (merge with 1 - alpha); metric is legacy_mse (default), legacy_cosine, legacy_emd or legacy_kl.

    RecipeError for settings and DataError for data that make no sense, CheckpointError for models that cannot be
    compared or averaged.
    """
    _check_search(initial_alpha, learning_rate, steps, rho)
    if legacy and (rho != 1 or domain_loader is not None or heads is not None):
        raise RecipeError(
            "The script's objective has one side and no weights: leave out rho, domain_loader and heads."
        )
    live = _live(model_1, model_2, rest)
    roles = roles_from_model(live.model)
    space = make_space({name: roles[name] for name in live.tensors}, groups, "base", BOUNDS)
    with _comparing(model_1, model_2):
        texts = _texts(model_1, model_2, data_loader, domain_loader)
    if legacy:
        evaluate, start = _one_sided(live, texts, metric or "legacy_mse"), 1 - initial_alpha
    else:
        evaluate, start = _two_sided(live, texts, metric or "js", (1.0, rho), heads), initial_alpha
    points, parts, converged = _descend(evaluate, space, start, learning_rate, steps)
    objective = parts.sum(1)
    best = space.alphas(points[int(objective.argmin())])
    if legacy:
        best, points = 1 - best, 1 - points
    single = len(space.names) == 1
    alpha = float(best[0]) if single else dict(zip(space.tensors, map(float, best), strict=True))
    return OptimalAlpha(alpha, points, objective, parts, converged)


def _check_search(initial_alpha: float, learning_rate: float, steps: int, rho: float) -> None:
    given = {"initial_alpha": initial_alpha, "learning_rate": learning_rate, "steps": steps, "rho": rho}
    alpha, rate, count, weight = (float(_numbers(name, value, 0)) for name, value in given.items())
    low, high = BOUNDS
    wrong = {
        f"initial_alpha must be from {low:g} to {high:g}": not low <= alpha <= high,
        "learning_rate must be above 0": rate <= 0,
        "steps must be 1 or more": count < 1,
        "rho must be 0 or more": weight < 0,
    }
    for wanted, is_wrong in wrong.items():
        if is_wrong:
            raise RecipeError(f"{wanted}, but got {given[wanted.split()[0]]}.")


def _live(model_1: nn.Module, model_2: nn.Module, rest: str | float) -> LiveModel:
    """A copy whose attention can be set between the two models, all else as ``rest`` says."""
    student = merge_models(model_1, model_2, 0.0, rest)
    attention = {name for name, role in roles_from_model(student).items() if role.attention}
    pairs = {n: pair for n, pair in _parameters(model_1, model_2).items() if n in attention}
    if not any(pair[0].ne(pair[1]).any() for pair in pairs.values()):
        raise CheckpointError("Both models have the same attention weights: no alpha is better than another.")
    sides = [{n: pair[i].to(pair[0].dtype) for n, pair in pairs.items()} for i in (0, 1)]
    return LiveModel(student, *sides)


@dataclass(frozen=True)
class _Text:
    """A batch, what `record` kept of both models on it, and whether it counts for the side of each: 0 or 1, (2,)."""

    inputs: Inputs
    kept: tuple[list[Layer], ...]
    counts: tuple[float, float]


def _texts(
    model_1: nn.Module, model_2: nn.Module, data_loader: Iterable[Any], domain_loader: Iterable[Any] | None
) -> list[_Text]:
    sides: list[tuple[Iterable[Any], tuple[float, float]]] = [(data_loader, (1.0, 1.0))]
    if domain_loader is not None:
        sides = [(data_loader, (1.0, 0.0)), (domain_loader, (0.0, 1.0))]
    return [
        _Text(inputs, tuple(record(model, inputs) for model in (model_1, model_2)), counts)
        for loader, counts in sides
        for inputs in _batches(loader, model_1)
    ]


def _batches(loader: Iterable[Any], model: nn.Module) -> list[Inputs]:
    """What a data loader yields, as inputs on the model's device; DataError if there is nothing to compare."""
    single = isinstance(loader, Mapping | Tensor)
    batches: list[Inputs] = [_inputs(batch, model) for batch in ([loader] if single else loader)]
    if not any(query_positions(inputs).any() for inputs in batches):
        raise DataError("The data loader has no text of at least two tokens: attention cannot be compared.")
    return batches


def _inputs(batch: Any, model: Any) -> dict[str, Tensor]:
    while isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise DataError(
            f"The data loader yields {type(batch).__name__}; make it yield dicts with a tensor input_ids (B, T), as "
            "tokenizer(texts, return_tensors='pt', padding=True) does."
        )
    device = next(model.parameters()).device
    found = {key: batch[key].to(device) for key in INPUTS if batch.get(key) is not None}
    ids, rows = found["input_ids"], model.get_input_embeddings().weight.shape[0]
    for key, given in found.items():
        if given.ndim != 2 or given.shape != ids.shape:
            raise DataError(
                f"A batch's {key} must be (B, T), of the shape of its input_ids, but is {tuple(given.shape)}."
            )
    if ids.is_floating_point() or not ((ids >= 0) & (ids < rows)).all():
        raise DataError(
            f"A batch's input_ids must be whole numbers from 0 to {rows - 1}, but they span {ids.min()} to "
            f"{ids.max()}; use the tokenizer of these models."
        )
    return found


@contextlib.contextmanager
def _comparing(*models: nn.Module) -> Iterator[None]:
    """Without dropout, and at the end as before; CheckpointError unless both models are in one place."""
    _check_loaded(*models)
    devices = {str(p.device) for model in models for p in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise CheckpointError(
            f"The models are on {' and '.join(sorted(devices))}; move both to one device, where their attention can be "
            "compared."
        )
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _two_sided(
    live: LiveModel, texts: Sequence[_Text], metric: str, weights: tuple[float, float], heads: Heads | None
) -> Evaluate:
    """J of the two sides."""
    distance = divergence(metric)

    def sums(student: Any, text: _Text, measure: Callable[..., Tensor], teachers: Sequence[Any]) -> Tensor:
        by_text = over_heads(compare_rows(student, text.inputs, teachers, measure), heads)
        return by_text.sum(-1) * torch.tensor(text.counts, device=by_text.device)

    def apart(m1: Tensor, m2: Tensor) -> Tensor:
        return torch.stack([distance(m2, m1), distance(m1, m2)])

    def from_both(a: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
        return torch.stack([distance(a, m1), distance(a, m2)])

    with torch.no_grad():
        ends = torch.stack([sums(text.kept[0], text, apart, text.kept[1:]) for text in texts]).sum(0)
    if not ends.isfinite().all():
        raise _not_finite()
    if not ends.all():
        raise CheckpointError(
            "Both models have the same attention on these texts: no alpha is better than another."
        )
    scale = torch.tensor(weights, device=ends.device) / ends

    def evaluate(alphas: Array) -> tuple[Array, Array]:
        live.set(alphas)
        with live.differentiable() as gradient:
            return _added(scale * sums(live, text, from_both, text.kept) for text in texts), gradient()

    return evaluate


def _one_sided(live: LiveModel, texts: Sequence[_Text], metric: str) -> Evaluate:
    """What the script minimised: the difference of the first layer from model_2, mean over batches."""
    if metric not in LEGACY:
        raise RecipeError(unknown("legacy metric", metric, LEGACY))

    def first_layer(text: _Text) -> Tensor:
        layers: list[tuple[Layer, Layer]] = []
        visit(live, text.inputs, text.kept[1:], lambda *pair: layers.append(pair))
        a, m = (layer.probabilities() for layer in layers[0])
        return LEGACY[metric](a, m)[None] / len(texts)

    def evaluate(alphas: Array) -> tuple[Array, Array]:
        live.set(alphas)
        with live.differentiable() as gradient:
            return _added(map(first_layer, texts)), gradient()

    return evaluate


def _added(losses: Iterable[Tensor]) -> Array:
    """Sum (parts,) of losses (parts,), each differentiated as soon as it is there."""
    total: Any = 0.0
    for loss in losses:
        if not loss.isfinite().all():
            raise _not_finite()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach().double().cpu().numpy()
    return np.asarray(total, np.float64)


def _not_finite() -> CheckpointError:
    return CheckpointError(
        "The attention of these models on these texts is not finite: their weights hold NaN or infinity, or overflow "
        "in their dtype."
    )


def _descend(
    evaluate: Evaluate, space: Space, start: float, learning_rate: float, steps: int
) -> tuple[Array, Array, bool]:
    """Points (steps, groups) and parts (steps, parts), and whether it came to rest: Quickprop (Fahlman, 1988).

    Each value moves against its slope g by its last step times |g / (g_before - g)|, at most `GROWTH`: to the zero of
    the secant, whatever the scale of J.
    """
    point, step = space.constant_point(start), np.full(len(space.names), learning_rate / GROWTH)
    before = np.full(len(space.names), np.nan)
    points, parts = list[Array](), list[Array]()
    rests = False
    while not rests and len(points) < max(1, steps):
        found, slopes = evaluate(space.alphas(point))
        points.append(point)
        parts.append(found)
        slope = space.pullback(point, slopes)
        with np.errstate(divide="ignore", invalid="ignore"):
            secant = np.abs(slope / (before - slope))
        step = step * np.fmin(secant, GROWTH)
        point, before = np.clip(point - np.sign(slope) * step, space.low, space.high), slope
        moved = np.abs(point - points[-1])
        rests = bool(((moved == 0) | ((moved < TOLERANCE) & (secant < GROWTH))).all())
    return np.array(points), np.array(parts), rests


# --- the difference


@dataclass(frozen=True)
class ModelDifference:
    """How far the attention of two models is apart on some texts; printed as a table.

    ``by_layer``: metric to (layers,): js, kl, mse, cosine and emd per query position, mean over heads, and the script's
    legacy_mse, legacy_cosine, legacy_emd and legacy_kl, mean over batches. ``by_head``: the first five as (layers,
    heads). ``layers``: depth of each row; ``skipped``: depths without softmax attention.
    """

    layers: tuple[int, ...]
    skipped: tuple[int, ...]
    by_layer: Mapping[str, Array]
    by_head: Mapping[str, Array]

    def __str__(self) -> str:
        widths = {metric: max(10, len(metric) + 2) for metric in self.by_layer}
        lines = ["layer" + "".join(f"{metric:>{width}}" for metric, width in widths.items())]
        for row, layer in enumerate(self.layers):
            cells = (f"{values[row]:>{widths[metric]}.3g}" for metric, values in self.by_layer.items())
            lines.append(f"{layer:>5}" + "".join(cells))
        return "\n".join([*lines, *([f"skipped: {self.skipped}"] if self.skipped else [])])


@torch.no_grad()
def model_difference(model_1: nn.Module, model_2: nn.Module, data_loader: Iterable[Any]) -> ModelDifference:
    """Every metric of attention by layer, of model_1 against model_2 as the teacher (which matters to kl alone).

    ``data_loader``: as of `find_optimal_alpha`. The models run in lock-step, a layer of each at a time: memory does not
    grow with depth, but the script's formulas need a layer's probabilities as a whole, and ten times that to work in.
    CheckpointError if their attention has other shapes or cannot be seen, DataError for the data.
    """
    rows: dict[int, Tensor] = {}
    whole: dict[int, Tensor] = {}
    with _comparing(model_1, model_2):
        batches = _batches(data_loader, model_1)
        for inputs in batches:
            for layer, (by_head_, by_batch) in _compare_all(model_1, model_2, inputs).items():
                rows[layer] = rows.get(layer, 0) + by_head_.sum(1).double()
                whole[layer] = whole.get(layer, 0) + by_batch.double() / len(batches)
    found = by_head(rows, batches, model_1)
    heads = dict(zip(DIVERGENCES, found.values, strict=True))
    legacy = torch.stack([whole[layer] for layer in found.layers], 1).cpu().numpy()
    by_layer = {metric: np.nanmean(values, 1) for metric, values in heads.items()}
    return ModelDifference(
        found.layers, found.skipped, by_layer | dict(zip(LEGACY, legacy, strict=True)), heads
    )


def _compare_all(model_1: nn.Module, model_2: nn.Module, inputs: Inputs) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each layer the five divergences (5, B, H) summed over query positions, and the script's four (4,)."""
    queries = query_positions(inputs)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def every(a: Tensor, m: Tensor) -> Tensor:
        return torch.stack([distance(a, m) for distance in DIVERGENCES.values()])

    def consume(layer: Layer, other: Layer) -> None:
        a, m = layer.probabilities(), other.probabilities()
        whole = torch.stack([distance(a, m) for distance in LEGACY.values()])
        found.setdefault(layer.index, []).append((over_queries(every, (layer, other), queries), whole))

    visit(model_1, inputs, [model_2], consume)
    return {
        layer: (torch.cat([rows for rows, _ in runs], -1), torch.stack([whole for _, whole in runs]).mean(0))
        for layer, runs in found.items()
    }
