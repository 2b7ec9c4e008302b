"""The siamese model: exact at its ends, the same with and without a cache, and what it is saved as."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import toy
import transformers
from safetensors.torch import load_file, save_file

from arma_mergekit.continual.curlora import CURLoRAConfig
from arma_mergekit.errors import ArmaError, CheckpointError, InputError, RunError
from arma_mergekit.evals.rows import Row
from arma_mergekit.report.siamese import conclusion
from arma_mergekit.siamese import SiameseCache, SiameseConfig, SiameseForCausalLM, before_answer
from arma_mergekit.siamese.diagnose import diagnose
from arma_mergekit.siamese.gate import Gate, mix

# PEFT 0.21 asks transformers for what it renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WORDS = torch.tensor([[5, 9, 14, 33, 71, 8, 40]])


def family(name):
    """A tiny causal LM of a family."""
    made = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
        "gemma2": lambda: transformers.Gemma2Config(
            **SIZES, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=0.05
        ),
        "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
        "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **{k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            intermediate_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        ),
    }[name]()  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def adapted(lm, config=None):
    """The LM with an adapter that says something else."""
    from peft import LoraConfig, get_peft_model

    config = config or LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if lm.config.model_type == "gpt2":
        config.fan_in_fan_out = True
    model = get_peft_model(lm, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter)) if "U" not in name else parameter.add_(5)
    return model.eval()


def made(name="llama", dtype=torch.float32, adapter=None, **config):
    """A siamese model whose gate was not trained, but decides."""
    model = SiameseForCausalLM(adapted(family(name).to(dtype), adapter), SiameseConfig(**config)).eval()
    if model.body.gate is not None:
        torch.manual_seed(2)
        torch.nn.init.normal_(model.body.gate.B.weight)
    return model


def sides(model, **inputs):
    with torch.no_grad():
        logits = []
        for side in ("base", "tuned"):
            with model.only(side) as lm:
                logits.append(lm(**inputs).logits)
        return logits


# ---- the ends, and the formula ----

FAMILIES = ["llama", "qwen3", "gemma2", "granite", "cohere", "gpt2", "opt", "gpt_neox"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_with_the_gate_at_one_it_is_the_base_and_at_zero_the_tuned_model_bit_for_bit(name, dtype):
    model = made(name, dtype, mode="hidden_average", value=1)
    base, tuned = sides(model, input_ids=WORDS)
    assert not torch.equal(base, tuned)
    with torch.no_grad():
        assert torch.equal(model(WORDS).logits, base)
        model.body.config = SiameseConfig("hidden_average", value=0)
        assert torch.equal(model(WORDS).logits, tuned)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_gate_that_saturates_is_as_exact_as_a_number(value):
    model = made(dtype=torch.bfloat16)
    ends = sides(model, input_ids=WORDS)
    model.body.gate.forward = lambda h, *_: torch.full_like(h, value, dtype=torch.float32)
    assert torch.equal(model(WORDS).logits, ends[0 if value else 1])


def test_the_gate_is_the_formula():
    """gate_t = sigmoid([q_M ; h_M,t ; h_M',t ; q_M'] W_A W_B), q over the prompt."""
    model = made()
    with torch.no_grad(), model.only("base") as lm:
        base = lm.model(WORDS).last_hidden_state[0]
    with torch.no_grad(), model.only("tuned") as lm:
        tuned = lm.model(WORDS).last_hidden_state[0]
    prompt = torch.tensor([[True, True, True, False, False, False, False]])
    rows = []
    for t in range(WORDS.shape[1]):
        x = torch.cat([base[:3].mean(0), base[t], tuned[t], tuned[:3].mean(0)])
        gate = torch.sigmoid(x @ model.body.gate.A.weight.T @ model.body.gate.B.weight.T)
        rows.append(gate * base[t] + (1 - gate) * tuned[t])
    expected = torch.stack(rows) @ lm.lm_head.weight.T
    torch.testing.assert_close(model(WORDS, prompt_mask=prompt).logits[0], expected)
    assert not torch.allclose(model(WORDS).logits[0], expected, atol=1e-3)


def test_without_the_prompt_the_gate_sees_only_the_token():
    config = SiameseConfig("no_query", rank=3)
    gate = Gate(4, config).eval()
    torch.nn.init.normal_(gate.B.weight)
    h, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    expected = torch.sigmoid(torch.cat([h, other], -1) @ gate.A.weight.T @ gate.B.weight.T)
    torch.testing.assert_close(gate(h, other, None), expected)
    model = made(mode="no_query")
    first = torch.zeros(1, 7, dtype=torch.bool)
    first[0, 0] = True
    assert torch.equal(model(WORDS, prompt_mask=first).logits, model(WORDS).logits)


def test_an_untrained_gate_is_the_average_of_hidden_states():
    model = made(mode="hidden_average")
    untrained = SiameseForCausalLM(model.tuned, SiameseConfig()).eval()
    assert torch.equal(untrained(WORDS).logits, model(WORDS).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_are_averaged_after_the_head_whatever_it_caps(name):
    model = made(name, mode="logit_average", value=0.25)
    base, tuned = sides(model, input_ids=WORDS)
    output = model(WORDS, labels=WORDS)
    torch.testing.assert_close(output.logits, 0.25 * base + 0.75 * tuned)
    wanted = torch.nn.functional.cross_entropy(output.logits[0, :-1], WORDS[0, 1:])
    torch.testing.assert_close(output.loss, wanted)
    hidden = made(name, mode="hidden_average", value=0.25)(WORDS).logits
    assert torch.allclose(hidden, output.logits, atol=1e-5) == (name == "llama")


@pytest.mark.parametrize("kind", ["curlora", "dora", "ia3"])
def test_any_adapter_that_can_be_switched_off_will_do(kind):
    from peft import IA3Config, LoraConfig

    config = {
        "curlora": lambda: CURLoRAConfig(r=8),
        "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
        "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }[kind]()
    plain = family("llama")(WORDS).logits
    model = made(adapter=config, mode="hidden_average", value=1)
    base, tuned = sides(model, input_ids=WORDS)
    assert torch.equal(base, plain)
    assert not torch.equal(tuned, plain)
    assert torch.equal(model(WORDS).logits, plain)


def test_two_checkpoints_with_heads_of_their_own_are_exact_at_both_ends_too():
    base, tuned = family("llama"), moved(family("llama"))
    with torch.no_grad():
        ends = base(WORDS).logits, tuned(WORDS).logits
    for value in (1, 0):
        model = SiameseForCausalLM(tuned, SiameseConfig("hidden_average", value=value), base).eval()
        assert torch.equal(model(WORDS).logits, ends[0 if value else 1])
    model = SiameseForCausalLM(tuned, SiameseConfig("logit_average", value=0.5), base).eval()
    torch.testing.assert_close(model(WORDS).logits, (ends[0] + ends[1]) / 2)
    gated = SiameseForCausalLM(tuned, SiameseConfig(), base).eval()
    torch.testing.assert_close(gated(WORDS).logits, (ends[0] + ends[1]) / 2)
    said = gated.generate(WORDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(said, gated.generate(WORDS, max_new_tokens=6, do_sample=False, use_cache=False))


# ---- decoding ----


def generate(model, ids=WORDS, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(ids, **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_decoding_with_a_cache_says_the_same_as_without(name, options):
    model = made(name)
    said = generate(model, **options)
    assert torch.equal(said, generate(model, use_cache=False, **options))
    assert said.shape[1] == WORDS.shape[1] + 12
    ends = dict.fromkeys(("base", "tuned"))
    for side in ends:
        with model.only(side) as lm:
            ends[side] = generate(lm, **options)
    assert not torch.equal(said, ends["base"]) or not torch.equal(said, ends["tuned"])


def test_a_generation_config_is_obeyed_by_position_as_in_transformers():
    model = made()
    asked = transformers.GenerationConfig(max_new_tokens=3, use_cache=False, return_dict_in_generate=True)
    said = model.generate(WORDS, asked)
    assert said.sequences.shape[1] == WORDS.shape[1] + 3
    assert said.past_key_values is None


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_prompt_says_the_same_alone_and_padded_in_a_batch(options):
    model, short = made(), WORDS[:, 3:]
    batch = torch.cat([WORDS, torch.nn.functional.pad(short, (3, 0))])
    mask = (batch != 0).long()
    said = generate(model, batch, attention_mask=mask, **options)
    assert torch.equal(said[:1], generate(model, **options))
    assert torch.equal(said[1:, 3:], generate(model, short, **options))
    with torch.no_grad():
        logits = model(batch, mask).logits[1, 3:]
        torch.testing.assert_close(logits, model(short).logits[0])


def test_sampling_a_seed_says_the_same_with_and_without_a_cache():
    model, said = made(), []
    for cached in (True, False):
        transformers.set_seed(5)
        said.append(generate(model, do_sample=True, temperature=2.0, use_cache=cached))
    assert torch.equal(*said)


def test_the_cache_of_one_answer_goes_on_into_the_next_as_if_from_nothing():
    model = made()
    first = generate(model, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, SiameseCache)
    more = torch.cat([first.sequences, torch.tensor([[7, 7, 3]])], 1)
    given = {"ids": more, "attention_mask": torch.ones_like(more), "output_logits": True}
    said = generate(model, past_key_values=first.past_key_values, return_dict_in_generate=True, **given)
    anew = generate(model, return_dict_in_generate=True, **given)
    assert torch.equal(said.sequences, anew.sequences)
    torch.testing.assert_close(said.logits, anew.logits)


def test_the_prompt_may_be_read_in_chunks():
    model = made()
    assert torch.equal(generate(model, prefill_chunk_size=3), generate(model))


def test_a_cache_cut_back_keeps_its_prompt_but_starts_no_further_one():
    model = made()
    output = model(WORDS[:, :5], use_cache=True)
    cache = output.past_key_values
    before = model(WORDS[:, 5:6], past_key_values=cache, use_cache=True).logits
    cache.crop(-1)
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(model(WORDS[:, 5:6], past_key_values=cache, use_cache=True).logits, before)
    with pytest.raises(ValueError, match="Tokens were removed"):
        generate(model, past_key_values=cache)


def test_stopping_and_streaming_are_those_of_transformers():
    model = made()
    said = generate(model)[0, WORDS.shape[1] :].tolist()
    stopped = generate(model, eos_token_id=said[4])[0, WORDS.shape[1] :].tolist()
    assert stopped == said[: said.index(said[4]) + 1]

    class Heard(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens, self.over = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.over = True

    heard = Heard()
    generate(model, streamer=heard)
    assert heard.over
    assert heard.tokens == [*WORDS[0].tolist(), *said]


def test_scoring_an_answer_is_what_generating_it_computes():
    model = made()
    found = generate(model, return_dict_in_generate=True, output_logits=True)
    sequence, start = found.sequences, WORDS.shape[1]
    spoken = torch.stack(found.logits, 1)
    prompt = torch.ones(1, start, dtype=torch.bool)
    labels = sequence.masked_fill(torch.arange(sequence.shape[1]) < start, -100)
    for given in ({"prompt_mask": prompt}, {"labels": labels}):
        scored = model(sequence, **given).logits[:, start - 1 : -1]
        torch.testing.assert_close(scored, spoken)
    assert not torch.allclose(model(sequence).logits[:, start - 1 : -1], spoken, atol=1e-3)


def test_the_prompt_of_labels_ends_where_the_answer_begins():
    labels = torch.tensor([[-100, -100, 4, 5, -100, 6], [3, 4, 5, -100, -100, -100], [-100] * 6])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = before_answer(labels, mask).int().tolist()
    assert found == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]


def test_an_empty_prompt_and_a_foreign_cache_are_refused():
    model = made()
    with pytest.raises(ValueError, match="at least one token in every row"):
        model(WORDS, prompt_mask=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be a SiameseCache"):
        generate(model, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="must be a SiameseCache"):
        model(WORDS, past_key_values=transformers.DynamicCache(), use_cache=True)


def test_the_suites_see_it_as_a_model_with_a_head():
    from arma_mergekit.evals.forward import CausalLM

    model = made()
    lm = CausalLM(model)
    assert lm.anatomy.body == "body"
    h, _ = lm.hidden([[Row(tuple(WORDS[0].tolist()), 1)]])
    first = torch.ones(1, 1, dtype=torch.bool)  # a text that is scored whole: its prompt is its first token
    torch.testing.assert_close(lm.head(h), model(WORDS[:, :-1], prompt_mask=first).logits[0])


# ---- the switch ----


def test_the_adapter_is_on_again_whatever_happens_in_the_pass_without_it():
    model = made()
    with torch.no_grad(), model.only("tuned") as lm:
        before = lm(WORDS).logits

    def fails(*_):
        raise KeyboardInterrupt

    handle = model.lm.model.layers[1].register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        model(WORDS)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.lm(WORDS).logits, before)
    assert "forward" not in vars(model.lm.model)


def test_a_merged_adapter_is_refused_and_not_unmerged_behind_the_users_back():
    model = made()
    model.tuned.merge_adapter()
    merged = model.lm.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match="merged into the weights"):
        model(WORDS)
    assert torch.equal(model.lm.model.layers[0].self_attn.q_proj.base_layer.weight, merged)


def test_adapters_that_cannot_be_switched_off_are_refused_by_name():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    prompts = get_peft_model(family("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(CheckpointError, match=r"PROMPT_TUNING adapter .* cannot be switched off"):
        SiameseForCausalLM(prompts)
    head = get_peft_model(family("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(CheckpointError, match="LORA adapter changes the head"):
        SiameseForCausalLM(head)


def test_a_deep_copy_switches_its_own_adapter():
    model = made()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.tuned.parameters():
            parameter.mul_(1.5)
        expected = model(WORDS).logits
        assert not torch.equal(copied(WORDS).logits, expected)
        base, tuned = sides(copied, input_ids=WORDS)
        assert not torch.equal(base, tuned)
        assert torch.equal(model(WORDS).logits, expected)


def test_there_is_one_copy_of_the_weights_and_two_caches():
    model = made()
    plain = sum(p.numel() for p in adapted(family("llama")).parameters())
    assert sum(p.numel() for p in model.parameters()) == plain + 5 * 32 * 8
    both = model(WORDS, use_cache=True).past_key_values
    one = model.lm(WORDS, use_cache=True).past_key_values
    sizes = [sum(layer.keys.numel() for layer in cache.layers) for cache in (both, one)]
    assert sizes[0] == 2 * sizes[1]


# ---- training ----


def test_only_gate_and_adapter_are_trained_and_the_base_pass_keeps_nothing():
    model = made().train()
    labels = WORDS.masked_fill(torch.arange(7) < 3, -100)
    model(WORDS, labels=labels).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all("lora_" in name or name.startswith("body.gate.") for name in moved)
    assert {"body.gate.A.weight", "body.gate.B.weight"} < moved
    assert set(model.state_dict()) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_loss_counts_the_answer_alone():
    model = made()
    labels = WORDS.masked_fill(torch.arange(7) < 3, -100)
    output = model(WORDS, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits[0, 2:-1], WORDS[0, 3:])
    torch.testing.assert_close(output.loss, wanted)


def test_gate_and_adapter_have_learning_rates_of_their_own():
    model = made()
    gate, adapter = model.parameter_groups(adapter_lr=0.1, gate_lr=0.2)
    assert (gate["lr"], adapter["lr"]) == (0.2, 0.1)
    assert sum(p.numel() for p in gate["params"]) == 5 * 32 * 8
    model.tuned.requires_grad_(False)
    assert [group["lr"] for group in model.parameter_groups(gate_lr=0.2)] == [0.2]


def test_dropout_follows_both_factors_and_only_in_training():
    gate = Gate(4, SiameseConfig("no_query", rank=2, dropout=0.5))
    torch.nn.init.normal_(gate.B.weight)
    h = torch.randn(1, 400, 4)
    assert (gate(h, -h, None) == 0.5).float().mean() > 0.4  # what is dropped last is sigmoid(0)
    gate.eval()
    assert torch.equal(gate(h, -h, None), gate(h, -h, None))


# ---- settings ----


def test_the_command_knows_the_same_modes():
    from arma_mergekit.cli.finetune import MODES as OFFERED
    from arma_mergekit.siamese import MODES

    assert tuple(MODES) == OFFERED


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mode": "ful"}, "Did you mean full"),
        ({"rank": 0}, "rank must be a whole number >= 1, but got 0"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"value": float("nan")}, "0 <= value <= 1"),
        ({"value": True}, "0 <= value <= 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_value(wrong, says):
    with pytest.raises(InputError, match=says):
        SiameseConfig(**wrong)


def test_mixing_by_a_number_at_the_ends_returns_the_operand():
    a, b = torch.tensor([1.0, float("inf")]), torch.tensor([2.0, float("nan")])
    assert mix(1, a, b) is a
    assert mix(0.0, a, b) is b
    assert mix(0.25, a, b)[0] == 1.75


# ---- files ----


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """base/, other/ (the same shapes), second/ and adapter/ as files."""
    root = tmp_path_factory.mktemp("siamese")
    lm = family("llama").to(torch.bfloat16)
    lm.save_pretrained(root / "base")
    adapted(lm).save_pretrained(root / "adapter")
    for name, scale in (("other", 0.5), ("second", 0.01)):
        lm = family("llama").to(torch.bfloat16)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        lm.save_pretrained(root / name)
    return root


def opened(parts, tuned="adapter", **config):
    model = SiameseForCausalLM.from_parts(str(parts / "base"), str(parts / tuned), SiameseConfig(**config))
    if model.body.gate is not None:
        torch.nn.init.normal_(model.body.gate.B.weight)
    return model


LOGITS = """
import sys, torch
from safetensors.torch import save_file
from arma_mergekit.siamese import SiameseForCausalLM
model = SiameseForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(torch.tensor([[5, 9, 14, 33]])).logits}, sys.argv[2])
"""


def test_a_saved_model_has_the_same_logits_bit_for_bit_in_another_process(parts, tmp_path):
    model = opened(parts, rank=3)
    model.save_pretrained(tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")) == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "gate.safetensors", "siamese.json",
    ]  # fmt: skip
    call = [sys.executable, "-c", LOGITS, str(tmp_path / "out"), str(tmp_path / "logits.safetensors")]
    subprocess.run(call, check=True)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9, 14, 33]])).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_dtype_and_device_map_are_those_asked_for(parts):
    where = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    model = SiameseForCausalLM.from_parts(str(parts / "base"), str(parts / "adapter"), **where)
    assert model.dtype == model.lm.lm_head.weight.dtype == torch.float32
    assert generate(model).shape == (1, 19)


def test_a_decoder_with_accelerates_hooks_keeps_them():
    """What device_map puts on modules: a forward of their own."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    expected, lm = made()(WORDS).logits, family("llama")
    tuned = adapted(lm)
    add_hook_to_module(lm.model, AlignDevicesHook(io_same_device=True))
    hooked = lm.model.forward
    model = SiameseForCausalLM(tuned).eval()
    model.body.gate.load_state_dict(made().body.gate.state_dict())
    assert torch.equal(model(WORDS).logits, expected)
    assert lm.model.forward is hooked


