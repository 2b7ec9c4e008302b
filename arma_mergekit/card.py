"""The model card of a merged checkpoint: README.md, whose front matter the Hub reads, and alphas.svg beside it.

It knows a lock (arma.lock.json) and the licences that directories of models state; no recipes, weights or runs. Names
come from other people's recipes and disks, so each is escaped: none becomes an element, a link, a row or a YAML key.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
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
ID = re.compile(r"[\w.+-]+")
NAME = re.compile(r"[\w.+ -]+")
LINK = re.compile(r"https://[^\s'\"]+")
TEXTS = {  # id to how the licence itself begins
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0"),
    "mit": re.compile(
        r"(\s*(The )?MIT License|.{0,400}?Permission is hereby granted, free of charge)", re.DOTALL
    ),
    "gpl-2.0": re.compile(r"\s*GNU GENERAL PUBLIC LICENSE\s+Version 2"),
    "gpl-3.0": re.compile(r"\s*GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    "llama3.1": re.compile(r"\s*LLAMA 3\.1 COMMUNITY LICENSE"),
    "llama3.2": re.compile(r"\s*LLAMA 3\.2 COMMUNITY LICENSE"),
}
PERMISSIVE = {
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense",
    "zlib",
}  # fmt: skip
UNFIT = {"gpl-2.0", "apache-2.0"}  # though the second is permissive
ADAPTER_OF_COMMIT = re.compile(r"[0-9a-f]{40}/[^/]+")  # its directory in the hub's cache, and a file

Lock = Mapping[str, Any]
Found = Mapping[str, tuple["Licence", ...]]


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


def licences(directories: Mapping[str, Path]) -> dict[str, tuple[Licence, ...]]:
    """What each model's README.md or LICENSE states, all of which holds; none if neither says anything known here."""
    return {name: _stated(path) or _recognised(path) for name, path in directories.items()}


def warnings(found: Found) -> list[str]:
    """What to clear up before a merge of models with these licences is published, a sentence each. No legal advice."""
    told = [
        f"The licence of {name} is not known: neither its README.md nor a LICENSE file states one."
        for name, terms in found.items()
        if not terms
    ]
    told += [
        f"{name} is under {licence}, which allows no derivatives, and a merge is one."
        for name, terms in found.items()
        for licence in terms
        if re.search(r"\bnd\b", licence.id)
    ]
    if len(_restrictive(found)) > 1 or {licence.id for licence in _all(found)} >= UNFIT:
        each = ", ".join(f"{name} is under {_together(terms)}" for name, terms in found.items())
        told.append(f"The licences may not go together: {each}.")
    return told


def _all(found: Found) -> set[Licence]:
    return {licence for terms in found.values() for licence in terms}


def _restrictive(found: Found) -> set[Licence]:
    return {licence for licence in _all(found) if licence.id not in PERMISSIVE}


def _together(terms: Collection[Licence]) -> str:
    return " and ".join(sorted(set(map(str, terms)))) or "none that is known"


def _of_merge(found: Found) -> Licence | None:
    """The one licence whose terms include the others'; None if that cannot be told."""
    if not found or warnings(found):
        return None
    distinct = _restrictive(found) or _all(found)
    return distinct.pop() if len(distinct) == 1 else Licence("other", _together(distinct))


def _stated(directory: Path) -> tuple[Licence, ...]:
    """Of the front matter: `license` is an id or a list of ids, whose `other` has name and link beside it."""
    front = FRONT.match(_text(directory / "README.md"))
    try:
        said = yaml.load(front[1] if front else "", yaml.BaseLoader)  # noqa: S506 - makes only text
    except (yaml.YAMLError, ValueError, RecursionError):
        return ()
    said = said if isinstance(said, dict) else {}
    stated = said.get("license")
    ids = [_like(ID, each).lower() for each in (stated if isinstance(stated, list) else [stated])]
    other = Licence(
        "other", _like(NAME, said.get("license_name")), _like(LINK, said.get("license_link")) or None
    )
    if not all(ids) or ("other" in ids and not other.name):
        return ()
    return tuple(other if each == "other" else Licence(each) for each in ids)


def _like(pattern: re.Pattern[str], value: object) -> str:
    """A text of that form; "" for anything else."""
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _recognised(directory: Path) -> tuple[Licence, ...]:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        text = _text(directory / name)
        for known, beginning in TEXTS.items():
            if beginning.match(text):
                return (Licence(known),)
    return ()


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


def render(lock: Lock, found: Found) -> str:
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


def _front(lock: Lock, found: Found) -> dict[str, Any]:
    """What the Hub reads."""
    licence = _of_merge(found)
    return {
        "base_model": _names(lock, True),
        "base_model_relation": "merge",
        "library_name": "transformers",
        **(licence.front if licence else {}),
        "tags": TAGS,
    }


def _names(lock: Lock, of_hub: bool) -> list[str]:
    """The parents that are ids of the Hub, or those that are not."""
    parts = (part for entry in lock["inputs"] for part in _parts(entry))
    return list(dict.fromkeys(name for name, is_id in parts if is_id == of_hub))


def _parts(entry: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Names of a model and its adapter, and whether each is an id of the Hub.

    A local directory may look like one (models/base), but only the hub's cache has commits and revisions.
    """
    ref = ModelReference.parse(entry["ref"])
    yield ref.model, _is_id(ref.model, entry.get("commit") or ref.revision)
    if ref.adapter is not None:
        cached = any(map(ADAPTER_OF_COMMIT.fullmatch, entry["files"]))
        yield ref.adapter, _is_id(ref.adapter, cached or ref.adapter_revision)


def _is_id(name: str, from_hub: object) -> bool:
    return bool(from_hub) and HUB_ID.fullmatch(name) is not None


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
    if local := [cell(name) for name in _names(lock, False)]:
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
