"""The import hook and `arma doctor`, in interpreters of their own. Needs an installed package (`pip install -e .`)."""

import importlib.metadata
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import arma_mergekit
from arma_mergekit import plugin
from arma_mergekit.cli import doctor
from arma_mergekit.kernel import average

ROOT = Path(__file__).parents[1]
PACKAGE_ROOT = str(Path(arma_mergekit.__file__).parents[1])
OPTIONS = ["--quiet", "--no-copy-tokenizer"]


def python(*arguments, **environment):
    """Run a new interpreter; its result."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, cwd=Path(sys.executable).parent
    )


def printed(done):
    """The JSON that a run printed last."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, tiny_llama):
    """Directory with two models and a recipe for each of mergekit's commands."""
    root = tmp_path_factory.mktemp("routes")
    base, tuned = tiny_llama(root / "base", seed=0), tiny_llama(root / "tuned", seed=1)

    def write(name, suffix="", head=""):
        text = f"{head}merge_method: arma\nbase_model: {base}{suffix}\nmodels:\n"
        text += f"- model: {tuned}{suffix}\n  parameters: {{alpha: 0.3}}\n"
        (root / name).write_text(text)

    write("recipe.yml")
    write("multi.yml", head="name: merged\n")
    write("files.yml", suffix="/model.safetensors")
    return root


def assert_merged(recipes, out):
    base, tuned, merged = (
        load_file(path / "model.safetensors") for path in (recipes / "base", recipes / "tuned", out)
    )
    assert merged.keys() == base.keys()
    for name in base:
        wanted = average(base[name], [tuned[name]], [0.3 if ".self_attn." in name else 1])
        assert torch.equal(merged[name], wanted), name


@pytest.fixture
def broken_mergekit(tmp_path):
    """A PYTHONPATH under which mergekit has a registry that our method can't work with."""
    package = tmp_path / "broken/mergekit/merge_methods"
    package.mkdir(parents=True)
    for name in ("../__init__", "__init__", "registry"):
        (package / f"{name}.py").write_text("LOADED = True\n")
    return str(tmp_path / "broken")


# The hook


def test_this_environment_has_the_hook():
    assert plugin.installed(), "these tests need an installed package: pip install -e ."


def test_hook_imports_nothing_but_itself_until_mergekits_registry_loads():
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); before = set(sys.modules);"
        "import arma_mergekit.plugin; arma_mergekit.plugin.install(); arma_mergekit.plugin.install();"
        "print(json.dumps([sorted(set(sys.modules) - before), len(sys.meta_path), type(sys.meta_path[0]).__name__]))"
    )
    modules, finders, first = printed(python("-S", "-c", script, PACKAGE_ROOT))
    assert modules == ["arma_mergekit", "arma_mergekit.plugin"]
    assert (finders, first) == (4, "Finder")


def test_finder_answers_for_no_other_module():
    finder = plugin.Finder()
    assert finder.find_spec("json") is None
    assert finder.find_spec("mergekit") is None
    assert finder.find_spec("mergekit.merge_methods.registry_of_somebody") is None


def test_start_file_names_what_the_pth_file_calls():
    lines = (ROOT / "arma_mergekit.start").read_text().split()
    assert [pkgutil.resolve_name(line) for line in lines] == [plugin.install]
    assert (
        ROOT / "arma_mergekit.pth"
    ).read_text() == f"import {plugin.__name__}; {plugin.__name__}.install()\n"


def test_entry_point_mergekit_should_read_gives_the_method():
    points = importlib.metadata.entry_points(group="mergekit.merge_methods", name="arma")
    assert {point.value for point in points} == {"arma_mergekit.method:arma"}


IN_ONE_PROCESS = """
import importlib, json, runpy, sys
assert "mergekit" not in sys.modules
from mergekit import merge_methods
from mergekit.merge_methods import registry
kind = lambda: type(merge_methods.get("arma")).__module__
loaders = registry.__loader__, registry.__spec__.loader
seen = {"first": kind(), "loaders": [type(loader).__module__ for loader in loaders]}
importlib.reload(registry)
seen["reloaded"] = kind()
root, options = sys.argv[1], sys.argv[2:]
from mergekit.scripts import merge_raw_pytorch, multimerge
multimerge.main([root + "/multi.yml", "-I", root + "/multi", *options], standalone_mode=False)
merge_raw_pytorch.main([root + "/files.yml", root + "/files", *options], standalone_mode=False)
sys.argv[1:] = [root + "/recipe.yml", root + "/module", *options]
print(json.dumps(seen))
sys.stdout.flush()
runpy.run_module("mergekit.scripts.run_yaml", run_name="__main__")
"""


