"""What lm-eval's tasks make of responses, as one number a document that goes up when things get better.

    aggregation                      value and weight of a document
    mean, nanmean                    the metric (minus it, if lower is better), 1
    perplexity                       ll, 1
    weighted_perplexity              ll, its words or bytes: the headline is -log perplexity
    bits_per_byte                    ll / ln 2, its bytes
    brier_score                      minus the document's own Brier score, 1

with ll the log-likelihood of the document. Other aggregations (F1, BLEU, Matthews, …) are not means over documents and
are refused: standard errors, held-back items and paired comparisons need a number a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from arma_mergekit.errors import DataError

__all__ = ["Metric"]

WEIGHTED = ("weighted_perplexity", "bits_per_byte")
LOG = ("perplexity", *WEIGHTED)  # aggregations whose logarithm is a ratio of sums


class Metric:
    """How a task turns the responses to a document's requests into a number that goes up when things get better.

    ``wanted``: `name` or `name,filter`; the task's first metric and filter unless given. DataError for metrics that are
    not means over documents.
    """

    def __init__(self, name: str, theirs: Any, wanted: str | None = None) -> None:
        self.task, self._where = theirs, f"lm-eval task {name}"
        known, filters = theirs.aggregation(), [f.name for f in theirs._filters]
        asked, _, filtered = (wanted or next(iter(known), "")).partition(",")
        if asked not in known:
            raise DataError(f"{self._where} has no metric {asked!r}; it has {', '.join(known)}.")
        self.name, self.filter = asked, filtered or filters[0]
        if self.filter not in filters:
            raise DataError(f"{self._where} has no filter {self.filter!r}; it has {', '.join(filters)}.")
        self.kind = _kind(known[asked])
        if not self.kind:
            raise DataError(
                f"{self._where}: {asked} is no mean over documents, so it has no standard error by document; give "
                f"another `metric` (of {', '.join(known)}) or task."
            )
        up = theirs.higher_is_better().get(asked)
        if up is None and self.kind not in LOG:
            raise DataError(
                f"{self._where} does not say whether {asked} is better high or low; add higher_is_better."
            )
        self._sign = 1.0 if up else -1.0
        self.weighted = self.kind in WEIGHTED
        logarithm = "log " if self.kind in LOG[:2] else ""
        self.unit = f"{'' if up else '-'}{logarithm}{asked}"

    def __call__(self, requests: Sequence[Any], responses: Sequence[Sequence[Any]]) -> tuple[float, float]:
        """Value and weight of a document, given all responses to each of its requests."""
        for request, response in zip(requests, responses, strict=True):
            request.resps = list(response)
        self.task._instances = list(requests)
        self.task.apply_filters()
        results = self.task.process_results(
            requests[0].doc, [r.filtered_resps[self.filter] for r in requests]
        )
        if self.name not in results:
            raise DataError(
                f"{self._where} gives no {self.name} for {requests[0].doc}; give another `metric`."
            )
        return self._oriented(results[self.name])

    def _oriented(self, result: Any) -> tuple[float, float]:
        if self.kind == "perplexity":
            return float(result), 1.0
        if self.kind == "weighted_perplexity":
            return float(result[0]), float(result[1])
        if self.kind == "bits_per_byte":
            return float(result[0]) / math.log(2), float(result[1])
        if self.kind == "brier_score":
            return self._sign * float(self.task.aggregation()[self.name]([result])), 1.0
        return self._sign * float(result), 1.0


def _kind(aggregation: Any) -> str:
    """Name of an aggregation that is a mean over documents, or of which the logarithm is one; empty for others."""
    from lm_eval.api import metrics

    kinds = ("mean", "nanmean", "brier_score", *LOG)
    return next((kind for kind in kinds if getattr(metrics, kind) is aggregation), "")
