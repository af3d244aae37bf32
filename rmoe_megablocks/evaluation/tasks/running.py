"""``rmoe eval FOLDER --tasks``: everything checked that can be before the model is loaded, then the harness."""

import argparse
import contextlib
import sys
from typing import Any

import datasets
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker

from rmoe_megablocks.conversion.folder.checksums import check_checksums
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import loading
from rmoe_megablocks.evaluation.prediction import Processes
from rmoe_megablocks.evaluation.tasks import building, result
from rmoe_megablocks.evaluation.tasks.model import Model
from rmoe_megablocks.evaluation.tasks.rows import Local

_BATCH = 8
#: samples of the bootstrap, which gives perplexity its standard error, to about 2 %
_SAMPLES = 1000


def run(args: argparse.Namespace, names: list[str], local: dict[str, Local]) -> int:
    """Evaluates and tells; 0. Raises UsageError, one line."""
    datasets.disable_progress_bars()
    loading.prepare(args.model, args.trust_router_code)
    check_checksums(args.model)
    tokenizer = loading.tokenizer(args.model, args.trust_remote_code)
    device = Processes(args.device).device
    knowing = building.manager()
    tasks = [
        building.of_rows(knowing, local[name]) if name in local else building.of_hub(knowing, name) for name in names
    ]
    dtype = getattr(torch, args.dtype) if args.dtype else "auto"
    model = loading.model(args.model, dtype, device, args.trust_remote_code)
    scorer = Model(model, tokenizer, args.model, args.batch_size or _BATCH)
    found = _evaluate(args, knowing, scorer, tasks)
    found["rmoe"] = result.summary(found, scorer, local, names)
    print(result.table(args.model.name or str(args.model), found))
    if args.out:
        result.write(found, args.out)
        print(f"rmoe: {args.out}", file=sys.stderr)
    return 0


def _evaluate(args: argparse.Namespace, knowing: Any, scorer: Model, tasks: list) -> dict[str, Any]:
    """The harness's result, with what its own command adds before it writes one."""
    tracker = EvaluationTracker()
    options = {"pretrained": scorer.pretrained, "dtype": str(scorer.model.dtype).removeprefix("torch.")}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of its bootstrap there
            found = simple_evaluate(
                model=scorer,
                model_args=options,
                tasks=tasks,
                task_manager=knowing,
                num_fewshot=args.num_fewshot,
                batch_size=scorer.batch_size,
                device=str(scorer.device),
                limit=args.limit,
                bootstrap_iters=_SAMPLES,
                evaluation_tracker=tracker,
            )
    except OverflowError as error:
        raise UsageError(f"{args.model}: a perplexity is too large for a number; look at the weights") from error
    result.complete(found, tracker)
    return found
