"""Attention probabilities of any causal LM (layers.py), and how far apart two models' are (formulas.py, compare.py).

importance.py says which heads matter.
"""

from arma_mergekit.attention.compare import (
    HeadDivergences,
    by_head,
    compare_rows,
    divergence_by_head,
    divergences,
    over_heads,
    over_queries,
    query_positions,
    visit,
)
from arma_mergekit.attention.formulas import DIVERGENCES, LEGACY, divergence
from arma_mergekit.attention.importance import head_importance, head_weights
from arma_mergekit.attention.layers import Inputs, Layer, Model, observed, record, stream

__all__ = [
    "DIVERGENCES",
    "LEGACY",
    "HeadDivergences",
    "Inputs",
    "Layer",
    "Model",
    "by_head",
    "compare_rows",
    "divergence",
    "divergence_by_head",
    "divergences",
    "head_importance",
    "head_weights",
    "observed",
    "over_heads",
    "over_queries",
    "query_positions",
    "record",
    "stream",
    "visit",
]
