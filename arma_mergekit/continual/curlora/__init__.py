"""CURLoRA (arXiv 2408.14572) as a method of PEFT: importing this package registers it.

    from peft import get_peft_model
    from arma_mergekit.continual.curlora import CURLoRAConfig

    model = get_peft_model(model, CURLoRAConfig(r=16))

After that import `PeftModel.from_pretrained` knows its adapters too.
"""

from arma_mergekit.continual.curlora.config import CURLoRAConfig, CURLoRAType
from arma_mergekit.continual.curlora.convert import save_as_lora, to_lora
from arma_mergekit.continual.curlora.layer import CURLoRALayer, CURLoRALinear
from arma_mergekit.continual.curlora.model import CURLoRAModel
from arma_mergekit.continual.curlora.register import register

__all__ = [
    "CURLoRAConfig",
    "CURLoRALayer",
    "CURLoRALinear",
    "CURLoRAModel",
    "CURLoRAType",
    "register",
    "save_as_lora",
    "to_lora",
]

register()
