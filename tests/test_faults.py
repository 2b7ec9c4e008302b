"""Faults while a merge or a tuning run is under way, and hostile inputs: nothing is lost, and a sentence says what.

Harm is done from outside (tests/faults.py), to processes that run the real commands.
"""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import llama_shapes, write_safetensors, write_tiny_llama
from faults import HEAVY, Lab, contents, flip

from arma_mergekit.cli.publish import write
from arma_mergekit.merge import merge
from arma_mergekit.recipe import Recipe

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
CODES = {"kill": -9, "term": 143, "int": 130}
COMMANDS = {
    "plan": ("plan", "r.yml"),
    "merge": ("merge", "r.yml", "new"),
    "reproduce": ("reproduce", "out/arma.lock.json", "new"),
    "verify": ("verify", "out"),
}
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def merged(lab, tmp_path_factory):
    """A base b, fine-tunes t and t+a (an adapter), and out, merged from b and t by r.yml; a.yml is for the adapter."""
    return make(lab, tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="session")
def larger(lab, tmp_path_factory):
    """The same with 10 MB each."""
    config = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16, "vocab_size": 2000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return make(lab, tmp_path_factory.mktemp("larger"), **config, **heads)


def make(lab, place, **config):
    write_tiny_llama(place / "b", **config)
    write_tiny_llama(place / "t", 1, **config)
    for side in "bt":
        (place / side / "tokenizer.json").write_text("{}")
    write_adapter(place / "a", config.get("hidden_size", 32))
    write_recipe(place / "r.yml")
    write_recipe(place / "a.yml", models=[{"model": "t+a"}])
    write_recipe(place / "old.yml", parameters={"alpha": 0.1, "rest": 0.2})
    assert lab.run("merge", "r.yml", "out", cwd=place).code == 0
    return place


def write_adapter(path, hidden=32, **config):
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    shapes = {"A": (4, hidden), "B": (hidden, 4)}
    factors = {
        f"base_model.model.{Q0}.lora_{f}.weight": rng.standard_normal(s).astype(np.float32)
        for f, s in shapes.items()
    }
    write_safetensors(path / "adapter_model.safetensors", factors)
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config)
    )


def write_recipe(file, **changes):
    plain = {
        "merge_method": "arma",
        "base_model": "b",
        "models": [{"model": "t"}],
        "parameters": {"alpha": 0.4},
    }
    file.write_text(yaml.safe_dump(plain | {"parameters": {"alpha": 0.4, "rest": 0.3}} | changes))


@pytest.fixture
def place(merged, tmp_path):
    """A copy of `merged` to do harm in."""
    shutil.copytree(merged, tmp_path / "x")
    return tmp_path / "x"


def leftovers(place):
    return sorted(p.name for p in place.iterdir() if ".arma-draft-" in p.name or ".arma-old-" in p.name)


def inputs(place):
    return [contents(place / name) for name in ("b", "t", "a")]


def refused(outcome, code=3):
    """The one sentence that a command ended with."""
    assert outcome.code == code, outcome.said
    assert len(outcome.said.strip()) > 20, outcome.said
    assert len(outcome.said) < 3000, outcome.said
    return outcome.said


# ---- killed ----


def old_and_new(lab, place, overwrite):
    """Contents of `out` before a merge, put there if it is to be overwritten, and after it."""
    new = contents(place / "out")
    shutil.rmtree(place / "out")
    if overwrite:
        assert lab.run("merge", "old.yml", "out", cwd=place).code == 0
    return contents(place / "out"), new


def kill(lab, place, old, new, at, name, exchange=True):
    """Kill a merge before one of its steps, look at what there is, and merge again."""
    call = ("merge", "r.yml", "out", *(["--overwrite"] if old else []))
    outcome = lab.run(*call, cwd=place, at=at, harm=("signal", SIGNALS[name]), exchange=exchange)
    where = f"{name} at step {at}: {outcome.steps[at] if at < len(outcome.steps) else 'none'}"
    assert outcome.code in (CODES[name], 0), where
    found = contents(place / "out")
    assert found in (old, new) or (found is None and not exchange), where
    if outcome.code == 0:
        assert found == new, where
    again = lab.run("merge", "r.yml", "out", "--overwrite", cwd=place)
    assert again.code == 0, f"{where}: {again.said}"
    assert contents(place / "out") == new
    assert leftovers(place) == []
    return outcome


def restore(place, old):
    """Put `out` into the state before the merge."""
    shutil.rmtree(place / "out")
    for name, data in (old or {}).items():
        (place / "out").mkdir(exist_ok=True)
        (place / "out" / name).write_bytes(data)


WAYS = [(name, overwrite) for name in SIGNALS for overwrite in (False, True)]


