"""What was measured of a merge before it was made, as its lock carries it: put together here, and read here.

It knows the files of a tuning run, and what a lock says of it; no models or checkpoints.

    side       whose scores: base, fine-tuned, merged (the candidate that became the checkpoint), one knob (its rival)
    samples    task `suite/task` to the sha256 of the ids of its held-back items, sorted
    contents   task to the digest of all its items as tokens; only where a task has one
    items      task to {"weight", and each side: headline values}; n numbers in a line of text, sorted by the item's id

Values are kept item by item because two merges that answered the same items are compared in pairs (verdict.py), which
sees differences that the errors of two means hide. Ids stay where they are: what they say may be nobody's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from arma_mergekit.cache import hashed
from arma_mergekit.errors import InputError, RunError
from arma_mergekit.evals.base import Measured
from arma_mergekit.recipe.document import read_yaml
from arma_mergekit.recipe.strict import sentences

__all__ = ["SIDES", "Asked", "Evaluation", "aligned", "of_run", "sample"]

SIDES = ("base", "fine-tuned", "merged", "one knob")
DIGITS = 7  # of a value; a float32 has no more
TOLERANCE = 1e-9  # of alphas that went through YAML
KEPT = (
    "rival",
    "objective",
    "keep",
    "holdout",
    "seeds",
    "forward_tokens",
    "weights",
)  # of summary.json, as it is

Record = Mapping[str, Any]
Number = Annotated[float, Field(strict=True)]
Asked = tuple[str, str | None]  # what a task asks: digests of its held-back items' ids and of its content
Line = Annotated[
    tuple[float, ...], BeforeValidator(lambda text: text.split() if isinstance(text, str) else text)
]


class Evaluation(BaseModel):
    """The part of a lock's `evaluation` that a checkpoint is judged by."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    candidate: str
    rival: str
    feasible: bool
    keep: dict[str, float]
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    holdout: float = Field(gt=0, lt=1)
    suites: tuple[str, ...]
    recipe_file: str
    recipe: dict[str, Any] | None
    samples: dict[str, str]
    contents: dict[str, str]
    items: dict[str, dict[str, Line]] = Field(min_length=1)
    share_kept: dict[str, dict[str, float]]

    @classmethod
    def of(cls, lock: Record, file: Path) -> Evaluation:
        """That of the lock in ``file``; InputError if there is none, or what is wrong with it."""
        if lock.get("evaluation") is None:
            raise InputError(
                f"{file} promises no scores: its alphas were not found by a tuning run. Merge the tuned.yml of an "
                "`arma-tune` run where its summary.json is."
            )
        try:
            return cls.model_validate(lock["evaluation"])
        except ValidationError as error:
            raise InputError("\n".join(sentences(error, cls, f"evaluation of {file}"))) from error

    @model_validator(mode="after")
    def _is_whole(self) -> Evaluation:
        columns = {"weight", *SIDES}
        for task, lines in self.items.items():
            lengths = {len(line) for line in lines.values()}
            if set(lines) != columns or len(lengths) != 1 or max(lengths) < 2 or min(lines["weight"]) <= 0:
                raise ValueError(f".items.{task} needs {', '.join(sorted(columns))}, equally many of each.")
        if missing := set(self.items) - set(self.samples):
            raise ValueError(f".samples lacks {min(missing)}.")
        if missing := set(SIDES) - set(self.share_kept):
            raise ValueError(f".share_kept lacks {min(missing)}.")
        return self

    @property
    def asked(self) -> dict[str, Asked]:
        """By task."""
        return {task: (self.samples[task], self.contents.get(task)) for task in self.items}

    def scores(self, side: str) -> dict[str, Measured]:
        """Held-back scores of a side by task, items in the order of the lock; losses are minus the values."""
        found = {}
        for task, lines in self.items.items():
            value, weight = np.array(lines[side]), np.array(lines["weight"])
            found[task] = Measured(_names(self.samples[task], len(value)), -value, value, weight, 0)
        return found


class _Score(BaseModel):
    items: int = Field(strict=True)
    score: Number
    stderr: Number


class _Verdict(BaseModel):
    sentence: str


class _Shown(Evaluation):
    """What the model card shows besides: a damaged run is found before its numbers get into a lock."""

    held_back: dict[str, dict[str, _Score]]
    share_kept: dict[str, dict[str, Number]]
    share_stderr: dict[str, dict[str, Number]]
    verdict: _Verdict | None

    @model_validator(mode="after")
    def _is_of_all_sides(self) -> _Shown:
        tasks = set(self.held_back.get("merged", {}))
        if any(not tasks <= set(self.held_back.get(side, {})) for side in SIDES):
            raise ValueError(".held_back lacks a side or a task.")
        if missing := set(SIDES) - set(self.share_stderr):
            raise ValueError(f".share_stderr lacks {min(missing)}.")
        return self


