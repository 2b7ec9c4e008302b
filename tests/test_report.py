"""The report of a run: every number from its files, every name escaped, nothing from the network."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from arma_mergekit import report
from arma_mergekit.cli.report import command
from arma_mergekit.errors import RunError
from arma_mergekit.report import charts, data, pareto, svg
from arma_mergekit.report.markup import compact, duration, percent, score, tag

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}


def alphas(value):
    """Three matrices in each of four layers, and the embeddings; every layer 0.25 higher than the one below."""
    layers = {f"model.layers.{i}.{kind}.weight": value + 0.25 * i for i in range(4) for kind in KINDS}
    return layers | {"model.embed_tokens.weight": value}


def entry(name, general, domain, reward, value=0.0, **more):
    held = {
        "general/nll": {"score": -3.0 - value, "stderr": 0.11, "loss": 3.0, "items": 15},
        "general/choice": {"score": 0.71, "stderr": 0.04, "loss": 0.7, "items": 80},
        "domain/generate": {"score": domain * 0.7, "stderr": 0.0375, "loss": 1.0, "items": 150},
    }
    return {
        "name": name, "search_reward": reward, "feasible": True, "evaluations": 9.0, "held_back": held,
        "share_kept": {"general": general, "domain": domain}, "share_stderr": {"general": 0.021, "domain": 0.0345},
        "search_share": {"general": general - 0.05, "domain": domain - 0.04}, "alphas": alphas(value), **more,
    }  # fmt: skip


def trial(key, reward, tokens=1000, part=None, **more):
    shares = {} if reward is None else {"shares": {"general": reward, "domain": 1.1 - reward}}
    scores = {
        "scores": {"general/nll": -3.25, "domain/generate": 0.456},
        "stderr": {"domain/generate": 0.0411},
    }
    return {
        "key": key,
        "reward": reward,
        "part": part,
        "tokens": tokens,
        "seconds": 2.0,
        **shares,
        **scores,
        **more,
    }


@pytest.fixture
def summary():
    sentence = (
        "bayes beats one knob, everything 0.5 (share kept: general +0.075 ± 0.020, domain +0.111 ± 0.030)."
    )
    verdict = {
        "name": "bayes", "rival": "one knob, everything 0.5", "dominates": True, "sentence": sentence,
        "suites": {"general": {"mean": 0.0754, "stderr": 0.02}, "domain": {"mean": 0.1114, "stderr": 0.03}},
    }  # fmt: skip
    return {
        "version": "9.8.7", "recipe": "recipes/x/recipe.yml", "best": "bayes", "rival": "one knob, everything 0.5",
        "feasible": True, "objective": {}, "keep": {"domain": 0.8}, "holdout": 0.5, "seeds": [0, 1],
        "command": "arma-tune recipes/x/recipe.yml --eval general,domain", "picks": {}, "verdicts": [verdict],
        "candidates": [
            entry("base", 1.0, 0.0, 0.0), entry("fine-tuned", 0.0, 1.0, 0.0, 1.0),
            entry("one knob, everything 0.5", 0.8125, 0.7125, 0.61, 0.5), entry("bayes", 0.8879, 0.8239, 0.83, -0.5),
            entry("bayes seed 1", 0.85, 0.77, 0.78, 0.25), entry("rl", 0.7, 0.9, 0.7, 0.1),
        ],
        "separation": [
            {"task": "general/nll", "base": -3.0, "tuned": -4.0, "sigmas": 17.06, "items": 17},
            {"task": "domain/generate", "base": 0.0, "tuned": 0.64, "sigmas": math.inf, "items": 149},
        ],
        "steering": ["domain/generate"], "watched": ["general/choice"],
        "curve": [{"alpha": a, "shares": {"general": 1 - a, "domain": a}, "reward": a} for a in (0.9, 0.1, 0.5)],
        "ledger": [
            {"phase": "base and fine-tuned", "trials": 2, "evaluations": 2.0, "forward_tokens": 2468, "seconds": 14},
            {"phase": "bayes", "trials": 4, "evaluations": 3.25, "forward_tokens": 7532, "seconds": 3700.4},
        ],
        "divergence": {
            "metric": "js",
            "pairs": {"fine-tuned vs base": [[0.1, 0.42], None, [0.0, None]], "bayes vs base": [[0.2, 0.1], None, []]},
            "skipped": ["layer 1: linear attention"],
        },
    }  # fmt: skip


@pytest.fixture
def trials():
    return [
        {"key": "fingerprint", "recipe": "b2d01e20d064a5bd", "data": {"x.jsonl": "46720db057f2ccf7"}},
        {"key": "ends", "base": {}, "finetuned": {}, "tokens": 2468, "seconds": 14},
        trial("one knob, everything/0", 0.61),
        trial("bayes/0/0", 0.4), trial("bayes/0/1", 0.99, 250, part=[0, 4]), trial("bayes/0/2", None, 0),
        trial("bayes/0/3", 0.83, 3000), trial("bayes/1/0", 0.78), trial("rl/0/0", 0.7), trial("rl/0/1", -7.0),
    ]  # fmt: skip


class Page(HTMLParser):
    """A page as a browser takes it apart; anything left open or closed twice is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables, self.text = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"{name} has an attribute twice"
        self.elements.append((name, dict(attributes)))
        if name in VOID:
            return
        self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"{name} closes something else"

    def handle_data(self, data):
        for name in set(self.open):
            self.text.setdefault(name, []).append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def names(self, name):
        return [attributes for found, attributes in self.elements if found == name]


