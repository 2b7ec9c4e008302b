"""Fine-tune a base on a file of examples: whole, through an adapter, or as a siamese model.

A whole model or an adapter can be merged afterwards; a siamese model decides while it decodes (siamese/).

    settings.py    what is trained how
    examples.py    which tokens are trained on
    kinds.py       what a method trains and saves
    run.py         the course of a run, its record, resuming
"""

from arma_mergekit.finetune.examples import Example, batch, encode
from arma_mergekit.finetune.run import RECORD, finetune
from arma_mergekit.finetune.settings import METHODS, GateSettings, Settings

__all__ = ["METHODS", "RECORD", "Example", "GateSettings", "Settings", "batch", "encode", "finetune"]
