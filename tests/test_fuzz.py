"""Documents with one thing wrong, or several, given to every command: it works or says why, and does no harm.

Each example runs in a process of its own (tests/faults.py), which also bounds its time and memory and watches what it
touches.
"""

import copy
import json
import re
import shutil

import pytest
import yaml
from conftest import llama_shapes, write_tiny_llama
from faults import Lab, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import parts, write_adapter, write_raw, write_recipe

from arma_mergekit.cache import hashed
from arma_mergekit.executor import reason

CODES = {
    "gate": (0, 3, 4, 5, 6, 7),
    "verify": (0, 1, 2, 3),
    "reproduce": (0, 1, 2, 3, 4),
}  # of others: 0, 2, 3, 4
FEW, MANY = 25, 130  # examples of each of the eight tests: 200 by default, 1,040 in the slow suite
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 10**4299]),
    st.floats(),
)
HOSTILE = [
    *(
        "",
        ".",
        "..",
        "../t",
        "/",
        "/etc/passwd",
        "../" * 40 + "etc/passwd",
        "~",
        "https://example.com/x",
        "b+a",
        "b@x",
    ),
    *(
        "b",
        "t",
        "+",
        "@",
        "a\0b",
        "a\nb",
        "\ud800",
        "%s%n",
        "x" * 300,
        "x" * 5000,
        "*",
        "[" * 50,
        "(a+)+$",
        "nan",
    ),
    *("1e999", "1_000", "arma", "linear", "BF16", "F4", "model.safetensors"),
]
TEXTS = st.text(max_size=8) | st.sampled_from(HOSTILE)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([50, 400, 900]).map(lambda levels: json.loads("[" * levels + "]" * levels)),
)


@st.composite
def spoilt(draw, document, most=3):
    """A JSON document with up to ``most`` values replaced, removed, added or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = list(walk(document))
        parent, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
        if what == "replace":
            parent[key] = draw(VALUES)
        elif what == "remove":
            del parent[key]
        elif what == "add" and isinstance(parent, dict):
            parent[draw(TEXTS)] = draw(VALUES)
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(TEXTS)] = parent.pop(key)
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        if not document:
            return document
    return document


def walk(document):
    """(container, key) of every value in a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list):
            yield from walk(value)


# ---- what a mergekit setting of alphas may look like, and nearly looks like ----

SCALARS = st.one_of(
    st.floats(-2, 3), st.integers(-1, 2), st.sampled_from(["0.5", "1e-3", " .5", "finetuned", "base"])
)
GRADIENTS = SCALARS | st.lists(SCALARS, min_size=1, max_size=5)
FILTERS = st.sampled_from(["*", "q_proj", "layers.1.", "self_attn", "k_proj.weight", "mlp", "nothing", ""])
CONDITIONS = st.fixed_dictionaries({"value": GRADIENTS}, optional={"filter": FILTERS})
ALPHAS = st.one_of(GRADIENTS, CONDITIONS, st.lists(CONDITIONS, min_size=1, max_size=4), VALUES)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def place(lab, tmp_path_factory):
    """Models b and t, an adapter a, a merge in out, and everything as JSON that can be spoilt."""
    place = tmp_path_factory.mktemp("fuzz")
    for side, seed in (("b", 0), ("t", 1)):
        write_tiny_llama(place / side, seed)
    write_adapter(place / "a")
    write_recipe(place / "r.yml")
    write_recipe(place / "a.yml", models=[{"model": "t+a"}])
    write_run(place, {name: 0.4 if "attn" in name else 0.3 for name in llama_shapes(config_of(place))})
    shutil.copy(place / "r.yml", place / "tuned.yml")
    assert lab.run("merge", "tuned.yml", "out", cwd=place).code == 0
    assert json.loads((place / "out" / "arma.lock.json").read_text())["evaluation"]["candidate"] == "bayes"
    return place


def config_of(place):
    return json.loads((place / "b" / "config.json").read_text())


