"""A stand-in for pretrain_gpt.py of Megatron-Core 0.19: the same calls in the same order, for one small purpose.

It knows nothing of this package. Beside it lies a module of its own, as gpt_builders.py does in a checkout.
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from stock_arguments import add_own_arguments


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset, num_samples, lambda: mpu.get_tensor_model_parallel_rank() == 0, config
    ).build()


def loss_func(loss_mask, output_tensor):
    losses = output_tensor.view(-1).float()
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def forward_step(data_iterator, model):
    batch = {key: value.cuda() for key, value in next(data_iterator).items() if torch.is_tensor(value)}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(
        extra_args_provider=add_own_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    print("the script's own argument:", args.stock_script_says)
    if args.stock_script_builds_the_model:  # as scripts did before there was a model configuration
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.training.arguments import core_transformer_config_from_args

        def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
            spec = get_gpt_layer_local_spec(num_experts=args.num_experts)
            return GPTModel(core_transformer_config_from_args(args), spec, args.padded_vocab_size, args.seq_length)

        full_config, provider = pretrain_cfg_container_from_args(args), model_provider
    else:
        full_config, provider = pretrain_cfg_container_from_args(args, gpt_config_from_args(args)), None
    pretrain(
        full_config, datasets_provider, ModelType.encoder_or_decoder, forward_step, model_provider=provider, store=store
    )
