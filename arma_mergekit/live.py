"""A model whose alphas can be set in memory, and the exact gradient of a loss with respect to them.

It knows a torch model, its tensors and numbers; no recipes, suites or searchers. Nothing is written to disk: a
candidate is `W_base + alpha * (W_ft - W_base)` (kernel.py), computed in place, so what is scored has the bits of what
the merge will ship.

Gradients cost a plain backward pass, and no gradient of a weight ever exists. For y = W(alpha) x,

    dL/dalpha = sum over tokens of <dL/dy_t, D x_t>,   D = W_ft - W_base

    symbol   meaning                         shape                dtype
    x        input of a linear layer         (tokens, in)         the model's
    D        difference of the two models    (out, in)            the model's; a second product in the backward pass
    alpha    one per averaged tensor         ()                   float32, its value unused

Embeddings use D[ids]; every other tensor (norms, biases, fused experts) goes through autograd as
`W + (alpha - stop(alpha)) * D`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from arma_mergekit.errors import CheckpointError
from arma_mergekit.kernel import average, one_thread, round_alpha

__all__ = ["LiveModel"]

Array = npt.NDArray[np.float64]


class LiveModel:
    """A causal LM with settable alphas; called like the model it wraps.

    ``model``: its weights are overwritten in place. ``base`` and ``tuned``: parameter name to tensor, of equal shapes,
    borrowed and never written to. Names absent from ``tuned`` keep the base's values. Starts at alpha 0.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
        self.model = model.eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        self.tensors = tuple(name for name in tuned if not torch.equal(base[name], tuned[name]))
        if not self.tensors:
            raise CheckpointError(
                "The fine-tuned model equals the base in every tensor: there is nothing to average."
            )
        missing = [name for name in self.tensors if name not in parameters]
        if missing:
            raise CheckpointError(
                f"{missing[0]} (and {len(missing) - 1} more) of the checkpoint is no parameter of the loaded "
                f"{type(model).__name__}: transformers converted it while loading, and such models can be merged but "
                "not searched in memory yet."
            )
        self._base = {name: base[name] for name in self.tensors}
        self._tuned = {name: tuned[name] for name in self.tensors}
        self._parameters = {name: parameters[name] for name in self.tensors}
        self._deltas: dict[str, Tensor] = {}
        self._alphas = np.full(len(self.tensors), np.nan)
        self.set(np.zeros(len(self.tensors)))

    def __call__(self, **inputs: Any) -> Any:
        """Forward pass of the wrapped model."""
        return self.model(**inputs)

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return next(self.model.parameters()).device

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The base's values of ``tensors``, borrowed."""
        return self._base

    @property
    def alphas(self) -> Array:
        """Alphas (N,) now in force, in the order of ``tensors``; a copy."""
        return np.array(self._alphas)

    @torch.no_grad()
    def set(self, alphas: npt.ArrayLike) -> None:
        """Make the model the average with these alphas (N,); only tensors whose alpha changed are computed."""
        wanted = np.array([round_alpha(float(a)) for a in np.asarray(alphas, dtype=np.float64)])
        if wanted.shape != self._alphas.shape:
            raise ValueError(f"This model has {len(self.tensors)} alphas, but got {wanted.shape}.")
        changed = np.flatnonzero(wanted != self._alphas)

        def write(i: int) -> None:
            name = self.tensors[i]
            out = self._parameters[name].data
            average(self._base[name], [self._tuned[name]], [wanted[i]], out=out, check=False)

        # threads over tensors, one inside each: torch's own threads would spin on every step of the kernel
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        with one_thread(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, changed))
        self._alphas = wanted

    def set_all(self, alpha: float) -> None:
        """One alpha for every tensor: 0 is the base, 1 the fine-tuned model."""
        self.set(np.full(len(self.tensors), alpha))

    @torch.no_grad()
    def at(self, alphas: npt.ArrayLike) -> nn.Module:
        """A frozen model of its own with these alphas (N,); tensors of the base and of the fine-tuned are borrowed."""
        pairs = zip(self.tensors, np.asarray(alphas, dtype=np.float64), strict=True)
        with one_thread():
            weights = {n: average(self._base[n], [self._tuned[n]], [float(a)], check=False) for n, a in pairs}
        return _with_weights(self.model, {id(self._parameters[n]): weight for n, weight in weights.items()})

    def delta(self, name: str) -> Tensor:
        """W_ft - W_base of a tensor, in the model's dtype; kept, since every backward pass needs it."""
        if name not in self._deltas:
            target = self._parameters[name]
            difference = self._tuned[name].to(torch.float32, copy=True).sub_(self._base[name])
            self._deltas[name] = difference.to(target.device, target.dtype)
        return self._deltas[name]

    def delta_norms(self) -> Array:
        """||W_ft - W_base|| / ||W_base|| per tensor (N,); inf where the base is all zero."""
        pairs = [
            (self._tuned[n].float() - self._base[n].float(), self._base[n].float()) for n in self.tensors
        ]
        with np.errstate(divide="ignore"):
            return np.array([np.float64(d.norm().item()) / b.norm().item() for d, b in pairs])

    def sizes(self) -> list[int]:
        """Elements per tensor (N,)."""
        return [self._base[name].numel() for name in self.tensors]

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[Callable[[], Array]]:
        """Within the block, losses are differentiable; calling what it yields returns dL/dalpha (N,) so far.

        Calls to ``backward`` add up. A tensor that no loss depends on has 0.
        """
        leaves = [torch.zeros((), requires_grad=True, device=self.device) for _ in self.tensors]
        with _tracked(self, dict(zip(self.tensors, leaves, strict=True))), torch.enable_grad():
            yield partial(_collect, leaves)


