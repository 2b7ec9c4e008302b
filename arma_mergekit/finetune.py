"""Fine-tune a base on a file of examples, whole or through an adapter, so that it can be merged afterwards.

    data                                         trained on                            weight 0
    {"prompt": "...", "answer": "..."}           the answer, and the end of text       the prompt
    {"messages": [{"role", "content"}, ...]}     what the assistant says               everything else
    {"text": "..."}                              all of it, and the end of text

    loss = mean over the trained-on tokens of a batch of -log p(token | what came before)

transformers' Trainer trains: AdamW, cosine decay after a warm-up of a tenth, gradient norm at most 1. What is here is
what it leaves open: masking, what is refused, one record of the run (`finetune.json`), resuming. Longer examples are
cut, and left out if nothing to learn is left; both are counted. It knows checkpoints, data files and PEFT; no recipes.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arma_mergekit import __version__
from arma_mergekit.checkpoint import AdaptedCheckpoint, Checkpoint, ModelReference, open_model
from arma_mergekit.checkpoint.header import read_json
from arma_mergekit.checkpoint.locate import locate
from arma_mergekit.checkpoint.lowrank import CONFIG
from arma_mergekit.digest import sha256_of
from arma_mergekit.errors import CheckpointError, DataError, RunError, unknown
from arma_mergekit.evals.rows import continuation
from arma_mergekit.evals.sources import Record, read_records
from arma_mergekit.load import LOCAL, adapted, as_dtype, build_model, max_positions, readable
from arma_mergekit.whole import write_whole

if TYPE_CHECKING:
    import torch

__all__ = ["METHODS", "RECORD", "Example", "Settings", "batch", "encode", "finetune", "load_adapted"]

RECORD = "finetune.json"
CHECKPOINTS = "checkpoints"  # removed at the end
IGNORED = -100  # what cross-entropy leaves out
FORMS = (("prompt", "answer"), ("messages",), ("text",))
Notify = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Method:
    """Defaults of one way to fine-tune; ``peft_type`` as adapters spell it, None for all weights."""

    peft_type: str | None
    lr: float
    rank: int | None = None
    alpha: float | None = None


METHODS = {
    "curlora": Method("CURLORA", 2.5e-4, 16, 1.0),  # the paper's
    "lora": Method("LORA", 2e-4, 16, 32.0),
    "full": Method(None, 2e-5),
}


@dataclass(frozen=True)
class Settings:
    """What is trained how; ``None`` is the method's default. ``targets``: names of modules, empty for the method's.

    ``steps`` > 0 takes the place of ``epochs``; ``batch`` examples of at most ``length`` tokens make a step.
    """

    base: str
    data: Path
    method: str
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    lr: float | None = None
    epochs: float = 1.0
    steps: int = 0
    batch: int = 8
    length: int = 512
    seed: int = 0
    save_every: int = 200

    def complete(self) -> Settings:
        """Every default written out; RunError for a method nobody knows, or an adapter's option with ``full``."""
        if self.method not in METHODS:
            raise RunError(unknown("method", self.method, METHODS))
        default = METHODS[self.method]
        if default.peft_type is None and (self.rank or self.alpha or self.targets):
            raise RunError("Method full trains every weight: rank, alpha and targets are an adapter's.")
        for name in ("lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RunError(f"{name} must be a positive number, but got {value}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha):
            raise RunError(f"alpha must be a finite number other than 0, but got {self.alpha}.")
        filled = {
            name: getattr(self, name) if getattr(self, name) is not None else getattr(default, name)
            for name in ("rank", "alpha", "lr")
        }
        return Settings(**{**asdict(self), **filled, "targets": tuple(sorted(self.targets))})


