"""What a tensor is, by its name: which layer, which projection, inside softmax attention or not.

It knows names, config.json and, where a model was built, its tree of modules; no shapes and no values, so not
how a fused projection interleaves its heads. A name is placed in four steps, each with its tables below:

1. A path through another modality's tower, codec or connector is ``vision``, whatever it contains.
2. The layer is the first number after a container of layers (``layers.3``, ``h.3``, ``blocks.3``).
3. The first component that names a token mixer says what kind of module the tensor is in. Two kinds of names
   say too little: ``self_attn`` may be linear attention (Kimi Linear, MiniMax), ``mixer`` may be anything
   (Nemotron-H). There the tensors beside it decide, and config.json.
4. The rest of the path, read from the leaf backwards, says which projection it is.

Attention is everything inside a text softmax-attention module, self or cross: projections, their biases, q/k
norms, the low-rank parts of MLA, sinks, gates, indexers. A norm of the residual stream is not, wherever an
architecture keeps it (BERT's ``attention.output.LayerNorm``). What no table places is ``other``, so rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Role", "depth", "layer_counts", "role", "roles", "roles_from_model"]


class _Table:
    """Which part a word names: the first row whose pattern matches all of it, "" if none does."""

    def __init__(self, **rows: str) -> None:
        self.parts = tuple(rows)
        self._pattern = re.compile("|".join(f"(?P<{part}>{pattern})" for part, pattern in rows.items()))
        self.part = lru_cache(maxsize=4096)(self._part)  # a checkpoint has few words and many names

    def _part(self, word: str) -> str:
        match = self._pattern.fullmatch(word)
        return match.lastgroup or "" if match else ""


# --- step 1: searched for in each component, in lower case
TOWER = re.compile(
    r"vision|visual|image|img_|video|pixel|audio|speech|sound|acoustic|timestamp|tokenizer|protein|vqmodel|vq_?vae"
    r"|q_?former|perception|sam_model|resampler|perceiver|(^|_)mm_|multi_?modal|projector|connector|aligner|merger"
    r"|patch_embed|(^|_)vit(_|$)"
)
AUDIO = re.compile(r"audio|speech|sound|acoustic|timestamp")
# model_type -> the stack that reads pixels or sound although its name does not say so
UNNAMED_TOWERS = {
    "cosmos3_omni": "blocks",
    "deepseek_ocr2": "qwen2_model",
    "donut": "encoder",
    "granite_speech": "encoder",
    "granite_speech_plus": "encoder",
    "moonshine": "encoder",
    "pix2struct": "encoder",
    "pp_formulanet": "encoder",
    "speech-encoder-decoder": "encoder",
    "speech_to_text": "encoder",
    "vision-encoder-decoder": "encoder",
    "whisper": "encoder",
}

# --- step 2: from here on a pattern matches a whole component. Lists of the same layers (XLM has four) ...
INDEX = re.compile(r"\.[0-9]{1,6}(?=\.|$)")
LAYERS = re.compile(r"layers?|h|blocks?|attentions|ffns|layer_norm[12]")
# ... and lists with a numbering of their own, which is then part of the stack's name.
OTHER_LAYERS = re.compile(r"\w+_(layers?|blocks?)")
STACK = re.compile(
    r"\w*(encoder|decoder)\w*|mtp\w*|global_transformer|[HL]_module|dit|talker|" + OTHER_LAYERS.pattern
)

# --- step 3, in lower case
MODULES = _Table(
    linear_attn=r"(linear|lin|lightning)_?(attn|attention)|\w*delta_?net|gdn|kda|retention|time_mix\w*|[ms]?lstm\w*",
    mamba=r"mamba\d?|ssm|mamba_mixer",
    conv=r"(short_?)?conv|\w*(_sconv|_convolution)",
    attention=r"((self|cross|x|rel|inter|local_?self|transient_?global_?self|multi_?head|enc_?dec"
    r"|encoder(_?decoder)?)_?)?(attn|attention|att)s?|cross_attn_layers|mha|att_proj|attn_out",
    mixer=r"mixer|temporal_block",
)
# No softmax where one of these is: state-space decay, RWKV's time mixing, lightning attention's slopes.
RECURRENT = re.compile(
    r"A_log|dt_bias|slope_rate|forget_gate|output_gate|time_\w+|g_norm\w*|([bf]|f_[ab]|gk)_proj|[wag]_lora|[qkv]_conv1d"
)
STATE_SPACE = re.compile(r"A_log|D|dt_bias|(dt|x|in|out)_proj|conv_?1d|rg_lru|linear_(x|y|out)")
# In a `mixer` these mean attention, and the row above another mixer
MIXER_ATTENTION = re.compile(r"[qkvo]_proj|W?qkv(_proj)?")
# Searched for in what config.json calls a layer
LINEAR_TYPE = re.compile(r"linear|lightning|delta|kda")
UNSURE = ("attention", "mixer")  # linear attention, anything: what is below the module decides
# The same asked of a module's class
CLASSES = _Table(
    linear_attn=r"\w*DeltaNet|xLSTMLayer|\w*RecurrentBlock",
    mamba=r"\w*(Mixer|MambaLayer)",
    conv=r"\w*Short\w*Conv\w*",
    attention=r"\w*(Attention|MLA)",
)

# --- step 4. The block's own norm, kept inside attention by BERT and its kin; in lower case
RESIDUAL_NORM = re.compile(r"layer_?norm|ln|self_attn_layer_norm|layernorm_before_attention")
# Small networks inside attention with a q, k or v of their own
HELPERS = re.compile(r"indexer|compressor|\w+_s?conv|experts?|router|rel_\w+")
ATTENTION = _Table(
    q_a_norm=r"q_a_(layer)?norm",
    kv_a_norm=r"kv_a_(layer)?norm",
    q_norm=r"(q|query)_?(layer)?norm|norm_q|q_ln|ln_q",
    k_norm=r"(k|key)_?(layer)?norm|norm_k|k_ln|ln_k",
    v_norm=r"(v|value)_?(layer)?norm|norm_v",
    inner_norm=r"\w*norm\w*|\w+_ln",
    sinks=r"\w*sinks?\w*|softmax_offset",
    q_a=r"q_a(_proj)?|wq_a",
    q_b=r"q_b(_proj)?|wq_b|q_gate_proj",
    kv_a=r"kv_a(_proj)?(_with_mqa)?|wkv_a(_with_mqa)?",
    kv_b=r"kv_b(_proj)?|wkv_b",
    qkv=r"g?qkv(_proj)?|[wW]_?qkv|W_pack|query_key_value|c_attn|att_proj|in_proj(_weight|_bias)?",
    kv=r"kv(_proj)?|wkv|to_kv|key_value",
    q=r"q(_proj|_lin|_attn)?(_weight|_bias)?|[wW]q(_du)?|query(_proj|_global|_net)?|(project|to|linear)_q",
    k=r"k(_proj|_lin)?(_weight|_bias)?|[wW]k(_dv)?|key(_proj|_global|_net)?|(project|to|linear)_k",
    v=r"v(_proj|_lin)?(_weight|_bias)?|[wW]v(_dv)?|value(_proj|_global|_net)?|(project|to|linear)_v|v_proj_\w+",
    o=r"o(_[ab])?(_proj)?|out(_proj|_lin|put)?|[wW]o(_[ab]|_ud)?|dense(_bias)?|c?_?proj|(to|linear)_out"
    r"|att(ention|n)?_out|out_projection",
)
# Elsewhere the rows are in order of precedence: any word of the path may decide.
IN_LAYER = _Table(
    other=r"\w*residual\w*",
    router=r"router\w*|gate|wg|shared_expert_gate|(\w+_)?expert_bias|moe_statics|e_score_correction_bias",
    gate_up=r"gate_up\w*|up_gate_proj|(shared_)?w13\w*|Wi|ff_proj|input_linear",
    gate=r"gate_proj\w*|linear_gate|w1|wi_0|w_0|proj_up_gate",
    up=r"up_proj\w*|w3|v1|wi|wi_1|w_1|w_in|(fc|lin|linear|layer_)1|fc_in|c_fc|dense_h_to_4h|intermediate|proj_up",
    down=r"down_proj\w*|(shared_)?w2(_\w+)?|[wW]o|w_out|(fc|lin|linear|layer_)2|fc_out|ff_out|c_proj|dense_4h_to_h"
    r"|output\w*|proj_down",
)
OUTSIDE = _Table(
    head=r"\w*lm_heads?|embed_out|output(_projection)?|lm_loss|pred_layer|proj_out|head|cls|generator_predictions"
    r"|final_logits_bias",
    embed=r"\w*embed\w*|wte|wpe|w|shared|\w+_emb",
)
NORM = re.compile(r"\w*norm\w*|(\w+_)?ln(_?\w+)?")  # in lower case

KINDS = {
    **dict.fromkeys(("q_a", "q_b"), "q"),
    **dict.fromkeys(("kv_a", "kv_b"), "kv"),
    **dict.fromkeys(("norm", "inner_norm", "q_norm", "k_norm", "v_norm", "q_a_norm", "kv_a_norm"), "norms"),
    **dict.fromkeys(("sinks", "other_attention"), "other"),
    **dict.fromkeys(("embed", "head"), "embeddings"),
    **dict.fromkeys(("linear_attn", "mamba", "conv"), "mixer"),
}


@dataclass(frozen=True)
class Role:
    """What one tensor is.

    - ``layer``: index of its layer within its stack, None outside layers.
    - ``part``: inside softmax attention q k v o qkv kv, q_a q_b kv_a kv_b (MLA), q_norm k_norm v_norm
      q_a_norm kv_a_norm inner_norm, sinks, other_attention; a bias has the part of its weight. Elsewhere gate
      up gate_up down (experts alike) router norm embed head linear_attn mamba conv other, and vision for all
      in another modality's tower or connector.
    - ``attention``: True inside a text softmax-attention module, self or cross.
    - ``stack``: which stack of layers: "" for the usual one, else as ``encoder``, ``decoder``, ``vision``.
    """

    layer: int | None
    part: str
    attention: bool
    stack: str = ""

    @property
    def kind(self) -> str:
        """Coarse part, for spaces with a value per kind of matrix; norms outside layers join embeddings."""
        if self.part == "norm" and self.layer is None:
            return "embeddings"
        return KINDS.get(self.part, self.part)


def role(name: str, config: Mapping[str, Any] | None = None) -> Role:
    """Role of one tensor from its name and, if given, the model's config.json. Never raises.

    Prefer `roles` where all names are known: in hybrid models one name alone may say too little.
    """
    return roles([name], config)[name]


def roles(names: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, Role]:
    """Roles of all tensors of a checkpoint; tensors of one module settle together what that module is."""
    forms = {name: _form(name) for name in names}
    inside: dict[str, set[str]] = {}
    for name, form in forms.items():
        if form.kind in UNSURE:
            module, words = _divide(name, form.at)
            inside.setdefault(module, set()).update(words)
    return {
        name: _describe(name, form.at, _kind(name, form, inside, config or {}))
        for name, form in forms.items()
    }


def roles_from_model(model: nn.Module) -> dict[str, Role]:
    """Roles of all tensors in a model's state dict, from the classes of its modules instead of their names.

    The model may live on ``meta``. Names are those in memory; some architectures are spelt otherwise on disk.
    """
    modules = dict(model.named_modules())
    kinds = {path: _kind_of_class(module) for path, module in modules.items()}
    found: dict[str, Role] = {}
    for name in model.state_dict():
        parts = name.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]
        at = next((i for i, path in enumerate(paths) if kinds.get(path)), -1)
        tower = _form(name).tower or _reads_no_text([modules[path] for path in paths if path in modules])
        found[name] = _describe(name, at, "vision" if tower else kinds[paths[at]] if at >= 0 else "")
    return found


def _kind_of_class(module: nn.Module) -> str:
    kind = CLASSES.part(type(module).__name__)
    words = {word for name in module.state_dict() for word in name.split(".")} if kind == "attention" else ()
    return "linear_attn" if any(map(RECURRENT.fullmatch, words)) else kind


def _reads_no_text(chain: Sequence[object]) -> bool:
    """Whether the innermost whole model of these (they say what they take, in transformers) takes no text."""
    whole = next((module for module in reversed(chain) if hasattr(module, "input_modalities")), None)
    return "text" not in getattr(whole, "input_modalities", "text") and not hasattr(whole, "embed_tokens")


def _general(name: str) -> str:
    """The name with every index 0: what thousands of layers and experts have in common."""
    return INDEX.sub(".0", name)


class _Form(NamedTuple):
    """What a name says whatever its indices are.

    ``at`` and ``kind``: position and kind of the first component that names a token mixer, -1 and "" if none; no leaf
    is one. ``tower``: a component names another modality.
    """

    parts: tuple[str, ...]
    at: int
    kind: str
    tower: bool


def _form(name: str) -> _Form:
    return _form_of(_general(name))


@lru_cache(maxsize=4096)
def _form_of(general: str) -> _Form:
    parts = tuple(general.split("."))
    kinds = ((i, MODULES.part(word.lower())) for i, word in enumerate(parts[:-1]))
    at, kind = next((spot for spot in kinds if spot[1]), (-1, ""))
    return _Form(parts, at, kind, any(TOWER.search(word.lower()) for word in parts))


def _divide(name: str, at: int) -> tuple[str, list[str]]:
    """Path of the module at a position, and the components below it."""
    parts = name.split(".")
    return ".".join(parts[: at + 1]), parts[at + 1 :]


def _kind(name: str, form: _Form, inside: Mapping[str, Iterable[str]], config: Mapping[str, Any]) -> str:
    """``inside``: by module, every component found below it, in any tensor's name."""
    if form.tower or UNNAMED_TOWERS.get(str(config.get("model_type"))) in form.parts[:2]:
        return "vision"
    if form.kind not in UNSURE:
        return form.kind
    module, _ = _divide(name, form.at)
    if form.kind == "mixer":
        return _kind_of_mixer(form.parts[form.at], inside[module])
    layer = _describe(name, form.at, form.kind).layer
    return "linear_attn" if _is_recurrent(inside[module], layer, config) else form.kind


