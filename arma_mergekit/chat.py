"""A conversation with several models at once: the same prompts, each with the history of its own answers.

It knows what can be named on the command line, models, tokenizers and texts; nothing of terminals.

    source     voices
    recipe     base, finetuned, merged (its alphas), and the models it compares with
    run        the same of its tuned.yml; one-knob and picks of the front by the names of their recipes
    model      base and finetuned of base+adapter; base, finetuned and siamese of a siamese directory; any other is
               alone, as `model`

Voices of one pair of models share what they can: base and fine-tuned weights stay mapped files, and a merge has
memory of its own only for tensors that are neither (on a GPU, each has its own). The three of a siamese directory are
one model.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arma_mergekit.checkpoint import open_model
from arma_mergekit.decode import Decoder, stops
from arma_mergekit.errors import CheckpointError, RecipeError, RunError, UsageError, unknown
from arma_mergekit.load import load_live, load_tokenizer, max_positions, open_tokenizer
from arma_mergekit.models import Named, open_named
from arma_mergekit.plan import plan
from arma_mergekit.recipe import Recipe

__all__ = ["Answer", "Cast", "Settings", "Voice", "open_cast"]

HALF = "\ufffd"  # what a tokenizer says for bytes that are no whole character yet
SIDES = {"base": "base", "finetuned": "tuned", "siamese": None}  # voice to side; None: both, mixed
NO_ALPHA = "give it alphas, or find them with `arma-tune` and name its run"


@dataclass(frozen=True)
class Settings:
    """How to answer. ``temperature`` 0: greedily; ``raw``: without a chat template."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    raw: bool = False


class Answer:
    """An answer that grows by a token a step.

    ``text`` so far; ``stopped``: None while it grows, then "end" (the model ended it), "length" or "interrupted".
    """

    def __init__(self, voice: Voice, ids: Sequence[int], settings: Settings) -> None:
        self.text, self.tokens, self.seconds = "", 0, 0.0
        self.stopped: str | None = None
        self._voice, self._stops = voice, stops(voice.model, voice.tokenizer)
        self._decoder = Decoder(voice.model, ids, settings.temperature, settings.seed)
        room = max_positions(voice.model.config)
        self._length = settings.max_tokens if room is None else min(settings.max_tokens, room - len(ids))

    def step(self) -> None:
        """One token more."""
        started = time.perf_counter()
        token = self._decoder.step()
        self.seconds += time.perf_counter() - started
        if token in self._stops:
            self.stopped = "end"
        else:
            self.tokens += 1
            self.stopped = "length" if self.tokens == self._length else None
        said = self._decoder.said[: self.tokens]
        text = self._voice.tokenizer.decode(said, skip_special_tokens=True)
        if self.stopped or not text.endswith(HALF):
            self.text = text

    @property
    def tokens_per_second(self) -> float:
        """Of this voice alone, reading the prompt included."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Side:
    """Base or fine-tuned side of a siamese model, called as the causal LM that it is."""

    def __init__(self, siamese: Any, side: str) -> None:
        self._siamese, self._side = siamese, side
        self.config, self.generation_config = siamese.config, siamese.generation_config

    def __call__(self, **inputs: Any) -> Any:
        """Forward pass of this side alone."""
        with self._siamese.only(self._side) as model:
            return model(**inputs)

    def parameters(self) -> Iterator[Any]:
        """Those of the siamese model."""
        yield from self._siamese.parameters()


@dataclass
class Voice:
    """A model that answers, and what was said: (prompt, answer) by turn."""

    name: str
    model: Any
    tokenizer: Any
    turns: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, prompt: str, settings: Settings) -> Answer:
        """Begin to answer; UsageError if the conversation is longer than the model takes."""
        ids = self._ids(prompt, settings.raw)
        longest = max_positions(self.model.config)
        if not ids:
            raise UsageError("The prompt is empty.")
        if longest is not None and len(ids) >= longest:
            raise UsageError(
                f"The conversation with {self.name} has {len(ids)} tokens, and the model takes {longest}; shorten the "
                "prompt, or begin anew with /reset."
            )
        return Answer(self, ids, settings)

    def remember(self, prompt: str, answer: Answer) -> None:
        """Make it part of the history, whole or not."""
        self.turns.append((prompt, answer.text))

    def _ids(self, prompt: str, raw: bool) -> list[int]:
        if raw or not self.tokenizer.chat_template:
            before = (f"{asked}{said}\n" for asked, said in self.turns)
            return list(self.tokenizer("".join([*before, prompt]))["input_ids"])
        roles = [("user", text) for text, _ in self.turns], [("assistant", text) for _, text in self.turns]
        said = [turn for pair in zip(*roles, strict=True) for turn in pair]
        messages = [{"role": role, "content": text} for role, text in [*said, ("user", prompt)]]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Cast:
    """Voices that a source offers; nothing is loaded.

    ``recipe``: of the pair of models; ``alphas``: name to the alphas of a voice of that pair, one for all tensors or by
    tensor; ``others``: name to any other model; ``siamese``: one whose sides speak too, by `SIDES`; ``missing``: why
    the pair has no merge.
    """

    recipe: Recipe | None = None
    alphas: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    others: Mapping[str, Named] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    siamese: Named | None = None
    missing: str = ""

    @property
    def usual(self) -> tuple[str, ...]:
        """Those that speak unless others are asked for."""
        return tuple(name for name in self.known if name not in self.extra)

    @property
    def known(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.alphas, *(SIDES if self.siamese else ()), *self.others)

    def load(self, wanted: Sequence[str]) -> list[Voice]:
        """These voices, in this order; UsageError for an unknown name."""
        for name in wanted:
            if name == "merged" and self.missing:
                raise RecipeError(self.missing)
            if name not in self.known:
                told = unknown("voice", name, self.known)
                raise UsageError(f"--compare: {told} Any other model as NAME=MODEL.")
        pair, sides = ([name for name in wanted if name in names] for names in (self.alphas, SIDES))
        found = {voice.name: voice for voice in (*self._pair(pair), *self._sides(sides))}
        for name in wanted:
            if name in self.others:
                found[name] = Voice(name, self.others[name].load(), self.others[name].tokenizer())
        return [found[name] for name in wanted]

    def _pair(self, wanted: Sequence[str]) -> Iterator[Voice]:
        """Voices of the pair of models."""
        if not wanted or self.recipe is None:
            return
        tokenizer, loaded = pair_tokenizer(self.recipe), load_live(self.recipe)
        live = loaded.live
        merges = [name for name in wanted if isinstance(self.alphas[name], Mapping)]
        for name in wanted:
            given = self.alphas[name]
            alphas = [given[t] if isinstance(given, Mapping) else given for t in loaded.tensors]
            if name in merges[-1:]:  # the live model's own memory is there anyway
                live.set(alphas)
            yield Voice(name, live.model if name in merges[-1:] else live.at(alphas), tokenizer)

    def _sides(self, wanted: Sequence[str]) -> Iterator[Voice]:
        """Voices of the siamese model."""
        if not wanted or self.siamese is None:
            return
        tokenizer, model = self.siamese.tokenizer(), self.siamese.load()
        for name in wanted:
            side = SIDES[name]
            yield Voice(name, model if side is None else Side(model, side), tokenizer)


def pair_tokenizer(recipe: Recipe) -> Any:
    """The base's tokenizer; if only the fine-tuned model has a chat template, with that."""
    tokenizer = load_tokenizer(recipe)
    if not tokenizer.chat_template:
        with contextlib.suppress(
            CheckpointError
        ):  # a fine-tuned model without a tokenizer has no template either
            tuned = open_tokenizer(open_model(recipe.finetuned[0].model).path)
            tokenizer.chat_template = tuned.chat_template
    return tokenizer


