"""`arma inspect`: numbers from the files, as a table, as JSON and as a page."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import toy
import transformers
from click.testing import CliRunner
from conftest import llama_shapes, write_safetensors, write_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from arma_mergekit import difference
from arma_mergekit.attention import divergence_by_head
from arma_mergekit.checkpoint import open_model
from arma_mergekit.cli import COMMANDS
from arma_mergekit.cli.inspect import bars, command, render
from arma_mergekit.errors import CheckpointError, RunError
from arma_mergekit.report import heatmap
from arma_mergekit.report.inspect import render as render_page
from arma_mergekit.report.page import write_page


def inspect(*arguments):
    done = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done


def as_json(*arguments):
    return json.loads(inspect(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Two models that can read, and what the command says of them."""
    root = tmp_path_factory.mktemp("toys")
    toy.write_data(root)
    models = [write_tiny_llama(root / name, seed) for seed, name in enumerate(("base", "finetuned"))]
    toy.make_tokenizer().save_pretrained(models[0])
    return models, as_json(*models, "--text", root / "general.jsonl", "--max-tokens", 300)


# --- weights


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", "bfloat16")]
)
def test_relative_changes_are_those_of_the_loaded_tensors(tmp_path, monkeypatch, dtypes):
    monkeypatch.setattr(difference, "CHUNK", 100)
    paths = [write_tiny_llama(tmp_path / f"{i}", i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    base, tuned = ({n: t.double() for n, t in load_file(p / "model.safetensors").items()} for p in paths)
    found = as_json(*paths)

    def expected(names):
        moved, norm = (
            sum(float(t.square().sum()) for t in ts)
            for ts in zip(*((tuned[n] - base[n], base[n]) for n in names), strict=True)
        )
        return math.sqrt(moved / norm)

    assert found["by_tensor"] == pytest.approx({name: expected([name]) for name in base}, rel=1e-5)
    assert found["relative_change"] == pytest.approx(expected(base), rel=1e-5)
    q = next(row for row in found["projections"] if row["part"] == "q")
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    assert q["by_layer"] == pytest.approx([expected([name]) for name in names], rel=1e-5)
    assert q["relative_change"] == pytest.approx(expected(names), rel=1e-5)
    assert (q["tensors"], q["attention"], q["parameters"]) == (2, True, 2 * 32 * 32)
    layers = [[name for name in base if f"layers.{layer}." in name] for layer in (0, 1)]
    assert found["layers"][0]["relative_change"] == pytest.approx(
        [expected(names) for names in layers], rel=1e-5
    )
    assert sum(row["share_of_change"] for row in found["projections"]) == pytest.approx(1)
    assert found["attention"] is None


def test_an_adapter_changes_what_it_adapts_and_nothing_else(tmp_path):
    base = write_tiny_llama(tmp_path / "base", dtype="float32")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    random = np.random.default_rng(0)
    key = "base_model.model.model.layers.1.self_attn.v_proj"
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 32), (16, 2)))
    write_safetensors(
        adapter / "adapter_model.safetensors", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    )
    found = as_json(base, f"{base}+{adapter}")
    name = "model.layers.1.self_attn.v_proj.weight"
    weight = load_file(base / "model.safetensors")[name].numpy()
    expected = np.linalg.norm(2 * b @ a) / np.linalg.norm(weight)
    assert found["changed"] == 1
    assert {n: v for n, v in found["by_tensor"].items() if v} == {name: pytest.approx(expected, rel=1e-5)}


def test_what_is_the_same_is_not_read_twice(tmp_path, monkeypatch):
    base = open_model(str(write_tiny_llama(tmp_path / "base")))
    reads = []
    read = type(base).read
    monkeypatch.setattr(type(base), "read", lambda self, name: reads.append(name) or read(self, name))
    found = difference.weight_difference(base, base)
    assert sorted(reads) == sorted(base.tensors)
    assert difference.relative(found.changes.values()) == 0


