"""From lm-eval's task objects to tasks.

It knows lm-eval's requests and how its HFLM encodes them; no recipes, searchers or objectives.

    output type            scored by                 loss of a document
    multiple_choice        token rows                -log softmax(s)[right choice]; s: what the metric compares, below
    loglikelihood          token rows                -log-likelihood of the continuation
    loglikelihood_rolling  token rows                -log-likelihood of the text, weighted as its metric is
    anything else          HFLM, which generates     minus the metric

The rows hold the tokens that HFLM would score, so these tasks have gradients and share our batches; the headline is
what the task's own `process_results` makes of their log-likelihoods ll. A choice's s is ll for `acc`,
ll / length x mean length for `acc_norm` (characters) and `acc_bytes`, ll - ll(no question) for `acc_mutual_info`.

Prompts with their few-shot examples are built once, for all candidates alike. lm-eval's cache is not keyed by model and
never used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arma_mergekit.errors import DataError
from arma_mergekit.evals.base import Task
from arma_mergekit.evals.lm_eval.load import explained, load, quiet
from arma_mergekit.evals.lm_eval.metric import Metric
from arma_mergekit.evals.outside import OutsideTask
from arma_mergekit.evals.rows import UNLIMITED, Item, Limits, Row, RowTask
from arma_mergekit.evals.tasks import GenerateTask

if TYPE_CHECKING:
    from arma_mergekit.recipe import TaskSpec

__all__ = ["LikelihoodTask", "RequestTask", "make_tasks"]

FEWSHOT_SEED = 1234  # of lm-eval's command line
GENERATE_BATCH = 8  # a batch's padding moves scores, so it is fixed
LENGTHS: Mapping[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}


def make_tasks(
    spec: TaskSpec, tokenizer: Any, include_path: Path | None = None, limits: Limits = UNLIMITED
) -> list[Task]:
    """One task for each of lm-eval's that the spec stands for; they share its weight.

    DataError for what is not there, cannot be scored by document, or would run code of a model.
    """
    loaded = load(spec.tasks, include_path)
    strangers = sorted(set(spec.samples or ()) - set(loaded))
    if strangers:
        raise DataError(f"`samples` names {strangers[0]}, but the lm-eval tasks are {', '.join(loaded)}.")
    lm = _without_model(tokenizer, limits.positions)
    return [
        _make(name, theirs, spec, lm, limits, spec.weight / len(loaded)) for name, theirs in loaded.items()
    ]


def _make(name: str, theirs: Any, spec: TaskSpec, lm: Any, limits: Limits, weight: float) -> Task:
    if getattr(theirs, "MULTIMODAL", False):
        raise DataError(f"lm-eval task {name} needs images or sounds, and only text is scored; leave it out.")
    metric = Metric(name, theirs, spec.metric)
    with quiet(), explained(f"lm-eval task {name}"):
        _configure(name, theirs, spec)
        documents = _documents(name, theirs, spec, lm)
    likelihood = theirs.OUTPUT_TYPE == "multiple_choice" or (
        theirs.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling")
        and all(len(requests) == 1 for requests in documents.values())
    )
    if likelihood:
        return LikelihoodTask(f"lm_eval:{name}", metric, documents, lm, limits, weight)
    _check_room(name, lm, documents)
    return RequestTask(f"lm_eval:{name}", metric, documents, lm.tokenizer, weight)


def _check_room(name: str, lm: Any, documents: Mapping[str, Sequence[Any]]) -> None:
    """DataError where prompts and what is to be generated cannot both fit in the model."""
    from lm_eval.models.utils import normalize_gen_kwargs

    asked = [r for requests in documents.values() for r in requests if r.request_type == "generate_until"]
    room = [lm.max_length - normalize_gen_kwargs(r.args[1], lm.max_gen_toks)["max_gen_toks"] for r in asked]
    if asked and all(len(lm.tok_encode(r.args[0])) > left for r, left in zip(asked, room, strict=True)):
        raise DataError(
            f"lm-eval task {name}: no prompt leaves room for what is generated in the {lm.max_length} tokens that the "
            "model takes; use fewer few-shot examples, or gen_kwargs: {max_gen_toks: …}."
        )


def _configure(name: str, theirs: Any, spec: TaskSpec) -> None:
    """Options, as lm-eval's command line applies them."""
    if spec.gen_kwargs is not None and theirs.OUTPUT_TYPE == "generate_until":
        theirs.set_config("generation_kwargs", dict(spec.gen_kwargs), update=True)
    fixed = theirs.get_config("num_fewshot")
    if fixed == 0 and spec.num_fewshot:
        raise DataError(f"lm-eval task {name} fixes num_fewshot at 0; leave `num_fewshot` out.")
    if spec.num_fewshot is not None or fixed is None:
        theirs.set_config("num_fewshot", spec.num_fewshot or 0)
    theirs.set_fewshot_seed(FEWSHOT_SEED)


