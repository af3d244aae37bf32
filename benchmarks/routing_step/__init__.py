"""The routing step of one layer, by everyone who computes it: right first, then how fast, and what it keeps.

Sizes and providers are declared in :mod:`.sizes` and :mod:`.providers`. In every round each provider has its turn, one
forward pass and one forward and backward pass, in an order that is turned round every other round; ratios are of one
round. On a CPU the inputs of one provider (27 MB at T 4096) are out of the core's caches when its turn comes again.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.measuring.clocks import Clock, progress
from benchmarks.measuring.command_line import at_least, check_file, check_names, set_threads
from benchmarks.measuring.errors import WrongResult
from benchmarks.measuring.quantiles import turns
from benchmarks.routing_step import providers, roofline, sizes, table
from benchmarks.routing_step.check import Check, saved_bytes
from benchmarks.routing_step.inputs import Inputs, Step
from benchmarks.routing_step.table import BOTH, FORWARD, Result
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report

_WARM_UP = 3
_ROUNDS = {"cpu": 24, "cuda": 200}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What may be chosen."""
    known = ", ".join(sizes.SIZES)
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"{known} (default 0.9b; on a GPU its bf16 forms)")
    known = ", ".join(providers.PROVIDERS)
    parser.add_argument("--providers", nargs="+", metavar="NAME", help=f"{known} (default all; on a CPU none compiled)")
    parser.add_argument(
        "--against", nargs="+", metavar="NAME", help="what ratios are taken to (default released and GRUCell)"
    )
    parser.add_argument("--tokens", nargs="+", type=at_least(1), metavar="T", help="in the place of the sizes' own")
    parser.add_argument("--rounds", type=at_least(2), help="default 24, on a GPU 200")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU (default torch's)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="processor time of this process, not wall time: for one thread on a machine that others use too",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="leave out a provider that is wrong or fails, say so, and end with status 1 when the others are measured",
    )
    parser.add_argument("--csv", type=Path, help="also write a row for each provider, size and pass to this file")


def run(args: argparse.Namespace) -> str:
    """Measures all sizes and returns their tables.

    Raises:
        UsageError: bad input.
        WrongResult: a provider that does not compute the step.
    """
    device, load = machine.device(), machine.load()
    check_file(args.csv, "--csv")
    names = args.sizes or sizes.DEFAULT[device.type]
    check_names("--sizes", names, sizes.SIZES)
    baselines = args.against or ["released", "GRUCell"]
    check_names("--against", baselines, providers.PROVIDERS)
    chosen = {name: providers.select(args.providers, sizes.SIZES[name], device) for name in names}
    missing = set(baselines) - {provider.name for selected in chosen.values() for provider in selected}
    if args.against and missing:
        raise UsageError(f"--against {min(missing)}: it is not among the providers that are measured")
    set_threads(args.threads if device.type == "cpu" else None, args.processor_time and device.type == "cpu")
    clock = Clock(device, args.processor_time)
    rounds = args.rounds or _ROUNDS[device.type]
    results = []
    for name in names:
        size = sizes.SIZES[name]
        rates = roofline.measure(device, size.hidden, clock)
        for tokens in args.tokens or size.tokens:
            inputs = Inputs(size, tokens, device)
            found = Result(name, tokens, rates)
            steps = check_all(chosen[name], inputs, found, args)
            take_turns(steps, inputs, found, rounds, clock)
            results.append(found)
    if args.csv:
        args.csv.write_text(table.as_csv(results, baselines, clock.name))
    return table.markdown(results, baselines, clock.name, load)


def check_all(
    chosen: list[providers.Provider], inputs: Inputs, found: Result, args: argparse.Namespace
) -> dict[str, Step]:
    """The steps that are right, each run a few times: ``found`` gets errors and bytes, ``args`` status 1 for others.

    Raises:
        WrongResult: a provider is wrong, without --keep-going; or none is right.
    """
    check, steps = Check(inputs), {}
    with progress(len(chosen), f"{found.size}, T {found.tokens}, right?") as bar:
        for provider in chosen:
            if provider.when_named:
                bar.set_postfix_str(f"compiling {provider.name}: minutes on a CPU")
            try:
                step = provider.build(inputs, provider.arithmetic(inputs.size))
                found.errors[provider.name] = check.errors(provider, step)
                found.saved[provider.name] = saved_bytes(step)
                for _ in range(_WARM_UP):
                    _both(step, inputs)
                steps[provider.name] = step
            except Exception as error:  # whatever a compiler or a kernel that was never run raises
                if not args.keep_going:
                    raise
                args.status = 1
                why = str(error) if isinstance(error, WrongResult) else f"--providers {provider.name}: {_line(error)}"
                report(f"{why} ({found.size}, T {found.tokens})")
            bar.set_postfix_str("", refresh=False)
            bar.update()
    if not steps:
        raise WrongResult(f"no provider is left to measure at {found.size}, T {found.tokens}")
    return steps


def take_turns(steps: dict[str, Step], inputs: Inputs, found: Result, rounds: int, clock: Clock) -> None:
    """Times all of them in every round."""
    found.seconds = {name: {FORWARD: [], BOTH: []} for name in steps}
    with progress(rounds, f"{found.size}, T {found.tokens}") as bar:
        for order in turns(list(steps), rounds):
            for name in order:
                step = steps[name]
                found.seconds[name][FORWARD].append(clock.seconds(step.run))
                found.seconds[name][BOTH].append(clock.seconds(lambda step=step: _both(step, inputs)))
            bar.update()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no words'}"


def _both(step: Step, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return step.backward(step.run(), inputs)
