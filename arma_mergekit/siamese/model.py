"""IMSM: a causal LM that decides per token and channel between what it knew and what it learned, from one copy.

    logits = head(h),   h = gate * h_M + (1 - gate) * h_M'          gate.py; the two passes: body.py

M is the base, M' the same weights with an adapter (LoRA, CURLoRA, any that PEFT can switch off), or a second
checkpoint at twice the memory. Decoding takes two passes a token, each with a cache of its own. The gate depends on
what is said, so no single checkpoint computes this: it cannot be exported or merged. Source: IMSM (arXiv 2412.17383).
It knows live models; files are files.py's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arma_mergekit.errors import CheckpointError
from arma_mergekit.evals.forward import calling
from arma_mergekit.siamese.body import SiameseBody, find_decoder
from arma_mergekit.siamese.cache import SiameseCache, checked
from arma_mergekit.siamese.config import SiameseConfig
from arma_mergekit.siamese.gate import mix
from arma_mergekit.siamese.switch import Switch

__all__ = ["SiameseForCausalLM", "before_answer"]

IGNORED = -100  # label of what is not learned


class SiameseForCausalLM(nn.Module):
    """A base and its fine-tuned self as one causal LM.

    ``tuned``: a PeftModel, whose base is then the other side; or a causal LM, with ``base`` the other one. If two
    checkpoints have different heads, each term of h goes through its own: logits = W (g h_M) + W' ((1 - g) h_M').
    ``source``: what `files.Source` says of where they are, needed to save. The base is never trained. One call at a
    time: the passes share weights, so threads must wait for each other.
    """

    base_model_prefix = "body"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # what Trainer asks before it sums losses over accumulated batches

    def __init__(
        self, tuned: Any, config: SiameseConfig | None = None, base: Any = None, source: Any = None
    ) -> None:
        super().__init__()
        self.siamese_config, self.source = config or SiameseConfig(), source
        self.tuned, self.second = tuned, base
        if base is not None:
            self.requires_grad_(False)
        decoder, like = find_decoder(self.lm)
        other = decoder if base is None else find_decoder(tuned)[0]
        off = Switch(tuned).off if base is None else contextlib.nullcontext
        self.body = SiameseBody(
            decoder.forward, other.forward, off, self.lm.config, self.siamese_config, like
        )
        self._decoder = (decoder,)  # in a tuple: it is no child of its own
        self._two_heads = base is not None and not _same_head(base, tuned)
        self.body.stacked |= self._two_heads

    @classmethod
    def from_parts(
        cls, base: str, tuned: str, config: SiameseConfig | None = None, **how: Any
    ) -> SiameseForCausalLM:
        """A base with an adapter of it, or with a second checkpoint, and a gate that knows nothing yet.

        ``base``, ``tuned``: directories or hub ids in the local cache. ``how``: dtype (torch's; default the base's),
        device_map (transformers'), train_adapter (else it is frozen). CheckpointError for what cannot be loaded.
        """
        from arma_mergekit.siamese.files import from_parts

        model: SiameseForCausalLM = from_parts(cls, base, tuned, config or SiameseConfig(), **how)
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, base: str | None = None, **how: Any) -> SiameseForCausalLM:
        """What `save_pretrained` wrote; CheckpointError if it is broken or its base is another than it was.

        ``base``: where the base is now, if it has moved; ``how`` as in `from_parts`.
        """
        from arma_mergekit.siamese.files import from_pretrained

        model: SiameseForCausalLM = from_pretrained(cls, Path(path), base, **how)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write adapter, gate, and which base they belong to: safetensors and JSON, without the base's weights."""
        from arma_mergekit.siamese.files import save_pretrained

        save_pretrained(self, Path(path))

    @property
    def lm(self) -> Any:
        """The causal LM whose head speaks; with an adapter, both passes' own."""
        return self.tuned.get_base_model() if self.second is None else self.second

    @property
    def config(self) -> Any:
        """The causal LM's; the gate's is ``siamese_config``."""
        return self.lm.config

    @property
    def generation_config(self) -> Any:
        """The causal LM's."""
        return self.lm.generation_config

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        device: torch.device = self.lm.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The base's; the gate is float32."""
        dtype: torch.dtype = self.lm.dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        """The causal LM's."""
        module: nn.Module = self.lm.get_input_embeddings()
        return module

    def get_output_embeddings(self) -> nn.Module:
        """The base's head."""
        module: nn.Module = self.lm.get_output_embeddings()
        return module

    def tokenizer(self) -> Any:
        """The base's, if it was made of files."""
        from arma_mergekit.siamese.files import tokenizer_of

        return tokenizer_of(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: SiameseCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The causal LM's output: logits (B, T, V), loss if there are ``labels``, past_key_values.

        ``prompt_mask`` (B, P): which positions of the whole sequence, from its first token on (cached ones included),
        are the prompt, whose mean hidden states the gate sees; those after P are not. Padding never is. By default

            with labels                          what comes before the first label that counts, at least one token
            first call, or without a cache       every token given
            with a cache that holds a prompt     none: the prompt is the cache's

        So score prompt + answer in one pass with prompt_mask, or labels, and it is what generating computes.
        """
        if prompt_mask is None and labels is not None:
            prompt_mask = before_answer(labels, attention_mask)
        if prompt_mask is not None and not prompt_mask.any(-1).all():
            raise ValueError("prompt_mask must have at least one token in every row.")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, **kwargs}
        if past_key_values is not None:
            given["past_key_values"] = past_key_values
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            given["logits_to_keep"] = logits_to_keep
        if labels is not None and not self._averages:
            given["labels"] = labels
        with self._mixing(prompt_mask):
            output = self.lm(**given)
        if labels is not None and self._averages:
            output["loss"] = self.lm.loss_function(output.logits, labels, vocab_size=output.logits.shape[-1])
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        past_key_values: SiameseCache | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with all that it takes; the prompt is everything it is given.

        ``past_key_values``: that of an earlier call (with return_dict_in_generate), to go on from: ``inputs`` then
        start with what it holds. ``prompt_mask`` as in `forward`.
        """
        if prompt_mask is None:
            given = (
                kwargs.get("attention_mask"),
                inputs,
                kwargs.get("input_ids"),
                kwargs.get("inputs_embeds"),
            )
            like = next(tensor for tensor in given if tensor is not None)
            prompt_mask = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        cache = checked(past_key_values)
        if cache is not None:
            cache.query.next_prompt()
        elif self._caches(generation_config, kwargs.get("use_cache")):
            cache = SiameseCache(self.config)
        if cache is not None:
            kwargs["past_key_values"] = cache
        with self._mixing(prompt_mask):
            return self.lm.generate(inputs, generation_config, **kwargs)

    @contextlib.contextmanager
    def only(self, side: str) -> Iterator[Any]:
        """Within the block, one side alone, as the causal LM that it is: ``base`` or ``tuned``."""
        if side not in ("base", "tuned"):
            raise ValueError(f"side must be base or tuned, but got {side!r}.")
        if self.second is not None:
            yield self.second if side == "base" else self.tuned
            return
        with self.body.off() if side == "base" else contextlib.nullcontext():
            yield self.lm

    def parameter_groups(self, adapter_lr: float = 3e-4, gate_lr: float = 1e-3) -> list[dict[str, Any]]:
        """What is trained, for an optimiser: gate and adapter, each with its own learning rate."""
        found: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                found[name.startswith("body.")].append(parameter)
        groups = ({"params": found[True], "lr": gate_lr}, {"params": found[False], "lr": adapter_lr})
        return [group for group in groups if group["params"]]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained, and nothing of the base: all that a Trainer's checkpoint needs."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        trained = {prefix + name for name, p in self.named_parameters() if p.requires_grad}
        everything = super().state_dict(*args, **kwargs)
        for name in [name for name in everything if name.startswith(prefix) and name not in trained]:
            del everything[name]
        return everything

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """What `state_dict` gave; RuntimeError if ``strict`` and it is not just that."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        wanted = set(self.state_dict())
        found.missing_keys[:] = [name for name in found.missing_keys if name in wanted]
        if strict and (found.missing_keys or found.unexpected_keys):
            raise RuntimeError(f"Missing: {found.missing_keys}; not expected: {found.unexpected_keys}.")
        return found

    def _caches(self, settings: Any, asked: bool | None) -> bool:
        """Whether a call of generate is to use a cache."""
        return bool((settings or self.generation_config).use_cache if asked is None else asked)

    @contextlib.contextmanager
    def _mixing(self, prompt_mask: Tensor | None) -> Iterator[None]:
        """Within the block, the causal LM's decoder is the two passes and the gate."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(calling(self._decoder[0], partial(self.body, prompt_mask=prompt_mask)))
            if self._two_heads:
                head = self.lm.get_output_embeddings()
                stack.enter_context(calling(head, partial(self._both_heads, head.forward)))
            if self._averages:
                handle = self.lm.register_forward_hook(self._average)
                stack.callback(handle.remove)
            yield

    @property
    def _averages(self) -> bool:
        """Whether the passes go through the head one by one, as a batch of both."""
        return self.siamese_config.mode == "logit_average"

    def _average(self, _: nn.Module, __: Any, output: Any) -> Any:
        output.logits = mix(self.siamese_config.value, *output.logits.chunk(2))
        return output

    def _both_heads(self, head: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """Logits of both terms of h (2B, T, d), each through its own head; the sum of the terms, if they are terms."""
        first, second = h.chunk(2)
        other = self.tuned.get_output_embeddings()
        if self._averages:
            return torch.cat([head(first), other(second)])
        return head(first) + nn.functional.linear(second, other.weight)


def _same_head(base: Any, tuned: Any) -> bool:
    """Whether one head serves both; CheckpointError if two cannot be added up."""
    heads = [lm.get_output_embeddings() for lm in (base, tuned)]
    one, other = heads
    if not all(type(head) is nn.Linear for head in heads) or one.weight.shape != other.weight.shape:
        raise CheckpointError(
            f"The heads of the two checkpoints ({', '.join(_described(head) for head in heads)}) cannot be added up; "
            "train an adapter instead."
        )
    if (one.bias is None) != (other.bias is None) or not (
        one.bias is None or torch.equal(one.bias, other.bias)
    ):
        raise CheckpointError(
            "The heads of the two checkpoints have different biases; train an adapter instead."
        )
    return torch.equal(one.weight, other.weight)


def _described(head: nn.Module) -> str:
    return f"{type(head).__name__} {tuple(getattr(head, 'weight', torch.empty(0)).shape)}"


def before_answer(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The prompt of labels (B, T): tokens before the first label that counts, the first token always."""
    first = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    learned = ((labels != IGNORED) & first).long().cumsum(-1) > 0
    start = first & (first.long().cumsum(-1) == 1)
    return first & (~learned | start)
