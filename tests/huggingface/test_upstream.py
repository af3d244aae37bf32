"""transformers' ModelTesterMixin and ConfigTester on our classes: RMOE_TEST_TRANSFORMERS=1, see upstream_tests.py."""

import unittest

import pytest
import torch

from rmoe_megablocks.huggingface import RmoeConfig, RmoeForCausalLM, RmoeModel
from tests.huggingface import upstream_tests
from tests.huggingface.built import config

ModelTesterMixin, ConfigTester = upstream_tests.load()

#: test -> why it does not apply
LEFT_OUT = {}


class Tester:
    """What ModelTesterMixin asks: a small configuration and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 5, 4, 61

    def __init__(self, parent) -> None:
        self.parent = parent

    def get_config(self) -> RmoeConfig:
        return config(pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class RmoeCommonTests(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (RmoeModel, RmoeForCausalLM)
    all_generative_model_classes = (RmoeForCausalLM,)
    pipeline_model_mapping = {}

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=RmoeConfig, hidden_size=32)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


for _name, _reason in LEFT_OUT.items():
    assert hasattr(RmoeCommonTests, _name), f"{_name} is no test of transformers any more"
    setattr(RmoeCommonTests, _name, pytest.mark.skip(reason=_reason)(lambda self: None))