HEADINGS = {
    "What is kept": ["candidates"],
    "Alphas by layer": ["candidates"],
    "Regret against cost": ["trials"],
    "Scores by task": ["candidates"],
    "Attention divergence": ["divergence"],
    "Cost": ["ledger"],
    "Reproduce": ["command", "version", "recipe", "objective", "seeds", "holdout"],
}


def headings(summary, trials):
    return Page(report.render(summary, trials)).text.get("h2", [])


# ---------------------------------------------------------------- the page


def test_it_is_well_formed_and_says_who_won(summary, trials):
    page = Page(report.render(summary, trials))
    assert page.text["h1"] == ["bayes beats one knob, everything 0.5"]
    assert (
        "On held-back items bayes keeps 88.8 ± 2.1 % of general and 82.4 ± 3.5 % of domain." in page.text["p"]
    )
    assert page.text["code"][0] == "mergekit-yaml tuned.yml merged/"


def test_it_asks_the_network_for_nothing(summary, trials):
    text = report.render(summary, trials)
    page = Page(text)
    assert not [
        a for _, a in page.elements if a.keys() & {"src", "href", "srcset", "action", "xlink:href", "data"}
    ]
    assert not {"link", "img", "iframe", "object", "base", "form"} & {name for name, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", text)
    policy = next(
        a["content"] for a in page.names("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_sections_come_in_the_order_a_reader_wants(summary, trials):
    assert headings(summary, trials) == ["Run next", *HEADINGS]


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_section_is_there_only_with_its_data(summary, trials, heading):
    left = {k: v for k, v in summary.items() if k not in HEADINGS[heading]}
    assert heading not in headings(left, [] if "trials" in HEADINGS[heading] else trials)


def test_an_empty_summary_makes_a_page():
    assert headings({}, []) == ["Run next"]


def test_a_run_without_what_only_newer_runs_have(summary, trials):
    for key in (
        "steering",
        "watched",
        "curve",
        "ledger",
        "divergence",
        "picks",
        "keep",
        "objective",
        "seeds",
        "command",
    ):
        del summary[key]
    for c in summary["candidates"]:
        del c["share_stderr"], c["search_share"]
    text = report.render(summary, trials)
    assert "keeps 88.8 % of general" in text
    assert "left out" not in text  # without `steering` nothing says so


@given(name=st.text(min_size=1), suite=st.text(min_size=1))
def test_no_name_becomes_markup(name, suite):
    c = {"name": name, "share_kept": {suite: 0.5, "b": 0.25}, "search_share": {suite: 0.5, "b": 0.25}}
    held = {f"{suite}/{name}": {"score": 1.0, "stderr": 0.1, "items": 3}}
    facts = {
        "candidates": [c | {"held_back": held}],
        "best": name,
        "recipe": name,
        "command": name,
        "keep": {suite: 1},
    }
    page = Page(report.render(facts, [{"key": "fingerprint", name: suite}]))
    assert len(page.names("script")) == len(page.names("style")) == 1
    assert {name for name, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "script", "body", "main", "header", "section", "h1", "h2", "p", "b",
        "ul", "li", "div", "span", "code", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "small",
        "svg", "desc", "g", "path", "text", "polyline", "dl", "dt", "dd", "details", "summary",
    }  # fmt: skip
    assert all(attribute in KNOWN for _, attributes in page.elements for attribute in attributes)


KNOWN = {
    "lang", "charset", "name", "content", "http-equiv", "class", "tabindex", "scope", "colspan", "viewbox", "role",
    "aria-label", "aria-hidden", "x", "y", "points", "transform", "d", "text-anchor",
}  # fmt: skip


def test_a_hostile_suite_is_read_as_it_is_written(summary, trials):
    evil = "<script>alert('$title')</script>"
    for c in summary["candidates"]:
        c["share_kept"][evil] = 0.5
    page = Page(report.render(summary, trials))
    assert len(page.names("script")) == 1
    assert any(f"{evil} kept, held back" in row for row in page.tables[0])


# ---------------------------------------------------------------- the numbers


def test_shares_in_the_table_are_those_of_the_summary(summary, trials):
    table = Page(report.render(summary, trials)).tables[0]
    assert table[0] == [
        "candidate",
        "general kept, held back",
        "domain kept, held back",
        "search reward",
        "evaluations",
    ]
    for row, c in zip(table[1:], summary["candidates"], strict=True):
        kept = [percent(c["share_kept"][s], c["share_stderr"][s]) for s in ("general", "domain")]
        assert row == [c["name"] + " best" * (c["name"] == "bayes"), *kept, score(c["search_reward"]), "9"]


def test_searched_and_held_back_scores_are_different_columns(summary, trials):
    groups, sides, *rows = Page(report.render(summary, trials)).tables[1]
    assert groups[1:] == [
        "domaingeneratesteers · ∞ σ", "generalnllleft out: too weak · 17.1 σ", "generalchoicewatched",
    ]  # fmt: skip
    assert sides[1:] == [
        "searched149 items", "held back150 items", "searched17 items", "held back15 items", "held back80 items",
    ]  # fmt: skip
    found = {row[0]: row[1:] for row in rows}
    assert found["base"][:3] == ["0.000", "0.000 ± 0.037", "-3.000"]
    assert found["fine-tuned"][0] == "0.640"
    assert found["bayes best"] == [
        "0.456 ± 0.041",
        "0.577 ± 0.037",
        "-3.250",
        "-2.500 ± 0.110",
        "0.710 ± 0.040",
    ]


def test_the_ledger_adds_up(summary, trials):
    *rows, total = Page(report.render(summary, trials)).tables[2][1:]
    assert rows == [
        ["base and fine-tuned", "2", "2,468", "14 s", "24.7 %"], ["bayes", "3.2", "7,532", "1 h 1 min", "75.3 %"],
    ]  # fmt: skip
    assert total[:4] == ["all", "5.2", "10,000", "1 h 1 min"]


def test_what_made_the_run_is_told(summary, trials):
    text = report.render(summary, trials)
    for fact in (
        "arma-tune recipes/x/recipe.yml --eval",
        "9.8.7",
        "b2d01e20d064a5bd",
        "46720db057f2ccf7",
        "0, 1",
    ):
        assert fact in text


def test_a_best_that_is_not_better_comes_after_the_simple_one(summary, trials):
    verdict = summary["verdicts"][0]
    verdict |= {"dominates": False, "sentence": "bayes is no better than x (share kept: domain 0): use that."}
    summary["next"] = "mergekit-yaml runs/x/tuned.yml merged/"
    page = Page(report.render(summary, trials))
    assert page.text["h1"] == ["bayes is no better than x"]
    assert page.text["code"][:2] == ["mergekit-yaml runs/x/one-knob.yml merged/", summary["next"]]
    assert (
        "It does not beat one knob, everything 0.5 on held-back items: consider one-knob.yml."
        in page.text["li"]
    )


def test_what_was_to_be_kept_and_is_not_is_told(summary, trials):
    summary |= {"feasible": False, "keep": {"domain": 0.95}}
    told = Page(report.render(summary, trials)).text["li"]
    assert told[0] == "No candidate keeps 95.0 % of domain on the search items; this one comes closest."
    assert told[1] == "On held-back items it keeps 82.4 % of domain, not 95.0 %."


def test_a_run_that_no_arm_won(summary, trials):
    summary["best"] = "one knob, everything 0.5"
    page = Page(report.render(summary, trials))
    assert page.text["h1"] == ["No searched merge is better than one knob, everything 0.5"]
    page = Page(report.render(summary | {"verdicts": []}, trials))
    assert page.text["h1"] == ["The best is one knob, everything 0.5"]  # nothing was searched, as in a sweep


# ---------------------------------------------------------------- the pictures


def points(picture):
    """Tooltips of the markers with their places."""
    found = {}
    for group in ET.fromstring(picture).iter("g"):
        place = re.match(r"translate\((\S+) (\S+)\)", group.get("transform", ""))
        if place:
            found[group.find("path/title").text.partition(":")[0]] = float(place[1]), float(place[2])
    return found


def test_places_are_proportional_to_shares(summary):
    found = points(pareto.held_panel(summary, ("general", "domain")))
    base, tuned, knob = (found[name] for name in ("base", "fine-tuned", "one knob, everything 0.5"))
    assert knob[0] == pytest.approx(tuned[0] + 0.8125 * (base[0] - tuned[0]), abs=0.1)
    assert knob[1] == pytest.approx(base[1] + 0.7125 * (tuned[1] - base[1]), abs=0.1)


def test_error_bars_are_one_standard_error_to_each_side(summary):
    picture = pareto.held_panel(summary, ("general", "domain"))
    base, tuned = points(picture)["base"], points(picture)["fine-tuned"]
    right, up = (float(n) for n in re.findall(r"[hv]([\d.]+)", picture)[:2])
    assert right == pytest.approx(2 * 0.021 * (base[0] - tuned[0]), abs=0.2)
    assert up == pytest.approx(2 * 0.0345 * (base[1] - tuned[1]), abs=0.2)


def test_the_search_panel_counts_what_it_does_not_draw(summary, trials):
    picture = pareto.search_panel(summary, trials, ("general", "domain"))
    assert "Search items; 1 below -15% not drawn" in picture
    assert {"bayes/0/0, reward 0.400", "one knob, everything 0.5", "bayes"} <= points(picture).keys()
    assert not [
        tip
        for tip in points(picture)
        if tip.startswith(("bayes/0/1", "bayes/0/2", "rl/0/1", "one knob, everything/"))
    ]


def test_what_must_be_kept_is_a_line(summary):
    assert "keep 80%" in pareto.held_panel(summary, ("general", "domain"))
    assert "keep" not in pareto.held_panel(summary | {"keep": {}}, ("general", "domain"))


def test_the_front_is_drawn_where_it_was_searched(summary, trials):
    found = pareto.search_panel(
        summary | {"objective": {"pareto": ["general", "domain"]}}, trials, ("general", "domain")
    )
    assert 'class="front"' in found
    assert 'class="front"' not in pareto.search_panel(summary, trials, ("general", "domain"))


@pytest.mark.parametrize(("suites", "panels"), [(1, 0), (2, 2), (3, 6)])
def test_every_pair_of_suites_has_its_panels(summary, trials, suites, panels):
    for found in [*summary["candidates"], *(t for t in trials if "shares" in t)]:
        for key in {"share_kept", "search_share", "shares"} & found.keys():
            known = {"domain": 0.5, "general": 0.5, "code": 0.25} | found[key]
            found[key] = {suite: known[suite] for suite in ("general", "domain", "code")[:suites]}
    assert len(pareto.panels(summary, trials)) == panels
    assert len(Page(report.render(summary, trials)).tables[0][0]) == 3 + suites


def test_without_trials_the_held_back_panel_stays(summary):
    del summary["curve"]
    for c in summary["candidates"]:
        del c["search_share"]
    assert len(pareto.panels(summary, [])) == 1


def test_the_picture_alone_is_a_whole_svg_file(summary, trials):
    root = ET.fromstring(report.pareto_svg(summary, trials))
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text == "Share kept"
    assert len(root.findall(f"{SVG}svg")) == 2
    assert "--s0" in root.find(f"{SVG}style").text
    assert report.pareto_svg({}, []) == ""


def test_every_picture_has_a_title_and_a_description(summary, trials):
    text = report.render(summary, trials)
    pictures = re.findall(r"<svg [^>]*role=.*?</svg>", text)
    assert len(pictures) > 5
    assert all(
        re.match(r"<svg [^>]*><title>[^<]+</title><desc>[^<]+</desc>", picture) for picture in pictures
    )


def test_families_share_a_look_and_differ_from_each_other(summary):
    found = pareto.looks(summary)
    assert set(found) == {"base", "fine-tuned", "one knob, everything", "bayes", "rl"}
    many = pareto.looks({"candidates": [{"name": f"searcher {k}"} for k in range(30)]})
    assert len(set(many.values())) == 32
    assert {look.shape for look in many.values()} <= set(svg.SHAPES)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("bayes", "bayes"), ("bayes:gp seed 12", "bayes:gp"), ("one knob, everything 0.5", "one knob, everything"),
        ("one knob, attention 0", "one knob, attention"), ("best domain (gradient seed 2)", "gradient"),
        ("knee (one knob, everything 0.4)", "one knob, everything"), ("fine-tuned", "fine-tuned"),
    ],
)  # fmt: skip
def test_the_family_of_a_name(name, family):
    assert data.family(name) == family


def test_alphas_are_drawn_by_kind_and_layer():
    picture = charts.alpha_chart("x", alphas(0.0) | {"model.layers.1.self_attn.q_proj.weight": 0.0})
    tips = re.findall(r"<g><title>([^<]+)", picture)
    assert "q, layers 0 to 1: 0" in tips  # equal neighbours are one cell
    assert "k, layer 3: 0.75" in tips
    assert "embeddings, outside layers: 0" in tips
    assert "0.38</text>" in picture  # the mean of k
    assert picture.index(">q<") < picture.index(">k<") < picture.index(">up<") < picture.index(">embeddings<")


def test_alphas_outside_the_unit_interval_are_marked():
    assert 'class="dots"' not in charts.alpha_chart("x", alphas(0.25))
    assert charts.alpha_chart("x", alphas(0.5)).count('class="dots"') == 3  # 1.25 in the last layer
    assert charts.alpha_chart("x", {"lm_head.weight": 0.5}) is None


def test_the_best_seed_of_a_searcher_is_shown_and_the_others_folded(summary, trials):
    page = Page(report.render(summary, trials))
    assert [c for c in page.text["figcaption"] if "vs" not in c] == ["bayes", "rl", "bayes seed 1"]
    assert "bayes seed 1" in page.text["details"]


def test_divergence_has_a_cell_for_every_head_that_was_measured(summary):
    rows = summary["divergence"]["pairs"]["fine-tuned vs base"]
    tips = re.findall(r"<g><title>([^<]+)", charts.divergence_chart("x", rows, 0.42))
    assert tips == ["head 0, layer 0: 0.1", "head 0, layer 2: 0", "head 1, layer 0: 0.42"]
    assert charts.divergence_chart("x", [None, []], 1.0) is None
    assert 'class="dots"' not in charts.divergence_chart("x", [[1.5]], 1.5)
    assert "Not measured: layer 1: linear attention." in report.render(summary, [])


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 9), st.sampled_from([None, [0, 2]])), min_size=1))
def test_regret_is_the_best_known_minus_the_best_so_far(rows):
    made = [trial(f"a/0/{k}", reward, tokens, part) for k, (reward, tokens, part) in enumerate(rows)]
    best, spent, expected = -math.inf, 0, []
    for reward, tokens, part in rows:
        spent += tokens
        best = best if part else max(best, reward)
        expected += [(spent, 10 - best)] if best > -math.inf else []
    assert data.regrets(made, 10) == expected