@pytest.mark.parametrize("mode", ["no_query", "hidden_average"])
def test_what_has_no_query_or_no_gate_is_saved_too(parts, tmp_path, mode):
    model = opened(parts, mode=mode, value=0.3)
    model.save_pretrained(tmp_path / "out")
    again = SiameseForCausalLM.from_pretrained(tmp_path / "out")
    assert again.siamese_config == model.siamese_config
    assert torch.equal(again(WORDS).logits, model(WORDS).logits)
    assert (tmp_path / "out" / "gate.safetensors").exists() == (mode == "no_query")


def test_two_checkpoints_are_saved_by_name(parts, tmp_path):
    model = opened(parts, "second")
    model.save_pretrained(tmp_path / "out")
    again = SiameseForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(WORDS).logits, model(WORDS).logits)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gate.safetensors", "siamese.json"]


def test_another_base_is_refused_and_a_moved_one_found_by_name(parts, tmp_path):
    opened(parts).save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"belongs to other weights than those of .*other"):
        SiameseForCausalLM.from_pretrained(tmp_path / "out", str(parts / "other"))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (parts / "base").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    SiameseForCausalLM.from_pretrained(tmp_path / "out", str(moved))


def test_it_is_no_input_of_a_merge_but_its_adapter_is(parts, tmp_path):
    from arma_mergekit.checkpoint import open_model

    opened(parts).save_pretrained(tmp_path / "out")
    for name in (str(tmp_path / "out"), f"{parts / 'base'}+{tmp_path / 'out'}"):
        with pytest.raises(
            CheckpointError, match="cannot be merged or exported as one checkpoint; its adapter"
        ):
            open_model(name)
    open_model(f"{parts / 'base'}+{tmp_path / 'out' / 'adapter'}")