def test_every_command_of_mergekit_knows_the_method_and_gives_the_kernels_bits(recipes):
    seen = printed(python("-I", "-c", IN_ONE_PROCESS, recipes, *OPTIONS))
    assert (seen["first"], seen["reloaded"]) == ("arma_mergekit.method", "arma_mergekit.method")
    assert "arma_mergekit.plugin" not in seen["loaders"]
    for out in ("multi/merged", "files", "module"):
        assert_merged(recipes, recipes / out)


def test_mergekit_yaml_as_installed_knows_the_method(recipes):
    script = shutil.which("mergekit-yaml", path=sysconfig.get_path("scripts"))
    command = [script, recipes / "recipe.yml", recipes / "script", *OPTIONS]
    subprocess.run(command, check=True, capture_output=True)
    assert_merged(recipes, recipes / "script")


def test_registry_loads_with_a_warning_if_our_method_cannot(broken_mergekit):
    script = """if True:
        import json, sys, warnings, importlib
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import mergekit.merge_methods.registry as registry
        messages = [(w.category.__name__, str(w.message)) for w in caught if "arma" in str(w.message)]
        warnings.simplefilter("error")
        importlib.reload(registry)
        print(json.dumps([registry.LOADED, messages]))
    """
    done = python("-c", script, PYTHONPATH=broken_mergekit)
    loaded, [(category, message)] = printed(done)
    assert loaded
    assert category == "RuntimeWarning"
    assert message.startswith("merge_method: arma is not available. ")
    assert "arma doctor" in message
    assert "RuntimeWarning: merge_method: arma is not available" in done.stderr  # where warnings are errors


def test_importing_the_method_first_registers_it_once():
    script = (
        "import arma_mergekit.method as m; from mergekit.merge_methods import get, registered_methods as all_;"
        "assert get('arma') is m.arma; print([x.spec.name for x in all_()].count('arma'))"
    )
    assert printed(python("-c", script)) == 1


@pytest.mark.slow
def test_without_startup_files_mergekit_does_not_know_the_method_but_our_own_command_does(recipes):
    paths = os.pathsep.join([PACKAGE_ROOT, *(p for p in sys.path if p.endswith("site-packages"))])
    arguments = [recipes / "recipe.yml", recipes / "without", *OPTIONS]
    done = python("-S", "-m", "mergekit.scripts.run_yaml", *arguments, PYTHONPATH=paths)
    assert "Unimplemented merge method arma" in done.stderr
    done = python("-S", "-m", "arma_mergekit.mergekit_yaml", *arguments, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert_merged(recipes, recipes / "without")


@pytest.mark.slow
def test_our_own_command_ends_with_one_sentence_and_the_code_of_the_error(recipes, tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text((recipes / "recipe.yml").read_text().replace("0.3", ".nan"))
    done = python("-m", "arma_mergekit.mergekit_yaml", bad, tmp_path / "out", *OPTIONS)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("Error: Parameter alpha of ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver", "fork"])
def test_processes_of_multiprocessing_know_the_method(tmp_path, start):
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def ask(name):\n"
        "    from mergekit.merge_methods import get\n"
        "    return get(name).spec.name\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:\n"
        "        print(pool.map(ask, ['arma'])[0])\n"
    )
    assert python(script, start).stdout == "arma\n"


@pytest.mark.slow
def test_ray_workers_know_the_method(tmp_path):
    pytest.importorskip("ray")
    script = tmp_path / "task.py"
    script.write_text(
        "import ray\n"
        "@ray.remote\n"
        "def ask(name):\n"
        "    from mergekit.merge_methods import get\n"
        "    return get(name).spec.name\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "print(ray.get(ask.remote('arma')))\n"
    )
    assert python(script, HOME=str(tmp_path)).stdout == "arma\n"


# The day mergekit reads entry points