def test_failed_trials_cost_nothing_and_minibatches_only_cost(trials):
    found = data.seeds(trials)
    assert data.regrets(found["bayes"][0], 0.83) == [(1000, pytest.approx(0.43)), (1250, pytest.approx(0.43)),
                                                     (1250, pytest.approx(0.43)), (4250, 0)]  # fmt: skip
    assert list(found) == ["bayes", "rl"]
    assert list(found["bayes"]) == [0, 1]


def test_where_the_front_is_searched_only_the_balanced_leg_has_the_reward_of_the_run():
    made = [trial("bayes/0/balance/0", 0.5), trial("bayes/0/domain/0", 0.9)]
    assert [t["reward"] for t in data.seeds(made)["bayes"][0]] == [0.5]
    assert data.best_known({}, made) == 0.5


STEPS = st.lists(st.tuples(st.integers(0, 20), st.floats(-5, 5)), min_size=1, unique_by=lambda p: p[0]).map(
    sorted
)


@given(st.lists(STEPS, min_size=1, max_size=4))
def test_a_spread_holds_every_curve(curves):
    low, middle, high = (dict(found) for found in data.spread(curves))
    for curve in curves:
        for cost, value in ((c, v) for c, v in curve if c in middle):
            assert low[cost] <= value <= high[cost]
            assert low[cost] <= middle[cost] <= high[cost]
    assert min(middle) == max(curve[0][0] for curve in curves)
    assert [list(found.items()) for found in map(dict, data.spread(curves[:1]))] == [curves[0]] * 3