def write_run(place, alphas):
    """summary.json and trials.jsonl of a tuning run that found these alphas."""
    names = {"base": 0.0, "fine-tuned": 1.0, "one knob": 0.5, "bayes": alphas}
    candidates, records = [], []
    for name, alpha in names.items():
        found = alpha if isinstance(alpha, dict) else dict.fromkeys(alphas, alpha)
        shares = {"general": 0.5, "domain": 0.6}
        candidates.append(
            {"name": name, "alphas": found, "feasible": True, "held_back": {}, "share_kept": shares}
        )
        candidates[-1]["share_stderr"] = dict.fromkeys(shares, 0.1)
        scores = {
            "ids": ["a", "b", "c"],
            "loss": [1.0, 2, 3],
            "value": [-1.0, -2, -3],
            "weight": [1.0, 1, 1],
            "tokens": 9,
        }
        held = {"general/kl:x": scores, "domain/nll:y": scores}
        records.append({"key": f"held back/{hashed(found)[:16]}", "held": held})
    summary = {
        "candidates": candidates, "best": "bayes", "rival": "one knob", "recipe": "r.yml", "keep": {"domain": 0.5},
        "fingerprint": {"suites": ["general", "domain"], "items of domain/nll:y": "0"}, "holdout": 0.5, "seeds": [0],
        "verdicts": [{"name": "bayes", "dominates": True, "sentence": "It does.", "suites": {}}], "forward_tokens": 9,
    }  # fmt: skip
    (place / "summary.json").write_text(json.dumps(summary))
    (place / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


class Bench:
    """Runs commands in ``place``, looks at everything they may not do, and puts the directory back into order."""

    def __init__(self, lab, place):
        self.lab, self.place = lab, place
        self.before = {p.name: contents(p) if p.is_dir() else p.read_bytes() for p in place.iterdir()}

    def run(self, *args):
        there = set(self.place.iterdir())
        outcome = self.lab.run(*args, cwd=self.place)
        merges = args[0] in ("merge", "reproduce")
        assert outcome.code in CODES.get(args[0], (0, 2, 3, 4)), f"{outcome.code}: {outcome.said}"
        assert outcome.code == 0 or re.search(r"\w+ \w+", outcome.said), f"{outcome.code} without a word"
        assert len(outcome.said) < 5000, outcome.said[:600]
        assert all(
            p == self.place or p.name == "new" or ".new.arma-draft-" in str(p) for p in outcome.strange()
        )
        made = {p.name for p in set(self.place.iterdir()) - there}
        assert made <= ({"new"} if merges and outcome.code in (0, 1) else set()), outcome.said
        if args[0] == "merge" and outcome.code == 0:
            assert self.run("verify", "new").code == 0
        return outcome

    def tidy(self):
        """Everything as it was."""
        shutil.rmtree(self.place / "new", ignore_errors=True)
        for name, data in self.before.items():
            for file, content in (data if isinstance(data, dict) else {"": data}).items():
                if (self.place / name / file).read_bytes() != content:
                    (self.place / name / file).write_bytes(content)


@pytest.fixture
def bench(lab, place):
    bench = Bench(lab, place)
    yield bench
    bench.tidy()


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def many(request):
    """How often a property is tried: the same examples each time by default, new ones in the slow suite."""
    return settings(
        max_examples=request.param, derandomize=request.param == FEW, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def is_ours(recipe):
    """Whether `arma merge` would do it itself: mergekit's executor is not what is fuzzed here."""
    return isinstance(recipe, dict) and reason(recipe) is None


def test_headers(bench, many):
    header, data = parts(bench.place / "b" / "model.safetensors")

    @many
    @given(spoilt(header), st.sampled_from(["plan", "merge"]), st.sampled_from([0, 0, 0, 1, -1, 64]))
    def check(header, command, more):
        bench.tidy()
        data_then = data + bytes(more) if more >= 0 else data[:more]
        write_raw(bench.place / "b" / "model.safetensors", json.dumps(header).encode(), data_then)
        bench.run(command, "r.yml", *(["new"] if command == "merge" else []))

    check()


PATCHES = st.lists(st.tuples(st.integers(0, 2**40), st.binary(max_size=12)), min_size=1, max_size=3)


def patched(data, patches, within):
    """Bytes with some of the first ``within`` overwritten."""
    data = bytearray(data)
    for at, new in patches:
        data[at % within : at % within + len(new)] = new
    return bytes(data)


def test_bytes_of_headers(bench, many):
    whole = (bench.place / "t" / "model.safetensors").read_bytes()
    within = 8 + int.from_bytes(whole[:8], "little")

    @many
    @given(
        PATCHES,
        st.sampled_from(["r.yml", "a.yml"]),
        st.integers(0, 3).map(lambda n: n == 0),
        st.integers(0, len(whole)),
    )
    def check(patches, recipe, cut, length):
        bench.tidy()
        data = patched(whole, patches, within)
        (bench.place / "t" / "model.safetensors").write_bytes(data[:length] if cut else data)
        bench.run("merge", recipe, "new")

    check()


def test_recipes(bench, many):
    recipe = yaml.safe_load((bench.place / "a.yml").read_text())
    recipe |= {"dtype": "bfloat16", "out_dtype": "float32"}

    @many
    @given(spoilt(recipe))
    def check(recipe):
        bench.tidy()
        (bench.place / "r.yml").write_text(json.dumps(recipe))
        bench.run(*(["merge", "r.yml", "new"] if is_ours(recipe) else ["plan", "r.yml"]))

    check()


def test_bytes_of_recipes(bench, many):
    text = (bench.place / "a.yml").read_bytes()

    @many
    @given(PATCHES)
    def check(patches):
        bench.tidy()
        (bench.place / "r.yml").write_bytes(patched(text, patches, len(text)))
        bench.run("plan", "r.yml")

    check()


def test_alphas(bench, many):
    @many
    @given(ALPHAS, ALPHAS, st.sampled_from(["r.yml", "a.yml"]))
    def check(alpha, rest, recipe):
        bench.tidy()
        content = yaml.safe_load((bench.place / recipe).read_text()) | {
            "parameters": {"alpha": alpha, "rest": rest}
        }
        (bench.place / "r.yml").write_text(json.dumps(content))
        bench.run("merge", "r.yml", "new")

    check()


def test_locks(bench, many):
    lock = json.loads((bench.place / "out" / "arma.lock.json").read_text())
    for key in ("alphas", "roles"):  # most of a lock is these
        lock[key] = dict(list(lock[key].items())[:1])

    @many
    @given(spoilt(lock), st.sampled_from(["verify", "reproduce", "gate"]))
    def check(lock, command):
        bench.tidy()
        foreign = (
            not isinstance(lock, dict)
            or lock.get("executor") == "mergekit"
            or not is_ours(lock.get("recipe"))
        )
        (bench.place / "out" / "arma.lock.json").write_text(json.dumps(lock))
        if command == "gate":
            bench.run("gate", "out", "--recorded")
        else:
            bench.run(*(["verify", "out"] if foreign or command == "verify" else ["reproduce", "out", "new"]))

    check()


def test_configs(bench, many):
    files = ("b/config.json", "t/config.json", "a/adapter_config.json")
    plain = {name: json.loads((bench.place / name).read_text()) for name in files}
    plain["a/adapter_config.json"] |= {
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"q_proj": 2.0},
        "bias": "none",
    }

    @many
    @given(
        st.sampled_from(files).flatmap(lambda name: spoilt(plain[name]).map(lambda content: (name, content)))
    )
    def check(change):
        bench.tidy()
        (bench.place / change[0]).write_text(json.dumps(change[1]))
        bench.run("merge", "a.yml", "new")

    check()


def test_runs_beside_a_recipe(bench, many):
    summary = json.loads((bench.place / "summary.json").read_text())
    lines = (bench.place / "trials.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]

    @many
    @given(
        st.one_of(spoilt(summary).map(lambda x: (x, records)), spoilt(records).map(lambda x: (summary, x)))
    )
    def check(run):
        bench.tidy()
        (bench.place / "summary.json").write_text(json.dumps(run[0]))
        (bench.place / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run[1]))
        assert bench.run("merge", "tuned.yml", "new").code == 0, "the weights are right all the same"

    check()
