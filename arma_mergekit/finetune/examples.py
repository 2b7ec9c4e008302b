"""From records to examples: which tokens are trained on, and batches of them.

    data                                         trained on                            weight 0
    {"prompt": "...", "answer": "..."}           the answer, and the end of text       the prompt
    {"messages": [{"role", "content"}, ...]}     what the assistant says               everything else
    {"text": "..."}                              all of it, and the end of text

Longer examples are cut. It knows records and tokenizers; no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arma_mergekit.evals.rows import continuation
from arma_mergekit.evals.sources import Record

if TYPE_CHECKING:
    import torch

__all__ = ["Example", "batch", "encode"]

IGNORED = -100  # what cross-entropy leaves out
FORMS = (("prompt", "answer"), ("messages",), ("text",))


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