def test_all_trials_may_have_failed(summary):
    failed = [trial(f"bayes/0/{k}", None, 0) for k in range(3)]
    assert charts.regret_chart(summary, failed) is None
    Page(report.render(summary, failed))


# ---------------------------------------------------------------- the parts

SPOT = st.tuples(st.floats(0, 300), st.floats(0, 300), st.text("abc ", min_size=1, max_size=20))


@given(st.lists(SPOT, max_size=12))
def test_labels_cover_neither_each_other_nor_a_point_nor_the_edge(spots):
    frame, boxes = svg.Box(0, 0, 300, 300), []
    for found in map(ET.fromstring, svg.place(spots, frame)):
        left, bottom = float(found.get("x")), float(found.get("y")) + 3.5
        boxes.append(svg.Box(left, bottom - 14, left + svg.CHARACTER * len(found.text), bottom))
    shrunk = [
        svg.Box(b.left + 0.1, b.top + 0.1, b.right - 0.1, b.bottom - 0.1) for b in boxes
    ]  # coordinates are rounded
    assert not any(a.meets(b) for k, a in enumerate(shrunk) for b in shrunk[:k])
    assert not any(a.meets(svg.Box(x - 5, y - 5, x + 5, y + 5)) for a in shrunk for x, y, _ in spots)
    assert all(b.left >= -0.1 and b.right <= 300.1 and b.top >= -0.1 and b.bottom <= 300.1 for b in boxes)


