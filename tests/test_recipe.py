import copy
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arma_mergekit.attention import DIVERGENCES
from arma_mergekit.errors import RecipeError
from arma_mergekit.objective import Bound
from arma_mergekit.recipe import Objective, Recipe, evals, resolve
from arma_mergekit.recipe.document import read_yaml
from arma_mergekit.recipe.settings import number, number_or_word
from arma_mergekit.roles import role
from arma_mergekit.space import make_space

MINIMAL = {
    "merge_method": "arma",
    "base_model": "models/base",
    "models": [{"model": "models/ft", "parameters": {"alpha": 0.6}}],
}


@pytest.fixture
def load(tmp_path):
    """Load a recipe from YAML text or from plain data."""

    def load(content):
        file = tmp_path / "recipe.yml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return Recipe.load(file)

    return load


@pytest.fixture
def refuse(load):
    """The lines of the error that a recipe is refused with, without its directory."""

    def refuse(content):
        with pytest.raises(RecipeError) as caught:
            load(content)
        return [
            line.replace(line[line.find("/") : line.find("recipe.yml")], "")
            for line in str(caught.value).splitlines()
        ]

    return refuse


def changed(*path, to):
    """MINIMAL with one value changed."""
    recipe = copy.deepcopy(MINIMAL)
    here = recipe
    for part in path[:-1]:
        here = here[part] if isinstance(here, list) else here.setdefault(part, {})
    here[path[-1]] = to
    return recipe


# ---- settings: mergekit's semantics ----

NAMES = ["model.layers.1.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight", "lm_head.weight"]
numbers = st.one_of(st.integers(-3, 3), st.floats(-5, 5), st.sampled_from(["1e-3", "-2", " 0.5 "]))
scalars = st.one_of(numbers, st.sampled_from(["base", "finetuned"]))
filters = st.sampled_from([None, "*", "q_proj", "layers.1", "mlp", "nothing", "lm_head"])


def setting(scalar):
    values = st.one_of(scalar, st.lists(scalar, min_size=1, max_size=5))
    conditions = st.fixed_dictionaries({"value": values}, optional={"filter": filters})
    return st.one_of(values, conditions, st.lists(conditions, min_size=1, max_size=4))


@settings(max_examples=600, deadline=None)
@given(
    kind=st.sampled_from(["number", "word"]),
    data=st.data(),
    name=st.sampled_from(NAMES),
    t=st.one_of(st.sampled_from([0, 1, 0.5, 1 / 29]), st.floats(0, 1)),
)
def test_settings_resolve_exactly_as_mergekit_resolves_them(kind, data, name, t):
    from mergekit.config import ParameterSetting, evaluate_setting
    from pydantic import TypeAdapter

    validate = number if kind == "number" else number_or_word
    given = data.draw(setting(numbers if kind == "number" else scalars))
    theirs = evaluate_setting(
        name, TypeAdapter(ParameterSetting).validate_python(given), t, validate=validate
    )
    ours = resolve(given, name, t, validate=validate)
    assert type(ours) is type(theirs)
    assert ours == theirs


@settings(max_examples=100, deadline=None)
@given(given=setting(numbers), t=st.floats(0, 1))
def test_numbers_mean_to_us_what_they_mean_to_mergekits_own_float_parameters(given, t):
    from mergekit.config import ParameterSetting, evaluate_setting
    from pydantic import TypeAdapter

    parsed = TypeAdapter(ParameterSetting).validate_python(given)
    theirs = evaluate_setting(NAMES[0], parsed, t, validate=TypeAdapter(float).validate_python)
    assert resolve(given, NAMES[0], t, validate=number) == theirs


def test_a_list_with_one_value_per_layer_is_exact_up_to_rounding_noise():
    values = [0.1 * i for i in range(30)]
    for layer, value in enumerate(values):
        assert resolve(values, "x", layer / 29) == pytest.approx(value, abs=1e-12)


# ---- what is accepted ----


def test_a_minimal_recipe_has_the_documented_defaults(load):
    recipe = load(MINIMAL)
    assert recipe.parameters.rest == "finetuned"
    assert recipe.tune.trials == 40
    assert recipe.tune.seeds == (0,)
    assert recipe.tune.holdout == 0.5
    assert recipe.tune.searchers == ("bayes", "rl", "gradient")
    assert recipe.tune.space.model_dump(exclude_none=True) == {}
    assert recipe.tune.objective.options(["general", "domain"]) == {}
    assert recipe.evals == {}


