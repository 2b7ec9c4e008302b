"""What a fine-tuned model has beside its weights and the result, which has the base's, will not have: a sentence each.

Told is what the fine-tuned model states and the base states otherwise or not at all, if it changes what users get: the
tokenizer, its chat template and special tokens, the settings of generation; not what saving again does to the files.
It knows the small files of two models; no recipes or weights.
"""

from __future__ import annotations

import contextlib
import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arma_mergekit.checkpoint import Checkpoint
from arma_mergekit.checkpoint.adapter import shortened
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import contained, readable
from arma_mergekit.errors import CheckpointError
from arma_mergekit.plan.compare import setting

__all__ = ["unlike_base"]

TOKENIZERS = (
    "tokenizer.json", "tekken.json", "added_tokens.json", "vocab*", "merges*.txt", "*.model", "*.tiktoken", "*.spm",
    "*.codes",
)  # fmt: skip
SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
MAP = "special_tokens_map.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # config.json's count where GENERATION has none
OPTIONAL = (
    *TOKENS[2:],
    "pad_token_id",
)  # told only where both have one: training adds what answers do not need
NO_MATTER = ("transformers_version", "use_cache")
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "num_beams": 1}
MERGEKIT = "in the recipe (mergekit's executor)"


def unlike_base(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    """The sentences, each with how to take the fine-tuned model's."""
    with readable(f"what is beside the weights of {base.ref} and {tuned.ref}"):
        yield from _of_tokenizer(
            base.ref, base.path, tuned.ref, _home(tuned, (*TOKENIZERS, SETTINGS, TEMPLATE))
        )
        theirs = _generation(_home(tuned, (GENERATION,)), tuned.config)
        if unlike := _unlike(_generation(base.path, base.config), theirs):
            yield (
                f"{tuned.ref} generates with other settings than {base.ref} ({unlike}); the result has the base's: to "
                f"take the others, write them into its {GENERATION}."
            )


def _home(model: Checkpoint, patterns: tuple[str, ...]) -> Path:
    """The directory whose files of these names count: an adapter's if it has any, else the model's."""
    model_first = list(model.directories.values())
    return next((home for home in reversed(model_first) if _files(home, patterns)), model_first[0])


def _files(home: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({file.name for pattern in patterns for file in home.glob(pattern) if file.is_file()})


def _of_tokenizer(base: str, ours: Path, tuned: str, theirs: Path) -> Iterator[str]:
    left, right = (_files(home, TOKENIZERS) for home in (ours, theirs))
    if right and not left:
        names = ", ".join([*right, *_files(theirs, (SETTINGS, MAP, TEMPLATE))])
        yield f"Only {tuned} has a tokenizer; the result has none, as the base: copy {names} into it."
        return
    for name in left:
        if name in right and not filecmp.cmp(ours / name, theirs / name, shallow=False):
            yield (
                f"{name} differs between {base} and {tuned}; the result has the base's: copy the other into it, or set "
                f"`tokenizer:` {MERGEKIT}."
            )
    if unlike := _unlike(_tokens(ours), _tokens(theirs)):
        yield (
            f"{tuned} has other special tokens than {base} ({unlike}); the result has the base's: copy the other "
            f"{SETTINGS} into it, or set `tokenizer:` {MERGEKIT}."
        )
    templates, others = _templates(ours), _templates(theirs)
    if any(templates.get(name) != text for name, text in others.items()):
        what = f"The chat template of {tuned} is not that of {base}; the result has the base's"
        alone = f"Only {tuned} has a chat template; the result has none, as the base"
        yield (
            f"{what if templates else alone}: write the other into its {TEMPLATE}, or set `chat_template:` {MERGEKIT}."
        )


def _templates(home: Path) -> dict[str, str]:
    """Chat templates by name, wherever they are kept; those of files of their own count most."""
    said = [_json(home, name).get("chat_template") for name in ("chat_template.json", SETTINGS)]
    found: dict[str, str] = {}
    for entry in said:
        named = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
        texts = [e for e in named if isinstance(e, dict) and isinstance(e.get("template"), str)]
        found.update((str(e.get("name")), e["template"]) for e in texts)
    files = {"default": home / TEMPLATE} | {f.stem: f for f in sorted((home / TEMPLATES).glob("*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            found[name] = file.read_text(encoding="utf-8", errors="replace")
    return {name: text.rstrip("\n") for name, text in found.items()}  # jinja ignores the last one


def _tokens(home: Path) -> dict[str, Any]:
    """Special tokens as text."""
    found = _said(_json(home, MAP)) | _said(_json(home, SETTINGS))
    return {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items() if k in TOKENS}


def _generation(home: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found = _said({key: setting(config, key) for key in IDS}) | _said(_json(home, GENERATION))
    return {key: value for key, value in found.items() if key not in NO_MATTER and not key.startswith("_")}


def _said(content: Mapping[str, Any]) -> dict[str, Any]:
    """Without null and false, which are as good as absent, and with one of a list of one as itself."""
    one = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in content.items()}
    return {key: value for key, value in one.items() if value is not None and value is not False}


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Keys whose values differ, with both values; "" if none."""
    return ", ".join(
        f"{key} {shortened(theirs[key])} for {shortened(ours.get(key))}"
        for key in theirs
        if theirs[key] != ours.get(key, DEFAULTS.get(key)) and (key in ours or key not in OPTIONAL)
    )


def _json(home: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model; {} if there is none that can be read, which is for its own readers to find."""
    if (home / name).is_file():
        with contextlib.suppress(CheckpointError):
            return read_json(contained(home, name))
    return {}