@given(st.floats(-100, 100), st.floats(0.001, 1000))
def test_ticks_are_even_and_on_the_axis(low, width):
    found = svg.Axis(low, low + width, 0, 1).ticks()
    assert 3 <= len(found) <= 8
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)


def test_an_axis_without_a_width_is_no_error():
    assert svg.Axis(2, 2, 10, 20)(2) == 10
    assert svg.Axis(0, 0, 10, 20).ticks() == [0]


def test_colours_between_stops_are_mixed_and_beyond_them_the_last():
    stops = ((0.0, "#000000"), (1.0, "#ff8000"))
    assert [svg.blend(stops, v) for v in (-1, 0, 0.5, 1, 7)] == [
        "#000000",
        "#000000",
        "#804000",
        "#ff8000",
        "#ff8000",
    ]


@given(st.text())
def test_text_survives_escaping(text):
    class Reader(HTMLParser):
        def handle_starttag(self, name, attributes):
            self.name, self.title = name, dict(attributes)["title"]

        def handle_data(self, data):
            self.read = getattr(self, "read", "") + data

    reader = Reader(convert_charrefs=True)
    reader.feed(tag("p", text, title=text))
    reader.close()
    assert reader.name == "p"
    assert reader.title == text
    assert getattr(reader, "read", "") == text