DESIGN = """
merge_method: arma
base_model: models/base
models:
  - model: models/finetuned
    parameters: {alpha: 0.6}
parameters: {rest: finetuned}
dtype: torch.bfloat16
evals:
  general:
    - nll:    {data: data/general.jsonl, field: text, max_tokens: 16384, weight: 1.0}
    - kl:     {data: data/general.jsonl}
    - choice: {data: data/wordnet.jsonl}
  domain:
    - generate: {data: data/icd10.jsonl, prefix: 4}
    - nll: {data: data/icd10.jsonl, prompt: question, answer: reply, answer_only: true, limit: 200}
tune:
  space: {groups: tensor, rest: "block:6:qkvo", bounds: [-1, 2.5]}
  objective: {maximize: general, keep: {domain: 95%}}
  searchers: bayes
  trials: 40
  seeds: 3
  holdout: 0.5
"""


def test_everything_in_the_design_is_understood(load):
    recipe = load(DESIGN)
    assert recipe.dtype == "bfloat16"
    nll, kl, _ = recipe.evals["general"]
    assert (nll.type, nll.field, nll.max_tokens, nll.weight) == ("nll", "text", 16384, 1.0)
    assert (kl.type, kl.limit) == ("kl", None)
    generate, answers = recipe.evals["domain"]
    assert (generate.prefix, generate.prompt, generate.answer_only) == (4, "prompt", None)
    assert (answers.prompt, answers.answer, answers.answer_only) == ("question", "reply", True)
    assert recipe.tune.searchers == ("bayes",)
    assert recipe.tune.seeds == (3,)
    assert recipe.tune.objective.keep == {"domain": Bound(0.95)}
    assert recipe.tune.objective.options(["general", "domain"]) == {
        "maximize": "general",
        "keep": {"domain": Bound(0.95)},
    }


def test_data_files_are_relative_to_the_recipe_and_the_raw_content_is_kept(load, tmp_path):
    recipe = load(DESIGN)
    assert recipe.data_path("data/x.jsonl") == tmp_path / "data" / "x.jsonl"
    assert recipe.data_path(tmp_path / "x") == tmp_path / "x"
    assert recipe.raw == yaml.safe_load(DESIGN)
    recipe.raw["models"].clear()
    assert recipe.raw["models"]


def test_a_recipe_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load(MINIMAL).merge_method = "linear"


def test_alphas_of_a_model_come_before_those_of_all(load):
    recipe = load(MINIMAL | {"parameters": {"alpha": 0.2, "rest": 0.1}})
    assert recipe.alpha_settings(recipe.models[0]) == (0.6, 0.2)


def test_the_base_may_be_listed_among_the_models(load):
    recipe = load(MINIMAL | {"models": [{"model": "models/base"}, *MINIMAL["models"]]})
    assert [entry.model for entry in recipe.finetuned] == ["models/ft"]


def test_tune_can_be_overridden_and_is_checked_again(load):
    recipe = load(MINIMAL).with_tune({"trials": 3, "seeds": [1, 2]})
    assert (recipe.tune.trials, recipe.tune.seeds, recipe.tune.holdout) == (3, (1, 2), 0.5)
    with pytest.raises(RecipeError, match=r"tune\.trials in .*greater than 0, but got 0"):
        recipe.with_tune({"trials": 0})


def test_objectives_say_which_suites_they_need():
    assert Objective(sum={"a": 1, "b": 2}).options(["a", "b"]) == {"weights": {"a": 1, "b": 2}}
    assert Objective(balance=["a"]).options(["a", "b"]) == {"only": ("a",)}
    assert Objective().options(["a", "b"]) == {}
    with pytest.raises(RecipeError, match=r"needs suite b, .* has a; add it to --eval"):
        Objective(maximize="a", keep={"b": 0.9}).options(["a"])


def test_a_recipe_survives_json(load):
    recipe = load(DESIGN)
    assert recipe.model_dump(mode="json")["evals"]["domain"][1]["answer"] == "reply"


# ---- what is refused ----

