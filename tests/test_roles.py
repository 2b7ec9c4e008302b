"""roles.py against every causal-LM, seq2seq and image-text architecture the installed transformers can build.

The truth is taken from the built model, never from names: a tensor is attention if a module above it takes a
softmax and a mask or cache (read off the code of its methods) and the model around that module embeds tokens.
Names as on disk come from transformers' own reverse weight conversion, run on attention and the rest apart.
"""

import inspect
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from arma_mergekit.roles import role, roles, roles_from_model

transformers.logging.set_verbosity_error()


# --- building: default configurations with few layers; sizes do not matter on `meta`

LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What default configurations lack, by the model_type of the (sub)configuration.
MISSING = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config.rope_theta": 1e4},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 1, "<|extra_200|>": 2}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl": {"head_dim": 64},
    "hunyuan_vl_text": {"head_dim": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] + ["conv"] * 29},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True},
}


def subconfigs(config):
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            yield from subconfigs(value)


def complete(config):
    for sub in subconfigs(config):
        for path, value in MISSING.get(sub.model_type, {}).items():
            *owner, key = path.split(".")
            setattr(getattr(sub, owner[0]) if owner else sub, key, value)


def shrink(config):
    """Keep eight experts and the fewest layers, at least two, that show every kind of layer."""
    for sub in subconfigs(config):
        values = vars(sub)
        counts = {k: values[k] for k in LAYER_COUNTS if isinstance(values.get(k), int)}
        total = max(counts.values(), default=0)
        per_layer = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == total > 2}
        patterns = [*per_layer.values(), getattr(sub, "layers_block_type", None) or ()]
        kinds = [v for v in patterns if v and all(isinstance(x, (str, int)) for x in v) and len(set(v)) < 7]
        keep = min(total, max([2, *(1 + max(map(list(v).index, v)) for v in kinds)]))
        for key, value in {**counts, **per_layer}.items():
            setattr(sub, key, min(value, keep) if key in counts else value[:keep])
        for key in EXPERT_COUNTS:
            if isinstance(values.get(key), int):
                setattr(sub, key, min(values[key], 8))


def build(model_type, class_name, small=True):
    cls = getattr(transformers, class_name)
    config = CONFIG_MAPPING[model_type]()
    if not isinstance(config, cls.config_class):  # a whole model's type listed with its text model's class
        config = cls.config_class()
    complete(config)
    if small:
        shrink(config)
    with torch.device("meta"):
        return cls(config)


# --- the truth

SOFTMAX = {
    *("softmax", "Softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "logsumexp"),
    *("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"),
}
# Modules of other modalities that live in a model that reads text.
NO_TEXT_CLASS = re.compile(
    "Vision(?!Text)|Image|Audio|Speech|QFormer|VQ|Perceiver|Projector$|ToTextProjection|Resampler|Conformer|SaProt"
    "|SequenceCompressor|SamVi|PoolingHead"
)


@cache
def takes_softmax(cls):
    """Whether a method of this class names a softmax, and its forward a mask, a cache or a position bias."""
    if issubclass(cls, (transformers.PreTrainedModel, nn.ModuleList, nn.Sequential)):
        return False
    methods = [f for base in cls.__mro__ if base is not nn.Module for f in vars(base).values() if callable(f)]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in methods]
    if not any(SOFTMAX.intersection(code.co_names) for code in codes if code):
        return False
    arguments = inspect.signature(cls.forward).parameters
    return any("mask" in a or a in ("past_key_values", "position_bias") for a in arguments)


def end_of(getter):
    """The module a model names as its input or output embedding; an empty one if it names none."""
    try:
        module = getter()
    except NotImplementedError:
        module = None
    return module if isinstance(module, nn.Module) else nn.Module()


