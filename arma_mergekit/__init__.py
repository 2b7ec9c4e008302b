"""Give a fine-tuned language model back what it knew, by averaging it with its base.

Importing the package is cheap: no torch, no transformers, no mergekit.
"""

__all__ = ["__version__"]

__version__ = "0.2.0"