CASES = {
    "typo at the top": (
        MINIMAL | {"paramters": {}},
        "Unknown key 'paramters' in recipe.yml. Did you mean parameters? Known: base_model,",
    ),
    "typo in a model": (
        changed("models", 0, "paramters", to={}),
        "Unknown key 'paramters' in recipe.yml at models[0]. Did you mean parameters? Known: model,",
    ),
    "weight, mergekit's habit": (
        changed("models", 0, "parameters", "wieght", to=1),
        "Unknown key 'wieght' in recipe.yml at models[0].parameters. Known: alpha.",
    ),
    "typo in a condition": (
        changed("models", 0, "parameters", "alpha", to=[{"fliter": "q_proj", "value": 1}]),
        "Unknown key 'fliter' in recipe.yml at models[0].parameters.alpha[0]. Did you mean filter?",
    ),
    "condition without value": (
        changed("models", 0, "parameters", "alpha", to={"filter": "q_proj"}),
        "models[0].parameters.alpha in recipe.yml needs a value.",
    ),
    "empty filter": (
        changed("models", 0, "parameters", "alpha", to={"filter": "", "value": 1}),
        "models[0].parameters.alpha.filter in recipe.yml must be part of a tensor's name, but got ''.",
    ),
    "scalars among conditions": (
        changed("models", 0, "parameters", "alpha", to=[0.5, {"value": 1}]),
        "models[0].parameters.alpha[0] in recipe.yml must be {filter, value} like the entries beside it",
    ),
    "NaN": (
        changed("models", 0, "parameters", "alpha", to=[0.1, float("nan")]),
        "models[0].parameters.alpha[1] in recipe.yml must be finite, but got nan.",
    ),
    "infinite": (
        changed("parameters", "rest", to=float("-inf")),
        "parameters.rest in recipe.yml must be finite, but got -inf.",
    ),
    "number of 400 digits": (
        changed("parameters", "rest", to=10**400),
        "parameters.rest in recipe.yml must be finite, but got a number with hundreds of digits.",
    ),
    "word for a number": (
        changed("models", 0, "parameters", "alpha", to="finetuned"),
        "models[0].parameters.alpha in recipe.yml must be a number, but got 'finetuned'.",
    ),
    "truth for a number": (
        changed("models", 0, "parameters", "alpha", to=True),
        "models[0].parameters.alpha in recipe.yml must be a number, but got True.",
    ),
    "empty list": (
        changed("models", 0, "parameters", "alpha", to=[]),
        "models[0].parameters.alpha in recipe.yml is an empty list: give at least one number.",
    ),
    "misspelt rest": (
        changed("parameters", "rest", to="finetune"),
        "parameters.rest in recipe.yml must be base, finetuned or a number, but got 'finetune'. Unknown word "
        "'finetune'. Did you mean finetuned?",
    ),
    "alpha on the base": (
        MINIMAL | {"models": [{"model": "models/base", "parameters": {"alpha": 1}}, {"model": "models/ft"}]},
        "models[0].parameters.alpha in recipe.yml has no effect, since models/base is the base; drop it.",
    ),
    "only the base": (
        MINIMAL | {"models": [{"model": "models/base"}]},
        "models in recipe.yml names only the base; add the fine-tuned model.",
    ),
    "the same model twice": (
        MINIMAL | {"models": [{"model": "models/ft"}] * 2},
        "models in recipe.yml names models/ft more than once; keep one entry.",
    ),
    "no models": (MINIMAL | {"models": []}, "models in recipe.yml needs at least one entry."),
    "no base": ({k: v for k, v in MINIMAL.items() if k != "base_model"}, "recipe.yml needs `base_model`."),
    "slices": (
        MINIMAL | {"slices": []},
        "recipe.yml `slices` is not supported by merge_method arma; name whole models under `models`.",
    ),
    "another method": (
        MINIMAL | {"merge_method": "linear"},
        "recipe.yml: merge_method 'linear' is not `arma`, the only one handled here. Run it with",
    ),
    "a misspelt method": (
        MINIMAL | {"merge_method": "amra"},
        "recipe.yml: merge_method 'amra' is not `arma`, the only one handled here. Did you mean arma?",
    ),
    "dtype": (
        MINIMAL | {"dtype": "int8"},
        "dtype in recipe.yml should be 'bfloat16', 'float16', 'float32' or 'float64', but got 'int8'.",
    ),
    "unknown task": (
        MINIMAL | {"evals": {"general": [{"nl": {"data": "x"}}]}},
        "evals.general[0] in recipe.yml: Unknown task 'nl'. Did you mean nll?",
    ),
    "unknown option": (
        MINIMAL | {"evals": {"general": [{"choice": {"data": "x", "fields": "y"}}]}},
        "Unknown key 'fields' in recipe.yml at evals.general[0].choice. Known: answer, choices,",
    ),
    "option of another task": (
        MINIMAL | {"evals": {"general": [{"kl": {"data": "x", "prefix": 4}}]}},
        "Unknown key 'prefix' in recipe.yml at evals.general[0].kl.",
    ),
    "task without data": (
        MINIMAL | {"evals": {"general": [{"kl": {}}]}},
        "evals.general[0].kl in recipe.yml needs `data`.",
    ),
    "suite that is one task": (
        MINIMAL | {"evals": {"general": {"nll": {"data": "x"}}}},
        "evals.general in recipe.yml should be a list, but got {'nll': {'data': 'x'}}.",
    ),
    "suite without tasks": (
        MINIMAL | {"evals": {"general": []}},
        "evals.general in recipe.yml has no tasks; give at least one.",
    ),
    "search space": (
        MINIMAL | {"tune": {"space": {"rest": "laier"}}},
        "tune.space.rest in recipe.yml: Unknown search space 'laier'. Did you mean layer?",
    ),
    "kernel split by kind": (
        MINIMAL | {"tune": {"space": {"groups": "kernel:qkvo"}}},
        "tune.space.groups in recipe.yml: Unknown search space 'kernel:qkvo'. Did you mean kernel?",
    ),
    "everything split by kind": (
        MINIMAL | {"tune": {"space": {"groups": "everything:qkvo"}}},
        "tune.space.groups in recipe.yml: Unknown search space 'everything:qkvo'. Did you mean everything?",
    ),
    "blocks of no layers": (
        MINIMAL | {"tune": {"space": {"rest": "block:0"}}},
        "tune.space.rest in recipe.yml: Unknown search space 'block:0'.",
    ),
    "everything for the rest": (
        MINIMAL | {"tune": {"space": {"rest": "everything"}}},
        "tune.space.rest in recipe.yml must not be `everything`, which covers attention too; give it as `groups`.",
    ),
    "everything and a rest": (
        MINIMAL | {"tune": {"space": {"groups": "everything", "rest": "base"}}},
        "tune.space in recipe.yml: `groups: everything` is one value for attention and rest together; drop `rest`.",
    ),
    "rest of 400 digits in the space": (
        MINIMAL | {"tune": {"space": {"rest": 10**400}}},
        "tune.space.rest in recipe.yml must be finite, but got a number with hundreds of digits.",
    ),
    "infinite rest in the space": (
        MINIMAL | {"tune": {"space": {"rest": float("inf")}}},
        "tune.space.rest in recipe.yml must be finite, but got inf.",
    ),
    "bounds in the wrong order": (
        MINIMAL | {"tune": {"space": {"bounds": [2, -1]}}},
        "tune.space in recipe.yml: `bounds` must be [low, high] with low < high, but got [2.0, -1.0].",
    ),
    "two objectives": (
        MINIMAL | {"tune": {"objective": {"balance": ["a"], "sum": {"a": 1}}}},
        "tune.objective in recipe.yml: Give one of balance, maximize, sum, pareto, but got balance and sum.",
    ),
    "suite balanced twice": (
        MINIMAL | {"tune": {"objective": {"balance": ["a", "a"]}}},
        "tune.objective.balance in recipe.yml has the same entry twice: a, a.",
    ),
    "keep without maximize": (
        MINIMAL | {"tune": {"objective": {"keep": {"a": "95%"}}}},
        "tune.objective in recipe.yml: `keep` needs `maximize`",
    ),
    "share of 95": (
        MINIMAL | {"tune": {"objective": {"maximize": "b", "keep": {"a": 95}}}},
        "tune.objective.keep.a in recipe.yml must be a share such as 95% or 0.95, but got 95.",
    ),
    "suite nearly defined": (
        MINIMAL
        | {"evals": {"general": [{"kl": {"data": "x"}}]}, "tune": {"objective": {"balance": ["generl"]}}},
        "tune.objective in recipe.yml: Unknown suite 'generl'. Did you mean general?",
    ),
    "searcher": (
        MINIMAL | {"tune": {"searchers": ["bayes", "gradiant"]}},
        "tune.searchers in recipe.yml: Unknown searcher 'gradiant'. Did you mean gradient?",
    ),
    "searcher that is a list": (
        MINIMAL | {"tune": {"searchers": [["bayes"]]}},
        "tune.searchers in recipe.yml: Unknown searcher",
    ),
    "seed twice": (
        MINIMAL | {"tune": {"seeds": [1, 1]}},
        "tune.seeds in recipe.yml has the same entry twice: 1, 1.",
    ),
    "no trials": (
        MINIMAL | {"tune": {"trials": 0}},
        "tune.trials in recipe.yml should be greater than 0, but got 0.",
    ),
    "holdout": (
        MINIMAL | {"tune": {"holdout": 1}},
        "tune.holdout in recipe.yml should be less than 1, but got 1.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_sentence_that_says_where_and_what(refuse, case):
    content, sentence = CASES[case]
    lines = refuse(content)
    assert len(lines) == 1
    assert lines[0].startswith(sentence)


@pytest.mark.parametrize(
    "word", ["global", "kind:qkvo", "layer", "tensor", "block:6", "block:12:qkvo", "kernel"]
)
def test_every_search_space_that_is_accepted_can_be_built(load, word):
    roles = {f"model.layers.{i}.self_attn.{k}_proj.weight" for i in range(4) for k in "qkvo"}
    roles = {name: role(name) for name in [*sorted(roles), "model.layers.0.mlp.up_proj.weight"]}
    space = load(MINIMAL | {"tune": {"space": {"groups": word, "rest": word}}}).tune.space
    assert make_space(roles, space.groups, space.rest).names


@pytest.mark.parametrize(
    ("tune", "sentence"),
    [
        ({"objective": {"pareto": ["a"]}}, "tune.objective in recipe.yml: `pareto` needs two suites or more"),
        ({"regularizer": {"text": "x", "attention": "jss"}}, "tune.regularizer.attention in recipe.yml"),
        (
            {"space": {"limits": {"attention.q": [1, 0]}}},
            "tune.space in recipe.yml: `limits` of attention.q must be",
        ),
        ({"space": {"tie": [[]]}}, "tune.space in recipe.yml: `tie` must hold lists of group names"),
        (
            {"objective": {"maximize": "a", "keep": {"b": "2 sigma"}}},
            "tune.objective.keep.b in recipe.yml must be 95%",
        ),
        ({"rung": 0}, "tune.rung in recipe.yml"),
    ],
)
def test_a_tune_block_without_sense_is_refused_in_one_sentence(refuse, tune, sentence):
    (line,) = refuse(MINIMAL | {"tune": tune})
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"lm_eval": {"limit": 3}}, "evals.a[0].lm_eval in recipe.yml needs `tasks`."),
        ({"lm_eval": {"tasks": []}}, "evals.a[0].lm_eval in recipe.yml needs `tasks`."),
        (
            {"lm_eval": {"tasks": "x", "task": "y"}},
            "Unknown key 'task' in recipe.yml at evals.a[0].lm_eval. Did you mean tasks?",
        ),
        (
            {"lm_eval": {"tasks": "x", "num_fewshot": -1}},
            "evals.a[0].num_fewshot in recipe.yml should be greater",
        ),
        (
            {"lm_eval": {"tasks": "x", "limit": 3, "samples": {"x": [1]}}},
            "evals.a[0].lm_eval in recipe.yml has both `limit` and `samples`; give one.",
        ),
        (
            {"lm_eval": {"tasks": "x", "fewshot_as_multiturn": True}},
            "evals.a[0].lm_eval in recipe.yml has `fewshot_as_multiturn`, which needs `apply_chat_template: true`.",
        ),
        (
            {"divergence": {"data": "x", "metric": "jss"}},
            "evals.a[0].divergence in recipe.yml: Unknown metric 'jss'. Did you mean js? Known: cosine, emd,",
        ),
        (
            {"divergence": {"data": "x", "teacher": "both"}},
            "evals.a[0].teacher in recipe.yml should be 'base' or",
        ),
        (
            {"generate": {"data": "x", "max_new_tokens": 3}},
            "evals.a[0].generate in recipe.yml has `max_new_tokens`, which",
        ),
        (
            {"generate": {"data": "x", "regex": "a", "prefix": 2}},
            "evals.a[0].generate in recipe.yml has both `regex` and `prefix`; give one.",
        ),
        (
            {"generate": {"data": "x", "regex": "(a"}},
            "evals.a[0].generate.regex in recipe.yml must be a regular expression, but '(a' is none (missing )",
        ),
        (
            {"generate": {"data": "x", "regex": 3}},
            "evals.a[0].regex in recipe.yml should be a string, but got 3.",
        ),
        ({"python": {"data": "x"}}, "evals.a[0].python in recipe.yml needs `function`."),
        (
            {"python": {"function": "score", "data": "x"}},
            "evals.a[0].python.function in recipe.yml must be module:name or file.py:name, but got 'score'.",
        ),
        (
            {"python": {"function": "a/b:score", "data": "x"}},
            "evals.a[0].python.function in recipe.yml must be",
        ),
        (
            {"python": {"function": "a.py:score"}},
            "evals.a[0].python in recipe.yml needs `data`, or a `limit`",
        ),
        (
            {"python": {"function": "a:b", "data": "x", "k": 1}},
            "Unknown key 'k' in recipe.yml at evals.a[0].python.",
        ),
        ({"nll": {"data": "x", "tasks": "y"}}, "Unknown key 'tasks' in recipe.yml at evals.a[0].nll."),
        (
            "",
            "evals.a[0] in recipe.yml must be one task, as in {nll: {data: my.jsonl}}, or a name of lm-eval's",
        ),
    ],
)
def test_each_mistake_in_a_task_is_one_sentence(refuse, entry, sentence):
    (line,) = refuse(MINIMAL | {"evals": {"a": [entry]}})
    assert line.startswith(sentence)