def _with_weights(model: nn.Module, weights: Mapping[int, Tensor]) -> nn.Module:
    """A copy of a model that shares its tensors, but for parameters (by id) that get other ones."""
    ours: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        new = weights.get(id(parameter))
        ours[id(parameter)] = parameter if new is None else nn.Parameter(new, requires_grad=False)
    return copy.deepcopy(model, ours)


def _collect(leaves: Sequence[Tensor]) -> Array:
    # no gradient at all: an expert that no token was routed to
    return np.array([0.0 if leaf.grad is None else leaf.grad.item() for leaf in leaves])


@contextlib.contextmanager
def _tracked(live: LiveModel, leaves: dict[str, Tensor]) -> Iterator[None]:
    """Route every use of an averaged tensor past its alpha, and undo it at the end."""
    patched: list[nn.Module] = []
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    by_parameter = {id(live._parameters[name]): name for name in leaves}
    try:
        for module in live.model.modules():
            own = {k: by_parameter[id(p)] for k, p in module._parameters.items() if id(p) in by_parameter}
            forward = _cheap_forward(module, own, live, leaves) if "weight" in own else None
            if forward is not None:
                module.forward = forward
                patched.append(module)
            for key, name in own.items():
                if forward is not None and key == "weight":
                    continue
                parameter = module._parameters.pop(key)
                assert parameter is not None
                swapped.append((module, key, parameter))
                leaf = leaves[name]
                # an attribute, not a Parameter: autograd sees alpha with slope D, the value stays W exactly
                object.__setattr__(module, key, _shift(parameter.detach(), live.delta(name), leaf))
        yield
    finally:
        for module in patched:
            del module.forward
        for module, key, parameter in swapped:
            del module.__dict__[key]
            module._parameters[key] = parameter


def _cheap_forward(
    module: nn.Module, own: Mapping[str, str], live: LiveModel, leaves: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """A forward that adds alpha's gradient to a module of a known kind, or None for any other."""
    delta, leaf = live.delta(own["weight"]), leaves[own["weight"]]
    layer: Any = module
    if type(module) is nn.Linear:
        return lambda x: _add_bias(_product(x, layer.weight, delta, leaf), layer.bias)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return lambda x: _add_bias(_product(x, layer.weight.T, delta.T, leaf), layer.bias)
    if type(module) is nn.Embedding and module.max_norm is None:
        return lambda ids: _shift(layer.weight[ids], delta[ids], leaf)
    return None


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _product(x: Tensor, weight: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    result: Tensor = _Product.apply(x, weight, delta, alpha)  # type: ignore[no-untyped-call]
    return result


def _shift(weight: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    result: Tensor = _Shift.apply(weight, delta, alpha)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """y = x W^T with dL/dx as usual and dL/dalpha = <dL/dy, x D^T>."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, delta)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor]:
        x, weight, delta = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, _inner(x, delta, dy)


def _inner(x: Tensor, delta: Tensor, dy: Tensor) -> Tensor:
    """<dy, x D^T> in float32, through the narrower of x D^T and dy D."""
    wide = delta.shape[0] > delta.shape[1]
    a, b = (x, dy @ delta) if wide else (dy, nn.functional.linear(x, delta))
    along: Tensor = torch.linalg.vecdot(a.float(), b.float()).sum()
    return along


class _Shift(torch.autograd.Function):
    """W + (alpha - stop(alpha)) * D: the value of W, with dL/dalpha = <dL/dW, D>."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
        # a constant, kept outside autograd's saved tensors: this node serves every backward pass of the block
        ctx.delta = delta
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[None, None, Tensor]:
        return None, None, (dw.float() * ctx.delta.float()).sum()