def patched(text, diff):
    """Apply a diff without line numbers: each hunk's old lines must occur once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] != drop) for drop in "+-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.slow
def test_with_the_change_proposed_upstream_the_hook_does_nothing_and_the_method_is_found(tmp_path):
    diff = (ROOT / "docs/develop.md").read_text().split("```diff\n")[1].split("```")[0]
    assert diff.count("\n+") + 1 == 6
    source = Path(importlib.metadata.distribution("mergekit").locate_file("mergekit"))
    shutil.copytree(source, tmp_path / "mergekit", ignore=shutil.ignore_patterns("__pycache__"))
    registry = tmp_path / "mergekit/merge_methods/registry.py"
    registry.write_text(patched(registry.read_text(), diff))
    script = (
        "import json, sys; __import__(sys.argv[1]); from mergekit.merge_methods import registry;"
        "before = 'arma' in registry._METHODS; found = registry.get('arma').spec.name;"
        "print(json.dumps([registry.__file__, before, found]))"
    )
    for first in ("mergekit.merge_methods", "arma_mergekit.method"):
        assert printed(python("-c", script, first, PYTHONPATH=str(tmp_path))) == [
            str(registry),
            False,
            "arma",
        ]


# The wheel


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["standard", "editable"])
def test_wheel_carries_the_startup_files_at_its_root(tmp_path, kind):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    if kind == "editable":
        pytest.importorskip("editables")
    [file] = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=[kind])
    names = zipfile.ZipFile(file).namelist()
    assert {"arma_mergekit.pth", "arma_mergekit.start"} <= set(names)
    others = [name for name in names if name.endswith(".pth") and name != "arma_mergekit.pth"]
    assert all(name < "arma_mergekit.pth" for name in others)  # so that it is importable when our line runs
    assert bool(others) == (kind == "editable")


# arma doctor


def test_doctor_says_yes_where_the_hook_works():
    report = printed_whole(python("-m", "arma_mergekit", "doctor", "--json"), code=0)
    assert report["sees"] is True
    assert "bad" not in [check["state"] for check in report["checks"]]
    assert any("arma_mergekit.pth in " in check["text"] for check in report["checks"])


def printed_whole(done, code):
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_doctor_says_why_not_where_mergekit_is_broken(broken_mergekit):
    done = python("-m", "arma_mergekit", "doctor", PYTHONPATH=broken_mergekit)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("bad   mergekit does not see merge_method: arma, because of ModuleNotFoundError: ")
    assert "mergekit.merge_methods.base" in last


@pytest.mark.parametrize(
    ("seen", "state", "words"),
    [
        ({"hook": True, "owner": "arma_mergekit.method", "error": ""}, "ok", "sees"),
        ({"hook": False, "owner": "arma_mergekit.method", "error": ""}, "ok", "sees"),
        ({"hook": True, "owner": "other.method", "error": ""}, "bad", "other.method's"),
        ({"hook": False, "owner": None, "error": "RuntimeError: no"}, "bad", "did not run arma_mergekit."),
        ({"hook": True, "owner": None, "error": "ImportError: no torch"}, "bad", "no torch"),
        ({"hook": None, "owner": None, "error": "exit code -11"}, "bad", "exit code -11"),
    ],
)
def test_doctors_verdict_names_the_reason(seen, state, words):
    check = doctor.verdict(seen)
    assert check.state == state
    assert words in check.text
    assert bool(check.remedy) == (state == "bad")


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.1.5", "ok"),
        ("0.1.5.post1", "ok"),
        ("0.1.12", "ok"),
        ("0.1.4", "note"),
        ("0.2.0", "note"),
        (None, "bad"),
    ],
)
def test_doctor_knows_which_mergekit_was_tested(version, state):
    assert doctor.mergekit_version(version).state == state


def test_doctor_finds_the_startup_file_or_says_where_it_looked(tmp_path):
    assert doctor.start_file([str(tmp_path)]) == doctor.Check(
        "note", f"No {doctor.START_FILE} where Python reads such files: {tmp_path}."
    )
    (tmp_path / doctor.START_FILE).touch()
    assert doctor.start_file(["/nowhere", str(tmp_path)]).state == "ok"


def test_doctor_notices_a_mergekit_yaml_of_another_interpreter(tmp_path):
    assert doctor.script(str(tmp_path / "mergekit-yaml"), str(tmp_path)).state == "ok"
    assert "another interpreter's" in doctor.script("/elsewhere/mergekit-yaml", str(tmp_path)).text
    assert doctor.script(None, str(tmp_path)).state == "note"
