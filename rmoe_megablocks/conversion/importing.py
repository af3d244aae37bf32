"""``rmoe import``: a Hugging Face folder becomes a Megatron checkpoint, for ``--load`` with ``--finetune``."""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rmoe_megablocks.conversion import partial
from rmoe_megablocks.conversion import source as sources
from rmoe_megablocks.conversion.dense.llama import SplitFolder
from rmoe_megablocks.conversion.dense.options import Options as SplitOptions
from rmoe_megablocks.conversion.folder.checksums import check_checksums
from rmoe_megablocks.conversion.folder.reading import Folder
from rmoe_megablocks.conversion.mapping import released
from rmoe_megablocks.conversion.mapping.checkpoint import DTYPES
from rmoe_megablocks.conversion.mapping.configuration import arguments_of, check_config
from rmoe_megablocks.conversion.mapping.weights import LAYERS, NORM_BEFORE_EXPERTS, Entry, entries
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import files
from rmoe_megablocks.process import progress_stream
from rmoe_megablocks.torch_dist.reading import COMMON_STATE
from rmoe_megablocks.torch_dist.writing import Chunk, write

_RELEASE = "release"  # Megatron's name for weights without a training state
_EMPTY = [None]  # what Megatron's linear layers store beside their weights without Transformer Engine


def import_folder(
    folder: Path,
    checkpoint: Path,
    transformer_engine: bool = False,
    trusts_router: bool = False,
    split: SplitOptions | None = None,
) -> list[str]:
    """Writes ``checkpoint``, which appears whole or not at all. Returns lines to tell the user.

    Args:
        folder: of the model.
        checkpoint: what --load will name: the folder of the tracker file and of ``release/``.
        transformer_engine: whether the run that loads it has --transformer-impl transformer_engine.
        trusts_router: whether a router type of somebody's module may be imported.
        split: how a dense model becomes one of experts.

    Raises:
        UsageError: one line that names what is missing, too much, of a wrong size, or cannot be expressed.
    """
    partial.check_new(checkpoint)
    opened = Folder(folder) if split is None else SplitFolder(Folder(folder), split)
    is_released = opened.config.get("model_type") == released.LAYOUT
    if is_released:
        opened.config = released.ours(opened.config)
    sources.check_router(opened.config.get("router_type", "linear"), trusts_router, str(folder / "config.json"))
    check_config(opened.config)
    wanted = entries(opened.config)
    if is_released:
        wanted = [released.entry(entry, opened.config) for entry in wanted]
    _check(opened, wanted)
    checked = check_checksums(folder)
    write_checkpoint(opened, wanted, checkpoint, transformer_engine)
    lines = [f"{checkpoint}: load it with --load {checkpoint} --finetune"]
    if split is not None:
        width = opened.config["moe_intermediate_size"]
        lines.append(
            f"{split.experts} experts of {width} neurons a layer ({split.method}), {split.topk} a token, outputs times "
            f"{split.scale:g}; a fresh {split.router_type} router"
        )
    if not checked:
        lines.append(f"{folder} has no checksums, so damage to its files would go unnoticed")
    return lines


def write_checkpoint(
    opened: Folder | SplitFolder, wanted: Sequence[Entry], checkpoint: Path, transformer_engine: bool = False
) -> None:
    """Writes a checked folder's weights; memory holds those of one entry at a time."""
    padding = opened.padding()
    chunks = list(_chunks(opened, wanted, padding, transformer_engine))
    rows = {chunk.size[0] for chunk in chunks if chunk.name == "embedding.word_embeddings.weight"}
    args = _arguments(opened.config, *rows)
    size = sum(_bytes(chunk) for chunk in chunks)
    with partial.writing(checkpoint, "CHECKPOINT") as place:
        release = place / _RELEASE
        shutil.rmtree(release, ignore_errors=True)  # an import is not taken up again: its one file is written in one go
        with tqdm(
            total=size, unit="B", unit_scale=True, mininterval=1.0, desc=checkpoint.name, file=progress_stream()
        ) as bar:
            write(release, [_shown(chunk, bar) for chunk in chunks], _objects(opened.config, wanted, args))
        files.write_atomically(release / files.CONFIG, json.dumps(sources.FORMAT))
        _seal(release)
        files.write_atomically(place / files.TRACKER, _RELEASE)


def _check(folder: Folder | SplitFolder, wanted: Sequence[Entry]) -> None:
    """Every weight is there once, in its size, and no other."""
    shapes = {name: shape for entry in wanted for name, shape in zip(entry.names, entry.shapes, strict=True)}
    problems = [f"{name} is missing" for name in shapes if name not in folder.tensors]
    problems += [
        f"{name} has no place in the model that config.json describes" for name in folder.tensors if name not in shapes
    ]
    for name, shape in shapes.items():
        found = folder.tensors.get(name)
        if found and tuple(found[0]) != tuple(shape):
            problems.append(f"{name} is {list(found[0])}, config.json makes it {list(shape)}")
        elif found and found[1] not in DTYPES:
            problems.append(f"{name} is of {found[1]}, expected fp32, bf16 or fp16")
    problems += _mixed(folder, wanted)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError(f"{folder.folder}: {'; '.join(problems[:3])}{more}")