def reads_text(chain, root):
    whole = next((m for m in reversed(chain) if isinstance(m, transformers.PreTrainedModel)), root)
    partial = [m for m in chain if not isinstance(m, transformers.PreTrainedModel)]
    if any(NO_TEXT_CLASS.search(type(m).__name__) for m in partial):
        return False
    embedding = end_of(whole.get_input_embeddings)
    if any(isinstance(m, nn.Embedding) for m in (embedding, *embedding.children())):
        return True
    named = NO_TEXT_CLASS.search(type(whole).__name__)
    return "text" in whole.input_modalities and whole.main_input_name == "input_ids" and not named


def in_attention(chain):
    """In a module that takes a softmax, or in one called Attention around it, less the block's norm."""
    inner = next((i for i, m in enumerate(chain) if takes_softmax(type(m))), None)
    if inner is not None:
        # XLNet's attention is the one that adds the residual itself, and normalises the sum.
        return not (type(chain[inner]).__name__.startswith("XLNet") and isinstance(chain[-1], nn.LayerNorm))
    wrappers = [m for m in chain if type(m).__name__.endswith("Attention")]
    around = any(takes_softmax(type(n)) for m in wrappers for n in m.modules())
    return around and not is_norm(chain[-1])


def is_norm(module):
    return "Norm" in type(module).__name__ and not any(module.children())


@dataclass
class Tensor:
    attention: bool
    text: bool
    classes: list[str]
    owner_is_norm: bool
    block: tuple[str, int] | None  # the outermost list of modules and the index there
    module: str  # path of the outermost attention module


@dataclass
class Architecture:
    config: dict
    tensors: dict[str, Tensor] = field(default_factory=dict)
    on_disk: dict[str, bool] = field(default_factory=dict)
    by_module: dict = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)

    @property
    def attention(self):
        return {name for name, tensor in self.tensors.items() if tensor.attention}


def describe(name, modules, root):
    parts = name.split(".")
    paths = [p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in modules]
    chain = [modules[p] for p in paths]
    lists = [p for p in paths if isinstance(modules.get(p.rpartition(".")[0]), nn.ModuleList)]
    block = (lists[0].rpartition(".")[0], int(lists[0].rpartition(".")[2])) if lists else None
    text = reads_text(chain, root)
    attention = text and in_attention(chain)
    outer = [p for p, m in zip(paths, chain, strict=True) if type(m).__name__.endswith(("Attention", "MLA"))]
    return Tensor(
        attention, text, [type(m).__name__ for m in chain], is_norm(chain[-1]) if chain else False, block,
        outer[0] if attention and outer else "",
    )  # fmt: skip


def names_on_disk(model, state, names):
    return revert_weight_conversion(model, {name: state[name] for name in names})


def study(model):
    modules, state = dict(model.named_modules()), model.state_dict()
    found = Architecture(model.config.to_dict(), by_module=roles_from_model(model))
    found.tensors = {name: describe(name, modules, model) for name in state}
    for half in (True, False):
        names = [name for name, tensor in found.tensors.items() if tensor.attention == half]
        found.on_disk.update(dict.fromkeys(names_on_disk(model, state, names), half))
    ends = [end_of(model.get_input_embeddings), end_of(model.get_output_embeddings)]
    weights = {id(w) for end in ends for w in end.parameters()}
    found.embeddings = {n for n, w in model.state_dict(keep_vars=True).items() if id(w) in weights}
    return found


BUILD_ERRORS = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, ImportError),
    StrictDataclassError,
)


def try_build(model_type, class_name):
    try:
        return build(model_type, class_name)
    except BUILD_ERRORS:  # some configurations cannot be cut; on `meta` a whole model only takes longer
        pass
    try:
        return build(model_type, class_name, small=False)
    except BUILD_ERRORS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


