"""The model card of a merged checkpoint: README.md, whose front matter the Hub reads, and alphas.svg beside it.

It knows a lock (arma.lock.json) and the licences that directories of models state; no recipes, weights or runs. Names
come from other people's recipes and disks, so each is escaped: none becomes an element, a link, a row or a YAML key.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from arma_mergekit.checkpoint import ModelReference
from arma_mergekit.checkpoint.locate import HUB_ID
from arma_mergekit.ci import cell, table
from arma_mergekit.report.charts import KINDS, alpha_chart
from arma_mergekit.report.markup import compact, percent, score, tag
from arma_mergekit.report.svg import CSS

__all__ = ["PICTURE", "Licence", "licences", "picture", "render", "warnings"]

PICTURE = "alphas.svg"
SIDES = ("base", "fine-tuned", "one knob", "merged")
TAGS = ["arma", "merge", "mergekit"]

READ = 20_000  # bytes of a file that are looked at
FRONT = re.compile(r"---\r?\n(.*?\n)---\s", re.DOTALL)
ID = re.compile(r"^license:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?['\"]?([\w.+-]+)", re.MULTILINE)
NAME = re.compile(r"^license_name:[ \t]*['\"]?([\w.+ -]+)", re.MULTILINE)
LINK = re.compile(r"^license_link:[ \t]*['\"]?(https://[^\s'\"]+)", re.MULTILINE)
TEXTS = {  # id to how the licence itself begins
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0"),
    "mit": re.compile(
        r"(\s*(The )?MIT License|.{0,400}?Permission is hereby granted, free of charge)", re.DOTALL
    ),
    "gpl-3.0": re.compile(r"\s*GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    "llama3.1": re.compile(r"\s*LLAMA 3\.1 COMMUNITY LICENSE"),
    "llama3.2": re.compile(r"\s*LLAMA 3\.2 COMMUNITY LICENSE"),
}
PERMISSIVE = {
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense",
    "zlib",
}  # fmt: skip

Lock = Mapping[str, Any]


# ---------------------------------------------------------------------- licences


@dataclass(frozen=True)
class Licence:
    """As the Hub spells it: its id, and the name and link of one whose id is `other`."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return self.name or self.id

    @property
    def front(self) -> dict[str, str]:
        """Entries of the front matter."""
        entries = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in entries.items() if value}


def licences(directories: Mapping[str, Path]) -> dict[str, Licence | None]:
    """What each model's README.md or LICENSE states; None where neither says anything that is known here."""
    return {name: _stated(path) or _recognised(path) for name, path in directories.items()}


def warnings(found: Mapping[str, Licence | None]) -> list[str]:
    """What to clear up before a merge of models with these licences is published, a sentence each. No legal advice."""
    told = [
        f"The licence of {name} is not known: neither its README.md nor a LICENSE file states one."
        for name, licence in found.items()
        if licence is None
    ]
    told += [
        f"{name} is under {licence}, which allows no derivatives, and a merge is one."
        for name, licence in found.items()
        if licence and re.search(r"\bnd\b", licence.id)
    ]
    if len(_restrictive(found)) > 1:
        each = ", ".join(f"{name} is under {licence}" for name, licence in found.items())
        told.append(f"The licences may not go together: {each}.")
    return told


def _restrictive(found: Mapping[str, Licence | None]) -> set[Licence]:
    return {licence for licence in found.values() if licence and licence.id not in PERMISSIVE}


def _of_merge(found: Mapping[str, Licence | None]) -> Licence | None:
    """The one licence whose terms include the others'; None if that cannot be told."""
    if not found or warnings(found):
        return None
    distinct = _restrictive(found) or {licence for licence in found.values() if licence}
    if len(distinct) == 1:
        return distinct.pop()
    return Licence("other", " and ".join(sorted(map(str, distinct))))


def _stated(directory: Path) -> Licence | None:
    front = FRONT.match(_text(directory / "README.md"))
    if front is None or (found := ID.search(front[1])) is None:
        return None
    if found[1] != "other":
        return Licence(found[1])
    name, link = NAME.search(front[1]), LINK.search(front[1])
    return Licence("other", name[1].strip(), link and link[1]) if name else None


def _recognised(directory: Path) -> Licence | None:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        text = _text(directory / name)
        for known, beginning in TEXTS.items():
            if beginning.match(text):
                return Licence(known)
    return None


def _text(file: Path) -> str:
    """The beginning of a file; "" if there is none that can be read."""
    try:
        if not file.is_file():
            return ""
        with file.open("rb") as stream:
            return stream.read(READ).decode("utf-8", "replace")
    except OSError:
        return ""


# ---------------------------------------------------------------------- the card


