"""A run whose routing parameters learn FACTOR times as fast: ``python -m studies.router_init.entry FACTOR ARGUMENTS``.

Their learning rate is multiplied and their weight decay divided by it, so that decay pulls as it did. The arguments are
those of ``bash launch/pretrain_rmoe.sh`` in one process.
"""

import argparse
import functools
import sys

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.launcher import worker


def is_routing(name: str) -> bool:
    """Whether a parameter is a router's, of any type: what layers own, and what they share."""
    return ".router." in name or "rnn_router." in name


def multiply_learning_rates(factor: float) -> None:
    """For the optimizer that Megatron builds next in this process."""
    megatron_cpu.install()  # before anything imports Megatron
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.training import training

    def key(name: str, dimensions: range) -> ParamKey:
        def matches(parameter, parameter_name):
            return parameter.dim() in dimensions and is_routing(parameter_name)

        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))

    standard = training.get_standard_config_overrides
    biases, matrices = key("routing biases", range(1, 2)), key("routing matrices", range(2, 9))

    @functools.wraps(standard)
    def overrides(config):
        speed = {"max_lr": config.lr * factor, "min_lr": config.min_lr * factor}
        # biases have no weight decay
        return standard(config) | {biases: speed, matrices: speed | {"wd_mult": 1 / factor}}

    training.get_standard_config_overrides = overrides


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m studies.router_init.entry", description=__doc__)
    parser.add_argument("factor", type=float)
    multiply_learning_rates(parser.parse_args(sys.argv[1:2]).factor)
    sys.exit(worker.main(sys.argv[2:]))
