"""``rmoe eval FOLDER --tasks``: what can be told before torch and the harness are imported is told here."""

import argparse
import importlib.metadata
import importlib.util
import os

from rmoe_megablocks.conversion.partial import say
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import report
from rmoe_megablocks.evaluation.tasks import known, quiet, rows

_PACKAGES = ("transformers", "safetensors", "accelerate", "datasets", "lm_eval")
_EXTRA = "pip install 'rmoe-megablocks[eval]'"
_OLDEST, _BELOW = (0, 4, 13), (0, 5)


def run(args: argparse.Namespace) -> int:
    """Evaluates; 0, or 130 after Ctrl-C. Raises UsageError, one line."""
    report.check_json(args.out, "--out")
    names = known.names_of(args.tasks)
    shots = args.num_fewshot or 0
    known.check_examples(names, shots)
    if not (args.model / "config.json").is_file():
        raise UsageError(
            f"{args.model} is no Hugging Face folder (no config.json), as --tasks takes: rmoe export makes one of a "
            "checkpoint"
        )
    if args.megatron_arguments:
        raise UsageError("unrecognized arguments for --tasks: " + " ".join(args.megatron_arguments))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--tasks runs in one process: start it without torchrun or accelerate launch")
    local = {name: rows.find(args.data_dir, name, shots) for name in names} if args.data_dir else {}
    _check_packages()
    say("loading lm-evaluation-harness")  # seconds, with a cold disk a minute
    try:
        with quiet.settings(offline=bool(local)):
            from rmoe_megablocks.evaluation.tasks import running

            return running.run(args, names, local)
    except KeyboardInterrupt:
        return 130


def _check_packages() -> None:
    for module in _PACKAGES:
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{module.replace('_', '-')} is not installed: {_EXTRA}")
    found = importlib.metadata.version("lm-eval")
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdecimal())
    if not _OLDEST <= numbers < _BELOW:
        raise UsageError(f"lm-eval {found} is installed, --tasks needs 0.4.13 or later and less than 0.5: {_EXTRA}")
