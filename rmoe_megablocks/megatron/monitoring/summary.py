"""summary.json: what a run came to, with the exact evaluation of its splits.

``iterations``, ``tokens`` and ``seconds`` are those of all sessions of the run up to the weights that are evaluated.
``valid_bpc``, ``test_bpc`` and ``bigram_bpc`` (on test, or on valid where that is all) stand for whole splits only:
under --eval-tokens the names of figures of a split's first tokens end in ``_partial``. ``evaluation`` tells for each
split how many ``tokens`` ``of`` all were predicted, or why it was ``left_out``: there is never a figure of nothing.
"""

import argparse
import json
import math
import resource
import sys
from collections.abc import Iterable

import torch

from rmoe_megablocks import data
from rmoe_megablocks.megatron.checkpoints.files import write_atomically
from rmoe_megablocks.megatron.inputs import datasets
from rmoe_megablocks.megatron.monitoring import evaluation
from rmoe_megablocks.megatron.monitoring.evaluation import Part
from rmoe_megablocks.megatron.monitoring.interruption import Interrupted, Interruption
from rmoe_megablocks.megatron.monitoring.progress import TokenProgress
from rmoe_megablocks.megatron.monitoring.reporting import Reporter
from rmoe_megablocks.megatron.resolve import Run

SPLITS = ("valid", "test")
_UNFINISHED = "not finished"
_MANY_TOKENS = 10_000_000  # of the training split: counting their bigrams takes a second or more


def bytes_per_token(run: Run) -> dict[str, float]:
    """Of each split that has text of known size; none where the loss is of a part of the text."""
    splits = run.metadata.splits if run.metadata and run.metadata.loss_after is None else {}
    return {name: split.bytes / split.tokens for name, split in splits.items() if split.tokens and split.bytes}


def evaluated_splits(run: Run) -> tuple[str, ...]:
    """The splits whose exact evaluation ends the run."""
    return tuple(split for split in SPLITS if not _left_out(run, split))


def _left_out(run: Run, split: str) -> str | None:
    """Why ``split`` is not evaluated, None if it is."""
    if run.args.no_final_evaluation:
        return "--no-final-evaluation"
    if run.metadata is None:
        return "the bytes of its text are known of a --dataset only"
    if split not in datasets.evaluated_splits(run.metadata):
        return f"the split has {run.metadata.splits[split].tokens} tokens: nothing to predict"
    return None


def layout(args: argparse.Namespace) -> str:
    """The parallel layout in a few letters, as "PP2 DP2"."""
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "VPP": args.virtual_pipeline_model_parallel_size or 1,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
        "DP": args.data_parallel_size,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 process"


def summarise(run: Run, model: list[torch.nn.Module], reporter: Reporter) -> None:
    """Evaluates the splits exactly, unless it is interrupted, and leaves summary.json. Collective."""
    args = run.args
    iterations = reporter.iteration or args.iteration
    summary = {
        "router": args.moe_router_type,
        "moe_backend": args.moe_backend,
        **_null_experts(args, reporter),
        "layout": layout(args),
        "iterations": iterations,
        **(reporter.metrics.totals(iterations) if reporter.writes else {}),
        "seed": args.seed,
        "peak_memory_bytes": _peak_memory(),
        "evaluation": {split: {"left_out": _left_out(run, split) or _UNFINISHED} for split in SPLITS},
    }
    _write(run, reporter, summary)  # a run that is killed while it is evaluated has one, too
    splits = evaluated_splits(run)
    if splits:
        _evaluate(run, model, reporter, summary, splits)
        _write(run, reporter, summary)
        reporter.say(f"{_results(summary, splits)}; {run.folder / 'summary.json'}")


def _null_experts(args: argparse.Namespace, reporter: Reporter) -> dict:
    """With null experts: how many, and the real ones of a token as measured last, mean of the layers; else nothing."""
    if not args.moe_null_experts:
        return {}
    measured = reporter.last_health.get("real_experts_per_token")
    return {
        "moe_null_experts": args.moe_null_experts,
        "real_experts_per_token": sum(measured) / len(measured) if measured else None,
    }