def _mixed(folder: Folder | SplitFolder, wanted: Sequence[Entry]) -> Iterator[str]:
    """Weights of other precisions than those that share a tensor of Megatron with them: one would be rounded."""
    first: dict[tuple[str, ...], tuple[str, torch.dtype]] = {}
    for entry in wanted:
        for name in entry.names if entry.dtype is None else ():
            if name in folder.tensors:
                dtype = folder.tensors[name][1]
                other, expected = first.setdefault(entry.keys, (name, dtype))
                if dtype != expected:
                    yield f"{name} is of {dtype}, {other} of {expected}: Megatron keeps both in one tensor"


def _chunks(
    folder: Folder | SplitFolder, wanted: Sequence[Entry], padding: Mapping[str, Tensor], engine: bool
) -> Iterator[Chunk]:
    stacked, layers = _stacked(folder.config), folder.config["num_hidden_layers"]
    for entry in wanted:
        dtype = entry.dtype or folder.tensors[entry.names[0]][1]
        key = entry.keys[-1] if engine and entry.keys == NORM_BEFORE_EXPERTS else entry.keys[0]
        shape = entry.shape
        more = padding.get(entry.names[0]) if entry.rows else None
        if more is not None:
            shape = (shape[0] + more.shape[0], *shape[1:])

        def load(entry=entry, dtype=dtype, more=more, front=1 if stacked and entry.layer is not None else 0) -> Tensor:
            whole = entry.join(tuple(folder.read(name) for name in entry.names))
            if more is not None:
                whole = torch.cat((whole, more.to(whole.dtype)))
            return (whole.unsqueeze(0) if front else whole).to(dtype)

        if entry.layer is None:
            yield Chunk(key, shape, (0,) * len(shape), shape, dtype, load)
        elif stacked:
            first = (entry.layer, *(0 for _ in shape))
            yield Chunk(f"{LAYERS}{key}", (layers, *shape), first, (1, *shape), dtype, load)
        else:
            yield Chunk(f"{LAYERS}{entry.layer}.{key}", shape, (0,) * len(shape), shape, dtype, load)


def _stacked(config: Mapping[str, Any]) -> bool:
    """Whether Megatron keeps the layers in one tensor: it does where --moe-layer-freq is 1."""
    return all(config["moe_layer_freq"])


def _shown(chunk: Chunk, bar: tqdm) -> Chunk:
    def load() -> Tensor:
        made = chunk.load()
        bar.update(_bytes(chunk))
        return made

    return Chunk(chunk.name, chunk.size, chunk.first, chunk.shape, chunk.dtype, load)


def _bytes(chunk: Chunk) -> int:
    return torch.Size(chunk.shape).numel() * chunk.dtype.itemsize


def _objects(config: Mapping[str, Any], wanted: Sequence[Entry], args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: the run's arguments, and the empty entries that loading asks for."""
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    found: dict[str, Any] = {COMMON_STATE: [common]}
    layers, stacked = config["num_hidden_layers"], _stacked(config)
    for entry in wanted:
        if not entry.linears:
            continue
        prefix = f"{LAYERS}" if stacked else f"{LAYERS}{entry.layer}."
        key = f"{prefix}{entry.keys[0].removesuffix('weight')}_extra_state/shard_"
        for expert in range(entry.linears):
            place = [(entry.layer, layers)] if stacked else []
            place += [(expert, entry.linears)] if ".experts." in entry.keys[0] else []
            place = place or [(0, 1)]
            found[f"{key}{'.'.join(str(at) for at, _ in place)}_{'.'.join(str(of) for _, of in place)}"] = _EMPTY
    return found


def _arguments(config: Mapping[str, Any], padded_vocab_size: int) -> argparse.Namespace:
    """What Megatron and our own checks ask the arguments of a checkpoint's run for."""
    layout = dict.fromkeys(
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "world_size", "data_parallel_size"),
        ),
        1,
    )
    return argparse.Namespace(
        **arguments_of(config),
        **layout,
        padded_vocab_size=padded_vocab_size,
        no_save_optim=True,
        no_save_rng=True,
        use_distributed_optimizer=False,
        ckpt_format="torch_dist",
    )


def _seal(folder: Path) -> None:
    """The manifest that Megatron writes with --verify-integrity, and what ours adds to it."""
    from rmoe_megablocks.conversion.folder.checksums import sha256

    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    files.seal(folder, {"algorithm": "sha256", "files": digests})