def test_every_kind_of_task_has_its_options(load):
    entries = [
        "mmlu",
        {
            "lm_eval": {
                "tasks": ["a", "b"],
                "include_path": "t",
                "samples": {"a": [3, 1]},
                "metric": "acc_norm",
            }
        },
        {
            "lm_eval": {
                "tasks": "a",
                "gen_kwargs": {"until": ["x"]},
                "apply_chat_template": True,
                "num_fewshot": 0,
            }
        },
        {"python": {"function": "e/my eval.py:score", "data": "d.parquet", "options": {"k": 1}}},
        {"python": {"function": "package.module:score", "limit": 4}},
        {"divergence": {"data": "d.txt", "metric": "emd", "teacher": "finetuned", "max_tokens": 9}},
    ]
    name, chosen, chat, file, module, divergence = load(MINIMAL | {"evals": {"a": entries}}).evals["a"]
    assert (name.type, name.tasks) == ("lm_eval", ("mmlu",))
    assert (chosen.tasks, chosen.samples, chosen.paths) == (("a", "b"), {"a": (3, 1)}, (Path("t"),))
    assert (chat.gen_kwargs, chat.fewshot_as_multiturn, chat.num_fewshot) == ({"until": ["x"]}, None, 0)
    assert (file.options, file.paths) == ({"k": 1}, (Path("d.parquet"), Path("e/my eval.py")))
    assert (module.limit, module.paths) == (4, ())
    assert (divergence.metric, divergence.teacher) == ("emd", "finetuned")


