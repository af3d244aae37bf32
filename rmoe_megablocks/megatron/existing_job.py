"""The router in somebody else's training script: its arguments, its checks, its place in the model.

:mod:`.run` calls these from inside Megatron, a patched pretrain_gpt.py (patches/megatron-lm) by name.
"""

import argparse
import os
import sys
from collections.abc import Callable

from megatron.training import get_args, global_vars
from megatron.training.models.gpt import GPTModelConfig

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.compat.megatron import script_hooks as megatron_script_hooks
from rmoe_megablocks.data.prepared.responses import mask_path
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments, balancing
from rmoe_megablocks.megatron.checkpoints import compatibility, model, resharding, upcycling
from rmoe_megablocks.megatron.checks import refusals, startup
from rmoe_megablocks.megatron.experts.backend import MEGATRON
from rmoe_megablocks.megatron.inputs.responses import masked
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.megatron.recurrence.install import install_router
from rmoe_megablocks.megatron.resolve import choose_optimizer_checkpoint
from rmoe_megablocks.routing import INIT_METHOD, all_arguments, get_router_type

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def install_hooks() -> None:
    """Makes Megatron do the same for a script that knows nothing of it."""
    megatron_script_hooks.extend_parse_args(with_router_arguments(), _check_parsed)
    megatron_script_hooks.extend_gpt_config(prepare_model)
    megatron_script_hooks.check_before_pretrain(_check_model)


def in_one_line() -> startup.in_one_line:
    """Around the script: what Megatron refuses before the first iteration is one line, under its traceback."""
    begun = []
    megatron_hooks.observe_training_log(lambda **iteration: begun.append(iteration))
    return startup.in_one_line(lambda: global_vars._GLOBAL_ARGS, lambda: bool(begun), log=None)


def with_router_arguments(provider: AddArguments | None = None) -> AddArguments:
    """An ``extra_args_provider`` that adds the router's arguments to those of the script's own ``provider``."""

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        _make_fit_for_cpu()
        if provider is not None:
            parser = provider(parser)
        if "--moe-router-type" in parser._option_string_actions:  # a patched script in the wrapper
            return parser
        return arguments.add_router_arguments(parser)

    return add_arguments


def _make_fit_for_cpu() -> None:
    """In CPU mode gives a command line that was written for a GPU the arguments that it needs, and says so.

    Megatron parses ``sys.argv``, some of its parts (as ft_integration) again, after this was called for the first one.
    """
    if not megatron_cpu.active():
        return
    sys.argv[1:], note = megatron_cpu.supply(sys.argv[1:])
    if note and os.environ.get("RANK", "0") == "0":
        print(note, flush=True)


def prepare_model(model_config: GPTModelConfig, args: argparse.Namespace) -> None:
    """Checks ``args`` and makes ``model_config`` build a model with the router that they ask for.

    Call it between ``gpt_config_from_args`` and ``pretrain_cfg_container_from_args``. A model with Megatron's own
    router, experts and sum of load-balancing losses is left untouched.

    Raises:
        UsageError: one clear line.
    """
    _check_router(args)
    if args.yaml_cfg is not None:
        return
    _check_no_prompts(args)
    notes = upcycling.choose(args)
    compatibility.check_router_matches(args)
    resharding.check_optimizer_layout(args)
    if _asked_for(args) is None or _is_prepared(model_config):
        return
    if type(model_config) is not GPTModelConfig:  # a subclass names another builder, which makes layers of its own
        raise UsageError(
            f"{_asked_for(args)} does not work with a {type(model_config).__name__}: "
            "leave out what makes the script use it (as ModelOpt's arguments)"
        )
    for note in notes + model.check(args) + null_experts.notes(args) + choose_optimizer_checkpoint(args):
        if args.rank == 0:
            print(note, flush=True)
    install_router(model_config, args)
    model_config.transformer.router_prepared = True


def _check_parsed(args: argparse.Namespace) -> None:
    """Refuses early what can be, before Megatron validates and starts."""
    if args.yaml_cfg is not None or not args.use_checkpoint_args:  # which brings the model's sizes later
        _check_router(args)


def _check_router(args: argparse.Namespace) -> None:
    options = _typed_options()
    if args.yaml_cfg is not None:  # the file has replaced all arguments, ours are not in it
        ours = {"--moe-router-type", "--moe-backend", "--moe-aux-loss-reduction", null_experts.OPTION}
        ours |= {argument.option for argument in all_arguments()}
        named = sorted(ours & options)
        if named or getattr(args, "moe_router_type", "linear") != "linear":
            raise UsageError(f"{[*named, '--moe-router-type'][0]} does not work with --yaml-cfg: use arguments")
        args.moe_router_type, args.moe_backend, args.moe_aux_loss_reduction = "linear", MEGATRON, balancing.SUM
        args.moe_router_init, args.moe_null_experts = INIT_METHOD, 0
        return
    args.explicit = options
    try:
        refusals.check_router_arguments(args)
    finally:
        del args.explicit  # Megatron saves its arguments with every checkpoint


def _check_no_prompts(args: argparse.Namespace) -> None:
    """Refuses a dataset that says which tokens are prompts: a script's own dataset would learn them all."""
    found = masked(args)
    if found:
        raise UsageError(
            f"{mask_path(found[0])}: the dataset leaves prompts out of the loss, which {sys.argv[0]} would count: "
            "fine-tune with rmoe's own entry (launch/pretrain_rmoe.sh), or prepare it without --loss-after"
        )


def _typed_options() -> set[str]:
    return {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}


def _check_model(model_config: object) -> None:
    """Refuses to train a model that was built without the router that was asked for."""
    args = get_args()
    if (option := _asked_for(args)) and not _is_prepared(model_config):
        raise UsageError(
            f"{option}: {sys.argv[0]} does not build its model with gpt_config_from_args, as pretrain_gpt.py of "
            "Megatron-Core 0.19 and later does, so the router cannot be put in"
        )


def _asked_for(args: argparse.Namespace) -> str | None:
    """The first option that Megatron's own model would not follow."""
    if get_router_type(args.moe_router_type).replaces_hosts:
        return f"--moe-router-type {args.moe_router_type}"
    if args.moe_router_init != INIT_METHOD:
        return f"--moe-router-init {args.moe_router_init}"
    if args.moe_null_experts:
        return f"{null_experts.OPTION} {args.moe_null_experts}"
    if args.moe_backend != MEGATRON:
        return f"--moe-backend {args.moe_backend}"
    return f"--moe-aux-loss-reduction {args.moe_aux_loss_reduction}" if balancing.reduces(args) else None


def _is_prepared(model_config: object) -> bool:
    return getattr(getattr(model_config, "transformer", None), "router_prepared", False)
