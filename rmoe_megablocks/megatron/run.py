"""A Megatron-LM training script with the recurrent router, the script unchanged::

    python -m rmoe_megablocks.megatron.run pretrain_gpt.py ARGUMENTS --moe-router-type gru
    torchrun TORCHRUN-ARGUMENTS -m rmoe_megablocks.megatron.run pretrain_gpt.py ARGUMENTS --moe-router-type gru

The script is any that builds its model as pretrain_gpt.py of Megatron-Core 0.19 does: parse_and_validate_args,
gpt_config_from_args, pretrain. It gets the router's arguments (--moe-router-type, --moe-router-rnn-...) and nothing
else: without --moe-router-type it trains as it always did. Megatron is the one beside the script where its folder is
a checkout, else the installed one. patches/megatron-lm has the same as a patch of pretrain_gpt.py.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report, report_from_rank


def main(argv: Sequence[str]) -> int:
    """Runs the script ``argv[0]`` with its arguments; the exit code, 2 for an error in what was asked for."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if not argv:
        report("name a training script: python -m rmoe_megablocks.megatron.run pretrain_gpt.py ARGUMENTS")
        return 2
    try:
        script = Path(argv[0])
        if not script.is_file():
            raise UsageError(f"{script} does not exist: the first argument is the training script, as pretrain_gpt.py")
        _use_megatron_of(script.resolve().parent)
        from rmoe_megablocks.megatron import existing_job  # imports Megatron: not before its place is clear

        existing_job.install_hooks()
        sys.argv = list(argv)
        runpy.run_path(str(script), run_name="__main__")
    except UsageError as error:
        report_from_rank(error)
        return 2
    return 0


def _use_megatron_of(folder: Path) -> None:
    """Imports what lies beside the script first, as Python does with a script; Megatron itself may lie there."""
    sys.path.insert(0, str(folder))
    loaded = getattr(sys.modules.get("megatron.core"), "__file__", None)
    if loaded is None or not (folder / "megatron" / "core").is_dir() or folder in Path(loaded).resolve().parents:
        return
    # CPU mode has imported the installed Megatron: start again, with the checkout on the path from the beginning
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    if first == str(folder):
        raise UsageError(
            f"{folder} has a Megatron of its own, but Python takes the one in {Path(loaded).parents[1]}: "
            f"start the run in {folder}"
        )
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
