"""What Megatron's training loop asks of an entry script: datasets, batches, the forward step and its loss."""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from rmoe_megablocks.megatron.inputs.responses import ResponseDataset, masked
from rmoe_megablocks.megatron.monitoring import nonfinite

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def dataset_config(args) -> GPTDatasetConfig:
    """Megatron's dataset configuration from its arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    if blend is not None:  # --split: Megatron never finishes to build a split without tokens
        left_out = getattr(args, "splits_left_out", [])
        config.split_matrix = [
            None if split.name in left_out else part for split, part in zip(Split, config.split_matrix, strict=True)
        ]
    return config


def datasets_provider(num_samples: list[int], vp_stage: int | None = None):
    """(train, valid, test) datasets; ``num_samples`` of each. Only ranks that feed or label a batch build them."""
    args = get_args()

    def on_this_rank() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    num_samples = [training_samples(args, num_samples[0]), *num_samples[1:]]
    return BlendedMegatronDatasetBuilder(_kind(args), num_samples, on_this_rank, dataset_config(args)).build()


def _kind(args) -> type[GPTDataset]:
    """The class of the datasets: ours only where there is a mask, as its name is in those of Megatron's index files."""
    if args.mock_data:
        return MockGPTDataset
    return ResponseDataset if masked(args) else GPTDataset


def training_samples(args, asked: int) -> int:
    """Windows for all iterations, where a resumed run has read more than its smaller batch would have by now.

    Megatron asks for --train-iters times the batch size of today (training.py:4473), and ends without data otherwise.
    """
    if not args.train_iters or args.step_batch_size_schedule or args.phase_transition_iterations:
        return asked
    left = max(0, args.train_iters - args.iteration) * args.global_batch_size
    return max(asked, args.consumed_train_samples + left)


datasets_provider.is_distributed = True  # read by Megatron: every rank calls it


def get_batch(
    data_iterator, config: TransformerConfig, vp_stage: int | None, micro_batch_size: int
) -> list[Tensor | None]:
    """This rank's part of the next micro-batch, in the order of BATCH_KEYS; all None on stages that need none.

    ``micro_batch_size`` is what the other tensor-parallel ranks make room for.
    """
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return [None] * len(BATCH_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(
            config.pipeline_model_parallel_layout, config.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
        ),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return [batch.get(key) for key in BATCH_KEYS]


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss of a micro-batch, its number of tokens, and both again for Megatron's averages.

    Megatron divides the one by the other, and averages that over context-parallel ranks (schedules.py:334). Where the
    mask leaves out more of one rank's part of a sequence than of another's, a token would weigh more there: every rank
    gets the number of the whole sequence, and a loss that much larger.
    """
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1).float())
    num_tokens = loss_mask.sum().detach().to(torch.int)
    if get_args().stop_on_nonfinite:  # without a check nobody takes them away again
        nonfinite.note_loss(loss)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    reported = {"lm loss": torch.stack((loss.detach(), num_tokens.float()))}
    size = get_args().context_parallel_size
    if size > 1 and not get_args().calculate_per_token_loss:
        torch.distributed.all_reduce(num_tokens, group=mpu.get_context_parallel_group())
        loss = loss * size
    return loss, num_tokens, reported


def forward_step(data_iterator, model):
    """One micro-batch through this process's model chunk."""
    timers = get_timers()
    args = get_args()
    micro_batch_size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, position_ids, attention_mask = get_batch(
        data_iterator, get_model_config(model), get_attr_wrapped_model(model, "vp_stage"), micro_batch_size
    )
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)
