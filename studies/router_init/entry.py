"""A run whose routing parameters learn FACTOR times as fast: ``python -m studies.router_init.entry FACTOR ARGUMENTS``.

Their learning rate is multiplied and their weight decay divided by it, so that decay pulls as it did. The arguments are
those of ``bash launch/pretrain_rmoe.sh`` in one process.
"""

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

    standard = training.get_standard_config_overrides

    @functools.wraps(standard)
    def overrides(config):
        speed = {"max_lr": config.lr * factor, "min_lr": config.min_lr * factor}
        return standard(config) | {
            # biases have no weight decay
            _key("biases", lambda parameter, name: parameter.dim() == 1 and is_routing(name)): speed,
            _key("matrices", lambda parameter, name: parameter.dim() > 1 and is_routing(name)): speed
            | {"wd_mult": 1 / factor},
        }

    def _key(name, predicate):
        return ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"routing {name}", fn=predicate))

    training.get_standard_config_overrides = overrides


if __name__ == "__main__":
    multiply_learning_rates(float(sys.argv.pop(1)))
    sys.exit(worker.main(sys.argv[1:]))