@pytest.mark.parametrize(("name", "overwrite"), WAYS)
def test_a_merge_stopped_before_any_of_its_steps_leaves_all_or_nothing(lab, place, name, overwrite):
    before = inputs(place)
    old, new = old_and_new(lab, place, overwrite)
    steps = stops(lab, place, old)
    for at in (steps // 2, steps - 6):
        kill(lab, place, old, new, at, name)
        restore(place, old)
    assert inputs(place) == before


def stops(lab, place, old):
    """How many steps a merge has; `out` stays as it is."""
    outcome = lab.run("merge", "r.yml", "out", *(["--overwrite"] if old else []), cwd=place)
    assert outcome.code == 0, outcome.said
    restore(place, old)
    return len(outcome.steps)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(("name", "overwrite"), WAYS)
def test_a_merge_stopped_before_each_of_its_steps_leaves_all_or_nothing(
    lab, place, name, overwrite, exchange
):
    old, new = old_and_new(lab, place, overwrite)
    for at in range(stops(lab, place, old) + 1):
        kill(lab, place, old, new, at, name, exchange)
        restore(place, old)


def stop_at_random(lab, place, old, new, times, rng):
    """Signals at any moment, also between steps, each into what the one before left."""
    whole = lab.run("merge", "r.yml", "other", cwd=place).seconds
    for _ in range(times):
        name = rng.choice(list(SIGNALS))
        running = lab.start("merge", "r.yml", "out", *(["--overwrite"] if old else []), cwd=place)
        time.sleep(rng.uniform(0, 1.2 * whole))
        running.send(SIGNALS[name])
        assert running.wait().code in (CODES[name], 0)
        found = contents(place / "out")
        assert found in (old, new)
        if found == new:
            restore(place, old)


@pytest.mark.parametrize("times", [4, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_merge_stopped_at_random_moments_leaves_all_or_nothing(lab, larger, tmp_path, overwrite, times):
    place = tmp_path / "x"
    shutil.copytree(larger, place)
    old, new = old_and_new(lab, place, overwrite)
    stop_at_random(lab, place, old, new, times, random.Random(times))
    assert lab.run("merge", "r.yml", "out", "--overwrite", cwd=place).code == 0
    assert contents(place / "out") == new
    assert leftovers(place) == []


@pytest.mark.slow
def test_the_command_itself_killed_at_random_moments_leaves_all_or_nothing(lab, larger, tmp_path):
    place, rng = tmp_path / "x", random.Random(0)
    shutil.copytree(larger, place)
    old, new = old_and_new(lab, place, overwrite=True)
    call = [sys.executable, "-m", "arma_mergekit", "merge", "r.yml", "out", "--overwrite"]
    since = time.monotonic()
    subprocess.run(call, cwd=place, check=True, capture_output=True)
    whole = time.monotonic() - since
    for _ in range(100):
        restore(place, old)
        running = subprocess.Popen(call, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, whole))
        running.kill()
        running.wait(10)
        assert contents(place / "out") in (old, new)
    assert subprocess.run(call, cwd=place).returncode == 0
    assert contents(place / "out") == new
    assert leftovers(place) == []


@pytest.mark.parametrize("name", ["term", "int"])
def test_a_merge_that_is_interrupted_cleans_up_and_says_how_to_go_on(lab, larger, tmp_path, name):
    shutil.copytree(larger, tmp_path / "x")
    outcome = lab.run("merge", "r.yml", "new", cwd=tmp_path / "x", at=30, harm=("signal", SIGNALS[name]))
    assert outcome.code == CODES[name]
    assert "same command" in outcome.err
    assert leftovers(tmp_path / "x") == []
    assert not (tmp_path / "x" / "new").exists()


def test_two_merges_into_one_directory_do_not_mix(lab, place, tmp_path):
    other = Lab(tmp_path)
    shutil.rmtree(place / "out")
    first = lab.start("merge", "r.yml", "out", cwd=place)
    second = other.start("merge", "old.yml", "out", cwd=place)
    codes = sorted([first.wait().code, second.wait().code])
    other.close()
    assert codes == [0, 2]
    assert lab.run("verify", "out", cwd=place).code == 0
    assert leftovers(place) == []


def test_a_directory_that_appears_while_the_merge_runs_is_not_replaced(place):
    def appear(_):
        (place / "here").mkdir()
        (place / "here" / "precious.txt").write_text("mine")
        return lambda _: None

    recipe = Recipe.load(absolute(place))
    with pytest.raises(Exception, match="not empty"):
        merge(recipe, place / "here", begin=appear)
    assert contents(place / "here") == {"precious.txt": b"mine"}
    assert leftovers(place) == []


def absolute(place):
    """The recipe with paths that hold in every directory."""
    write_recipe(place / "abs.yml", base_model=str(place / "b"), models=[{"model": str(place / "t")}])
    return place / "abs.yml"


@pytest.mark.parametrize(
    "mine", [".new.arma-notes", ".new.arma-draft-notes", ".new.arma-old-bak", ".new.bak"]
)
def test_directories_of_others_are_no_leftovers(lab, place, mine):
    (place / mine).mkdir()
    (place / mine / "note").write_text("mine")
    assert lab.run("merge", "r.yml", "new", cwd=place).code == 0
    assert contents(place / mine) == {"note": b"mine"}


# ---- inputs that change or vanish ----

INPUTS = (
    "b/model.safetensors", "t/model.safetensors", "a/adapter_model.safetensors", "b/config.json", "t/tokenizer.json",
)  # fmt: skip
HARMS = [(kind, file) for kind in ("unlink", "truncate", "zero") for file in INPUTS]


def harm_input(lab, merged, tmp_path, harm, clean, at):
    """Do harm to an input before a step of a merge: the result is right, or refused with a word on what happened."""
    kind, file = harm
    place = tmp_path / f"{at}"
    shutil.copytree(merged, place)
    outcome = lab.run("merge", "a.yml", "new", cwd=place, at=at, harm=(kind, str(place / file)))
    where = f"{kind} {file} at step {at}: {outcome.steps[min(at, len(outcome.steps) - 1)]}: {outcome.said}"
    if outcome.code == 0:
        assert at < clean.planned or contents(place / "new") == clean.result, where
    else:
        assert outcome.code == 3, where
        assert Path(file).name in outcome.said or Path(file).parent.name in outcome.said, where
        assert not (place / "new").exists(), where
        assert leftovers(place) == [], where
    shutil.rmtree(place)


@dataclass
class Clean:
    """A merge that nothing happened to: its result, its number of steps, and when it had seen all inputs."""

    result: dict
    steps: int
    planned: int


@pytest.fixture(scope="session")
def adapted(lab, merged, tmp_path_factory):
    """The merge of the adapter."""
    place = tmp_path_factory.mktemp("adapted") / "x"
    shutil.copytree(merged, place)
    outcome = lab.run("merge", "a.yml", "new", cwd=place)
    assert outcome.code == 0, outcome.said
    draft = next(i for i, step in enumerate(outcome.steps) if ".arma-draft-" in step)
    return Clean(contents(place / "new"), len(outcome.steps), draft)


@pytest.mark.parametrize("harm", HARMS, ids=" ".join)
def test_an_input_that_changes_during_a_merge_is_noticed(lab, merged, adapted, tmp_path, harm):
    at = random.Random(str(harm)).randrange(adapted.planned, adapted.steps)
    harm_input(lab, merged, tmp_path, harm, adapted, at)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS, ids=" ".join)
def test_an_input_that_changes_at_any_step_of_a_merge_is_noticed(lab, merged, adapted, tmp_path, harm):
    for at in range(adapted.steps):
        harm_input(lab, merged, tmp_path, harm, adapted, at)


def test_an_input_that_changes_between_plan_and_copy_is_named(place):
    def cut(_):
        os.truncate(place / "t" / "model.safetensors", 20_000)
        return lambda _: None

    with pytest.raises(Exception, match=r"t/model\.safetensors changed") as caught:
        merge(Recipe.load(absolute(place)), place / "new", begin=cut)
    assert caught.value.exit_code == 3
    assert not (place / "new").exists()


# ---- no room ----


@pytest.mark.parametrize("times", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_files_that_may_not_grow_end_a_merge_without_a_trace(lab, place, times):
    old, new = old_and_new(lab, place, overwrite=True)
    rng = random.Random(0)
    for _ in range(times):
        limit = rng.choice([rng.randrange(1, 5000), rng.randrange(1, 60_000)])
        outcome = lab.run("merge", "r.yml", "out", "--overwrite", cwd=place, RLIMIT_FSIZE=limit)
        if outcome.code == 0:
            assert contents(place / "out") == new
            restore(place, old)
        else:
            assert "File too large" in refused(outcome, 4)
            assert contents(place / "out") == old
        assert leftovers(place) == []


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no right to mount: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_without_room_is_noticed_before_anything_is_written(lab, larger, small_disk):
    outcome = lab.run("merge", "r.yml", small_disk / "new", cwd=larger)
    assert "make room" in refused(outcome, 4)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_during_a_merge_leaves_what_was_there(lab, place, small_disk):
    shutil.copytree(place / "out", small_disk / "out")
    old = contents(small_disk / "out")
    call = ("merge", "old.yml", small_disk / "out", "--overwrite")
    steps = lab.run("merge", "old.yml", small_disk / "other", cwd=place).steps
    begun = steps.index("ctypes.dlsym")  # to have the disk start with what was written first
    shutil.rmtree(small_disk / "other")
    ballast = small_disk / "ballast"
    for share in (0, 0.3, 0.8):
        at = begun + int(share * (len(steps) - begun))
        outcome = lab.run(*call, cwd=place, at=at, harm=("fill", str(ballast)))
        assert "No space left" in refused(outcome, 4), share
        assert contents(small_disk / "out") == old
        assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "out"]
        ballast.unlink()
    assert lab.run(*call, cwd=place).code == 0
    assert lab.run("verify", small_disk / "out", cwd=place).code == 0


BEHIND = ["merge", "verify", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plan", "reproduce"))]


@pytest.mark.parametrize("command", BEHIND)
def test_a_full_disk_behind_stdout_is_an_error_not_a_traceback(place, command):
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-m", "arma_mergekit", *COMMANDS[command]]
        outcome = subprocess.run(call, cwd=place, stdout=full, stderr=subprocess.PIPE, text=True)
    assert outcome.returncode not in (0, 1 if command == "verify" else 0)
    assert "No space left" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("Error: ")


def test_reports_are_written_to_devices_and_pipes_not_in_their_place(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        device.write_text("")
    except PermissionError:
        pytest.skip("no right to make a device")
    write(device, "text")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["null"]


def test_a_few_descriptors_are_enough_for_many_shards(lab, place):
    for side, other in (("b", "t"), ("t", "b")):
        write_recipe(
            place / "k.yml", base_model=side, models=[{"model": other}], parameters={"alpha": 0, "rest": 0}
        )
        assert lab.run("merge", "k.yml", f"{side}s", "--out-shard-size", "1B", cwd=place).code == 0
    write_recipe(place / "s.yml", base_model="bs", models=[{"model": "ts"}])
    outcome = lab.run("merge", "s.yml", "new", cwd=place, RLIMIT_NOFILE=40)
    assert outcome.code == 0, outcome.said
    assert lab.run("verify", "new", "--recipe", "r.yml", cwd=place, RLIMIT_NOFILE=40).code == 0


# ---- hostile inputs ----


def edit(file, change, data=None):
    """Change the header of a safetensors file as a dictionary, and its bytes."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_raw(file, json.dumps(header).encode(), raw[8 + length :] if data is None else data)


def write_raw(file, header, data=b"", length=None):
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def sharded(place, names=("one.safetensors", "two.safetensors"), sides="bt"):
    """Split both models into two shards; returns the weight_map."""
    for side in sides:
        header, data = parts(place / side / "model.safetensors")
        tensors = [n for n in header if n != "__metadata__"]
        half = len(tensors) // 2
        weight_map = dict.fromkeys(tensors[:half], names[0]) | dict.fromkeys(tensors[half:], names[1])
        for name in set(names):
            mine = {n: header[n] for n, file in weight_map.items() if file == name}
            blobs = [data[slice(*t["data_offsets"])] for t in mine.values()]
            ends = np.cumsum([0, *map(len, blobs)]).tolist()
            mine = {n: t | {"data_offsets": ends[i : i + 2]} for i, (n, t) in enumerate(mine.items())}
            write_raw(place / side / name, json.dumps(mine).encode(), b"".join(blobs))
        (place / side / "model.safetensors").unlink()
        write_index(place / side, weight_map)
    return weight_map


def parts(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_index(model, weight_map):
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def index_says(shard):
    """The index places a tensor in another file."""
    return lambda place: write_index(place / "b", sharded(place) | {"model.norm.weight": shard})


def header_says(**values):
    """The header says something else of one tensor of the base."""

    def change(place):
        edit(place / "b" / "model.safetensors", lambda header: header["model.norm.weight"].update(values))

    return change


def raw_header(text, length=None):
    return lambda place: write_raw(place / "b" / "model.safetensors", text, bytes(64), length)


def cut(place):
    file = place / "t" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def link_out(name):
    """A file of the base is a link to a copy outside of it."""

    def change(place):
        (place / "b" / name).rename(place / f"elsewhere-{name}")
        (place / "b" / name).symlink_to(place / f"elsewhere-{name}")

    return change


def pickled(place):
    for side in "bt":
        (place / side / "model.safetensors").unlink()
        content = pickle.dumps(Trap(str(place / "trapped")))
        (place / side / "pytorch_model.bin").write_bytes(content)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def recipe_says(text):
    return lambda place: (place / "r.yml").write_text(text)


def parameter(text):
    head = "merge_method: arma\nbase_model: b\nmodels: [{model: t}]\nparameters:\n  "
    return recipe_says(head + text)


def duplicate(place):
    header, data = parts(place / "b" / "model.safetensors")
    text = json.dumps(header)
    twice = text[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}"
    write_raw(place / "b" / "model.safetensors", twice.encode(), data)


def swapped_shards(place):
    """The base's second shard takes the place of the first."""
    sharded(place)
    shutil.copy(place / "b" / "two.safetensors", place / "b" / "one.safetensors")


def foreign_adapter(place):
    write_adapter(place / "a", 48)
    write_recipe(place / "r.yml", models=[{"model": "b+a"}])


def adapter_says(**config):
    def change(place):
        write_adapter(place / "a", **config)
        write_recipe(place / "r.yml", models=[{"model": "b+a"}])

    return change


def fifo(name):
    def change(place):
        (place / "b" / name).unlink()
        os.mkfifo(place / "b" / name)

    return change


def in_config(**values):
    def change(place):
        config = json.loads((place / "b" / "config.json").read_text())
        (place / "b" / "config.json").write_text(json.dumps(config | values))

    return change


HUGE = 10**4000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)
# what is wrong -> how to make it so, what is said about it
HOSTILE = {
    "header claims 2^60 bytes": (raw_header(b"{}", 2**60), "claims 1,152,921,504,606,846,976 bytes"),
    "header is no JSON": (raw_header(b"{" * 50), "no valid JSON"),
    "header nested 100,000 deep": (raw_header(b"[" * 100_000), "no valid JSON"),
    "tensor of 2^60 elements": (header_says(shape=[2**60]), "norm.weight.*takes"),
    "shape of 8,000 digits": (header_says(shape=[HUGE, HUGE]), "norm.weight.*whole numbers"),
    "shape of 4 MB": (header_says(shape=[HUGE] * 1000), "norm.weight.*whole numbers"),
    "shape of 200,000 ones": (header_says(shape=[1] * 200_000), "norm.weight"),
    "offsets of 4,300 digits": (header_says(data_offsets=[10**4299 * 9, 10**4299 * 9 + 64]), "norm.weight"),
    "tensors overlap": (header_says(data_offsets=[0, 64]), "overlaps"),
    "two tensors of a name": (duplicate, "'model.norm.weight' occurs twice"),
    "file cut by a byte": (cut, "truncated"),
    "index leads up": (index_says("../t/one.safetensors"), "outside the model"),
    "index leads to root": (index_says("/etc/one.safetensors"), "outside the model"),
    "index names a pickle": (index_says("pytorch_model.bin"), "pickled shard"),
    "index names the lock": (index_says("arma.lock.json"), "arma.lock.json"),
    "index names custom code": (index_says("modeling_x.py"), "modeling_x.py"),
    "index names no text": (index_says("\ud800.safetensors"), "safetensors"),
    "index names two lines": (index_says("a\nb.safetensors"), "safetensors"),
    "shard in the place of another": (swapped_shards, "another shard|lacks"),
    "weights link out": (link_out("model.safetensors"), "is a link to .*outside the model"),
    "config links out": (link_out("config.json"), "is a link to .*outside the model"),
    "tokenizer links out": (link_out("tokenizer.json"), "is a link to .*outside the model"),
    "weights are a pipe": (fifo("model.safetensors"), "model.safetensors"),
    "config is a pipe": (fifo("config.json"), "config.json"),
    "pickled weights": (pickled, "only pickled weights"),
    "adapter of another base": (foreign_adapter, r"B A has shape \(48, 48\).*\(32, 32\)"),
    "adapter of another rank": (adapter_says(r=5), "rank 4, adapter_config.json says 5"),
    "adapter with a huge alpha": (adapter_says(lora_alpha=10**400), "lora_alpha.*number"),
    "adapter with a huge rank": (adapter_says(r=10**400), "r in adapter_config.json"),
    "adapter refused at length": (adapter_says(bias="x" * 100_000), "bias"),
    "adapter refused in depth": (adapter_says(modules_to_save=json.loads("[" * 500 + "]" * 500)), "modules_to_save"),
    "YAML bomb": (recipe_says(BOMB), "aliases"),
    "YAML tag": (parameter("alpha: !!python/object/apply:os.system [ls]"), "tag .* is refused"),
    "YAML nested deep": (parameter("alpha: " + "[" * 5000), "nested deeper"),
    "YAML number of 600 kB in base 60": (parameter("alpha: 1" + ":1" * 300_000), "number"),
    "YAML number of 5,000 hex digits": (recipe_says(f"merge_method: 0x{'f' * 5000}"), "number|merge_method"),
    "YAML of 2 MB": (recipe_says("a: " + "x" * 2_000_000), "larger than"),
    "YAML of bytes": (lambda place: (place / "r.yml").write_bytes(b"\xff\xfe\x00"), "UTF-8|YAML"),
    "alpha NaN": (parameter("alpha: .nan"), "finite"),
    "alpha infinite": (parameter("alpha: [1e999]"), "finite"),
    "recipe is a list": (recipe_says("[1, 2]"), "mapping"),
    "base with a NUL": (recipe_says('{merge_method: arma, base_model: "a\\0b", models: [{model: t}]}'), "No model"),
    "base of 100 kB": (recipe_says(f"{{merge_method: arma, base_model: {'a' * 100_000}, models: [{{model: t}}]}}"), ""),
    "no tensors at all": (lambda p: [write_raw(p / s / "model.safetensors", b"{}") for s in "bt"], "no tensors"),
}  # fmt: skip
AT_MERGE = ("tokenizer",)  # a plan reads the headers of weights and configs only
OF_RECIPES = (
    "YAML",
    "alpha",
    "recipe",
    "base",
    "adapter",
)  # the lock that reproduce and verify go by has its own


def concerns(what, command):
    """Whether a command has to notice."""
    blind = AT_MERGE if command in ("plan", "verify") else ()
    blind += OF_RECIPES if command in ("reproduce", "verify") else ()
    return not what.startswith(blind)


@pytest.mark.parametrize("commands", ["merge verify", pytest.param("plan reproduce", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_inputs_are_refused_with_a_sentence_and_nothing_is_written(lab, place, what, commands):
    harm, sentence = HOSTILE[what]
    harm(place)
    before = sorted(place.iterdir())
    for command in commands.split():
        if concerns(what, command):
            outcome = lab.run(*COMMANDS[command], cwd=place)
            assert re.search(sentence, refused(outcome), re.DOTALL), outcome.said
            assert not [p for p in outcome.strange() if not is_draft(p, place)], command
            assert sorted(place.iterdir()) == before


def is_draft(path, place):
    """Whether a path is that of a draft of `new`, or in it; `place` itself counts, since it is created if missing."""
    return path == place or path.relative_to(place).parts[0].startswith(".new.arma-draft-")


ODD = [{"a": 1}, *(pytest.param(v, marks=pytest.mark.slow) for v in (True, -1, 5, "x", [], [[]], None))]


@pytest.mark.parametrize("value", ODD)
def test_odd_values_in_a_config_do_not_end_a_plan(lab, place, value):
    config = json.loads((place / "b" / "config.json").read_text())
    for key in (*config, "text_config", "quantization_config", "rope_parameters", "layer_types"):
        for side in "bt":
            (place / side / "config.json").write_text(json.dumps(config | {key: value}))
        outcome = lab.run("plan", "r.yml", cwd=place)
        assert outcome.code in (0, 3), f"{key}: {outcome.said}"


@pytest.mark.parametrize("shape", [[4, 0], [0, 4], [0], [3, 0, 2]])
def test_tensors_without_elements_are_merged_and_verified(lab, place, shape):
    for side in "bt":
        file = place / side / "model.safetensors"
        size = len(parts(file)[1])
        empty = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size]}
        edit(
            file,
            lambda header, empty=empty: header.update({f"{Q0[:-6]}q_proj.bias": empty, "model.none": empty}),
        )
    write_recipe(place / "r.yml", out_dtype="float32")
    assert lab.run("merge", "r.yml", "new", cwd=place).code == 0
    assert lab.run("verify", "new", cwd=place).code == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_the_tensors_name(lab, place, value):
    header, _ = parts(place / "t" / "model.safetensors")
    data = header[f"{Q0}.weight"]["data_offsets"][0]
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    poke(place / "t" / "model.safetensors", data + 2, bits.astype("<u2").tobytes())
    assert lab.run("plan", "r.yml", cwd=place).code == 0
    said = refused(lab.run("merge", "r.yml", "new", cwd=place))
    assert f"{Q0}.weight" in said
    assert "not finite" in said
    assert not (place / "new").exists()


def poke(file, at, data):
    """Write bytes at an offset of a safetensors file's tensors."""
    with file.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start + at)
        stream.write(data)


@pytest.mark.parametrize(("side", "word"), [("base", "rest: base"), ("both", "rest: finetuned")])
def test_a_model_may_be_called_like_a_word_of_ours(lab, place, side, word):
    (place / "t").rename(place / side)
    head = f"{{merge_method: arma, base_model: b, models: [{{model: {side}}}], parameters: {{alpha: 0.4, {word}}}}}"
    (place / "r.yml").write_text(head)
    assert lab.run("merge", "r.yml", "new", cwd=place).code == 0
    assert lab.run("verify", "new", cwd=place).code == 0


@pytest.mark.parametrize("name", ["tokenizer_1.safetensors", "vocab.safetensors", "sub/x.safetensors"])
def test_shards_with_names_of_side_files_keep_their_bytes(lab, place, name):
    sharded(place, (name.replace("/", "_"), "two.safetensors"))
    assert lab.run("merge", "r.yml", "new", cwd=place).code == 0
    assert lab.run("verify", "new", cwd=place).code == 0


OUT_NAMES = ["a+b@c", "-x y", "ü*[a]", "a\nb'\"$(x)", "x" * 200, "..x", "a.arma-x"]


@pytest.mark.parametrize("name", OUT_NAMES)
def test_any_name_of_a_directory_will_do(lab, place, name):
    out = place / name
    assert lab.run("merge", "--", "r.yml", out, cwd=place).code == 0
    assert lab.run("verify", "--", out, cwd=place).code == 0
    assert lab.run("reproduce", "--overwrite", "--", out, out, cwd=place).code == 0
    assert leftovers(place) == []


@pytest.mark.parametrize(
    "name", ["x" * 250, ".", "..", "/", "r.yml", "r.yml/x", "b", "b/model.safetensors", "loop/x"]
)
def test_directories_that_cannot_be_written_are_refused(lab, place, name):
    (place / "loop").symlink_to("loop")
    before = sorted(place.iterdir()), contents(place / "b")
    for options in ((), ("--overwrite",)):
        outcome = lab.run("merge", *options, "r.yml", name, cwd=place)
        assert outcome.code in (2, 4), outcome.said
        assert len(outcome.err.strip().splitlines()) == 1
    assert (sorted(place.iterdir()), contents(place / "b")) == before


def test_a_name_that_is_no_text_will_do_too(lab, place):
    name = os.fsdecode(b"\xff-\xfe")
    other = shutil.move(place, place.with_name(name))
    for args in (["merge", "r.yml", name], ["verify", name], ["reproduce", name, f"{name}2"]):
        outcome = lab.run(*args, cwd=other)
        assert outcome.code == 0, outcome.err


# ---- bounded memory ----


def grow(file, name, dtype, size):
    """Append a tensor of zeros that takes no room on the disk."""
    header, data = parts(file)
    header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [len(data), len(data) + size]}
    write_raw(file, json.dumps(header).encode(), data)
    os.truncate(file, file.stat().st_size + size)


@pytest.mark.parametrize("size", [160_000_000, pytest.param(1_000_000_000, marks=pytest.mark.slow)])
def test_large_tensors_of_integers_take_no_memory(place, tmp_path, size):
    lab = Lab(tmp_path, seconds=60)
    for side in "bt":
        grow(place / side / "model.safetensors", "model.layers.0.mask", "U8", size)
    assert lab.run("merge", "r.yml", "new", "--no-digests", cwd=place).peak < 150_000_000
    lab.close()


def test_large_tokenizers_take_no_memory(lab, place):
    for side in "bt":
        os.truncate(place / side / "tokenizer.json", 160_000_000)
    assert lab.run("merge", "r.yml", "new", "--no-digests", cwd=place).peak < 150_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["b/config.json", "b/model.safetensors", "out/arma.lock.json", "a/adapter_config.json"]
)
def test_json_of_100_mb_is_refused_in_bounds(lab, place, where):
    text = b'{"a":[' + b"[]," * 33_000_000 + b"[]]}"
    if where.endswith("json"):
        (place / where).write_bytes(text)
    else:
        write_raw(place / where, text)
    refused(
        lab.run("plan", "a.yml", cwd=place)
        if "out" not in where
        else lab.run("reproduce", "out", "x", cwd=place)
    )