def test_numbers_as_people_read_them():
    assert [compact(n) for n in (0, 999, 481490, 1.5e6, math.inf)] == ["0", "999", "481k", "1.5M", "∞"]
    assert [duration(s) for s in (0, 59.6, 748.4, 7384)] == ["0 s", "1 min 0 s", "12 min 28 s", "2 h 3 min"]
    assert [percent(None), percent(0.9187), percent(-0.0001), percent(0.5, 0.0123)] == [
        "–",
        "91.9 %",
        "0.0 %",
        "50.0 ± 1.2 %",
    ]
    assert [score(None), score(-1e-9), score(0.4733, 0.0409)] == ["–", "0.000", "0.473 ± 0.041"]


# ---------------------------------------------------------------- markdown, files, the command


def test_markdown_has_the_verdict_the_shares_and_the_command(summary):
    text = report.markdown(summary)
    assert text.startswith("### bayes beats one knob, everything 0.5\n")
    assert "| **bayes** | 88.8 ± 2.1 % | 82.4 ± 3.5 % | 0.830 |" in text
    assert text.endswith("    mergekit-yaml tuned.yml merged/\n")


@given(st.text(min_size=1))
def test_no_name_breaks_the_markdown_table(name):
    c = {"name": name, "share_kept": {name: 0.5}, "search_reward": None}
    text = report.markdown({"candidates": [c], "best": "x"})
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert len(table) == 3
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in table} == {4}
    assert "<" not in text