def _documents(name: str, theirs: Any, spec: TaskSpec, lm: Any) -> dict[str, list[Any]]:
    """lm-eval's requests by document id."""
    if spec.apply_chat_template and not lm.tokenizer.chat_template:
        raise DataError(
            f"lm-eval task {name}: `apply_chat_template`, but the model has no chat template; leave it out."
        )
    chosen = sorted(set(spec.samples[name])) if name in (spec.samples or ()) else None  # type: ignore[index]
    if chosen and chosen[-1] >= len(theirs.eval_docs):
        raise DataError(
            f"lm-eval task {name} has {len(theirs.eval_docs)} documents, so none has number {chosen[-1]}."
        )
    multiturn = spec.apply_chat_template if spec.fewshot_as_multiturn is None else spec.fewshot_as_multiturn
    theirs.build_all_requests(
        limit=spec.limit,
        samples=chosen,
        apply_chat_template=spec.apply_chat_template,
        fewshot_as_multiturn=multiturn,
        chat_template=lm.apply_chat_template if spec.apply_chat_template else None,
    )
    documents: dict[str, list[Any]] = {}
    for request in sorted(theirs.instances, key=lambda r: (r.doc_id, r.idx)):
        number = chosen[request.doc_id] if chosen else request.doc_id
        documents.setdefault(f"{name}-{number}", []).append(request)
    return documents


def _without_model(tokenizer: Any, positions: int | None) -> Any:
    """lm-eval's HFLM without a model: how it encodes texts and chats. Its `loglikelihood` returns token pairs."""
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise DataError("lm-eval needs a tokenizer with a BOS or EOS token, and the model's has neither.")
    lm = HFLM.__new__(HFLM)
    lm.tokenizer, lm.backend, lm.add_bos_token, lm.custom_prefix_token_id = tokenizer, "causal", None, None
    lm.chat_template_args, lm.enable_thinking = {}, None
    lm._max_length = positions or HFLM._DEFAULT_MAX_LENGTH
    lm._loglikelihood_tokens = lambda requests, **_: [(before, scored) for _, before, scored in requests]
    return lm


class LikelihoodTask(RowTask):
    """Documents scored by the log-likelihoods of continuations, as token rows."""

    def __init__(
        self, name: str, metric: Metric, documents: Mapping[str, Sequence[Any]], lm: Any, limits: Limits,
        weight: float = 1.0,
    ) -> None:  # fmt: skip
        theirs = metric.task
        choice = theirs.OUTPUT_TYPE == "multiple_choice"
        rows = {
            key: _rows(f"{name}, document {key}", lm, requests, limits.vocabulary)
            for key, requests in documents.items()
        }
        if all(cut for _, cut in rows.values()):
            raise DataError(
                f"{name}: every document is longer than the {lm.max_length} tokens that the model takes; use fewer "
                "few-shot examples."
            )
        super().__init__(name, [Item(key, made) for key, (made, _) in rows.items()], weight)
        self.unit = metric.unit
        self._metric, self._requests = metric, list(documents.values())
        self._made_of = _digest(metric, documents)
        self._right = tuple(_right(theirs, key, r) if choice else () for key, r in documents.items())
        self._lengths = tuple(_lengths(theirs, metric.name, r) if choice else () for r in documents.values())
        weighted = metric.weighted
        self._weights = {
            key: metric(requests, [[0.0]])[1] if weighted else 1.0 for key, requests in documents.items()
        }

    def item_weight(self, item: Item) -> float:
        """Words or bytes for a perplexity by words or bytes; otherwise every document counts the same."""
        return self._weights[item.id]

    columns = GenerateTask.columns

    def outcome(self, index: int, rows: Sequence[Any]) -> tuple[Any, float | None]:
        """The document's loss, see above, and its metric."""
        import torch

        each = torch.stack([-row[:, 0].sum() for row in rows])
        requests = self._requests[index]
        if requests[0].request_type == "loglikelihood_rolling":
            responses: list[list[Any]] = [[float(each.detach().sum())]]
        else:
            responses = [
                [(float(ll.detach()), bool(row[:, 1].all()))] for ll, row in zip(each, rows, strict=True)
            ]
        value, _ = self._metric(requests, responses)
        return self._loss(index, each), value

    def _loss(self, index: int, each: Any) -> Any:
        import torch

        right = self._right[index]
        if not right:
            return -each.sum()
        lengths = torch.tensor(self._lengths[index], dtype=each.dtype, device=each.device)
        n = len(lengths)
        scores = each[:n] - each[n:] if self._metric.name == "acc_mutual_info" else each[:n]
        scores = scores / lengths * lengths.mean()
        return scores.logsumexp(0) - scores[list(right)].logsumexp(0)


