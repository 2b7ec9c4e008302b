import copy
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit.card import Licence, licences, picture, render, warnings

APACHE, MIT, LLAMA = ((Licence(id),) for id in ("apache-2.0", "mit", "llama3.1"))
GPL2, GPL3, NC, ND = ((Licence(id),) for id in ("gpl-2.0", "gpl-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0"))
UNKNOWN = ()
TENSORS = {
    "model.layers.0.self_attn.q_proj.weight": (0.2, [0, "q", True]),
    "model.layers.1.self_attn.q_proj.weight": (0.6, [1, "q", True]),
    "model.layers.0.mlp.up_proj.weight": (1.0, [0, "up", False]),
    "model.layers.1.mlp.up_proj.weight": (1.0, [1, "up", False]),
}
SIDES = ("base", "fine-tuned", "merged", "one knob")
EVALUATION = {
    "candidate": "gradient",
    "rival": "one knob, everything 0.3",
    "held_back": {
        side: {"general/kl:x": {"score": -0.5, "stderr": 0.01, "loss": 0.5, "items": 12}} for side in SIDES
    },
    "share_kept": {side: {"general": 0.9} for side in SIDES},
    "share_stderr": {side: {"general": 0.02} for side in SIDES},
    "verdict": {"dominates": True, "sentence": "gradient beats one knob.", "suites": {}},
}


def make_lock(base="org/base", tuned=("org/finetuned",), evaluation=None, recipe_file="runs/x/tuned.yml"):
    roles = [("base", base), *(("fine-tuned", ref) for ref in tuned)]
    several = len(tuned) > 1
    return {
        "format": 1,
        "tool": {"arma_mergekit": "0.3.0"},
        "executor": "arma",
        "recipe_file": recipe_file,
        "inputs": [{"role": role, "ref": ref, "commit": "a" * 40, "files": {}} for role, ref in roles],
        "output": {"files": {}, "bytes": 10, "parameters": 44_000},
        "tensors": {"averaged": 4, "copied": 0},
        "alphas": {t: [alpha, 0.1] if several else alpha for t, (alpha, _) in TENSORS.items()},
        "roles": {t: role for t, (_, role) in TENSORS.items()},
        "evaluation": evaluation,
    }


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_hubs_own_reader_takes_the_card():
    card = ModelCard(render(make_lock(evaluation=EVALUATION), {"org/base": APACHE, "org/finetuned": APACHE}))
    assert card.data.base_model == ["org/base", "org/finetuned"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert "merge" in card.data.tags


def test_alphas_are_told_by_kind_with_their_range():
    card = render(make_lock(), {})
    assert "| q | attention | 2 | 0.40 | 0.20 | 0.60 |" in card
    assert "| up |  | 2 | 1.00 | 1.00 | 1.00 |" in card


def test_every_fine_tuned_model_has_its_alphas():
    card = render(make_lock(tuned=("org/one", "org/two")), {})
    assert card.index("Of org/one:") < card.index("0.40 | 0.20 | 0.60") < card.index("Of org/two:")
    assert "| q | attention | 2 | 0.10 | 0.10 | 0.10 |" in card


def test_scores_stand_beside_those_of_base_fine_tuned_and_one_knob():
    card = render(make_lock(evaluation=EVALUATION), {})
    assert "|  | items | base | fine-tuned | one knob, everything 0.3 | this merge |" in card
    assert f"| general/kl:x | 12 |{' -0.500 ± 0.010 |' * 4}" in card
    assert f"| general: share kept |  |{' 90.0 ± 2.0 % |' * 4}" in card
    assert "gradient beats one knob." in card


def test_without_an_evaluation_no_score_is_claimed():
    assert "## Scores" not in render(make_lock(), {})


def test_the_picture_stands_alone_and_the_card_shows_it():
    drawn = ElementTree.fromstring(picture(make_lock()))
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert drawn.get("viewBox")
    assert "![Alphas by layer](alphas.svg)" in render(make_lock(), {})


def test_a_model_without_layers_has_no_picture():
    lock = make_lock()
    lock["alphas"], lock["roles"] = {"lm_head.weight": 0.5}, {"lm_head.weight": [None, "head", False]}
    assert picture(lock) == ""
    assert "![" not in render(lock, {})


def test_what_mergekit_executed_has_a_card_without_alphas():
    lock = make_lock() | {"executor": "mergekit"}
    for key in ("alphas", "roles", "tensors", "evaluation"):
        del lock[key]
    card = render(lock, {})
    assert "which left the merge to mergekit" in card
    assert "## Alphas" not in card
    assert picture(lock) == ""
    assert front(card)["base_model"] == ["org/base", "org/finetuned"]


def base_models(ref, commit, *files):
    lock = make_lock(base=ref)
    lock["inputs"] = [{"role": "base", "ref": ref, "commit": commit, "files": dict.fromkeys(files)}]
    card = render(lock, {})
    return front(card)["base_model"], "Local directories, to be named in `base_model`" in card


COMMIT = "c" * 40


def test_only_what_came_from_the_hub_is_declared_a_parent_there():
    assert base_models("org/base", COMMIT) == (["org/base"], False)
    assert base_models("gpt2", COMMIT) == (["gpt2"], False)
    assert base_models("org/base@main", None) == (["org/base"], False)
    assert base_models("models/base", None) == ([], True)
    assert base_models(f"/cache/models--org--x/snapshots/{COMMIT}", COMMIT) == ([], True)


def test_a_model_and_its_adapter_may_come_from_different_places():
    assert base_models("/srv/base+org/lora", None, f"{COMMIT}/adapter_config.json") == (["org/lora"], True)
    assert base_models("org/base+runs/lora", COMMIT, "lora/adapter_config.json") == (["org/base"], True)
    assert base_models("models/base+runs/lora@v1", None) == (["runs/lora"], True)


HOSTILE = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not set("+@") & set(text)
)
NASTY = [
    "a\n---\nlicense: mit\n# x",
    "`x` <script>alert(1)</script>",
    "|a|b|",
    "](http://x)",
    "x: [",
    "\"'",
    "![p](q)",
]


