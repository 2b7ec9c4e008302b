"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) with its own prompts, tokens and metrics.

load      names to lm-eval's task objects
metric    a task's responses to one number a document
tasks     task objects to tasks
"""

from arma_mergekit.evals.lm_eval.load import knows
from arma_mergekit.evals.lm_eval.tasks import make_tasks

__all__ = ["knows", "make_tasks"]