@dataclass(frozen=True)
class Example:
    """Tokens (n,), and whether each is trained on (n,); ``cut``: it was longer."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    cut: bool = False

    @property
    def loss_tokens(self) -> int:
        """How many tokens are predicted: never the first."""
        return sum(self.trained[1:])


def finetune(settings: Settings, out: Path, notify: Notify = lambda _: None) -> dict[str, Any]:
    """Train into the directory ``out``, from where it stopped if it has begun; returns its `finetune.json`.

    ``out`` gets the adapter, or the whole model in the base's dtype. RunError if it holds a run of other settings,
    CheckpointError or DataError for what cannot be used.
    """
    settings = settings.complete()
    base = open_model(settings.base)
    record = _record(settings, base)
    before = _earlier(out, record)
    if before is not None and before["result"] is not None:
        return before
    model, tokenizer = _model(settings, base), _tokenizer(base.path)
    positions = max_positions(model.config)
    length = min(settings.length, positions) if positions else settings.length
    examples = [encode(tokenizer, r, length) for r in _records(settings.data)]
    usable = [example for example in examples if example.loss_tokens]
    if not usable:
        raise DataError(f"{settings.data} has nothing to learn within {length} tokens; raise the length.")
    out.mkdir(parents=True, exist_ok=True)
    _write(out, record)
    facts = {**_counts(model), **_sizes(examples, usable)}
    notify(facts)
    record["result"] = {**facts, **_train(settings, model, usable, out, notify)}
    _save(model, tokenizer, base, settings, out)
    _write(out, record)
    return record


def encode(tokenizer: Any, record: Record, length: int) -> Example:
    """The first ``length`` tokens of a record, and which are trained on; DataError if it has no known form."""
    form = next((form for form in FORMS if all(key in record.fields for key in form)), None)
    if form is None:
        raise record.error("needs prompt and answer, messages, or text")
    if form == ("messages",):
        tokens, trained = _chat(tokenizer, record)
    else:
        tokens, trained = _plain(tokenizer, record, form)
    return Example(tuple(tokens[:length]), tuple(trained[:length]), len(tokens) > length)


def _plain(tokenizer: Any, record: Record, form: Sequence[str]) -> tuple[list[int], list[bool]]:
    """Prompt and answer as the suites tokenise them, or text; then the end of text."""
    if form == ("text",):
        tokens, start = tokenizer(record.text("text"))["input_ids"], 0
    else:
        row = continuation(tokenizer, record.text("prompt"), record.text("answer"), record.where)
        tokens, start = list(row.tokens), row.start
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens = [*tokens, tokenizer.eos_token_id]
    return tokens, [k >= start for k in range(len(tokens))]


def _chat(tokenizer: Any, record: Record) -> tuple[list[int], list[bool]]:
    """A conversation through the model's own template; only what follows the assistant's header is trained on."""
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise record.error("messages must be a list of objects with role and content")
    if not getattr(tokenizer, "chat_template", None):
        raise record.error(
            "the base's tokenizer has no chat template; give prompt and answer instead of messages"
        )
    whole, spans = _rendered(tokenizer, record, messages), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header = _rendered(tokenizer, record, messages[:i], True)
        turn = _rendered(tokenizer, record, messages[: i + 1])
        if not (whole.startswith(turn) and turn.startswith(header)):
            raise record.error("the chat template rewrites earlier turns, so they cannot be told apart")
        spans.append((len(header), len(turn)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    trained = [
        any(first < end and start < last for first, last in spans) for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], trained


def _rendered(tokenizer: Any, record: Record, messages: Sequence[Any], answer: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise record.error(f"the chat template does not take these messages ({error})") from error
    return text


def batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (batch, longest), padded on the right."""
    import torch

    longest = max(len(example.tokens) for example in examples)
    shape = (len(examples), longest)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        tokens = torch.tensor(example.tokens)
        ids[row, :n], mask[row, :n] = tokens, 1
        labels[row, :n] = torch.where(torch.tensor(example.trained), tokens, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _records(path: Path) -> list[Record]:
    if not path.is_file():
        raise DataError(f"No data file {path}; paths start at the current directory.")
    return read_records(path, ())


def _model(settings: Settings, base: Checkpoint) -> Any:
    """What is trained: an adapter in the base's dtype, or the whole model in float32."""
    import torch

    torch.manual_seed(settings.seed)
    method = METHODS[settings.method]
    model = build_model(base.path, torch.float32 if method.peft_type is None else as_dtype(None, base))
    if method.peft_type is None:
        if isinstance(base, AdaptedCheckpoint):
            raise CheckpointError(
                f"{base.ref} has an adapter, which method full cannot go on training; merge it."
            )
        return model
    if isinstance(base, AdaptedCheckpoint):
        return _continued(settings.method, base, model)
    return adapted(model, _peft_config(settings), settings.base)


def _peft_config(settings: Settings) -> Any:
    targets = list(settings.targets) or None
    if settings.method == "curlora":
        from arma_mergekit.continual.curlora import CURLoRAConfig

        assert settings.rank is not None
        assert settings.alpha is not None
        return CURLoRAConfig(
            r=settings.rank, curlora_alpha=settings.alpha, target_modules=targets, seed=settings.seed,
            task_type="CAUSAL_LM",
        )  # fmt: skip
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=targets or "all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip


def load_adapted(reference: str, method: str) -> Any:
    """The `PeftModel` of BASE+ADAPTER, whose adapter is of that method; CheckpointError otherwise."""
    base = open_model(reference)
    if not isinstance(base, AdaptedCheckpoint):
        raise CheckpointError(f"{reference} has no adapter; name it as BASE+ADAPTER.")
    return _continued(method, base, build_model(base.path, as_dtype(None, base)))


def _continued(method: str, base: AdaptedCheckpoint, model: Any) -> Any:
    """The model with the adapter of ``base``, to be trained further: the same U over a sequence of tasks."""
    from peft import PeftModel

    import arma_mergekit.continual.curlora  # noqa: F401 - PEFT knows its adapters only then

    reference = ModelReference.parse(base.ref)
    assert reference.adapter is not None
    path = locate(reference.adapter, reference.adapter_revision)
    kind = read_json(path / CONFIG).get("peft_type")
    if kind != METHODS[method].peft_type:
        raise CheckpointError(f"{path} is a {kind} adapter, but this needs one of method {method}.")
    with readable(f"The adapter {path}", "train it again"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(model, str(path), is_trainable=True)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    with readable(
        f"The tokenizer of {path}", "copy the tokenizer's files from the model it was trained from"
    ):
        return AutoTokenizer.from_pretrained(str(path), **LOCAL)


def _train(
    settings: Settings, model: Any, examples: Sequence[Example], out: Path, notify: Notify
) -> dict[str, Any]:
    """Loss at the start and the end, steps and seconds of this process."""
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    place = out / CHECKPOINTS
    per_epoch = -(-len(examples) // settings.batch)
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    model.config.use_cache = False
    arguments = TrainingArguments(
        str(place), per_device_train_batch_size=settings.batch, max_steps=steps, learning_rate=settings.lr,
        lr_scheduler_type="cosine", warmup_steps=-(-steps // 10), weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=max(1, steps // 50), logging_first_step=True, save_steps=settings.save_every,
        save_total_limit=2, seed=settings.seed, data_seed=settings.seed, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, label_names=["labels"], logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=batch, train_dataset=list(examples))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress(notify))
    last = get_last_checkpoint(str(place)) if place.is_dir() else None
    started, done = time.monotonic(), int(last.rpartition("-")[2]) if last else 0
    trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        raise RunError(
            f"The loss became {losses[-1]} in {out}; take a lower learning rate and another directory."
        )
    return {
        "steps": trainer.state.global_step, "resumed_at": done, "seconds": seconds,
        "seconds_per_step": seconds / max(1, trainer.state.global_step - done),
        "loss_first": losses[0], "loss_last": losses[-1],
    }  # fmt: skip


def _progress(notify: Notify) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        """Tells what the Trainer logs."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                notify({"step": state.global_step, "of": state.max_steps, "loss": logs["loss"]})

    return Progress()


def _save(model: Any, tokenizer: Any, base: Checkpoint, settings: Settings, out: Path) -> None:
    """Adapter, or whole model with its tokenizer, in ``out``; the checkpoints on the way are removed."""
    import shutil

    model.config.use_cache = True
    if METHODS[settings.method].peft_type is None:
        model.to(as_dtype(None, base)).save_pretrained(out)
        tokenizer.save_pretrained(out)
    else:
        model.save_pretrained(out)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's card of blanks
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _counts(model: Any) -> dict[str, int]:
    everything = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in everything),
        "trainable": sum(p.numel() for p in everything if p.requires_grad),
    }


def _sizes(examples: Sequence[Example], usable: Sequence[Example]) -> dict[str, int]:
    return {
        "examples": len(usable),
        "left_out": len(examples) - len(usable),
        "cut": sum(example.cut for example in usable),
        "tokens": sum(len(example.tokens) for example in usable),
        "loss_tokens": sum(example.loss_tokens for example in usable),
    }


def _record(settings: Settings, base: Checkpoint) -> dict[str, Any]:
    """What `finetune.json` starts as: enough to tell whether a run may be resumed."""
    if not settings.data.is_file():
        raise DataError(f"No data file {settings.data}; paths start at the current directory.")
    return {
        "format": 1,
        "arma_mergekit": __version__,
        "settings": {**asdict(settings), "data": str(settings.data), "targets": list(settings.targets)},
        "data_sha256": sha256_of(settings.data),
        "base_tensors": len(base.tensors),
        "result": None,
    }


def _earlier(out: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the run in ``out``, if it is this one; RunError if it is another's."""
    if not (out / RECORD).is_file():
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty and holds no run of finetune; name another directory.")
        return None
    earlier = read_json(out / RECORD)
    flat = [{"data_sha256": r["data_sha256"], **r["settings"]} for r in (earlier, record)]
    for key, value in flat[1].items():
        if flat[0].get(key) != value:
            raise RunError(
                f"{out} holds a run with {key} {flat[0].get(key)!r}, not {value!r}; name another directory."
            )
    return earlier


def _write(out: Path, record: Mapping[str, Any]) -> None:
    write_whole({out / RECORD: json.dumps(record, indent=2) + "\n"})