def many_models(place):
    write_recipe(place / "r.yml", models=[{"model": f"/x/{i}"} for i in range(20_000)])


def many_keys(place):
    write_recipe(place / "r.yml", **{f"x{i}": 1 for i in range(40_000)})


def many_shards(place):
    (place / "b" / "model.safetensors").unlink()
    write_index(place / "b", {f"t{i}": f"s{i}.safetensors" for i in range(60_000)})


def many_patterns(place):
    write_adapter(place / "a", rank_pattern={f"z{i}": 3 for i in range(30_000)})
    factors, shapes = {}, llama_shapes(json.loads((place / "b" / "config.json").read_text()))
    for name, shape in shapes.items():
        if "proj" in name:
            module = name.removesuffix(".weight")
            factors[f"{module}.lora_A.weight"] = np.ones((4, shape[1]), np.float32)
            factors[f"{module}.lora_B.weight"] = np.ones((shape[0], 4), np.float32)
    write_safetensors(place / "a" / "adapter_model.safetensors", factors)
    write_recipe(place / "r.yml", models=[{"model": "b+a"}])


FLOODS = (many_models, many_keys, many_shards, many_patterns)


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
def test_a_hundred_thousand_of_a_kind_end_soon_and_are_not_all_told(lab, place, flood):
    flood(place)
    outcome = lab.run("plan", "r.yml", cwd=place)
    assert outcome.code == (0 if flood is many_patterns else 3) or "pattern" in outcome.err
    assert len(outcome.said) < 20_000