@given(base=HOSTILE | st.sampled_from(NASTY), tuned=HOSTILE | st.sampled_from(NASTY), path=HOSTILE)
def test_no_name_breaks_the_front_matter_or_the_markdown(base, tuned, path):
    plain = render(make_lock(evaluation=EVALUATION), {"org/base": UNKNOWN, "org/finetuned": MIT})
    evaluation = copy.deepcopy(EVALUATION) | {"rival": base, "candidate": tuned}
    lock = make_lock(base, (tuned,), evaluation, path)
    for entry in lock["inputs"]:
        entry["commit"] = None
    card = render(lock, {base: UNKNOWN, tuned: MIT} if base != tuned else {base: UNKNOWN, "x": MIT})
    assert card.startswith("---\nbase_model")
    assert set(front(card)) <= {"base_model", "base_model_relation", "library_name", "license", "tags"}
    body, usual = (text.split("\n---\n", 1)[1] for text in (card, plain))
    assert len(re.findall("^#", body, re.M)) == len(re.findall("^#", usual, re.M))
    assert len(re.findall("^```", body, re.M)) == 2
    assert "<script" not in body.replace("    arma merge", "")
    for row in (line for line in body.splitlines() if line.startswith("| ")):
        assert row.endswith(" |")


# ---------------------------------------------------------------------- licences


