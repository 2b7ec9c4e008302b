"""The ICD-10-CM codes the domain suites and the training text are made of (package simple-icd-10-cm)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHAPTERS = "EFIJK"  # endocrine, mental, circulatory, respiratory, digestive


def key(text: str) -> str:
    """A hash to order things by: random-looking, the same on every machine."""
    return hashlib.sha256(f"arma-mergekit {text}".encode()).hexdigest()


def leaves() -> dict[str, str]:
    """Every billable code of the chapters with its full description, in random-looking order."""
    import simple_icd_10_cm as cm

    codes = [code for code in cm.get_all_codes(with_dots=True) if code[0] in CHAPTERS and cm.is_leaf(code)]
    return {code: cm.get_description(code) for code in sorted(codes, key=key)}


def prompt(description: str) -> str:
    """The question, in training and in the suites."""
    return f"Diagnosis: {description}\nICD-10-CM:"


def held_out() -> set[str]:
    """The codes of the committed domain suites: never trained on."""
    codes = set()
    for name in ("icd10.jsonl", "icd10_choice.jsonl"):
        for line in (HERE / "data" / name).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            codes.add((item["choices"][item["answer"]] if "choices" in item else item["answer"]).strip())
    return codes
