"""What a recipe does to every tensor, and everything that is wrong with it, from headers alone."""

from arma_mergekit.plan.plan import Plan, PlannedTensor, plan, plan_file

__all__ = ["Plan", "PlannedTensor", "plan", "plan_file"]
