"""Odd options of the router and of its balancing."""

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import SHORT, TINY, trained, would_start


def refused(options: str, line: str) -> Case:
    return Case(options, f"{TINY} {options}", refused=line)


def works(options: str) -> Case:
    return Case(options, f"{TINY} {options}", works=would_start)


CASES = [
    refused("--moe-router-rnn-hidden-size 0", "--moe-router-rnn-hidden-size.*at least 1, got 0"),
    refused("--moe-router-rnn-hidden-size 12.5", "--moe-router-rnn-hidden-size.*12.5"),
    refused("--moe-router-rnn-init zeros", "--moe-router-rnn-init: invalid choice: 'zeros'"),
    refused("--moe-router-rnn-init init_method --init-method-xavier-uniform", "Xavier's bounds are a matrix's"),
    refused("--moe-router-init zeros", "--moe-router-init: invalid choice: 'zeros'"),
    refused("--moe-router-init fan_in --moe-router-type linear --spec a b", "fan_in does not work with --spec"),
    refused("--moe-router-init fan_in --moe-router-type linear --num-experts=null", "no experts to route to"),
    refused("--moe-aux-loss-reduction max", "--moe-aux-loss-reduction: invalid choice: 'max'"),
    refused("--moe-aux-loss-reduction mean --moe-aux-loss-coeff 0", "mean: there is no load-balancing loss"),
    refused("--moe-aux-loss-reduction mean --moe-router-load-balancing-type none", "there is no load-balancing loss"),
    refused("--moe-aux-loss-reduction mean --mtp-num-layers 1", "does not work with --mtp-num-layers"),
    works("--moe-aux-loss-reduction mean"),
    works("--moe-aux-loss-reduction mean --moe-router-type linear"),
    works("--moe-router-rnn-init init_method"),
    works("--moe-router-init fan_in --moe-router-rnn-bias"),
    works("--moe-router-init fan_in --moe-router-type linear"),
    works("--moe-router-rnn-hidden-size 1"),
    Case(
        "the linear router in bf16",
        f"{TINY} {SHORT} --moe-router-type linear --bf16",
        works=trained,
        trains=True,
        seconds=120,
    ),
]