def test_the_base_is_named_by_its_absolute_path_and_the_digests_of_its_weights(parts, tmp_path):
    opened(parts).save_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "siamese.json").read_text())
    assert record["base"]["model"] == str(parts / "base")
    assert list(record["base"]["sha256"]) == ["model.safetensors"]


def broken(out, what):
    """Break a saved model in one way."""
    gate, record = out / "gate.safetensors", out / "siamese.json"
    tensors = load_file(gate)
    if what == "truncated gate":
        gate.write_bytes(gate.read_bytes()[:-8])
    elif what == "gate of another rank":
        save_file({"A.weight": tensors["A.weight"][:2].clone(), "B.weight": tensors["B.weight"]}, gate)
    elif what == "gate of NaN":
        save_file({name: t * float("nan") for name, t in tensors.items()}, gate)
    elif what == "no gate":
        gate.unlink()
    elif what == "pickled adapter":
        adapter = out / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(adapter), out / "adapter" / "adapter_model.bin")
        adapter.unlink()
    elif what == "half an adapter":
        adapter = out / "adapter" / "adapter_model.safetensors"
        save_file(dict(list(load_file(adapter).items())[1:]), adapter)
    elif what == "link out":
        moved = out.parent / "elsewhere.safetensors"
        gate.rename(moved)
        gate.symlink_to(moved)
    else:
        content = json.loads(record.read_text())
        content.update(
            {
                "format 2": {"format": 2},
                "no settings": {"settings": None},
                "odd settings": {"settings": {"mode": "full", "rnak": 3}},
                "no base": {"base": {"model": 3}},
            }[what]
        )
        record.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("truncated gate", "truncated"),
        ("gate of another rank", "must hold F32 tensors"),
        ("gate of NaN", "NaN or infinite"),
        ("no gate", "gate.safetensors is missing"),
        ("pickled adapter", "pickled adapters are never opened"),
        ("half an adapter", "other tensors than its config asks for"),
        ("link out", "outside the model"),
        ("format 2", "has format 2"),
        ("no settings", "needs settings"),
        ("odd settings", "Did you mean rank"),
        ("no base", "needs base with model and sha256"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_broken_directory_is_refused_in_a_sentence(parts, tmp_path, what, says):
    opened(parts).save_pretrained(tmp_path / "out")
    broken(tmp_path / "out", what)
    with pytest.raises(CheckpointError, match=says):
        SiameseForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("setting", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_changes_the_base_is_refused(parts, tmp_path, setting):
    for file in (parts / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | setting
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the base is not what is left"):
        SiameseForCausalLM.from_parts(str(parts / "base"), str(tmp_path))


def test_a_model_that_was_not_made_of_files_has_no_base_to_name(tmp_path):
    with pytest.raises(RunError, match="make it with from_parts"):
        made().save_pretrained(tmp_path / "out")


# ---- what the gate does ----


def moved(lm):
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return lm


def rows(*texts):
    return [Row(tuple(text), start) for text, start in texts]


TASKS = {
    "general": rows(([5, 9, 14, 33, 71, 8, 40], 1), ([3, 7, 7, 20], 1)),
    "domain": rows(([11, 12, 13, 14, 15], 3)),
}


def test_the_diagnosis_is_of_the_gates_where_the_answer_is_predicted():
    model = made()
    found = diagnose(model, TASKS)
    assert [(task["name"], task["tokens"], task["items"]) for task in found["tasks"]] == [
        ("general", 9, 2), ("domain", 2, 1), ("all", 11, 3),
    ]  # fmt: skip
    seen = []
    model.body.watch = lambda gate, *_: seen.append(gate)
    with torch.no_grad():
        model(torch.tensor([[11, 12, 13, 14]]), prompt_mask=torch.ones(1, 3))
    gate = seen[0][0, 2:]
    domain = found["tasks"][1]
    torch.testing.assert_close(torch.tensor(domain["by_channel"]), gate.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.tensor(domain["spread_by_channel"]), gate.std(0, correction=0), atol=1e-5, rtol=0
    )
    assert domain["mean"] == pytest.approx(float(gate.mean()), abs=1e-5)
    assert not found["constant"]
    assert domain["kl_one"] > 0


def test_a_gate_that_does_not_move_is_said_to_be_the_average_that_it_is():
    model = made()
    torch.nn.init.zeros_(model.body.gate.B.weight)
    found = diagnose(model, TASKS)
    assert found["constant"]
    assert found["average"] == 0.5
    assert [task["kl_one"] for task in found["tasks"]] == [0.0] * 3
    assert "averaging the two models' outputs, the base's with weight 0.500" in conclusion(found)
    assert "decides token by token" in conclusion(diagnose(made(), TASKS))


def test_two_heads_have_no_single_average_and_no_gate_nothing_to_see():
    gated = SiameseForCausalLM(family("llama"), SiameseConfig(), moved(family("llama")))
    assert diagnose(gated.eval(), TASKS)["tasks"][0]["kl_one"] is None
    with pytest.raises(RunError, match=r"takes the base with weight 0\.5"):
        diagnose(made(mode="hidden_average"), TASKS)


def test_the_command_prints_a_line_for_each_task_and_writes_a_page(pair, tmp_path):
    from click.testing import CliRunner

    from arma_mergekit.cli.inspect import command

    model, files = pair
    words = [str(model), *(word for file in files for word in ("--text", str(file)))]
    done = CliRunner().invoke(
        command, [*words, "--html", str(tmp_path / "page.html")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == f"  siamese      {model}   full, rank 8, 48 channels"
    assert [line.split()[0] for line in done.stdout.splitlines()[5:8]] == ["general", "sums", "all"]
    page = (tmp_path / "page.html").read_text()
    assert "What the gate does" in page
    assert page.count('class="curve') == 2
    assert not re.search(r"(?:src|href|url\()[ =\"']*http", page)
    found = json.loads(CliRunner().invoke(command, [*words, "--json"], catch_exceptions=False).stdout)
    assert len(found["tasks"][0]["by_channel"]) == 48


@pytest.mark.parametrize(
    ("words", "says"), [([], "Give FINETUNED"), (["--text", "nowhere.jsonl"], "No data file|Cannot read")]
)
def test_what_the_command_lacks_is_named(pair, words, says):
    from click.testing import CliRunner

    from arma_mergekit.cli.inspect import command

    done = CliRunner().invoke(command, [str(pair[0]), *words])
    assert isinstance(done.exception, ArmaError)
    assert re.search(says, str(done.exception))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A saved siamese model of a toy that has a tokenizer, and two files of texts."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("toy")
    config = transformers.LlamaConfig(
        vocab_size=len(toy.ALPHABET), hidden_size=48, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    lm = transformers.LlamaForCausalLM(config)
    toy.save(lm, toy.make_tokenizer(), root / "base")
    get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "adapter")
    model = SiameseForCausalLM.from_parts(str(root / "base"), str(root / "adapter"))
    torch.nn.init.normal_(model.body.gate.B.weight)
    model.save_pretrained(root / "siamese")
    toy.write_data(root)
    return root / "siamese", [root / "general.jsonl", root / "sums.jsonl"]
