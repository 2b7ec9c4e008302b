"""Attention probabilities of any causal LM (layers.py), and how far apart two models' are (formulas.py, compare.py)."""

from arma_mergekit.attention.compare import HeadDivergences, divergence_by_head, divergences
from arma_mergekit.attention.formulas import DIVERGENCES, LEGACY, divergence
from arma_mergekit.attention.layers import Inputs, Layer, Model, observed, record, stream

__all__ = [
    "DIVERGENCES",
    "LEGACY",
    "HeadDivergences",
    "Inputs",
    "Layer",
    "Model",
    "divergence",
    "divergence_by_head",
    "divergences",
    "observed",
    "record",
    "stream",
]