def _rows(
    where: str, lm: Any, requests: Sequence[Any], vocabulary: int | None
) -> tuple[tuple[Row, ...], bool]:
    """Rows of a document's requests, and whether one had to be cut; from the left, as lm-eval does."""
    longest = lm.max_length + 1  # the last token is predicted, not read
    pairs = [pair for request in requests for pair in _pairs(lm, request)]
    rows = []
    for before, scored in pairs:
        tokens = (*before, *scored)[-longest:]
        start = len(tokens) - len(scored)
        if not scored or start < 1:
            raise DataError(
                f"{where}: its continuation has {len(scored)} tokens, the model takes {lm.max_length}."
            )
        Limits(vocabulary=vocabulary).check(tokens, where)
        rows.append(Row(tokens, start))
    return tuple(rows), any(len(before) + len(scored) > longest for before, scored in pairs)


def _pairs(lm: Any, request: Any) -> list[tuple[list[int], list[int]]]:
    """Context and scored tokens of a request; of a whole text, in windows as long as the model takes."""
    if request.request_type == "loglikelihood":
        return list(lm.loglikelihood([request], disable_tqdm=True))
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(request.args[0]),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=1,
    )
    return [make_disjoint_window(window) for window in windows]


def _right(theirs: Any, key: str, requests: Sequence[Any]) -> tuple[int, ...]:
    """Which choices are right."""
    doc = requests[0].doc
    choices = theirs.doc_to_choice(doc)
    gold = theirs.doc_to_text(doc) if theirs.multiple_input else theirs.doc_to_target(doc)
    found = [choices.index(g) if g in choices else g for g in (gold if isinstance(gold, list) else [gold])]
    right = tuple(int(g) for g in found if isinstance(g, int) and 0 <= g < len(choices))
    if not right:
        raise DataError(
            f"lm-eval document {key}: its target {gold!r} is none of its {len(choices)} choices; correct it."
        )
    return right


def _lengths(theirs: Any, metric: str, requests: Sequence[Any]) -> tuple[int, ...]:
    """What the metric divides the log-likelihood of each choice by."""
    choices = theirs.doc_to_choice(requests[0].doc)
    return tuple(map(LENGTHS.get(metric, lambda _: 1), choices))


def _digest(metric: Metric, documents: Mapping[str, Sequence[Any]]) -> str:
    """Of all that the scores depend on beside the model and its tokenizer."""
    from lm_eval import __version__

    asked = [[(r.request_type, r.arguments, r.doc) for r in requests] for requests in documents.values()]
    facts = (__version__, metric.task.VERSION, metric.name, metric.filter, list(documents), asked)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def _samples(request: Any) -> bool:
    """Whether a request asks for random text."""
    options = request.arguments[1] if request.request_type == "generate_until" else {}
    return bool(options.get("do_sample"))


class RequestTask(OutsideTask):
    """Documents scored by whatever lm-eval asks of its own wrapper of the model, generation above all."""

    def __init__(
        self,
        name: str,
        metric: Metric,
        documents: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        weight: float = 1.0,
    ) -> None:
        super().__init__(name, list(documents), weight)
        self.unit = metric.unit
        self._metric, self._requests, self._tokenizer = metric, list(documents.values()), tokenizer
        self._lm: Any = None
        drawn = any(_samples(r) for requests in documents.values() for r in requests)
        self.content = None if drawn else _digest(metric, documents)

    def values(self, model: Any, items: Sequence[int]) -> Sequence[float]:
        """Metric of these documents; weights set in place since the last call are seen."""
        lm = self._wrapped(model)
        requests = [r for i in items for r in self._requests[i]]
        responses: dict[int, list[Any]] = {id(r): [] for r in requests}
        for kind in dict.fromkeys(r.request_type for r in requests):
            asked = [r for r in requests if r.request_type == kind for _ in range(r.repeats or 1)]
            for request, response in zip(asked, getattr(lm, kind)(asked, disable_tqdm=True), strict=True):
                responses[id(request)].append(response)
        return [
            self._metric(self._requests[i], [responses[id(r)] for r in self._requests[i]])[0] for i in items
        ]

    def _wrapped(self, model: Any) -> Any:
        from lm_eval.models.huggingface import HFLM

        if self._lm is None or self._lm.model is not model:
            with quiet():
                self._lm = HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=GENERATE_BATCH)
        return self._lm