def _is_recurrent(inside: Iterable[str], layer: int | None, config: Mapping[str, Any]) -> bool:
    return any(map(RECURRENT.fullmatch, inside)) or bool(LINEAR_TYPE.search(_layer_type(config, layer)))


def _kind_of_mixer(name: str, inside: Iterable[str]) -> str:
    words = list(inside)
    if any(map(MIXER_ATTENTION.fullmatch, words)):
        return "linear_attn" if any(map(RECURRENT.fullmatch, words)) else "attention"
    if any(map(STATE_SPACE.fullmatch, words)):
        return "mamba" if name.lower() == "mixer" else "linear_attn"
    return ""  # an MLP or experts


def _layer_type(config: Mapping[str, Any], layer: int | None) -> str:
    """What config.json says of a layer: ``layer_types``, Kimi Linear's list or MiniMax's; "" if nothing."""
    nested = (config.get(key) for key in ("text_config", "llm_config", "language_config"))
    text = next((part for part in nested if isinstance(part, Mapping)), config)
    if str(text.get("model_type")).startswith("rwkv"):
        return "linear"
    if layer is None:
        return ""
    kimi = text.get("linear_attn_config")
    counted_from_one = kimi.get("kda_layers") if isinstance(kimi, Mapping) else None
    if isinstance(counted_from_one, (list, tuple)) and layer + 1 in counted_from_one:
        return "kda"
    types = text.get("layer_types") or text.get("attn_type_list")
    if not isinstance(types, (list, tuple)) or layer >= len(types):
        return ""
    return "linear" if types[layer] == 0 else str(types[layer])