@pytest.mark.parametrize("option", ["match", "pattern", "max_gen_toks"])
def test_options_of_generation_that_nothing_obeys_are_unknown_keys(refuse, option):
    (line,) = refuse(MINIMAL | {"evals": {"a": [{"generate": {"data": "x", option: "exact"}}]}})
    assert line.startswith(f"Unknown key '{option}' in recipe.yml at evals.a[0].generate.")


def test_all_mistakes_are_reported_at_once(refuse):
    content = changed("models", 0, "parameters", "alpha", to=["x", float("nan")])
    content |= {
        "modles": [],
        "tune": {"trials": 0, "serchers": "x"},
        "evals": {"a": [{"kl": {"dta": 1}}, {"z": {}}]},
    }
    found = "\n".join(refuse(content))
    for part in ("alpha[0]", "alpha[1]", "modles", "tune.trials", "serchers", "'dta'", "needs `data`", "'z'"):
        assert part in found


def test_a_list_whose_entries_are_wrong_is_not_called_empty_as_well(refuse):
    assert len(refuse(changed("models", 0, to={"modell": "x"}))) == 2  # the unknown key and the missing one


# ---- YAML ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must hold a mapping"),
        ("- 1", "must hold a mapping"),
        ("a: [1", "line 2: did not find expected"),
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: !!python/object/apply:os.system [echo]", "line 1: tag .*python/object.* is refused"),
        ("a: !!str 3", "tag .* is refused"),
        ("a: !x 3", "tag !x is refused"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins"),
        ("base: &b {x: 1}\na:\n  <<: *b", "line 3: merge keys"),
        ("on: 1", "line 1: key 'on' must be text; put it in quotes"),
        ("[1, 2]: 1", "a list or mapping"),
        ("a: &a [*a]", "aliases multiply"),
        ("a: " + "[" * 50 + "]" * 50, "nested deeper than 30"),
        ("a: " + "[" * 100_000, "nested deeper than 30"),
        ("a: &x 1\nb: [" + "*x, " * 100 + "]", "more than 64 aliases"),
        ("a: 2024-99-99", "cannot be read"),
        ("a: '\x00'", "no valid YAML"),
        ("a: " + "x" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_yaml_that_could_hide_or_grow_or_run_is_refused(tmp_path, text, reason):
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError, match=reason) as caught:
        read_yaml(file)
    assert time.process_time() - started < 2
    assert "\n" not in str(caught.value)


def test_a_billion_laughs_cost_nothing(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 8)]
    (tmp_path / "bomb.yml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="aliases multiply to over 200,000 values"):
        read_yaml(tmp_path / "bomb.yml")


def test_ordinary_aliases_are_fine(load):
    text = yaml.safe_dump(MINIMAL).replace("alpha: 0.6", "alpha: &a 0.6")
    assert load(text + "parameters: {rest: *a}").parameters.rest == 0.6


def test_files_that_are_not_there_or_not_text_are_told_apart(tmp_path):
    (tmp_path / "latin.yml").write_bytes("a: ä".encode("latin-1"))
    for name, reason in {
        "nowhere.yml": "No recipe",
        "latin.yml": "not UTF-8",
        ".": "Cannot read the recipe",
    }.items():
        with pytest.raises(RecipeError, match=reason):
            Recipe.load(tmp_path / name)


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def complaints(content, path):
    """Lines of the RecipeError, none if there is none; any other exception is a failure."""
    try:
        Recipe.parse(content, path)
    except RecipeError as error:
        return str(error).splitlines() or [""]
    return []


BLOCKS = [
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "evals",
    "tune",
    "slices",
    "tokenizer",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(BLOCKS), plain, min_size=1, max_size=3))
