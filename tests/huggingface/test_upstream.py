"""transformers' ModelTesterMixin and ConfigTester on our classes: RMOE_TEST_TRANSFORMERS=1, see upstream_tests.py."""

import unittest

import pytest
import torch
from transformers.models.auto import modeling_auto

from rmoe_megablocks.huggingface import RmoeConfig, RmoeForCausalLM, RmoeModel
from tests.huggingface import upstream_tests
from tests.huggingface.built import config

ModelTesterMixin, ConfigTester = upstream_tests.load()

# by these names the common tests know a base model, and which one takes labels
modeling_auto.MODEL_MAPPING_NAMES["rmoe"] = "RmoeModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rmoe"] = "RmoeForCausalLM"

#: test -> why it does not apply
_CPU_MODE = "the CPU mode of tests/conftest.py answers for torch.cuda; passes or skips with --noconftest -o addopts="
LEFT_OUT = {
    "test_can_load_with_device_context_manager": _CPU_MODE,
    "test_can_load_with_global_device_set": _CPU_MODE,
    "test_cpu_offload": _CPU_MODE,
    "test_disk_offload_bin": _CPU_MODE,
    "test_disk_offload_safetensors": _CPU_MODE,
    "test_flex_attention_with_grads": "torch's flex attention has no backward pass on CPUs",
    "test_generation_tester_mixin_inheritance": "GenerationTesterMixin is not in the sdist: test_generation.py",
}


class Small:
    """What ModelTesterMixin asks: a small configuration and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 61

    def __init__(self, parent) -> None:
        self.parent = parent

    def get_config(self) -> RmoeConfig:
        return config(num_hidden_layers=2, moe_layer_freq=[1, 1], pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class RmoeCommonTests(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (RmoeModel, RmoeForCausalLM)
    all_generative_model_classes = (RmoeForCausalLM,)
    pipeline_model_mapping = {}

    def setUp(self) -> None:
        self.model_tester = Small(self)
        self.config_tester = ConfigTester(self, config_class=RmoeConfig, hidden_size=32)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


for _name, _reason in LEFT_OUT.items():
    assert hasattr(RmoeCommonTests, _name), f"{_name} is no test of transformers any more"
    setattr(RmoeCommonTests, _name, pytest.mark.skip(reason=_reason)(lambda self: None))
