"""The YAML recipe: read safely, checked strictly, frozen.

It knows what a recipe may say; no models, tensors or data files. `settings` holds mergekit's parameter
semantics, `evals` and `tune` our own blocks, `document` the file.
"""

from arma_mergekit.recipe.evals import TaskSpec
from arma_mergekit.recipe.recipe import ModelEntry, Recipe
from arma_mergekit.recipe.settings import Setting, resolve
from arma_mergekit.recipe.tune import Objective, TuneConfig

__all__ = ["ModelEntry", "Objective", "Recipe", "Setting", "TaskSpec", "TuneConfig", "resolve"]
