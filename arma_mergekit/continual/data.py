"""Tasks from local files as records, token rows and batches. It knows files and a tokenizer; no models.

JSONL: {"prompt", "answer"}, the answer scored by exact match of its tokens; with "choices" (texts; "answer" is one of
them or its index) by the likeliest choice (score.py). A folder `<group>/<task>` holds train.json and
test.json, lists of {"sentence", "label"}, and labels.json, the list of labels; there the prompt is the sentence, the
group's instruction with all labels, and "Answer:".

A dataset is one of `datasets` (a name, or a local directory): the prompt is a template of its columns, the answer a
column; the names of a ClassLabel are its choices.

A record is {"prompt", "answer", "choices", "label"}, texts all, "label" what the memory balances by. Prompts lose their
beginning where prompt and longest answer exceed ``max_length`` tokens, so instructions stand at their end.
"""

from __future__ import annotations

import json
import random
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from arma_mergekit.continual.plan import Plan, TaskSpec
from arma_mergekit.errors import DataError
from arma_mergekit.evals.rows import Item, Row, continuation
from arma_mergekit.evals.sources import read_records

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Task", "collator", "encode", "items", "paths", "read_task"]

Record: TypeAlias = Mapping[str, Any]

IGNORED = -100
INSTRUCTIONS = {
    "TC": "What is the topic of the text?",
    "SC": "What is the sentiment of the text?",
    "NLI": "How do the two sentences relate?",
    "QQP": "Do the two sentences mean the same?",
    "BoolQA": "Is the answer to the question true or false?",
    "MultiRC": "Is the candidate answer to the question true or false?",
    "COPA": "Which one is it?",
    "WiC": "Does the word mean the same in both sentences?",
}
OTHER = "Which label fits?"


@dataclass(frozen=True)
class Task:
    """Records to train on and to test with."""

    name: str
    train: Sequence[Record]
    test: Sequence[Record]


def paths(plan: Plan, spec: TaskSpec) -> list[Path]:
    """The files of a task; of a dataset none."""
    if spec.dataset is not None:
        return []
    if spec.folder is None:
        return [plan.place(str(spec.train)), plan.place(str(spec.test))]
    return [plan.place(spec.folder) / f"{name}.json" for name in ("train", "test", "labels")]


def read_task(plan: Plan, spec: TaskSpec) -> Task:
    """A task's records, the first ``limit`` of each file; DataError names file and place."""
    if spec.dataset is not None:
        test = Path(spec.dataset)
        sides = _from_dataset(plan, spec)
        return _task(spec, sides, test)
    train, test, *labels = paths(plan, spec)
    if labels:
        group = train.parent.parent.name
        question = spec.instruction or INSTRUCTIONS.get(group, OTHER)
        names = _json_list(labels[0])
        if not _distinct(names):
            raise DataError(
                f"{labels[0]} must be two or more different texts, but got {reprlib.repr(names)}."
            )
        sides = [_from_folder(path, question, names) for path in (train, test)]
    else:
        sides = [_from_lines(path) for path in (train, test)]
    return _task(spec, sides, test)


def _task(spec: TaskSpec, sides: Sequence[list[Record]], test: Path) -> Task:
    kept = [_some(s, limit) for s, limit in zip(sides, (spec.limit_train, spec.limit_test), strict=True)]
    if len({record["choices"] is None for record in kept[1]}) > 1:
        raise DataError(f"{test}: records with and without choices cannot be scored together; split them.")
    return Task(spec.name, *kept)


def _some(records: list[Record], limit: int | None) -> list[Record]:
    """``limit`` records at random, the same at every call, since files may be sorted by label."""
    if limit is None or limit >= len(records):
        return records
    kept = sorted(random.Random(0).sample(range(len(records)), limit))
    return [records[k] for k in kept]


def _distinct(choices: Any) -> bool:
    """Whether it is a list of two or more different texts."""
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    return texts and len(choices) == len(set(choices)) > 1


def _from_lines(path: Path) -> list[Record]:
    found: list[Record] = []
    for record in read_records(path, ["prompt", "answer"]):
        prompt, answer, choices = record.text("prompt"), record.fields["answer"], record.fields.get("choices")
        if isinstance(choices, list) and isinstance(answer, int) and 0 <= answer < len(choices):
            answer = choices[answer]
        if choices is not None and not _distinct(choices):
            raise record.error(
                f"choices must be two or more different texts, but got {reprlib.repr(choices)}"
            )
        if not isinstance(answer, str) or not answer or (choices is not None and answer not in choices):
            raise record.error(
                f"answer must be a text, one of the choices if there are any, but got {answer!r}"
            )
        label = record.fields.get("label", answer if choices else None)
        found.append({"prompt": prompt, "answer": answer, "choices": choices, "label": label})
    return found


