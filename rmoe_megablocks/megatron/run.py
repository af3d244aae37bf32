"""A Megatron-LM training script with the recurrent router, the script unchanged::

    python -m rmoe_megablocks.megatron.run pretrain_gpt.py ARGUMENTS --moe-router-type gru
    torchrun TORCHRUN-ARGUMENTS -m rmoe_megablocks.megatron.run pretrain_gpt.py ARGUMENTS --moe-router-type gru

The script is any that builds its model as pretrain_gpt.py of Megatron-Core 0.19 and later does:
parse_and_validate_args, gpt_config_from_args, pretrain. It gets the router's arguments (--moe-router-type,
--moe-router-rnn-...) and, where there is no GPU, those that CPU mode needs; a line says which. Without
--moe-router-type it trains as it always did. Megatron is the one beside the script where its folder is a checkout,
else the installed one. patches/megatron-lm has the same as a patch of pretrain_gpt.py.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rmoe_megablocks.compat import upstreams
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
        upstreams.prefer_megatron_beside(script)
        from rmoe_megablocks.megatron import existing_job  # imports Megatron: not before its place is clear

        _check_megatron_is_of(script.resolve().parent)
        existing_job.install_hooks()
        sys.argv = list(argv)
        with existing_job.in_one_line():
            runpy.run_path(str(script), run_name="__main__")
    except UsageError as error:
        report_from_rank(error)
        return 2
    return 0


def _check_megatron_is_of(folder: Path) -> None:
    """Refuses to train with another Megatron than the one beside the script, whose code calls it.

    The import of this package has put the folder first on the path; a Megatron that was loaded before wins all the
    same (a sitecustomize, or a caller of :func:`main`).
    """
    loaded = Path(sys.modules["megatron.core"].__file__).parents[2]
    if (folder / "megatron" / "core").is_dir() and not loaded.samefile(folder):
        raise UsageError(
            f"{folder} has a Megatron of its own, but Python has loaded the one in {loaded} before: "
            "start the script with python -m rmoe_megablocks.megatron.run"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