def of_run(run: Path, lock: Record) -> dict[str, Any] | None:
    """The evaluation of the merge that ``lock`` (its alphas and inputs) describes, from the tuning run in ``run``.

    None if no run ended there. RunError, which says why, if it is damaged or scored other alphas or other weights:
    numbers of another merge are worse than none.
    """
    file = run / "summary.json"
    if not file.is_file():
        return None
    try:
        raw = file.read_bytes()
        summary, records = json.loads(raw), _journal(run / "trials.jsonl")
        sides = _sides(summary, lock, run)
        held = {side: _held(records, candidate) for side, candidate in sides.items()}
        found = {
            "summary_sha256": hashlib.sha256(raw).hexdigest(),
            **_facts(summary, sides),
            **_items(held),
        }
        _Shown.model_validate(found)
        return found
    except OSError as error:
        raise RunError(f"Cannot read {error.filename}: {error.strerror}; check its rights.") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, InputError) as error:
        raise RunError(
            f"The run in {run} is damaged or of another version ({error!r}); tune again."
        ) from error


def aligned(measured: Measured) -> Measured:
    """Scores just made, with their items in the order of a lock's, and named like those."""
    order = np.argsort(np.array(measured.ids), kind="stable")
    loss, value, weight = (getattr(measured, key)[order] for key in ("loss", "value", "weight"))
    return Measured(_names(sample(measured.ids), len(order)), loss, value, weight, measured.tokens)


def sample(ids: Sequence[str]) -> str:
    """Digest of a set of items."""
    return hashed(sorted(ids))


def _names(digest: str, count: int) -> tuple[str, ...]:
    """Names of items: equal where the items are, so that tasks on the same items are resampled together."""
    return tuple(f"{digest}/{k}" for k in range(count))


def _journal(file: Path) -> dict[str, Record]:
    """Records of a run by key."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {record["key"]: record for record in records}


def _sides(summary: Record, lock: Record, run: Path) -> dict[str, Record]:
    """The candidates that are the lock's merge, its ends and its rival; RunError if the run scored no such merge."""
    ref = _other_weights(summary["fingerprint"], lock["inputs"])
    if ref is not None:
        raise RunError(f"The run in {run} scored other weights of {ref} than those merged; tune again.")
    by_name = {candidate["name"]: candidate for candidate in summary["candidates"]}
    # the rival first: an arm that found nothing better ends where the rival is
    ranked = [by_name[summary["rival"]], by_name[summary["best"]], *by_name.values()]
    merged = next((c for c in ranked if _same_alphas(lock["alphas"], c["alphas"])), None)
    if merged is None:
        raise RunError(
            f"The run in {run} scored no merge with these alphas; was its recipe edited? Tune again."
        )
    return dict(zip(SIDES, (by_name["base"], by_name["fine-tuned"], merged, ranked[0]), strict=True))


def _same_alphas(got: Record, wanted: Mapping[str, float]) -> bool:
    found = ((got.get(tensor), alpha) for tensor, alpha in wanted.items())
    return all(isinstance(mine, int | float) and abs(mine - alpha) <= TOLERANCE for mine, alpha in found)


def _other_weights(fingerprint: Record, inputs: Sequence[Record]) -> str | None:
    """The first input with a file that is not what the run saw; the run kept half of each digest."""
    for model in inputs:
        for name, entry in model["files"].items():
            half, whole = fingerprint.get(f"model {model['ref']}: {name}"), entry.get("sha256")
            if half and whole and not whole.startswith(half):
                return str(model["ref"])
    return None


def _facts(summary: Record, sides: Mapping[str, Record]) -> dict[str, Any]:
    """What the run says of itself and of these candidates."""
    merged, recipe = sides["merged"], Path(summary["recipe"])
    verdict = next((v for v in summary["verdicts"] if v["name"] == merged["name"]), None)
    fingerprint = {key: value for key, value in summary["fingerprint"].items() if key != "key"}
    return {
        "candidate": merged["name"],
        "feasible": merged["feasible"],
        **{key: summary[key] for key in KEPT if key in summary},
        "suites": fingerprint["suites"],
        "recipe_file": str(recipe),
        "recipe": summary.get("recipe_content") or (read_yaml(recipe) if recipe.is_file() else None),
        "fingerprint": fingerprint,
        "contents": {
            key.removeprefix("items of "): value
            for key, value in fingerprint.items()
            if key.startswith("items of ")
        },
        "held_back": {side: candidate["held_back"] for side, candidate in sides.items()},
        "share_kept": {side: candidate["share_kept"] for side, candidate in sides.items()},
        "share_stderr": {side: candidate["share_stderr"] for side, candidate in sides.items()},
        "verdict": verdict and {key: verdict[key] for key in ("dominates", "sentence", "suites")},
    }


def _held(records: Mapping[str, Record], candidate: Record) -> dict[str, Measured]:
    """Held-back scores of a candidate from the journal (`Tuner.hold`)."""
    record = records[f"held back/{hashed(candidate['alphas'])[:16]}"]
    return {task: Measured.from_json(data) for task, data in record["held"].items()}


def _items(held: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """``samples`` and ``items`` of these scores."""
    samples, items = {}, {}
    for task, measured in held["merged"].items():
        samples[task] = sample(measured.ids)
        sides = {side: _line(aligned(found[task]).value) for side, found in held.items()}
        items[task] = {"weight": _line(aligned(measured).weight), **sides}
    return {"samples": samples, "items": items}


def _line(values: Any) -> str:
    return " ".join(f"{value:.{DIGITS}g}" for value in values)