def open_cast(source: str, others: Mapping[str, str]) -> Cast:
    """What a source offers, and ``others`` by name; InputError or RunError for what cannot be used."""
    path, named = Path(source), {name: open_named(ref) for name, ref in others.items()}
    if path.suffix in (".yml", ".yaml"):
        return _of_recipe(Recipe.load(path), named)
    if (path / "tuned.yml").is_file():
        return _of_run(path, named)
    alone = open_named(source)
    if alone.kind == "siamese":
        return Cast(others=named, siamese=alone)
    if alone.kind == "adapter":
        models = {"base_model": source.partition("+")[0], "models": [{"model": source}]}
        return Cast(
            Recipe.parse({"merge_method": "arma", **models}, Path("chat")),
            {"base": 0.0, "finetuned": 1.0},
            named,
        )
    return Cast(others={"model": alone, **named})


def _of_recipe(recipe: Recipe, others: Mapping[str, Named]) -> Cast:
    """Base, fine-tuned and the merge that the recipe describes, if it does."""
    compared = {name: open_named(ref) for name, ref in recipe.tune.compare.items()}
    ends: dict[str, float | Mapping[str, float]] = {"base": 0.0, "finetuned": 1.0}
    without = plan(recipe, require_alpha=False).check()
    if plan(recipe).errors:
        return Cast(
            recipe, ends, {**compared, **others}, missing=f"{recipe.path} gives no alpha: {NO_ALPHA}."
        )
    merged = {tensor.name: tensor.alphas[0] for tensor in without.tensors}
    return Cast(recipe, {**ends, "merged": merged}, {**compared, **others})


def _of_run(run: Path, others: Mapping[str, Named]) -> Cast:
    """What a tuning run found: its best, and whatever else it wrote a recipe of."""
    cast = _of_recipe(Recipe.load(run / "tuned.yml"), {**_compared(run), **others})
    files = {"one-knob": run / "one-knob.yml"}
    files |= {file.stem.removeprefix("tuned-"): file for file in sorted(run.glob("tuned-*.yml"))}
    more = {
        name: _of_recipe(Recipe.load(file), {}).alphas["merged"]
        for name, file in files.items()
        if file.is_file()
    }
    return Cast(cast.recipe, {**cast.alphas, **more}, cast.others, tuple(more))


def _compared(run: Path) -> dict[str, Named]:
    """The models that a finished run was compared with."""
    file = run / "summary.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("compared", []) if file.is_file() else []
        return {entry["name"]: open_named(entry["model"]) for entry in found}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged ({error}); start its `arma-tune` command again.") from error
