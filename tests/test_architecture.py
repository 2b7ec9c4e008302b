"""The import direction of the design, and how little the light commands load."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_tiny_llama

import arma_mergekit

ROOT = Path(arma_mergekit.__file__).parent

# A module imports from its own line or from those above it. `recipes` of a new module: put it where its imports allow.
LAYERS = (
    ("errors", "kernel", "roles", "space", "objective", "digest", "whole"),
    ("checkpoint", "attention", "search", "trials"),
    ("recipe", "plan", "live", "decode", "evals"),
    ("merge", "method"),
    ("executor",),
    ("export", "load", "scoring", "verdict", "fingerprint", "cache"),
    ("averaging", "difference", "continual", "siamese", "models"),
    ("worker", "engines"),
    ("arms", "tune"),
    ("plugin", "report", "evaluation", "card", "results", "run", "ci", "gate", "finetune", "chat"),
    ("cli", "mergekit_yaml", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOW_MERGEKIT = {
    "method",
    "executor",
    "plugin",
    "mergekit_yaml",
    "cli",
}  # the last two call its commands, doctor asks its registry
HEAVY = (
    "torch",
    "transformers",
    "mergekit",
    "optuna",
    "lm_eval",
    "ray",
    "plotly",
    "peft",
    "datasets",
    "scipy",
    "pandas",
)
MODULES = sorted(ROOT.rglob("*.py"))


def unit(file):
    """The module or package directly below arma_mergekit that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(file, *, nested=True):
    """Dotted names that a file imports when it runs; without ``nested``, when it is imported."""
    pending, found = list(ast.parse(file.read_text(encoding="utf-8")).body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif is_type_checking(node):
            pending += node.orelse
        elif nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return found


def ours(file):
    """Units of this package that a file imports."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("arma_mergekit.")}
    return {name for name in names if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}


def test_there_is_something_to_test():
    assert {"kernel", "recipe", "cli"} <= {unit(file) for file in MODULES}
    assert ours(ROOT / "checkpoint" / "lowrank.py") == {"checkpoint", "errors", "kernel"}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    name = unit(file)
    if name == "__init__":
        assert not ours(file)
        return
    assert name in LEVEL, f"{file} has no place in LAYERS yet; give it one"
    above = {other for other in ours(file) if LEVEL[other] > LEVEL[name]}
    assert not above, f"{name} must not import {', '.join(sorted(above))}"


def test_no_two_units_import_each_other():
    graph = {}
    for file in MODULES:
        graph.setdefault(unit(file), set()).update(ours(file) - {unit(file)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_method_plugin_and_commands_know_mergekit(file):
    knows = any(name.split(".")[0] == "mergekit" for name in imports(file))
    assert not knows or unit(file) in KNOW_MERGEKIT


def test_searchers_see_no_models_files_or_clocks():
    forbidden = {"torch", "transformers", "time", "datetime", "os", "pathlib", "io", "shutil", "tempfile"}
    for file in (ROOT / "search").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & forbidden, file
        assert ours(file) <= {"errors", "space", "search"}, file


@pytest.mark.parametrize(
    "name", ["errors", "roles", "objective", "checkpoint", "recipe", "plan", "space", "cli"]
)
def test_light_modules_import_nothing_heavy_at_their_top(name):
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).glob("*.py")
    for file in files:
        assert not {n.split(".")[0] for n in imports(file, nested=False)} & set(HEAVY), file


def run(code, *arguments, cwd=None):
    """Run code in a fresh interpreter; its last line of output, split."""
    code += f"\nimport sys, time\nprint(time.process_time(), *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=cwd, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT.parent), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    seconds, *loaded = done.stdout.splitlines()[-1].split()
    return float(seconds), loaded


COMMAND = """
import sys
from arma_mergekit.cli import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
"""


def test_importing_the_package_takes_no_time():
    seconds, loaded = run("import arma_mergekit")
    assert loaded == []
    assert seconds < 0.2  # of processor time, interpreter included: wall time depends on who else is running


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["tune", "--help"], ["doctor", "--help"]]
)
def test_help_is_immediate(arguments):
    seconds, loaded = run(COMMAND, *arguments)
    assert loaded == []
    assert seconds < 0.4


def test_planning_loads_no_framework_and_is_fast(tmp_path):
    for seed, name in enumerate(("base", "ft")):
        write_tiny_llama(tmp_path / name, seed)
    models = "[{model: ft, parameters: {alpha: 0.5}}]"
    (tmp_path / "recipe.yml").write_text(f"merge_method: arma\nbase_model: base\nmodels: {models}\n")
    seconds, loaded = run(COMMAND, "plan", "recipe.yml", cwd=tmp_path)
    assert loaded == []
    assert seconds < 0.7


@pytest.mark.parametrize(
    ("layers", "shards", "width"), [(80, 30, 8192), (126, 191, 16384)], ids=["70B", "405B"]
)
def test_planning_the_largest_models_takes_less_than_a_second(tmp_path, layers, shards, width):
    for name in ("base", "ft"):
        write_headers(tmp_path / name, layers, shards, width)
    models = "[{model: ft, parameters: {alpha: [{filter: q_proj, value: [0, 1]}, {value: 0.5}]}}]"
    (tmp_path / "recipe.yml").write_text(f"merge_method: arma\nbase_model: base\nmodels: {models}\n")
    seconds, loaded = run(COMMAND, "plan", "recipe.yml", cwd=tmp_path)
    assert loaded == []
    assert seconds < 1


def write_headers(path, layers, shards, width):
    """A sharded Llama of true size whose files are holes behind their headers."""
    import json

    path.mkdir()
    shapes = {
        "model.embed_tokens.weight": (128256, width),
        "lm_head.weight": (128256, width),
        "model.norm.weight": (width,),
    }
    kinds = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (1024, width), "self_attn.v_proj": (1024, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (3 * width, width), "mlp.up_proj": (3 * width, width),
        "mlp.down_proj": (width, 3 * width), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    shapes |= {
        f"model.layers.{i}.{kind}.weight": shape for i in range(layers) for kind, shape in kinds.items()
    }
    config = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    names, weight_map = list(shapes), {}
    for k in range(shards):
        file, header, end = f"model-{k + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in names[k::shards]:
            start, end = end, end + 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
