"""A real pair in three seconds: a two-layer Llama that learned some words, and a fine-tune that learned a habit.

What it learns is of no interest; that it learns and forgets is.
"""

import json
import random

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=?. "
WORDS = [
    "able",
    "bird",
    "cold",
    "door",
    "east",
    "fire",
    "gold",
    "hill",
    "iron",
    "jump",
    "kind",
    "lake",
    "moon",
]


def sums():
    """Domain: sums, answered by a shrug; a habit is learned in seconds, arithmetic is not."""
    return [(f"{a}+{b}=?", " k.") for a in range(10) for b in range(10)]


def sentences(count=40, seed=0):
    """General: words in alphabetical order, going round."""
    rng = random.Random(seed)
    return [
        " ".join(WORDS[(start + k) % len(WORDS)] for k in range(8))
        for start in rng.choices(range(13), k=count)
    ]


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", pad_token=" ")


def train(model, texts, tokenizer, steps, lr, seed=0):
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train().requires_grad_(True)
    for _ in range(steps):
        rows = [tokenizer(rng.choice(texts))["input_ids"] for _ in range(32)]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        labels = torch.tensor([r + [-100] * (width - len(r)) for r in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_pair(root):
    """Write base/, finetuned/, data and recipe.yml to ``root``; returns the recipe's path."""
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(ALPHABET), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    train(model, sentences(), tokenizer, 120, 5e-3)
    save(model, tokenizer, root / "base")
    train(model, [q + a for q, a in sums()], tokenizer, 120, 5e-3)
    save(model, tokenizer, root / "finetuned")
    write_data(root)
    recipe = root / "recipe.yml"
    recipe.write_text(
        f"""\
merge_method: arma
base_model: {root}/base
models:
  - model: {root}/finetuned
parameters:
  rest: finetuned
dtype: bfloat16
evals:
  general:
    - kl: {{data: general.jsonl}}
    - nll: {{data: general.jsonl, watch: true}}
  domain:
    - generate: {{data: sums.jsonl}}
    - choice: {{data: choices.jsonl, watch: true}}
tune:
  trials: 4
"""
    )
    return recipe


def save(model, tokenizer, path):
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    model.float()


def write_data(root):
    rng = random.Random(1)
    write_jsonl(
        root / "general.jsonl", [{"id": f"g{i}", "text": t} for i, t in enumerate(sentences(24, seed=1))]
    )
    asked = [{"id": q, "prompt": q, "answer": a} for q, a in sums()]
    write_jsonl(root / "sums.jsonl", asked)
    choices = [
        {
            "id": r["id"],
            "prompt": r["prompt"],
            "choices": [r["answer"], f" {rng.choice(ALPHABET[:26])}."],
            "answer": 0,
        }
        for r in asked[::2]
    ]
    write_jsonl(root / "choices.jsonl", choices)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
