import pytest
import torch
import transformers

from arma_mergekit.decode import Decoder, footprints, stops

PROMPT = [5, 17, 3, 8]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def said(decoder, count=12):
    return [decoder.step() for _ in range(count)]


def test_greedy_decoding_is_that_of_transformers(model):
    ids = torch.tensor([PROMPT])
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert said(Decoder(model, PROMPT)) == wanted[0, 4:].tolist()


def test_a_model_without_a_cache_says_the_same(model):
    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, use_cache, **more):
            return self.inner(input_ids=input_ids, use_cache=False, **more)

    decoder = Decoder(Forgetful(), PROMPT)
    assert said(decoder) == said(Decoder(model, PROMPT))
    assert decoder.cache is None


def test_draws_depend_on_the_seed_and_not_on_who_takes_turns(model):
    alone = said(Decoder(model, PROMPT, temperature=2.0, seed=7))
    first, other = (Decoder(model, PROMPT, temperature=2.0, seed=seed) for seed in (7, 8))
    pairs = [(first.step(), other.step()) for _ in range(12)]
    assert [a for a, _ in pairs] == alone
    assert [b for _, b in pairs] != alone


def test_every_token_that_ends_a_text_stops(model):
    config = transformers.GenerationConfig(eos_token_id=[2, 5])
    holder = type("Model", (), {"generation_config": config})()
    assert stops(holder, type("Tokenizer", (), {"eos_token_id": 9})()) == {2, 5, 9}
    assert stops(model) == set()


def test_a_footprint_counts_shared_weights_once_and_the_cache_by_token(model):
    tied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
    ).eval()
    found = footprints({"untied": model, "tied": tied}, tokens=4, rounds=1)
    floats = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    head = model.lm_head.weight.numel()
    assert found["untied"].weight_bytes == pytest.approx(4 * floats, rel=0.01)
    assert found["untied"].weight_bytes - found["tied"].weight_bytes == 4 * head
    keys_and_values = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    assert found["tied"].cache_bytes == keys_and_values
    assert found["tied"].tokens_per_second > 0