def _describe(name: str, at: int, kind: str) -> Role:
    """Role of a tensor whose module stands at ``at`` and is of this kind, "" for none."""
    spot, found = _described(_general(name), at, kind)
    if found.layer is None:
        return found
    return Role(int(name.split(".", spot + 1)[spot]), found.part, found.attention, found.stack)


@lru_cache(maxsize=4096)
def _described(general: str, at: int, kind: str) -> tuple[int, Role]:
    """Where the layer's index stands, -1 if nowhere, and the role but for that index."""
    parts = general.split(".")
    spot = _layer(parts, at)
    layer = None if spot < 0 else 0
    if kind == "vision":
        hears = any(AUDIO.search(word.lower()) for word in parts)
        return spot, Role(layer, "vision", False, "audio" if hears else "vision")
    stack = ".".join(word for word in parts[:spot] if STACK.fullmatch(word))
    if kind == "attention":
        part = _attention_part(parts[at], parts[at + 1 :])
        return spot, Role(layer, part, part != "norm", stack)
    return spot, Role(layer, kind or _rest_part(parts, layer), False, stack)


def _layer(parts: Sequence[str], at: int) -> int:
    """Position of the layer's index, -1 if none; ``at`` is where the module stands, -1 if none."""
    spots = [i for i in range(1, len(parts)) if parts[i] == "0"]
    numbered = (i for i in spots if LAYERS.fullmatch(parts[i - 1]) or OTHER_LAYERS.fullmatch(parts[i - 1]))
    return next(numbered, at - 1 if at - 1 in spots else -1)