def test_whatever_stands_in_a_recipe_it_loads_or_is_refused_in_sentences(tmp_path, changes):
    assert all(map(str.strip, complaints(MINIMAL | changes, tmp_path / "recipe.yml")))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block=st.sampled_from(["model", "parameters", "task", "other task", "space", "objective", "tune"]),
    key=st.sampled_from(
        [
            "alpha",
            "rest",
            "data",
            "limit",
            "prompt",
            "tasks",
            "samples",
            "metric",
            "function",
            "options",
            "regex",
            "max_new_tokens",
            "groups",
            "bounds",
            "keep",
            "sum",
            "balance",
            "seeds",
            "searchers",
        ]
    ),
    value=plain,
)
def test_any_value_of_any_key_loads_or_is_refused_in_sentences(tmp_path, block, key, value):
    places = {
        "model": {"models": [{"model": "x", "parameters": {key: value}}]},
        "parameters": {"parameters": {key: value}},
        "task": {"evals": {"s": [{"choice": {key: value}}, {"nll": {"data": "x", key: value}}]}},
        "other task": {
            "evals": {"s": [{"lm_eval": {"tasks": "x", key: value}}, {"python": {key: value}}, value]}
        },
        "space": {"tune": {"space": {key: value}}},
        "objective": {"tune": {"objective": {key: value}}},
        "tune": {"tune": {key: value}},
    }
    assert all(map(str.strip, complaints(MINIMAL | places[block], tmp_path / "recipe.yml")))


def test_the_divergences_of_a_recipe_are_those_of_the_attention_package():
    assert tuple(evals.DIVERGENCES) == tuple(DIVERGENCES)


def test_of_very_many_faults_the_first_are_told_and_the_rest_counted(refuse):
    lines = refuse(MINIMAL | {f"x{i}": 1 for i in range(1000)})
    assert len(lines) == 41
    assert lines[-1] == "960 more places in recipe.yml are wrong."
