"""Give a fine-tuned language model back what it knew, by averaging it with its base.

Importing the package is cheap: no torch, no transformers, no mergekit. What is imported from it by name below lives in
`averaging`, and loads torch at that moment.
"""

TYPE_CHECKING = (
    False  # what typing.TYPE_CHECKING is, without importing typing at every start of Python (plugin.py)
)
if TYPE_CHECKING:
    from arma_mergekit.averaging import (
        ModelDifference,
        OptimalAlpha,
        find_optimal_alpha,
        merge_models,
        model_difference,
    )

__all__ = [
    "ModelDifference",
    "OptimalAlpha",
    "__version__",
    "find_optimal_alpha",
    "merge_models",
    "model_difference",
]

__version__ = "0.4.0"


def __getattr__(name: str) -> object:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(f"{__name__}.averaging"), name)
    return found