def _attention_part(module: str, inside: Sequence[str]) -> str:
    """``module`` itself is a projection in OLMo's first layout (``blocks.3.att_proj``)."""
    if any(RESIDUAL_NORM.fullmatch(word.lower()) for word in inside):
        return "norm"
    if any(map(HELPERS.fullmatch, inside)):
        return "other_attention"
    return next(filter(None, map(ATTENTION.part, (*reversed(inside), module))), "other_attention")


def _rest_part(parts: Sequence[str], layer: int | None) -> str:
    if any(NORM.fullmatch(word.lower()) for word in parts):
        return "norm"
    table = OUTSIDE if layer is None else IN_LAYER
    found = set(map(table.part, parts))
    return next((part for part in table.parts if part in found), "other")


def layer_counts(roles: Mapping[str, Role]) -> dict[str, int]:
    """Layers of each stack, by the highest index."""
    counts: dict[str, int] = {}
    for role in roles.values():
        if role.layer is not None:
            counts[role.stack] = max(counts.get(role.stack, 0), role.layer + 1)
    return counts


def depth(role: Role, counts: Mapping[str, int]) -> float:
    """mergekit's t of a tensor: i / (n - 1) in a stack of n layers (1 if n is 1), 0 outside the layers."""
    if role.layer is None:
        return 0.0
    layers = counts[role.stack]
    return min(1.0, role.layer / (layers - 1)) if layers > 1 else 1.0