@cache
def architecture(model_type, class_name):
    """What there is to know of a model, or the sentence why it cannot be built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        model = try_build(model_type, class_name)
        return model if isinstance(model, str) else study(model)


# --- which architectures

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SEQ2SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
MULTIMODAL = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def listed(mapping):
    return [(t, c if isinstance(c, str) else c[0]) for t, c in mapping.items()]


TEXT = list(dict.fromkeys(listed(CAUSAL) + listed(SEQ2SEQ)))
OTHERS = [pair for pair in listed(MULTIMODAL) if pair not in TEXT]
USUAL = {
    *("gemma3", "idefics", "internvl", "kimi_k25", "llama4", "llava", "mistral3", "mllama", "molmo2"),
    *("paligemma", "pix2struct", "qwen2_5_vl", "qwen3_vl", "whisper"),
}
ALL = [*TEXT, *(pair if pair[0] in USUAL else pytest.param(pair, marks=pytest.mark.slow) for pair in OTHERS)]
WITHOUT_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
# Known and accepted: Evolla's cross-attention to a protein sits, with an MLP, in a module called `adapter`.
MISPLACED = {"evolla": re.compile(r"\.adapter\.")}


@pytest.fixture(params=ALL, ids="-".join)
def arch(request):
    found = architecture(*request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return request.param[0], found


def test_nearly_all_listed_text_architectures_were_really_built():
    built = [pair for pair in TEXT if not isinstance(architecture(*pair), str)]
    assert len(built) >= 150
    assert len(built) >= 0.97 * len(TEXT), sorted(set(TEXT) - set(built))


@pytest.mark.slow
def test_nearly_all_listed_multimodal_architectures_were_really_built():
    built = [pair for pair in OTHERS if not isinstance(architecture(*pair), str)]
    assert len(built) >= 0.9 * len(OTHERS), sorted(set(OTHERS) - set(built))


def assert_attention(model_type, got, truth):
    missed = {name for name in truth if name not in got}
    extra = got - truth
    known = MISPLACED.get(model_type)
    if known:
        assert missed, "no longer misplaced: take it off the list"
        missed = {name for name in missed if not known.search(name)}
    assert not missed, f"{len(missed)} attention tensors not placed: {sorted(missed)[:5]}"
    assert not extra, f"{len(extra)} tensors wrongly called attention: {sorted(extra)[:5]}"


def attention_in(found):
    return {name for name, r in found.items() if r.attention}


def test_attention_is_found_by_names_as_in_memory(arch):
    model_type, found = arch
    assert bool(found.attention) == (model_type not in WITHOUT_ATTENTION)
    assert_attention(model_type, attention_in(roles(found.tensors, found.config)), found.attention)


def test_attention_is_found_by_names_as_on_disk(arch):
    model_type, found = arch
    truth = {name for name, attention in found.on_disk.items() if attention}
    assert_attention(model_type, attention_in(roles(found.on_disk, found.config)), truth)


def test_attention_is_found_by_the_classes_of_a_models_modules(arch):
    model_type, found = arch
    assert set(found.by_module) == set(found.tensors)
    assert_attention(model_type, attention_in(found.by_module), found.attention)


def test_one_name_and_the_config_say_what_all_names_say(arch):
    _, found = arch
    together = roles(found.tensors, found.config)
    differ = [n for n in found.tensors if role(n, found.config).attention != together[n].attention]
    assert not differ


def test_layer_is_the_index_in_its_list_and_stack_and_layer_name_one_block(arch):
    _, found = arch
    blocks = defaultdict(set)
    for name, got in roles(found.tensors, found.config).items():
        tensor = found.tensors[name]
        if tensor.attention and tensor.block:
            assert got.layer == tensor.block[1], name
            blocks[got.stack, got.layer].add(tensor.block)
    assert all(len(b) == 1 for b in blocks.values()), blocks


def test_every_attention_module_has_its_projections_told_apart(arch):
    model_type, found = arch
    modules = defaultdict(set)
    for name, got in roles(found.tensors, found.config).items():
        if found.tensors[name].attention and model_type not in MISPLACED:
            modules[found.tensors[name].module].add(got.part)
    for path, parts in modules.items():
        assert "o" in parts or model_type == "jetmoe", f"{path} has no o: {parts}"
        assert parts & {"q", "q_b", "qkv"} or model_type in {"jetmoe", "reformer"}, (
            f"{path} has no q: {parts}"
        )


def test_norms_and_embeddings_are_called_so(arch):
    model_type, found = arch
    for name, got in roles(found.tensors, found.config).items():
        tensor = found.tensors[name]
        if name in found.embeddings and model_type != "modernbert-decoder":  # its head is a bare `decoder`
            assert got.kind == "embeddings", name
        elif tensor.owner_is_norm and tensor.text and got.kind != "mixer":
            assert got.kind in {"norms", "embeddings", "vision"} or got.part == "other_attention", name
        elif got.part == "norm":
            assert any("Norm" in c or c == "Embedding" for c in tensor.classes), (name, tensor.classes)


# --- modules that mix tokens without a softmax are named as what they are

MIXERS = [
    ("bailing_hybrid", "BailingHybridDeltaAttention", "linear_attn"),
    ("bamba", "BambaMixer", "mamba"),
    ("falcon_h1", "FalconH1Mixer", "mamba"),
    ("granitemoehybrid", "GraniteMoeHybridMambaLayer", "mamba"),
    ("jamba", "JambaMambaMixer", "mamba"),
    ("kimi_linear", "KimiLinearDeltaAttention", "linear_attn"),
    ("lfm2", "Lfm2ShortConv", "conv"),
    ("mamba2", "Mamba2Mixer", "mamba"),
    ("minimax", "MiniMaxLightningAttention", "linear_attn"),
    ("nemotron_h", "NemotronHMamba2Mixer", "mamba"),
    ("olmo_hybrid", "OlmoHybridGatedDeltaNet", "linear_attn"),
    ("qwen3_next", "Qwen3NextGatedDeltaNet", "linear_attn"),
    ("recurrent_gemma", "RecurrentGemmaRecurrentBlock", "linear_attn"),
    ("rwkv", "RwkvSelfAttention", "linear_attn"),
    ("xlstm", "xLSTMLayer", "linear_attn"),
    ("zamba2", "Zamba2MambaMixer", "mamba"),
]


@pytest.mark.parametrize(("model_type", "class_name", "part"), MIXERS, ids=[m[0] for m in MIXERS])
@pytest.mark.parametrize("with_config", [True, False])
def test_mixers_without_softmax_are_named_as_what_they_are(model_type, class_name, part, with_config):
    found = architecture(model_type, CAUSAL[model_type])
    inside = {name for name, tensor in found.tensors.items() if class_name in tensor.classes}
    by_name = roles(found.tensors, found.config if with_config else None)
    assert inside
    assert {by_name[name].part for name in inside} == {part}
    assert {by_name[name].kind for name in inside} == {"mixer"}
    assert {found.by_module[name].part for name in inside} == {part}


def test_a_name_that_says_too_little_is_settled_by_its_neighbours():
    gated = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.A_log"]
    plain = ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    together = roles(gated + plain)
    assert {together[name].part for name in gated} == {"linear_attn"}
    assert [together[name].part for name in plain] == ["q", "o"]
    assert role(gated[0]).attention, "alone, it looks like attention"


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
        {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2]}},
        {"attn_type_list": [0, 1]},
    ],
    ids=["layer_types", "text_config", "kimi", "minimax"],
)
def test_a_name_that_says_too_little_is_settled_by_the_config(config):
    parts = [role(f"model.layers.{i}.self_attn.q_proj.weight", config).part for i in (0, 1)]
    assert parts == ["linear_attn", "q"]


# --- names no installed architecture has, and those that mislead

NAMES = [
    # name, layer, part, kind, attention
    ("model.layers.3.self_attn.q_proj.weight", 3, "q", "q", True),
    ("model.layers.3.self_attn.q_proj.bias", 3, "q", "q", True),
    ("model.layers.3.self_attn.k_norm.weight", 3, "k_norm", "norms", True),
    ("model.layers.3.self_attn.rotary_emb.inv_freq", 3, "other_attention", "other", True),
    ("model.layers.3.self_attn.sinks", 3, "sinks", "other", True),
    ("model.layers.3.self_attn.q_a_layernorm.weight", 3, "q_a_norm", "norms", True),
    ("model.layers.3.self_attn.q_b_proj.weight", 3, "q_b", "q", True),
    ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", 3, "kv_a", "kv", True),
    ("model.layers.3.self_attn.kv_b_proj.weight", 3, "kv_b", "kv", True),
    ("model.layers.3.self_attn.indexer.wq_b.weight", 3, "other_attention", "other", True),
    ("base_model.model.model.layers.3.self_attn.v_proj.lora_A.weight", 3, "v", "v", True),
    ("model.layers.3.self_attn.qkv_proj.weight", 3, "qkv", "qkv", True),
    ("model.layers.3.self_attn.W_pack.weight", 3, "qkv", "qkv", True),
    ("transformer.h.3.self_attention.query_key_value.weight", 3, "qkv", "qkv", True),
    ("gpt_neox.layers.3.attention.query_key_value.bias", 3, "qkv", "qkv", True),
    ("gpt_neox.layers.3.attention.dense.weight", 3, "o", "o", True),
    ("h.3.attn.c_attn.weight", 3, "qkv", "qkv", True),
    ("h.3.attn.c_proj.bias", 3, "o", "o", True),
    ("h.3.mlp.c_proj.weight", 3, "down", "down", False),
    ("model.layers.3.attention.wqkv.weight", 3, "qkv", "qkv", True),
    ("model.layers.3.attention.wo.weight", 3, "o", "o", True),
    ("layers.3.attention.wq.weight", 3, "q", "q", True),
    ("transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", 3, "qkv", "qkv", True),
    ("transformer.blocks.3.norm_attn_norm.norm_1.weight", 3, "norm", "norms", False),
    ("transformer.encoder.layers.3.self_attention.dense.weight", 3, "o", "o", True),
    ("model.transformer.blocks.3.att_proj.weight", 3, "qkv", "qkv", True),
    ("model.transformer.blocks.3.attn_out.weight", 3, "o", "o", True),
    ("model.transformer.blocks.3.ff_proj.weight", 3, "gate_up", "gate_up", False),
    ("decoder.block.3.layer.1.EncDecAttention.k.weight", 3, "k", "k", True),
    ("decoder.block.3.layer.1.layer_norm.weight", 3, "norm", "norms", False),
    ("decoder.block.3.layer.2.DenseReluDense.wo.weight", 3, "down", "down", False),
    ("bert.encoder.layer.3.attention.output.dense.weight", 3, "o", "o", True),
    ("bert.encoder.layer.3.attention.output.LayerNorm.weight", 3, "norm", "norms", False),
    ("bert.encoder.layer.3.output.dense.weight", 3, "down", "down", False),
    ("language_model.model.layers.3.cross_attn.q_proj.weight", 3, "q", "q", True),
    ("language_model.model.layers.3.cross_attn_attn_gate", 3, "other", "other", False),
    ("model.layers.3.post_attention_layernorm.weight", 3, "norm", "norms", False),
    ("layers.3.attention_norm.weight", 3, "norm", "norms", False),
    ("transformer.h.3.ln_attn.weight", 3, "norm", "norms", False),
    ("model.layers.3.linear_attn.in_proj_qkvz.weight", 3, "linear_attn", "mixer", False),
    ("model.layers.3.mamba.in_proj.weight", 3, "mamba", "mixer", False),
    ("backbone.layers.3.mixer.q_proj.weight", 3, "q", "q", True),
    ("backbone.layers.3.mixer.up_proj.weight", 3, "up", "up", False),
    ("backbone.layers.3.mixer.A_log", 3, "mamba", "mixer", False),
    ("visual.blocks.3.attn.qkv.weight", 3, "vision", "vision", False),
    ("vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight", 3, "vision", "vision", False),
    ("multi_modal_projector.linear_1.weight", None, "vision", "vision", False),
    ("model.layers.3.block_sparse_moe.experts.5.w1.weight", 3, "gate", "gate", False),
    ("model.layers.3.block_sparse_moe.experts.5.w2.weight", 3, "down", "down", False),
    ("model.layers.3.block_sparse_moe.experts.5.w3.weight", 3, "up", "up", False),
    ("model.layers.3.block_sparse_moe.gate.weight", 3, "router", "router", False),
    ("model.layers.3.mlp.experts.gate_up_proj", 3, "gate_up", "gate_up", False),
    ("model.layers.3.mlp.gate_proj.weight", 3, "gate", "gate", False),
    ("model.layers.3.mlp.shared_expert_gate.weight", 3, "router", "router", False),
    ("model.embed_tokens.weight", None, "embed", "embeddings", False),
    ("model.norm.weight", None, "norm", "embeddings", False),
    ("lm_head.weight", None, "head", "embeddings", False),
    ("output.weight", None, "head", "embeddings", False),
    ("model.mystery.weight", None, "other", "other", False),
    ("model.layers.3.mystery.q_proj.weight", 3, "other", "other", False),
]


@pytest.mark.parametrize(("name", "layer", "part", "kind", "attention"), NAMES, ids=[n[0] for n in NAMES])
def test_name_is_placed(name, layer, part, kind, attention):
    got = role(name)
    assert (got.layer, got.part, got.kind, got.attention) == (layer, part, kind, attention)


def test_mixtral_and_llava_are_placed_alike_in_memory_and_on_disk():
    disk = [
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "language_model.model.layers.1.self_attn.k_proj.weight",
    ]
    memory = [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.language_model.layers.1.self_attn.k_proj.weight",
    ]
    assert [r.part for r in roles(disk).values()] == ["gate", "k"]
    assert [r.part for r in roles(memory).values()] == ["gate_up", "k"]
    assert [r.layer for r in roles(disk + memory).values()] == [1, 1, 1, 1]


def test_equal_layers_of_different_stacks_are_told_apart():
    stacks = ("model", "model.encoder", "model.decoder", "mtp", "talker.model", "model.visual")
    places = [role(f"{s}.layers.2.self_attn.q_proj.weight") for s in stacks]
    assert [p.layer for p in places] == [2] * 6
    assert [p.stack for p in places] == ["", "encoder", "decoder", "mtp", "talker", "vision"]


def test_an_encoder_that_reads_pixels_is_no_text_attention_once_the_config_says_so():
    name = "encoder.encoder.layer.0.attention.query.weight"
    assert not role(name, {"model_type": "pix2struct"}).attention
    assert role(name, {"model_type": "t5"}).attention


WORDS = st.sampled_from(
    ["model", "layers", "0", "7", "self_attn", "mixer", "q_proj", "norm", "weight", "", "²", "٣"]
)
CONFIGS = st.none() | st.dictionaries(
    st.sampled_from(["model_type", "text_config", "layer_types", "linear_attn_config", "attn_type_list"]),
    st.none()
    | st.integers()
    | st.text(max_size=3)
    | st.lists(st.text(max_size=3))
    | st.just({"kda_layers": "1"}),
)


@given(st.text() | st.lists(WORDS, max_size=8).map(".".join), CONFIGS)
@settings(max_examples=500, deadline=None)
def test_no_name_and_no_config_makes_it_raise(name, config):
    got = role(name, config)
    assert got == roles([name], config)[name]
    assert not got.attention or "." in name