@pytest.mark.slow
def test_a_checkpoint_of_100_000_tensors_is_planned_in_bounds(place, tmp_path):
    lab = Lab(tmp_path, seconds=30)
    for side in "bt":
        entries = {
            f"layers.{i % 100}.mlp.experts.{i}.w1.weight": {
                "dtype": "F32",
                "shape": [0],
                "data_offsets": [0, 0],
            }
            for i in range(100_000)
        }
        write_raw(place / side / "model.safetensors", json.dumps(entries).encode())
    assert lab.run("plan", "r.yml", cwd=place).code == 0
    lab.close()


# ---- what verify finds ----


def test_every_flipped_bit_of_the_weights_is_found_and_its_tensor_named(lab, place):
    header, _ = parts(place / "out" / "model.safetensors")
    rng = random.Random(0)
    for name, entry in rng.sample(sorted((n, t) for n, t in header.items() if n != "__metadata__"), 6):
        at, bit = rng.randrange(*entry["data_offsets"]), rng.randrange(8)
        file = place / "out" / "model.safetensors"
        flip(file, len(file.read_bytes()) - 49472 + at, bit)
        outcome = lab.run("verify", "out", cwd=place)
        assert outcome.code == 1
        assert f"{name}: 1 of " in outcome.out
        flip(file, len(file.read_bytes()) - 49472 + at, bit)
    assert lab.run("verify", "out", cwd=place).code == 0


