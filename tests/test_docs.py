"""README and docs say what the code does: help texts, code blocks, recipes, links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from arma_mergekit.cli import COMMANDS, cli
from arma_mergekit.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*/*.yml") if p.is_file())


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def help_text(name):
    """What a user sees; a process of its own, since click caches help options between commands of one process."""
    words = [] if name == "arma" else [name]
    call = [
        sys.executable,
        "-c",
        "from arma_mergekit.cli import cli; cli(prog_name='arma')",
        *words,
        "--help",
    ]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.parametrize("name", ["arma", *sorted(COMMANDS)])
def test_the_help_in_the_docs_is_the_help_of_the_command(name):
    assert help_text(name).strip() in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_in_a_page_exists_with_its_options(page):
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] not in ("arma", "arma-tune"):
            continue
        name = "tune" if words[0] == "arma-tune" else words[1]
        known = {o for p in cli.get_command(click.Context(cli), name).params for o in p.opts}
        asked = {w.partition("=")[0] for w in words if w.startswith("--")}
        assert asked <= known | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_in_a_page_is_one(page, tmp_path):
    for text in blocks(page, "yaml"):
        if "merge_method: arma" in text:
            (tmp_path / "recipe.yml").write_text(text)
            Recipe.load(tmp_path / "recipe.yml")
        assert yaml.safe_load(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


# PEFT 0.21 asks transformers for what it renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_python_block_in_a_page_runs(page):
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), {})


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_loads_and_its_data_is_there(path):
    recipe = Recipe.load(path)
    assert path.read_text().startswith("# arma")
    for task in (t for suite in recipe.evals.values() for t in suite):
        assert recipe.data_path(task.data).is_file()