@pytest.fixture
def run(tmp_path, summary, trials):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(t) + "\n" for t in trials))
    return tmp_path


def test_the_page_is_written_into_the_run(run, summary, trials):
    assert report.write_report(run) == run / "report.html"
    assert (run / "report.html").read_text() == report.render(summary, trials)
    assert sorted(p.name for p in run.iterdir()) == ["report.html", "summary.json", "trials.jsonl"]


def test_a_line_that_is_being_written_is_left_out(run, trials):
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"key": "rl/0/2", "rewa')
    assert len(report.read_run(run)[1]) == len(trials)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_damaged_run_is_one_sentence(run, text):
    (run / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match=r"^The run in .* is damaged .*Make another"):
        report.write_report(run)


def test_a_page_that_cannot_be_written_leaves_nothing_behind(run):
    with pytest.raises(RunError, match=r"Cannot write .*nowhere/x.html: No such file"):
        report.write_report(run, run / "nowhere" / "x.html")
    (run / "taken").mkdir()
    with pytest.raises(RunError, match="Cannot write"):
        report.write_report(run, run / "taken")
    assert not list(run.glob(".*"))


def test_the_command_prints_where_the_page_is(run):
    done = CliRunner().invoke(command, [str(run), "--out", str(run / "x.html")], catch_exceptions=False)
    assert done.output == f"{run / 'x.html'}\n"
    assert (run / "x.html").read_text().startswith("<!doctype html>")


def test_the_command_prints_markdown(run, summary):
    done = CliRunner().invoke(command, [str(run), "--markdown"], catch_exceptions=False)
    assert done.output == report.markdown(summary)
    assert not (run / "report.html").exists()


def test_no_run_is_one_sentence_with_its_remedy(tmp_path):
    with pytest.raises(
        RunError, match=r"^No finished run in .*summary\.json.*Give the directory of one, or finish"
    ):
        report.write_report(tmp_path)