@pytest.mark.parametrize("times", [25, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_header_goes_unnoticed(lab, place, times):
    file = place / "out" / "model.safetensors"
    size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    rng = random.Random(1)
    for _ in range(times):
        at, bit = rng.randrange(size), rng.randrange(8)
        flip(file, at, bit)
        outcome = lab.run("verify", "out", cwd=place)
        assert outcome.code in (1, 2), f"byte {at}, bit {bit}: {outcome.said}"
        flip(file, at, bit)


def test_shards_of_another_merge_are_found(lab, place):
    assert lab.run("merge", "r.yml", "new", "--out-shard-size", "30KB", cwd=place).code == 0
    assert lab.run("merge", "old.yml", "other", "--out-shard-size", "30KB", cwd=place).code == 0
    assert lab.run("verify", "new", cwd=place).code == 0
    shard = "model-00002-of-00002.safetensors"
    shutil.copy(place / "other" / shard, place / "new" / shard)
    outcome = lab.run("verify", "new", cwd=place)
    assert outcome.code == 1
    _, names = (
        parts(place / "new" / shard)[0],
        [n for n in parts(place / "new" / shard)[0] if n != "__metadata__"],
    )
    assert all(name in outcome.out for name in names)


FORGERIES = {
    "other tokenizer": lambda out: (out / "tokenizer.json").write_text('{"a": 1}'),
    "other config": lambda out: (out / "config.json").write_text(
        (out / "config.json").read_text().replace("10000.0", "20000.0")
    ),
    "code beside": lambda out: (out / "modeling_llama.py").write_text("import os"),
    "template beside": lambda out: (out / "chat_template.jinja").write_text("{{ x }}"),
    "weights beside": lambda out: shutil.copy(out / "model.safetensors", out / "adapter_model.safetensors"),
    "pickle beside": lambda out: (out / "pytorch_model.bin").write_bytes(b"\x80\x02"),
    "linked templates": lambda out: (out / "additional_chat_templates").symlink_to("../b"),
}


@pytest.mark.parametrize("lock", ["kept", "told", "gone"])
@pytest.mark.parametrize("what", FORGERIES)
def test_what_is_not_of_the_merge_is_found_whatever_the_lock_says(lab, place, what, lock):
    out = place / "out"
    FORGERIES[what](out)
    if lock == "told":
        said = json.loads((out / "arma.lock.json").read_text())
        files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "arma.lock.json"}
        said["output"]["files"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        }
        (out / "arma.lock.json").write_text(json.dumps(said))
    elif lock == "gone":
        (out / "arma.lock.json").unlink()
    outcome = lab.run("verify", "out", *(["--recipe", "r.yml"] if lock == "gone" else []), cwd=place)
    assert outcome.code == 1, outcome.said


def test_a_card_that_was_edited_and_what_a_download_leaves_are_no_difference(lab, place):
    card = place / "out" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    (place / "out" / ".cache" / "huggingface").mkdir(parents=True)
    (place / "out" / ".cache" / "huggingface" / "x.metadata").write_text("1")
    (place / "out" / ".gitattributes").write_text("*.safetensors filter=lfs")
    outcome = lab.run("verify", "out", cwd=place)
    assert outcome.code == 0, outcome.said
    assert "README.md was edited after the merge." in outcome.said
    card.unlink()
    assert "README.md was deleted after the merge." in lab.run("verify", "out", cwd=place).said


def test_a_merge_is_verified_by_digests_when_its_inputs_are_gone(lab, place):
    shutil.rmtree(place / "t")
    assert lab.run("verify", "out", cwd=place).code == 3
    flip(place / "out" / "model.safetensors", -1)
    outcome = lab.run("verify", "out", cwd=place)
    assert outcome.code == 1
    assert "model.safetensors is not the file that was merged" in outcome.out


@pytest.mark.parametrize("metadata", [[], None, {"total_size": 10**4299}])
def test_an_index_with_odd_totals_differs(lab, place, metadata):
    assert lab.run("merge", "r.yml", "new", "--out-shard-size", "30KB", cwd=place).code == 0
    file = place / "new" / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metadata": metadata}))
    refused(lab.run("verify", "new", cwd=place), 1)


def test_a_merge_without_digests_can_be_verified_but_not_reproduced(lab, place):
    assert lab.run("merge", "r.yml", "new", "--no-digests", cwd=place).code == 0
    assert lab.run("verify", "new", cwd=place).code == 0
    assert "no digests" in refused(lab.run("reproduce", "new", "again", cwd=place))
    assert not (place / "again").exists()


# ---- hostile locks ----


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


def lock_with(path, *values):
    """The lock says something else at a place; without a value, nothing."""

    def change(lock):
        *parents, last = path
        for key in parents:
            lock = lock[key]
        if values:
            lock[last] = values[0]
        else:
            del lock[last]

    return change


def file_named(name):
    return lock_with(("output", "files", name), {"bytes": 3, "sha256": "0" * 64})


CONFIG = ("output", "files", "config.json")
LOCKS = {
    **{f"no {key}": lock_with((key,)) for key in ("recipe", "output", "inputs", "tool", "executor", "format")},
    **{f"{key} is a list": lock_with((key,), [1]) for key in ("recipe", "output", "inputs", "tool", "executor")},
    **{f"{key} is a number": lock_with((key,), 5) for key in ("recipe", "output", "inputs", "tool", "recipe_file")},
    "no files": lock_with(("output", "files")),
    "files is a list": lock_with(("output", "files"), [1]),
    "file is nothing": lock_with(CONFIG, None),
    "bytes is text": lock_with((*CONFIG, "bytes"), "x"),
    "bytes has 4,300 digits": lock_with((*CONFIG, "bytes"), 10**4299),
    "no sha256": lock_with((*CONFIG, "sha256")),
    "sha256 is a list": lock_with((*CONFIG, "sha256"), [1]),
    "file leads up": file_named("../r.yml"),
    "file leads to root": file_named("/etc/hostname"),
    "file is no text": file_named("\ud800"),
    "file has a NUL": file_named("a\0b"),
    "file of 5,000 characters": file_named("a" * 5000),
    "file is the directory": file_named(""),
    "input has a list of files": lock_with(("inputs", 0, "files"), [1]),
    "no commit": lock_with(("inputs", 0, "commit")),
    "shard size is text": lock_with(("output", "shard_size"), "x"),
    "shard size is negative": lock_with(("output", "shard_size"), -1),
    "tool is deep": lock_with(("tool",), deep(900)),
    "recipe is deep": lock_with(("recipe", "tokenizer"), deep(900)),
    "alpha is deep": lock_with(("recipe", "parameters", "alpha"), deep(400)),
    "alpha is huge": lock_with(("recipe", "parameters", "alpha"), 10**400),
    "base is no text": lock_with(("recipe", "base_model"), "\ud800"),
    "base has a NUL": lock_with(("recipe", "base_model"), "a\0b"),
    "another method": lock_with(("recipe", "merge_method"), "arma2"),
    "format of the future": lock_with(("format",), 2),
}  # fmt: skip


@pytest.mark.parametrize("what", LOCKS)
def test_hostile_locks_are_refused_before_anything_is_merged(lab, place, what):
    lock = json.loads((place / "out" / "arma.lock.json").read_text())
    LOCKS[what](lock)
    (place / "out" / "arma.lock.json").write_text(json.dumps(lock))
    verified = lab.run("verify", "out", cwd=place)
    assert verified.code in (1, 2, 3), verified.said
    assert len(verified.said) < 3000
    refused(lab.run("reproduce", "out", "new", cwd=place))
    assert not (place / "new").exists()


def test_files_outside_are_not_even_looked_at(lab, place):
    """A lock that lists a file elsewhere must not be answered with whether that has this size or content."""
    secret = place / "secret"
    secret.write_text("abc")
    for digest in ("0" * 64, hashlib.sha256(b"abc").hexdigest()):
        lock = json.loads((place / "out" / "arma.lock.json").read_text())
        lock["output"]["files"]["../secret"] = {"bytes": 3, "sha256": digest}
        (place / "out" / "arma.lock.json").write_text(json.dumps(lock))
        outcome = lab.run("verify", "out", cwd=place)
        assert not [step for step in outcome.steps if "secret" in step]
        assert outcome.code == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_what_is_no_lock_is_refused(lab, place, content):
    (place / "out" / "arma.lock.json").write_bytes(content)
    refused(lab.run("reproduce", "out", "new", cwd=place))
    refused(lab.run("verify", "out", cwd=place), 2)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"best": 1, "rival": 2, "candidates": []}', '{"candidates": 5}']
)
def test_a_broken_summary_beside_the_recipe_does_not_cost_the_merge(lab, place, content):
    (place / "r.yml").rename(place / "tuned.yml")
    (place / "summary.json").write_text(content)
    outcome = lab.run("merge", "tuned.yml", "new", cwd=place)
    assert outcome.code == 0, outcome.said
    assert "No scores in the lock" in outcome.err


