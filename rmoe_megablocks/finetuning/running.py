"""``rmoe finetune``: from rows and a folder to the folder of the model that was trained on them."""

import argparse
import copy
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rmoe_megablocks.conversion import partial
from rmoe_megablocks.conversion.folder.checksums import check_checksums
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import loading
from rmoe_megablocks.finetuning import examples, rows, settings, writing
from rmoe_megablocks.finetuning.examples import Examples
from rmoe_megablocks.finetuning.training import ResponseTrainer, Telling, freeze_router
from rmoe_megablocks.process import progress_stream


class _Stopped(Exception):
    """A signal came: the checkpoint is written, the folder is not."""


def run(args: argparse.Namespace) -> int:
    """Trains and writes the folder; 0, or 130 after a signal. Raises UsageError, one line."""
    rank = int(os.environ.get("RANK", "0"))
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        gpus = torch.cuda.device_count()
        raise UsageError(
            f"one process for {gpus} GPUs: torchrun --nproc-per-node {gpus} -m rmoe_megablocks.cli finetune ..., or "
            "CUDA_VISIBLE_DEVICES=0 for one of them"
        )
    # what the work is done in: partial.writing makes it, and it becomes --out when all is written
    place = args.out.with_name(args.out.name + ".partial")
    if args.resume and (args.out / settings.FILE).is_file():
        loading.prepare(args.model, args.trust_router_code)
        settings.complete(args, loading.config(args.model, args.trust_remote_code))
        settings.check_same(args.out / settings.FILE, settings.described(args))
        if rank == 0:
            print(f"{args.out} is finished: nothing is left to do")
        return 0
    if rank == 0 or args.resume:
        partial.check_new(args.out)
        if place.exists() and not args.resume:
            raise UsageError(f"{place} is of an interrupted fine-tuning: go on with --resume, or remove it")
    found = rows.read(args.data)
    loading.prepare(args.model, args.trust_router_code)
    if rank == 0:
        check_checksums(args.model)
    tokenizer = loading.tokenizer(args.model, args.trust_remote_code)
    settings.complete(args, loading.config(args.model, args.trust_remote_code))
    asked = settings.described(args)
    checkpoint = None
    if args.resume and place.exists():
        if (place / settings.FILE).is_file():
            settings.check_same(place / settings.FILE, asked)
        checkpoint = settings.newest_checkpoint(place / settings.CHECKPOINTS)
    made = _examples(found, tokenizer, args, rank)
    model = loading.model(args.model, torch.float32, torch.device("cpu"), args.trust_remote_code)
    _check_ids(made, model, args)
    try:
        if rank:
            _train(args, place, model, tokenizer, made, checkpoint)
            PartialState().wait_for_everyone()
            return 0
        with partial.writing(args.out, "--out"):
            partial_arguments = place / settings.FILE
            if not partial_arguments.is_file():
                partial_arguments.write_text(json.dumps(asked, indent=2) + "\n")
            saved, told = _train(args, place, model, tokenizer, made, checkpoint)
            writing.write(args, place, model, tokenizer, saved, told)
            shutil.rmtree(place / settings.CHECKPOINTS, ignore_errors=True)
            writing.write_checksums(place)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                PartialState().wait_for_everyone()
    except _Stopped as stopped:
        if rank == 0:
            print(f"rmoe: stopped after step {stopped}; the same command with --resume goes on", file=sys.stderr)
        return 130
    writing.tell(args, told)
    return 0


def _examples(found: list[rows.Row], tokenizer: Any, args: argparse.Namespace, rank: int) -> Examples:
    """Raises UsageError where no row has a label."""
    bar = tqdm(found, "reading rows", disable=rank > 0, file=progress_stream(), leave=False, delay=2, mininterval=1)
    made = examples.make(bar, tokenizer, args.seq_length)
    if not made.ids:
        raise UsageError(
            f"{args.data}: no row has a token of a response within --seq-length {args.seq_length}: make it longer"
        )
    if rank == 0:
        if made.skipped:
            partial.say(f"{made.skipped:,} of {len(found):,} rows are left out: no response within {args.seq_length}")
        if made.cut > made.skipped:
            partial.say(f"{made.cut - made.skipped:,} responses are cut at {args.seq_length} tokens, without an end")
    return made


def _check_ids(made: Examples, model: torch.nn.Module, args: argparse.Namespace) -> None:
    largest, size = max(map(max, made.ids)), model.get_input_embeddings().num_embeddings
    if largest >= size:
        raise UsageError(f"the tokenizer of {args.model} gives the id {largest}, the model has {size:,}")


def _train(
    args: argparse.Namespace,
    place: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    made: Examples,
    checkpoint: Path | None,
) -> tuple[writing.Saved, writing.Told]:
    """Trains ``model`` in place. Collective. Raises _Stopped after a signal."""
    saved = writing.Saved(copy.deepcopy(model.config), copy.deepcopy(model.generation_config))
    frozen = freeze_router(model) if args.freeze_router else []
    if args.freeze_router and not frozen:
        raise UsageError(f"--freeze-router: {args.model} has no router ({model.config.model_type})")
    telling = Telling(place / "metrics.jsonl", _any_process)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that newer releases of the libraries will change
        trainer = make_trainer(args, place / settings.CHECKPOINTS, model, tokenizer, made, [telling])
        kind = trainer.accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise UsageError(f"accelerate is set to {kind}, of which the folder could not be written: use MULTI_GPU")
        try:
            trainer.train(resume_from_checkpoint=os.fspath(checkpoint) if checkpoint else None)
        finally:
            telling.close()
    if telling.stopped:
        raise _Stopped(trainer.state.global_step)
    return saved, writing.Told(
        steps=trainer.state.global_step,
        tokens=sum(line["tokens"] for line in telling.lines()),
        rows=len(made.ids),
        skipped=made.skipped,
        cut=made.cut - made.skipped,
        predicted=made.predicted,
        first=telling.first["lm_loss"],
        last=telling.last["lm_loss"],
        frozen=len(frozen),
        seconds=sum(line["seconds"] for line in telling.lines()),
    )


def make_trainer(
    args: argparse.Namespace,
    folder: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    made: Examples,
    callbacks: Sequence[TrainerCallback] = (),
) -> ResponseTrainer:
    """The trainer of completed arguments, whose checkpoints go into ``folder``."""
    ours = settings.is_ours(model.config)
    datasets.disable_progress_bars()
    end = examples.end_of_response(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end  # neither seen nor predicted
    trainer = ResponseTrainer(
        model=model,
        args=settings.of_trl(args, folder, 0.0 if ours else args.aux_loss),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=pad),
        train_dataset=datasets.Dataset.from_dict({"input_ids": made.ids, "labels": made.labels}),
        processing_class=copy.deepcopy(tokenizer),  # the Trainer writes into it
        callbacks=list(callbacks),
        own_aux_loss=args.aux_loss if ours else 0.0,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _any_process(value: bool) -> bool:
    """Whether ``value`` holds in any process. Collective."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    total = torch.tensor(int(value), device=state.device)
    torch.distributed.all_reduce(total)
    return bool(total)