def test_tensors_without_a_counterpart_are_listed(tmp_path):
    base, tuned = (write_tiny_llama(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    for path, changes in (
        (base, {"bias": torch.zeros(3)}),
        (tuned, {"model.embed_tokens.weight": torch.zeros(99, 32)}),
    ):
        tensors = load_file(path / "model.safetensors") | changes | {"steps": torch.tensor([1])}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    found = as_json(base, tuned)
    assert found["not_compared"] == {
        "bias": "in the base only",
        "model.embed_tokens.weight": "shape [96, 32] in the base, [99, 32] in the fine-tuned model",
        "steps": "I64 and I64 are not compared",
    }
    assert "  Not compared\n    bias: in the base only" in render(found)
    assert "99, 32" in render_page(found)


def test_a_change_of_what_was_zero_is_not_a_number_but_counts(tmp_path):
    paths = [write_tiny_llama(tmp_path / name) for name in ("base", "tuned")]
    for path, value in zip(paths, (0.0, 3.0), strict=True):
        tensors = load_file(path / "model.safetensors") | {"model.norm.weight": torch.full((32,), value)}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    found = as_json(*paths)
    assert found["by_tensor"]["model.norm.weight"] is None
    assert found["changed"] == 1
    norm = next(row for row in found["projections"] if row["part"] == "norm")
    assert norm["share_of_change"] == 1
    assert norm["relative_change"] > 0
    assert norm["by_layer"] == [0, 0]


def test_values_that_are_not_finite_are_one_sentence(tmp_path):
    paths = [write_tiny_llama(tmp_path / name) for name in ("base", "tuned")]
    tensors = load_file(paths[1] / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, paths[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight': NaN or infinite"):
        difference.weight_difference(*(open_model(str(path)) for path in paths))


# --- attention


def test_attention_by_head_is_that_of_the_loaded_models(toys):
    (base, tuned), found = toys
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tuned, base)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lines = (base.parent / "general.jsonl").read_text().splitlines()
    texts, tokens = [], 0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        if tokens + ids.numel() <= 300:
            texts.append({"input_ids": ids})
            tokens += ids.numel()
    expected = divergence_by_head(*models, texts).values
    attention = found["attention"]
    assert (attention["texts"], attention["tokens"]) == (len(texts), tokens)
    np.testing.assert_allclose(attention["by_head"], expected, rtol=1e-3)
    np.testing.assert_allclose(attention["by_layer"], expected.mean(1), rtol=1e-3)
    assert attention["mean"] == pytest.approx(expected.mean(), rel=1e-3)
    assert (attention["layers"], attention["skipped"], attention["metric"]) == ([0, 1], [], "js")


def test_models_that_do_not_differ_are_shown_without_attention(tmp_path):
    base = write_tiny_llama(tmp_path / "base")
    done = inspect(base, base, "--text", "nowhere.jsonl", "--html", tmp_path / "x.html")
    assert "0 of 21 tensors changed" in done.stdout
    assert "No tensor inside the layers changed." in (tmp_path / "x.html").read_text()


# --- the table


def test_the_table_has_every_projection_with_its_layers(toys):
    text = render(toys[1])
    for part in ("q", "k", "v", "o", "gate", "up", "down", "norm", "embed"):
        assert re.search(rf"^    {part} +\d+ +\d", text, re.M), part
    assert re.search(r"^  attention\n    q ", text, re.M)
    assert "layer" in text.split("heads that moved most: ")[1]
    assert "inspect" in COMMANDS


def test_bars_show_change_no_change_and_nothing():
    assert bars([0.0, 0.25, None, 1.0], 1.0) == "·▃ █"
    assert len(bars([0.5] * 126, 1.0)) == 63
    assert bars([], 1.0) == ""


# --- the page


class Page(HTMLParser):
    """Elements of a page, and whether every one was closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def cells(self):
        return [a["data-tip"] for tag, a in self.found if tag == "i" and ": " in a.get("data-tip", "")]


def test_the_page_shows_every_number_of_both_maps(toys):
    found = toys[1]
    page = Page(render_page(found))
    assert page.open == []
    cells = set(page.cells())
    for row in found["projections"]:
        for layer, value in enumerate(row["by_layer"]):
            assert f"{row['part']}, layer {layer}: {heatmap.number(value)}" in cells
    for layer, row in enumerate(found["attention"]["by_head"]):
        for head, value in enumerate(row):
            assert f"head {head}, layer {layer}: {heatmap.number(value)}" in cells


def test_every_class_of_a_cell_has_a_colour_in_light_and_in_dark(toys):
    text = render_page(toys[1])
    used = {a["class"] for tag, a in Page(text).found if tag == "i" and "class" in a}
    assert any(name.startswith("warm") for name in used)
    assert any(name.startswith("cold") for name in used)
    for name in used - {"none"}:
        assert len(re.findall(rf"\.{name}\{{background:#[0-9a-f]{{6}}\}}", text)) == 2, name
    assert f"warm{heatmap.LEVELS - 1}" in used


def test_the_page_needs_nothing_from_outside_and_names_cannot_become_elements(toys):
    found = {**toys[1], "base": "<script src=x>", "not_compared": {"<b>": "</dd>"}}
    text = render_page(found)
    assert "<script src" not in text
    assert Page(text).open == []
    assert not re.search(r"(?:src|href|url\()[ =\"']*http", text)


numbers = st.none() | st.just(0.0) | st.floats(1e-12, 10)


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(1, 90), heads=st.integers(1, 70), data=st.data(), stack=st.sampled_from(["", "encoder"]),
    skipped=st.lists(st.integers(0, 5)),
)  # fmt: skip
def test_any_difference_has_a_table_and_a_page(layers, heads, data, stack, skipped):
    values = data.draw(st.lists(numbers, min_size=layers, max_size=layers))
    attention = {
        "metric": "emd", "texts": 1, "tokens": 7, "layers": list(range(layers)), "skipped": skipped,
        "by_head": [[0.1 * layer] * heads for layer in range(layers)], "by_layer": [0.1 * n for n in range(layers)],
        "mean": 0.1,
    }  # fmt: skip
    row = {
        "part": "q",
        "stack": stack,
        "tensors": 3,
        "parameters": 5,
        "relative_change": None,
        "share_of_change": 0.0,
    }
    found = {
        "base": "a", "finetuned": "b", "model": "m", "tensors": 1, "changed": 0, "parameters": 0,
        "relative_change": None, "layers": [{"stack": stack, "relative_change": values}],
        "projections": [row | {"attention": True, "by_layer": values}, row | {"attention": False, "by_layer": []}],
        "not_compared": {}, "attention": attention,
    }  # fmt: skip
    assert Page(render_page(found)).open == []
    assert all(len(line) < 250 for line in render(found).splitlines())


def test_a_page_that_cannot_be_written_is_one_sentence(toys, tmp_path):
    with pytest.raises(RunError, match=r"Cannot write .*nowhere/x.html: No such file"):
        write_page(render_page(toys[1]), tmp_path / "nowhere" / "x.html")
    assert not list(tmp_path.iterdir())


def test_names_of_all_tensors_of_a_llama_are_in_the_json(tmp_path):
    base, tuned = (write_tiny_llama(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned")))
    config = json.loads((base / "config.json").read_text())
    assert set(as_json(base, tuned)["by_tensor"]) == set(llama_shapes(config))
