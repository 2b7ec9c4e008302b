"""Whether two checkpoints fit: config, layers, tensors, shapes, dtypes, as sentences.

It knows headers and configs; no recipes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.adapter import shortened
from arma_mergekit.checkpoint.header import FLOATS
from arma_mergekit.checkpoint.model import some
from arma_mergekit.roles import Role, layer_counts

__all__ = ["Findings", "compare", "examine", "setting", "shape_errors"]

# buffers that old checkpoints hold and every model computes for itself
RECOMPUTED = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
)
SAME_CONFIG = ("num_attention_heads", "num_key_value_heads", "head_dim")
SAME_USE = (
    "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "hidden_act",
    "attn_logit_softcapping", "final_logit_softcapping", "num_experts_per_tok",
)  # fmt: skip
WINDOW = "sliding_window"
ROPE = (
    "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
)  # fmt: skip
ROPE_TYPES = {"su": "longrope", "mrope": "default"}  # as transformers renames them


@dataclass
class Findings:
    """Sentences, and the tensors that the result does not need."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A value of config.json, or of its text part."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, Mapping) else None)


def examine(checkpoint: Checkpoint) -> list[str]:
    """What makes one checkpoint unfit for averaging."""
    if not checkpoint.tensors:
        return [f"{checkpoint.ref} has no tensors; name a directory with a whole model."]
    quantised = setting(checkpoint.config, "quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
        return [f"{checkpoint.ref} is quantised (quant_method {method}); name the unquantised model."]
    packed = [t.name for t in checkpoint.tensors.values() if t.dtype.startswith(("F8", "F4", "F6"))]
    return (
        [f"{checkpoint.ref} has 8-bit tensors ({some(packed)}); name the unquantised model."]
        if packed
        else []
    )


def compare(base: Checkpoint, tuned: Checkpoint, roles: Mapping[str, Role]) -> Findings:
    """How a fine-tuned model differs from its base; ``roles`` of the tensors of both."""
    found = Findings()
    kinds = [setting(c.config, "model_type") for c in (base, tuned)]
    if None not in kinds and kinds[0] != kinds[1]:
        found.errors.append(
            f"{base.ref} is a {kinds[0]}, {tuned.ref} a {kinds[1]}; only models of one architecture average."
        )
        return found
    found.errors += _config_errors(base, tuned)
    found.warnings += _config_warnings(base, tuned)
    depths = [layer_counts({n: roles[n] for n in c.tensors}) for c in (base, tuned)]
    found.errors += _layer_errors(base, tuned, *depths)
    shallow = {stack: min(d.get(stack, 0) for d in depths) for stack in {*depths[0], *depths[1]}}
    extra = {n for n, r in roles.items() if r.layer is not None and r.layer >= shallow[r.stack]}
    _one_sided(base, tuned, roles, extra, found)
    found.warnings += _dtype_warnings(base, tuned)
    return found


def _config_errors(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    for key in SAME_CONFIG:
        left, right = setting(base.config, key), setting(tuned.config, key)
        if None not in (left, right) and left != right:
            yield f"{key} is {left} in {base.ref} and {right} in {tuned.ref}: their heads do not match."


def _config_warnings(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    left, right = _computed(base.config), _computed(tuned.config)
    unlike = [
        f"{key} is {shortened(left[key])} in {base.ref} and {shortened(right[key])} in {tuned.ref}"
        for key in left
        if key in right and left[key] != right[key]
    ]
    if unlike:
        yield (
            f"{', '.join(unlike)}; the result gets the base's, so check that the fine-tuned model was made from this "
            "base."
        )
    if base.path.resolve() == tuned.path.resolve() and type(base) is type(tuned):
        yield f"{tuned.ref} is the same directory as the base {base.ref}: there is nothing to average."


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of how the weights are used, in one spelling; without what it leaves to a default."""
    found = {key: value for key in SAME_USE if (value := setting(config, key)) is not None}
    if any(isinstance(part, Mapping) and WINDOW in part for part in (config, config.get("text_config"))):
        found[WINDOW] = None if setting(config, f"use_{WINDOW}") is False else setting(config, WINDOW)
    parts = [setting(config, key) for key in ("rope_scaling", "rope_parameters")]
    rope = {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}
    if not any(isinstance(value, Mapping) for value in rope.values()):
        above = {key: setting(config, key) for key in ("rope_theta", "partial_rotary_factor")}
        return found | _rope(rope | {key: value for key, value in above.items() if value is not None})
    for kind, part in rope.items():  # of layer, each with its own
        own = _rope(part) if isinstance(part, Mapping) else {}
        found |= {f"{key} of {shortened(kind)}": value for key, value in own.items()}
    return found


def _rope(said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings, by the names that transformers 5 has for them."""
    kind = said.get("rope_type") or said.get("type") or "default"
    found = {key: value for key in ROPE if (value := said.get(key)) is not None}
    return found | {"rope_type": ROPE_TYPES.get(str(kind), kind)}


def _layer_errors(
    base: Checkpoint, tuned: Checkpoint, left: Mapping[str, int], right: Mapping[str, int]
) -> Iterator[str]:
    for stack in sorted({*left, *right}):
        ours, theirs = left.get(stack, 0), right.get(stack, 0)
        if ours != theirs:
            what = f"{stack} layers" if stack else "layers"
            yield f"{base.ref} has {ours} {what}, {tuned.ref} has {theirs}; only equally deep models average."


def _one_sided(
    base: Checkpoint, tuned: Checkpoint, roles: Mapping[str, Role], extra: Collection[str], found: Findings
) -> None:
    """Tensors that only one of the two has, those of ``extra`` layers apart."""
    heads = {n for n, r in roles.items() if r.part == "head"}
    tied = [_is_tied(c, heads) for c in (base, tuned)]
    if heads and tied[0] != tied[1]:
        alone, other = (base, tuned) if tied[0] else (tuned, base)
        found.errors.append(
            f"{alone.ref} ties its head to its embedding, {other.ref} does not ({some(heads)}); save both "
            "the same way (tie_word_embeddings in config.json)."
        )
    for here, there in ((base, tuned), (tuned, base)):
        only = set(here.tensors) - set(there.tensors) - set(extra)
        spare = {n for n in only if (n in heads and any(tied)) or n.endswith(RECOMPUTED)}
        found.left_out |= spare
        needed = only - spare
        if needed:
            found.errors.append(
                f"{there.ref} lacks {some(needed)} of {here.ref}; only models with the same tensors average."
            )
        if spare and (tied[0] == tied[1] or not spare <= heads):
            why = "tied to the embedding" if spare <= heads else "computed by the model itself"
            found.warnings.append(f"Only {here.ref} has {some(spare)}, {why}: left out of the result.")


def _is_tied(checkpoint: Checkpoint, heads: Collection[str]) -> bool:
    flag = setting(checkpoint.config, "tie_word_embeddings")
    return bool(flag) if flag is not None else not any(n in checkpoint.tensors for n in heads)


def shape_errors(
    base: Checkpoint, tuned: Checkpoint, roles: Mapping[str, Role], names: Iterable[str]
) -> Iterator[str]:
    """Sentences on those tensors of both whose shapes differ."""
    unlike = [n for n in names if base.tensors[n].shape != tuned.tensors[n].shape]
    vocabulary = [n for n in unlike if roles[n].part in ("embed", "head") and _same_width(base, tuned, n)]
    others = [n for n in unlike if n not in vocabulary]
    if vocabulary:
        name = vocabulary[0]
        sizes = [c.tensors[name].shape[0] for c in (base, tuned)]
        yield (
            f"The vocabularies differ: {base.ref} has {sizes[0]} rows in {some(vocabulary)}, {tuned.ref} "
            f"{sizes[1]}; bring both to the same tokens (resize_token_embeddings) first."
        )
    if others:
        first = min(others)
        shapes = [list(c.tensors[first].shape) for c in (base, tuned)]
        yield (
            f"Shapes differ between {base.ref} and {tuned.ref} in {some(others)} ({first}: {shapes[0]} "
            f"against {shapes[1]}); only models of one size average."
        )


def _same_width(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    left, right = base.tensors[name].shape, tuned.tensors[name].shape
    return len(left) == len(right) > 0 and left[1:] == right[1:]


def _dtype_warnings(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    pairs = {
        n: (base.tensors[n].dtype, tuned.tensors[n].dtype)
        for n in base.tensors
        if n in tuned.tensors and base.tensors[n].dtype != tuned.tensors[n].dtype
    }
    for (ours, theirs), count in Counter(pairs.values()).items():
        names = [n for n, pair in pairs.items() if pair == (ours, theirs)]
        end = (
            f"averaged ones get {ours}, those copied from {tuned.ref} stay {theirs}; out_dtype makes them one"
            if {ours, theirs} <= FLOATS
            else "they cannot be averaged and are copied from the base"
        )
        yield f"{count} tensors are {ours} in {base.ref} and {theirs} in {tuned.ref} ({some(names)}): {end}."