def _write(run: Run, reporter: Reporter, summary: dict) -> None:
    if reporter.writes:
        write_atomically(run.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _evaluate(run: Run, model: list[torch.nn.Module], reporter: Reporter, summary: dict, splits: Iterable[str]) -> None:
    """Fills ``summary`` with what is known when all is done or a signal comes."""
    parts = {
        split: Part.first(data.read_tokens(run.dataset / split), run.metadata.splits[split].bytes, run.args.eval_tokens)
        for split in splits
    }
    sizes = " and ".join(
        f"{split} ({part.predicted:,}{f' of {part.of:,}' * part.partial} tokens)" for split, part in parts.items()
    )
    reporter.say(
        f"evaluating {sizes} exactly; --eval-tokens N caps it, --no-final-evaluation leaves it out, Ctrl-C ends it"
    )
    say = reporter.say if reporter.writes else None
    try:
        with Interruption() as interruption:
            for split, part in parts.items():
                with TokenProgress(f"evaluating {split}", part.predicted, say) as progress:
                    nats = evaluation.mean_loss(model, part.tokens, interruption.check, progress.update)
                _enter(summary, split, part, part.bits_per_byte(nats))
            if reporter.writes:
                interruption.alone()
                _add_bigram(run, reporter, summary, part)
    except Interrupted as interrupted:
        begun = split
        for split in splits:
            if summary["evaluation"][split] == {"left_out": _UNFINISHED}:
                summary["evaluation"][split] = {"left_out": f"interrupted {interrupted}"}
        if interrupted.mean is not None and math.isfinite(interrupted.mean):
            # no figure to compare runs by: how far it came depends on when the signal came
            summary["evaluation"][begun] |= {
                "first_tokens": interrupted.done,
                "first_tokens_bpc": parts[begun].bits_per_byte(interrupted.mean),
                "of": parts[begun].of,
            }
        reporter.say(
            f"evaluation interrupted {interrupted}: the training is done and saved, the same command evaluates again"
            if run.args.save
            else f"evaluation interrupted {interrupted}"
        )


def _enter(summary: dict, split: str, part: Part, bits_per_byte: float) -> None:
    if not math.isfinite(bits_per_byte):
        summary["evaluation"][split] = {"left_out": f"the loss is {bits_per_byte}"}
        return
    summary[f"{split}_bpc" + "_partial" * part.partial] = bits_per_byte
    summary["evaluation"][split] = {"tokens": part.predicted, "of": part.of}


def _add_bigram(run: Run, reporter: Reporter, summary: dict, part: Part) -> None:
    """The baseline on the same text."""
    if run.metadata.splits["train"].tokens == 0:
        return
    train = data.read_tokens(run.dataset / "train")
    if len(train) > _MANY_TOKENS:
        reporter.say(f"counting the bigrams of {len(train):,} training tokens, the baseline")
    summary["bigram_bpc" + "_partial" * part.partial] = data.bigram_bits_per_byte(
        train, part.tokens, len(part.tokens) * part.bytes_per_token, run.metadata.vocab_size
    )


def _results(summary: dict, splits: Iterable[str]) -> str:
    """One line: "test 3.392 bpc, valid 3.280 bpc (a bigram model of the same training text: 3.868)"."""
    words = []
    for split in ("test", "valid"):
        told = summary["evaluation"][split]
        if "first_tokens" in told:
            words.append(
                f"{split} {told['first_tokens_bpc']:.3f} bpc of the first {told['first_tokens']:,} of {told['of']:,} "
                f"tokens ({told['left_out']})"
            )
        elif "left_out" in told:
            words += [f"{split} left out: {told['left_out']}"] * (split in splits)
        elif told["tokens"] < told["of"]:
            figure = summary[f"{split}_bpc_partial"]
            words.append(f"{split} {figure:.3f} bpc (partial: the first {told['tokens']:,} of {told['of']:,} tokens)")
        else:
            words.append(f"{split} {summary[f'{split}_bpc']:.3f} bpc")
    line = ", ".join(words)
    for key, where in (("bigram_bpc", ""), ("bigram_bpc_partial", ", on the same part")):
        if key in summary:
            line += f" (a bigram model of the same training text: {summary[key]:.3f}{where})"
    return line


def _peak_memory() -> int:
    """Bytes of the process that needed most, on this host's processors or its GPU."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        own = max(torch.cuda.max_memory_allocated(), 0) or own
    peak = torch.tensor([own], dtype=torch.int64, device="cuda")
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return int(peak.item())