def render(lock: Lock, found: Mapping[str, Licence | None]) -> str:
    """README.md of the checkpoint that a lock describes; ``found``: `licences` of its parents."""
    evaluation = lock.get("evaluation")
    names = [cell(entry["ref"]) for entry in lock["inputs"]]
    blocks = [
        f"---\n{yaml.safe_dump(_front(lock, found), sort_keys=False)}---",
        f"# Merge of {' and '.join(names)}",
        *(f"> {cell(warning)}" for warning in warnings(found)),
        "## How it was made",
        *_making(lock),
        *(_alphas(lock) if lock.get("alphas") else ()),
        *(_scores(evaluation) if evaluation else ()),
        "## Check it",
        "`arma.lock.json` has the sha256 of every file that went in and came out. With the parents where it says, this "
        "merges again, tensor by tensor, and compares:",
        "    pip install arma-mergekit\n    arma verify .",
        "## Use it",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this directory, or the id of this model\n'
        'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n```",
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _front(lock: Lock, found: Mapping[str, Licence | None]) -> dict[str, Any]:
    """What the Hub reads."""
    licence = _of_merge(found)
    return {
        "base_model": list(dict.fromkeys(name for entry in lock["inputs"] for name in _hub_ids(entry))),
        "base_model_relation": "merge",
        "library_name": "transformers",
        **(licence.front if licence else {}),
        "tags": TAGS,
    }


def _hub_ids(entry: Mapping[str, Any]) -> Iterator[str]:
    """Names of a model and its adapter that can be ids; the Hub takes no card that names anything else."""
    reference = ModelReference.parse(entry["ref"])
    for name in (reference.model, reference.adapter):
        if name and HUB_ID.fullmatch(name) and (entry.get("commit") or "/" in name):
            yield name


def _making(lock: Lock) -> Iterator[str]:
    version, counts = cell(lock["tool"]["arma_mergekit"]), lock.get("tensors")
    if counts:
        yield (
            f"By arma_mergekit {version}: {counts['averaged']} tensors averaged, W = W_base + alpha (W_fine-tuned - "
            f"W_base), {counts['copied']} copied; {compact(lock['output']['parameters'])} parameters."
        )
    else:
        yield f"By arma_mergekit {version}, which left the merge to {cell(lock['executor'])}."
    yield f"    arma merge {' '.join(shlex.quote(lock['recipe_file']).split())} out/"
    rows = [[entry["role"], entry["ref"], (entry.get("commit") or "")[:12]] for entry in lock["inputs"]]
    yield table(["", "model", "commit"], rows, 3)
    if local := [cell(entry["ref"]) for entry in lock["inputs"] if not entry.get("commit")]:
        yield f"Local directories, to be named in `base_model` by ids of the Hub before publishing: {', '.join(local)}."


def _alphas(lock: Lock) -> Iterator[str]:
    """For each fine-tuned model, mean and range of alpha over the tensors of each kind."""
    tuned = [entry["ref"] for entry in lock["inputs"] if entry["role"] != "base"]
    yield "## Alphas"
    yield "Weight of the fine-tuned model: 0 is the base (blue), 1 the fine-tuned model (orange)."
    if picture(lock):
        yield f"![Alphas by layer]({PICTURE})"
    for k, ref in enumerate(tuned):
        if len(tuned) > 1:
            yield f"Of {cell(ref)}:"
        yield table(["kind", "", "tensors", "mean", "lowest", "highest"], _alpha_rows(lock, k), 2)


def _alpha_rows(lock: Lock, k: int) -> Iterator[list[str]]:
    kinds: dict[tuple[bool, str], list[float]] = {}
    for tensor, alphas in lock["alphas"].items():
        _, part, attention = lock["roles"][tensor]
        kinds.setdefault((not attention, part), []).append(_column(alphas, k))
    for (outside, part), values in sorted(kinds.items(), key=lambda kind: _order(*kind[0])):
        spread = (fmean(values), min(values), max(values))
        yield [part, "" if outside else "attention", str(len(values)), *(f"{value:.2f}" for value in spread)]


def _order(outside: bool, part: str) -> tuple[bool, int, str]:
    """Attention first, q k v o before others."""
    return outside, KINDS.index(part) if part in KINDS else len(KINDS), part


def _column(alphas: float | Sequence[float], k: int) -> float:
    """Alpha of the k-th fine-tuned model."""
    return alphas[k] if isinstance(alphas, Sequence) else alphas


def _scores(evaluation: Lock) -> Iterator[str]:
    """Held-back scores beside those of base, fine-tuned and the best one-knob average."""
    held, kept, errors = (evaluation[key] for key in ("held_back", "share_kept", "share_stderr"))
    head = ["", "items", "base", "fine-tuned", evaluation["rival"], "this merge"]
    rows = [
        [
            task,
            str(found["items"]),
            *(score(held[side][task]["score"], held[side][task]["stderr"]) for side in SIDES),
        ]
        for task, found in held["merged"].items()
    ]
    rows += [
        [
            f"{suite}: share kept",
            "",
            *(percent(kept[side].get(suite), errors[side].get(suite)) for side in SIDES),
        ]
        for suite in kept["merged"]
    ]
    yield "## Scores"
    yield (
        "On items that no search has seen, with standard errors; up is better. A share of 0 % is the worse of base "
        f"and fine-tuned, 100 % the better. Found by {cell(evaluation['candidate'])}."
    )
    yield table(head, rows)
    if evaluation["verdict"]:
        yield cell(evaluation["verdict"]["sentence"])


def picture(lock: Lock) -> str:
    """alphas.svg: alpha by layer and kind of matrix, of the first fine-tuned model; "" for a model without layers."""
    alphas = {tensor: _column(alpha, 0) for tensor, alpha in lock.get("alphas", {}).items()}
    drawn = alpha_chart("this merge", alphas)
    if drawn is None:
        return ""
    size = re.search(r'viewBox="([^"]+)"', drawn)
    assert size is not None
    own = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": size[1], "style": "background:var(--paper)"}
    return tag("svg", tag("style", CSS), drawn, **own) + "\n"