@pytest.mark.parametrize("size", ["0", "-1", "x", "9" * 400 + "T", "1e9", ""])
def test_sizes_of_shards_that_are_none_are_refused(lab, place, size):
    refused(lab.run("merge", "r.yml", "new", "--out-shard-size", size, cwd=place), 2)


# ---- no network ----

WRAPPER = """\
import sys
from faults import refuse_sockets
sys.addaudithook(refuse_sockets)
from arma_mergekit.cli import cli, run
for call in [line.split() for line in sys.argv[1].splitlines()]:
    try:
        run(cli, "arma", call)
    except SystemExit as ended:
        assert ended.code == 0, call
"""


@pytest.mark.parametrize("executor", ["arma", pytest.param("mergekit", marks=pytest.mark.slow)])
def test_the_whole_path_needs_no_socket(place, executor):
    if executor == "mergekit":
        write_recipe(place / "r.yml", merge_method="linear", parameters={"weight": 0.5}, dtype="bfloat16")
    plan = "plan r.yml\n" if executor == "arma" else ""
    verify = "verify new\n" if executor == "arma" else ""
    calls = f"{plan}merge r.yml new\n{verify}reproduce new again"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, calls], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- the tuner ----


@pytest.fixture(scope="session")
def tuner(tmp_path_factory):
    """A `Lab` with torch, and so more memory."""
    lab = Lab(tmp_path_factory.mktemp("tuner"), HEAVY, seconds=120, peak=4_000_000_000)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def pair(tuner, tmp_path_factory):
    """A recipe for a pair that can be tuned."""
    place = tmp_path_factory.mktemp("pair")
    assert tuner.run(place, what="write_pair").code == 0
    return place / "recipe.yml"


