"""RMoE in transformers 5.17 to 5.24: importing this makes ``AutoModelForCausalLM.from_pretrained`` know the model.

import rmoe_megablocks.huggingface
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("folder")
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rmoe_megablocks.huggingface.configuration import RmoeConfig
from rmoe_megablocks.huggingface.folders.released import LlamaMoeRnnConfig, LlamaMoeRnnForCausalLM
from rmoe_megablocks.huggingface.modeling import RmoeForCausalLM, RmoeModel, RmoePreTrainedModel
from rmoe_megablocks.huggingface.release import check

check()
AutoConfig.register(RmoeConfig.model_type, RmoeConfig)
AutoModel.register(RmoeConfig, RmoeModel)
AutoModelForCausalLM.register(RmoeConfig, RmoeForCausalLM)
AutoConfig.register(LlamaMoeRnnConfig.model_type, LlamaMoeRnnConfig)
AutoModelForCausalLM.register(LlamaMoeRnnConfig, LlamaMoeRnnForCausalLM)

__all__ = [
    "LlamaMoeRnnConfig",
    "LlamaMoeRnnForCausalLM",
    "RmoeConfig",
    "RmoeForCausalLM",
    "RmoeModel",
    "RmoePreTrainedModel",
]
