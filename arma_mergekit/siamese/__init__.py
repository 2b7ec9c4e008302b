"""IMSM (arXiv 2412.17383): a base and its fine-tuned self, mixed token by token while decoding.

from arma_mergekit.siamese import SiameseForCausalLM

model = SiameseForCausalLM.from_parts("base", "adapter")
"""

from arma_mergekit.siamese.cache import SiameseCache
from arma_mergekit.siamese.config import MODES, SiameseConfig
from arma_mergekit.siamese.model import SiameseForCausalLM, before_answer

__all__ = ["MODES", "SiameseCache", "SiameseConfig", "SiameseForCausalLM", "before_answer"]
