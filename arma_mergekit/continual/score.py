"""The score of a task's test records: share of right choices, or of exact answers. It knows models and token rows.

    with choices    log p(choice and the end of text | prompt) is highest for the right one
    else            greedy decoding yields the answer

The first is no mean over tokens, as suites have it for models that never saw such choices: a model that was trained to
give one of them spreads its probability over them, and of a long label all tokens but the first are nearly certain, so
that a mean prefers long labels. Causal models are scored by the tasks of evals, encoder-decoder models by the same two
rules over the decoder's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arma_mergekit.continual.data import Task, items
from arma_mergekit.evals.base import Measured
from arma_mergekit.evals.tasks import ChoiceTask, GenerateTask

__all__ = ["score"]


class LabelTask(ChoiceTask):
    """The likeliest choice; rows go to the end of text, so that no choice is the beginning of another."""

    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """Cross-entropy of the right choice, and whether it was the first."""
        import torch

        each, answer = torch.stack([-row.sum() for row in rows]), self.items[index].answer
        return -each.log_softmax(0)[answer], float(each.argmax() == answer)


def score(model: Any, tokenizer: Any, task: Task, max_length: int, encoder_decoder: bool) -> dict[str, float]:
    """{"score", "stderr"} of a task."""
    was_training = model.training
    model.eval()
    if encoder_decoder:
        values = np.array([_right(model, tokenizer, record, max_length) for record in task.test], np.float64)
        ids = tuple(map(str, range(len(values))))
        found = Measured(ids, values, values, np.ones(len(values)), 0)
    else:
        found = _rows_task(tokenizer, task, max_length).measure(_whole(model), range(len(task.test)))
    model.train(was_training)
    return {"score": found.score, "stderr": found.stderr if len(task.test) > 1 else 0.0}


def _rows_task(tokenizer: Any, task: Task, max_length: int) -> LabelTask | GenerateTask:
    made = items(tokenizer, task, max_length)
    if task.test[0]["choices"]:
        return LabelTask(task.name, made)
    return GenerateTask(task.name, made, [len(item.rows[0].targets) for item in made])


def _whole(model: Any) -> Any:
    """The transformers model inside an adapter, its layers still adapted."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _right(model: Any, tokenizer: Any, record: Any, max_length: int) -> bool:
    """Whether an encoder-decoder model gives the right answer."""
    import torch

    answers = record["choices"] or [record["answer"]]
    targets = [tokenizer(answer)["input_ids"] for answer in answers]
    ids = torch.tensor([tokenizer(record["prompt"])["input_ids"][-max_length:]], device=model.device)
    with torch.no_grad():
        encoded = _whole(model).get_encoder()(input_ids=ids)
        each = []
        for tokens in targets:
            labels = torch.tensor([tokens], device=model.device)
            logits = model(encoder_outputs=encoded, labels=labels).logits[0].float()
            each.append(
                (
                    -torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum"),
                    bool((logits.argmax(-1) == labels[0]).all()),
                )
            )
    if record["choices"]:
        best = max(range(len(each)), key=lambda k: float(each[k][0]))
        return bool(answers[best] == record["answer"])
    return each[0][1]