def write(directory, **files):
    directory.mkdir()
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return directory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README_md": "---\nlicense: llama3.1\ntags: [a]\n---\nlicense: mit"}, LLAMA),
        ({"README_md": "---\nlicense:\n- mit\n---\n"}, MIT),
        ({"README_md": "---\r\nlicense: 'mit'\r\n---\r\n"}, MIT),
        (
            {
                "README_md": "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.y/LICENSE\n---\n"
            },
            (Licence("other", "qwen", "https://x.y/LICENSE"),),
        ),
        ({"README_md": "---\nlicense:\n- apache-2.0\n- cc-by-nc-4.0\n---\n"}, (*APACHE, *NC)),
        ({"README_md": "---\nlicense: [mit, gpl-2.0] # both\n---\n"}, (*MIT, *GPL2)),
        ({"README_md": "---\nlicense: >-\n  Apache-2.0\n---\n"}, APACHE),
        ({"README_md": "---\nlicense: MIT\n---\n"}, MIT),
        ({"README_md": "---\nlicense: [mit, other]\n---\n"}, UNKNOWN),
        ({"README_md": "---\nlicense: [mit, {a: b}]\n---\n"}, UNKNOWN),
        ({"README_md": "---\nlicense: [mit\n---\n"}, UNKNOWN),
        ({"README_md": f"---\nlicense: {'[' * 9999}\n---\n"}, UNKNOWN),
        ({"README_md": "---\nlicense: other\n---\n"}, UNKNOWN),
        ({"README_md": "# no front matter\nlicense: mit\n"}, UNKNOWN),
        ({"LICENSE": "      GNU GENERAL PUBLIC LICENSE\n         Version 2, June 1991\n"}, GPL2),
        ({"LICENSE": "                 Apache License\n           Version 2.0, January 2004\n"}, APACHE),
        ({"LICENSE": "MIT License\n\nCopyright (c) 2026 X\n"}, MIT),
        ({"LICENSE": "Copyright 2026 X\n\nPermission is hereby granted, free of charge, to any person"}, MIT),
        ({"LICENSE_txt": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"}, LLAMA),
        ({"LICENSE": "All rights reserved. The MIT License does not apply."}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_a_licence_is_what_the_readme_or_the_licence_file_states(tmp_path, files, expected):
    assert licences({"x": write(tmp_path / "x", **files)}) == {"x": expected}


def test_a_readme_that_is_no_file_or_no_text_states_nothing(tmp_path):
    (tmp_path / "README.md").mkdir()
    (tmp_path / "LICENSE").write_bytes(b"\xff\xfe\x00" * 10_000)
    assert licences({"x": tmp_path, "y": Path("/nowhere")}) == {"x": UNKNOWN, "y": UNKNOWN}


def licence_in(found):
    return {k: v for k, v in front(render(make_lock(), found)).items() if k.startswith("license")}


@pytest.mark.parametrize(
    ("base", "tuned", "expected"),
    [
        (APACHE, APACHE, {"license": "apache-2.0"}),
        (LLAMA, MIT, {"license": "llama3.1"}),
        (LLAMA, LLAMA, {"license": "llama3.1"}),
        (APACHE, MIT, {"license": "other", "license_name": "apache-2.0 and mit"}),
        ((*APACHE, *NC), MIT, {"license": "cc-by-nc-4.0"}),
        (GPL3, APACHE, {"license": "gpl-3.0"}),
        (GPL2, MIT, {"license": "gpl-2.0"}),
        (GPL2, APACHE, {}),
        (LLAMA, NC, {}),
        ((*APACHE, *NC), LLAMA, {}),
        ((*GPL3, *NC), MIT, {}),
        (APACHE, UNKNOWN, {}),
        (APACHE, ND, {}),
        (APACHE, (*MIT, *ND), {}),
    ],
)
def test_the_merge_has_the_strictest_licence_or_none_if_that_cannot_be_told(base, tuned, expected):
    found = {"org/base": base, "org/finetuned": tuned}
    assert licence_in(found) == expected
    assert bool(warnings(found)) == (not expected)


def test_what_is_not_clear_is_said_in_a_sentence_and_in_the_card():
    (unknown,) = warnings({"org/base": UNKNOWN, "b": MIT})
    assert unknown.startswith("The licence of org/base is not known")
    (mixed,) = warnings({"a": LLAMA, "b": (*NC, *APACHE)})
    assert (
        mixed
        == "The licences may not go together: a is under llama3.1, b is under apache-2.0 and cc-by-nc-4.0."
    )
    assert "> The licence of org/base is not known" in render(make_lock(), {"org/base": UNKNOWN})