def tune(pair, out):
    budget = ("--searchers", "random,cmaes", "--trials", "3", "--cache", "none")
    return ("tune", str(pair), "--eval", "general,domain", "--out", str(out), *budget)


def found(out):
    """What a run found, without times and places."""
    summary = json.loads((out / "summary.json").read_text())
    return summary["candidates"], (out / "tuned.yml").read_text().split("\n", 2)[2]


def stop_tuning(tuner, pair, out, whole, rng):
    """A signal to a run, at a random moment or before a random step; what it has written so far is whole."""
    name = rng.choice(list(SIGNALS))
    if rng.random() < 0.5:
        at = rng.randrange(len(whole.steps))
        outcome = tuner.run(*tune(pair, out), cwd=out.parent, at=at, harm=("signal", SIGNALS[name]))
    else:
        running = tuner.start(*tune(pair, out), cwd=out.parent)
        time.sleep(rng.uniform(0.1, whole.seconds / 2))  # before that it is not yet ours what a signal does
        running.send(SIGNALS[name])
        outcome = running.wait()
    assert outcome.code in (CODES[name], 0), outcome.said
    for file in out.glob("*.json"):
        json.loads(file.read_text())
    for file in out.glob("*.yml"):
        yaml.safe_load(file.read_text())
    return outcome.code != 0


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_stopped_at_random_moments_goes_on_to_the_same_result(tuner, pair, tmp_path, kills):
    clean, rng = tmp_path / "clean", random.Random(kills)
    whole = tuner.run(*tune(pair, clean), cwd=tmp_path)
    assert whole.code == 0, whole.said
    while kills > 0:
        out = tmp_path / f"run {kills}"
        kills -= sum(stop_tuning(tuner, pair, out, whole, rng) for _ in range(3))
        last = tuner.run(*tune(pair, out), cwd=tmp_path)
        assert last.code == 0, last.said
        assert found(out) == found(clean)
