"""Make the data of the second case, topic classification, in runs/topics/data/.

    git clone https://github.com/cmnfriend/O-LoRA
    python benchmarks/topics/prepare.py --data O-LoRA/CL_Benchmark

Reads TC/dbpedia and TC/agnews: lists of {"label", "sentence"} with the texts of DBpedia and AG News, which have
terms of their own and are not part of this project. Writes

    topics.jsonl          300 test texts: text to topic
    topics_choice.jsonl   300 other test texts: text to one of four topics of the same data set
    train.jsonl           the training texts, none of which is in the two above

Texts are cut to 48 tokens of the base model. Every choice is made by hash: the same input gives the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETS = ("dbpedia", "agnews")
ITEMS = 300
TOKENS = 48  # of a text
CHOICES = 4

Row = dict[str, Any]


def key(text: str) -> str:
    """A hash to order things by: random-looking, the same on every machine."""
    return hashlib.sha256(f"arma-mergekit {text}".encode()).hexdigest()


def cut(tokenizer: Any, text: str) -> str:
    """The first `TOKENS` tokens of a text."""
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    return text if len(ends) <= TOKENS else text[: ends[TOKENS - 1]].rstrip()


def rows(tokenizer: Any, folder: Path, part: str) -> Iterator[Row]:
    """{"id", "prompt", "answer", "choices", "right"} of every text, whose title is left out."""
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    for item in json.loads((folder / f"{part}.json").read_text(encoding="utf-8")):
        name = key(item["sentence"])
        body = item["sentence"].split("\nText:")[-1].strip()
        rng = random.Random(name)
        choices = [item["label"], *rng.sample([x for x in labels if x != item["label"]], CHOICES - 1)]
        rng.shuffle(choices)
        yield {
            "id": f"{folder.name}-{name[:12]}",
            "prompt": f"Text: {cut(tokenizer, body)}\nTopic:",
            "answer": f" {item['label']}",
            "choices": [f" {choice}" for choice in choices],
            "right": choices.index(item["label"]),
        }


def different(tokenizer: Any, data: Path, part: str) -> list[Row]:
    """The texts of all sets, each once."""
    found = {row["id"]: row for name in SETS for row in rows(tokenizer, data / name, part)}
    return list(found.values())


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)}")


def main() -> None:
    """Read, split, write."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="O-LoRA's CL_Benchmark")
    parser.add_argument("--base", type=Path, default=ROOT / "recipes" / "icd10" / "models" / "base")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "topics" / "data")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    train, test = (different(tokenizer, args.data / "TC", part) for part in ("train", "test"))
    test.sort(key=lambda row: key(row["id"]))
    asked = ("id", "prompt", "answer")
    questions, choices = test[:ITEMS], test[ITEMS : 2 * ITEMS]
    tested = {row["prompt"] for row in (*questions, *choices)}
    write(args.out / "topics.jsonl", ({k: row[k] for k in asked} for row in questions))
    write(
        args.out / "topics_choice.jsonl",
        (
            {"id": r["id"], "prompt": r["prompt"], "choices": r["choices"], "answer": r["right"]}
            for r in choices
        ),
    )
    write(
        args.out / "train.jsonl",
        ({k: row[k] for k in asked} for row in train if row["prompt"] not in tested),
    )


if __name__ == "__main__":
    main()
