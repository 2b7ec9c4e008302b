"""Safetensors checkpoints seen through their headers; weights are mapped only when read.

It knows files, tensors and adapters; no recipes, merge methods, torch or mergekit.
"""

from arma_mergekit.checkpoint.adapter import AdaptedCheckpoint, open_model
from arma_mergekit.checkpoint.header import TensorInfo, read_header
from arma_mergekit.checkpoint.locate import ModelReference
from arma_mergekit.checkpoint.model import Checkpoint

__all__ = ["AdaptedCheckpoint", "Checkpoint", "ModelReference", "TensorInfo", "open_model", "read_header"]
