"""Small models of Megatron in one process, saved as a run of any layout saves them: names and shapes are global."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args

from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checkpoints import files
from rmoe_megablocks.megatron.recurrence.install import install_router
from tests.conversion.cells import SMALL

METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
ITERATION = 7


def build(*argv: str):
    """(model, arguments)"""
    args = arguments.parse([*SMALL, *argv])
    arguments.fill_defaults(args)
    arguments.validate(args)
    args.padded_vocab_size = (
        -(-args.vocab_size // args.make_vocab_size_divisible_by) * args.make_vocab_size_divisible_by
    )
    model_config = gpt_config_from_args(args)
    install_router(model_config, args)
    builder = model_config.get_builder_cls()(model_config)
    torch.manual_seed(1234)
    (model,) = builder.build_distributed_models(ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False)
    for name in ("explicit", "argv", "as_config"):
        delattr(args, name)
    return model, args


def make(folder: Path, *argv: str) -> Path:
    """Saves a model whose every weight and buffer is drawn anew, norms and biases included."""
    model, args = build(*argv)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator) * 0.05
                tensor.copy_(drawn + 1 if name.endswith(("layernorm.weight", "norm_weight", "gamma")) else drawn)
    save(folder, model, args)
    return folder


def save(folder: Path, model, args) -> Path:
    """Saves the model as a complete checkpoint of ITERATION."""
    checkpoint = folder / f"iter_{ITERATION:07d}"
    checkpoint.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(metadata={**METADATA, "dp_cp_group": torch.distributed.group.WORLD})}
    state |= {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    dist_checkpointing.save(state, str(checkpoint), content_metadata=METADATA, async_strategy="mcore")
    seal(checkpoint)
    (folder / files.TRACKER).write_text(str(ITERATION))
    return folder


def seal(checkpoint: Path) -> None:
    """Gives a checkpoint, damaged on purpose or not, a manifest that fits it, as a stranger would."""
    import hashlib

    (checkpoint / files.MANIFEST).unlink(missing_ok=True)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
    files.seal(checkpoint, {"algorithm": "sha256", "files": digests})


def load(model, checkpoint: Path) -> None:
    """Loads a checkpoint into a model as Megatron does."""
    wanted = model.sharded_state_dict(metadata={**METADATA, "dp_cp_group": torch.distributed.group.WORLD})
    model.load_state_dict(dist_checkpointing.load({"model": wanted}, str(checkpoint))["model"])
