"""The training entry: Megatron's own loop on our arguments, model and data."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.global_vars import set_global_variables

from rmoe_megablocks import yaml12
from rmoe_megablocks.command_line import program_arguments
from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.megatron.checkpoints import compatibility, safety, storage
from rmoe_megablocks.megatron.checks import startup
from rmoe_megablocks.megatron.inputs import batches
from rmoe_megablocks.megatron.monitoring import nonfinite, summary
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.monitoring.reporting import Reporter, log_file, megatron_output_to
from rmoe_megablocks.megatron.preflight import check_devices
from rmoe_megablocks.megatron.recurrence.install import install_router
from rmoe_megablocks.megatron.resolve import Run, resolve

Model = list[torch.nn.Module]


def main(argv: Sequence[str]) -> int:
    """Trains, evaluates and sums up one run in this process, one rank of it.

    Args:
        argv: Megatron's arguments and ours, see :mod:`.arguments`.

    Raises:
        UsageError: bad input, before training.
    """
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "torchrun --nproc-per-node")
        with storage.in_one_line(argparse.Namespace(save=None), Path.cwd(), lambda: "nothing was started"):
            run = resolve(argv)
    # ft_integration parses the program's arguments again, which may be those of --config and what it takes back
    with (
        storage.in_one_line(run.args, run.folder, run.restart),
        run.lock() if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext(),
        megatron_output_to(run.folder / "logs"),
        program_arguments(run.argv),
    ):
        return _train(run)


def run_megatron(args: argparse.Namespace, on_model: Callable[[Model], None]) -> None:
    """Builds the model that ``args`` describe and hands it to Megatron's training loop.

    ``on_model`` sees the model chunks once they are wrapped, before the optimizer exists. Raises NonFiniteError, on
    all ranks at once, when a loss or gradient is not finite.
    """
    set_global_variables(args)
    model_config = gpt_config_from_args(args)
    install_router(model_config, args)
    safety.install(args)

    def hook(chunks: Model) -> Model:
        safety.check_agreement(args)
        nonfinite.install(chunks, args)
        on_model(chunks)
        return chunks

    model_config.post_wrap_hooks.append(hook)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        batches.datasets_provider,
        ModelType.encoder_or_decoder,
        batches.forward_step,
    )


def _train(run: Run) -> int:
    args = run.args
    model: Model = []
    reporters: list[Reporter] = []

    def on_model(chunks: Model) -> None:
        model.extend(chunks)
        health = None
        if args.num_experts:
            sizes = (args.num_experts, args.moe_null_experts, args.moe_router_topk)
            health = RoutingHealth(args.num_layers, args.mtp_num_layers or 0, *sizes)
        if health is not None:
            health.watch(chunks)
        reporter = Reporter(run.folder, summary.bytes_per_token(run), health, summary.evaluated_splits(run))
        reporters.append(reporter)
        megatron_hooks.observe_training_log(reporter.on_iteration)
        megatron_hooks.observe_evaluations(reporter.wants_evaluation, reporter.on_evaluation)
        _announce(reporter, run)
        reporter.start()

    log = log_file(run.folder / "logs")
    with (
        startup.in_one_line(lambda: args, lambda: bool(reporters) and reporters[0].iteration > 0, log),
        storage.in_one_line(args, run.folder, run.restart),  # first: before the other calls it a wrong argument
    ):
        try:
            run_megatron(args, on_model)
        except SystemExit as exit:  # Megatron's way to end early: a signal, --exit-interval, --exit-duration-in-mins
            if not reporters:
                raise startup.ended_early(exit, log) from exit
            reporters[0].close()
            if args.ckpt_convert_format:
                reporters[0].say(f"iteration {args.iteration} is saved as {args.ckpt_convert_format} in {args.save}")
                return exit.code or 0
            reporters[0].say(f"stopped after iteration {reporters[0].iteration}: {_resume_from(args)}")
            return exit.code or 0
        except nonfinite.NonFiniteError as error:
            return _stopped(error, reporters[0], args)
    reporter = reporters[0]
    reporter.close()
    summary.summarise(run, model, reporter)
    torch.distributed.destroy_process_group()
    return 0


def _stopped(error: nonfinite.NonFiniteError, reporter: Reporter, args: argparse.Namespace) -> int:
    """Tells why the run cannot go on, and from where it can be taken up again. Every rank ends here."""
    maybe_finalize_async_save(blocking=True, terminate=True)  # of an earlier iteration
    reporter.stop(error.iteration, error.cause)
    print(error, flush=True)  # Megatron's log
    reporter.say(f"{error}\nno weight was changed and nothing was saved; {_resumes_from(args)}")
    torch.distributed.barrier()  # the report comes before torchrun ends the others for the first one's exit
    torch.distributed.destroy_process_group()
    return 1


def _resume_from(args: argparse.Namespace) -> str:
    if args.save is None:
        return "nothing was saved, as --no-checkpoints asks; the same command starts from the beginning"
    return f"checkpoint in {args.save}; the same command resumes"


def _resumes_from(args: argparse.Namespace) -> str:
    for folder in (args.save, args.load):
        iteration = compatibility.latest_iteration(folder)
        if iteration is not None:
            return f"the same command resumes from iteration {iteration} in {folder}, on the same data"
    return "there is no checkpoint: the same command starts from the beginning"


def _announce(reporter: Reporter, run: Run) -> None:
    """Tells what runs where; leaves the run's configuration, fit for --config, and all arguments in its folder."""
    args = run.args
    for note in run.notes:
        reporter.say(note)
    experts = f", {args.moe_backend} experts" if args.num_experts else ""
    reporter.say(
        f"{args.run_name}: {args.moe_router_type} router{experts}, {summary.layout(args)}; files in {run.folder}"
    )
    if torch.distributed.get_rank() == 0:
        _leave(run.folder / "config.yaml", yaml12.write({"MODEL_ARGS": run.config}))
        _leave(run.folder / "arguments.json", json.dumps(vars(args), default=str, indent=2, sort_keys=True))


def _leave(path: Path, text: str) -> None:
    with storage.naming(path):
        path.write_text(text)