def _from_folder(path: Path, question: str, labels: Sequence[str]) -> list[Record]:
    choices = [f" {label}" for label in labels]
    found: list[Record] = []
    for k, row in enumerate(_json_list(path)):
        if (
            not isinstance(row, dict)
            or row.get("label") not in labels
            or not isinstance(row.get("sentence"), str)
        ):
            raise DataError(
                f"{path}, entry {k}: must have a sentence and one of the labels, but got {reprlib.repr(row)}."
            )
        prompt = f"{row['sentence'].strip()}\n{question} {', '.join(labels)}\nAnswer:"
        found.append(
            {"prompt": prompt, "answer": f" {row['label']}", "choices": choices, "label": row["label"]}
        )
    return found


def _from_dataset(plan: Plan, spec: TaskSpec) -> list[list[Record]]:
    """Both splits of a dataset."""
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise DataError(f"Task {spec.name}: a dataset needs datasets; pip install datasets.") from error
    place = plan.place(str(spec.dataset))
    try:
        saved = (place / "dataset_dict.json").exists()
        whole = (
            load_from_disk(str(place))
            if saved
            else load_dataset(str(place if place.is_dir() else spec.dataset))
        )
        return [_from_split(spec, whole[split]) for split in spec.splits]
    except (KeyError, ValueError, OSError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise DataError(
            f"Task {spec.name}: dataset {spec.dataset} cannot be used as prompt {spec.prompt!r} and answer "
            f"{spec.answer!r} of splits {', '.join(spec.splits)} ({cause})."
        ) from error


def _from_split(spec: TaskSpec, rows: Any) -> list[Record]:
    names = getattr(rows.features[spec.answer], "names", None)
    choices = [f" {name}" for name in names] if names else None
    found: list[Record] = []
    for row in rows:
        answer = f" {row[spec.answer]}" if choices is None else choices[row[spec.answer]]
        prompt = str(spec.prompt).format_map(row)
        found.append(
            {"prompt": prompt, "answer": answer, "choices": choices, "label": answer if choices else None}
        )
    if not found:
        raise ValueError("it has no rows")
    return found


def _json_list(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    if not isinstance(found, list) or not found:
        raise DataError(f"{path} must be a JSON list that is not empty.")
    return found


def rows(tokenizer: Any, record: Record, max_length: int) -> list[Row]:
    """A row of prompt and answer for each choice (or the one answer), all with the same part of the prompt."""
    answers = record["choices"] or [record["answer"]]
    found = [continuation(tokenizer, record["prompt"], answer) for answer in answers]
    room = max(1, max_length - max(len(row.targets) for row in found))
    return [_shortened(row, room, tokenizer.bos_token_id) for row in found]


def _shortened(row: Row, room: int, bos: int | None) -> Row:
    """A row whose prompt has its last ``room`` tokens, and a leading start token if it had one."""
    if row.start <= room:
        return row
    lead = row.tokens[:1] if room > 1 and row.tokens[0] == bos else ()
    cut = row.start - room + len(lead)
    return Row((*lead, *row.tokens[cut:]), room)


def items(tokenizer: Any, task: Task, max_length: int) -> list[Item]:
    """The test records as items of a choice or generate task."""
    found = []
    for k, record in enumerate(task.test):
        answer, made = 0, rows(tokenizer, record, max_length - 1)  # as they were trained on
        if record["choices"]:
            answer = record["choices"].index(record["answer"])
            made = [Row(row.tokens + _end(tokenizer), row.start) for row in made]
        found.append(Item(f"{task.name}-{k}", tuple(made), answer, record["answer"]))
    return found


def _end(tokenizer: Any) -> tuple[int, ...]:
    """The end of text, if there is such a token."""
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def encode(tokenizer: Any, record: Record, max_length: int, encoder_decoder: bool) -> dict[str, list[int]]:
    """input_ids and labels of a record; only the answer and the end of text are learned."""
    if encoder_decoder:
        prompt = tokenizer(record["prompt"])["input_ids"]
        return {"input_ids": prompt[-max_length:], "labels": tokenizer(record["answer"])["input_ids"]}
    at = record["choices"].index(record["answer"]) if record["choices"] else 0
    row = rows(tokenizer, record, max_length - 1)[at]
    tokens = [*row.tokens, *_end(tokenizer)]
    return {"input_ids": tokens, "labels": [IGNORED] * row.start + tokens[row.start :]}


def collator(pad: int) -> Callable[[Sequence[Mapping[str, list[int]]]], dict[str, Tensor]]:
    """Features (input_ids, labels) to a batch padded on the right, with its attention mask."""

    def collate(features: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        import torch

        def padded(name: str, filler: int) -> Tensor:
            longest = max(len(f[name]) for f in features)
            return torch.tensor([[*f[name], *[filler] * (longest - len(f[name]))] for f in features])

        lengths = torch.tensor([len(f["input_ids"]) for f in features])
        ids = padded("input_ids", pad)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", IGNORED)}

    return collate
