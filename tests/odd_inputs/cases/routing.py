"""Odd options of the router and of its balancing."""

from pathlib import Path

from rmoe_megablocks.launcher.config import REPOSITORY
from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import SHORT, TINY, trained, would_start


def refused(options: str, line: str) -> Case:
    return Case(options, f"{TINY} {options}", refused=line)


def works(options: str) -> Case:
    return Case(options, f"{TINY} {options}", works=would_start)


def own(name: str, code: str, line: str) -> Case:
    """A type of one's own, in the folder that the run is started in."""
    return Case(name, f"{TINY} --moe-router-type own:Router", refused=line, files={"own.py": code})


BASE_CLASS = "from rmoe_megablocks.routing import *\nclass Router(RouterLayer):\n"
ROUTE = "    def route(self, x_TH, h_TP, shared, dtype): return x_TH[..., : self.config.num_experts], None\n"


def two_types(folder: Path) -> None:
    """The base's arguments are gru's."""
    base = REPOSITORY / "configs" / "tiny.yaml"
    (folder / "config.yaml").write_text(f"defaults: {base}\nMODEL_ARGS:\n  --moe-router-type: mlp\n")


CASES = [
    refused("--moe-router-rnn-hidden-size 0", "--moe-router-rnn-hidden-size.*at least 1, got 0"),
    refused("--moe-router-rnn-hidden-size 12.5", "--moe-router-rnn-hidden-size.*12.5"),
    refused("--moe-router-rnn-init zeros", "--moe-router-rnn-init: invalid choice: 'zeros'"),
    refused("--moe-router-rnn-init init_method --init-method-xavier-uniform", "Xavier's bounds are a matrix's"),
    refused("--moe-router-impl cuda", "--moe-router-impl: invalid choice: 'cuda'"),
    refused("--moe-router-type rnn --moe-router-impl triton", "RNNRouter has torch's operations alone; use auto"),
    refused("--moe-router-type linear --moe-router-impl eager", "--moe-router-impl belongs to --moe-router-type"),
    works("--moe-router-impl recompute"),
    refused("--moe-router-init zeros", "--moe-router-init: invalid choice: 'zeros'"),
    refused("--moe-router-init fan_in --moe-router-type linear --spec a b", "fan_in does not work with --spec"),
    refused("--moe-router-init fan_in --moe-router-type linear --num-experts=null", "no experts to route to"),
    refused("--moe-aux-loss-reduction max", "--moe-aux-loss-reduction: invalid choice: 'max'"),
    refused("--moe-aux-loss-reduction mean --moe-aux-loss-coeff 0", "mean: there is no load-balancing loss"),
    refused("--moe-aux-loss-reduction mean --moe-router-load-balancing-type none", "there is no load-balancing loss"),
    refused("--moe-aux-loss-reduction mean --mtp-num-layers 1", "does not work with --mtp-num-layers"),
    refused("--moe-null-experts -1", "--moe-null-experts: must be at least 0, got -1"),
    refused("--moe-null-experts 1.5", "--moe-null-experts: .*'1.5' is not a whole number"),
    refused("--moe-null-experts 2 --moe-router-topk 11", "topk 11: there are only 8 experts and 2 null experts"),
    refused("--moe-null-experts 2 --num-experts=null", "--moe-null-experts 2: the model has no experts to route to"),
    refused("--moe-null-experts 2 --moe-router-topk 1", "--moe-null-experts does not work with --moe-router-topk 1"),
    refused("--moe-null-experts 2 --moe-router-pre-softmax", "does not work with --moe-router-pre-softmax"),
    refused(
        "--moe-null-experts 2 --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0",
        "--moe-null-experts does not work with --moe-router-load-balancing-type sinkhorn",
    ),
    works("--moe-null-experts 0"),
    works("--moe-null-experts 8"),
    works("--moe-null-experts 8 --moe-router-type linear"),
    works("--moe-null-experts 2 --moe-router-topk 10"),
    works("--moe-aux-loss-reduction mean"),
    works("--moe-aux-loss-reduction mean --moe-router-type linear"),
    works("--moe-router-rnn-init init_method"),
    works("--moe-router-init fan_in --moe-router-rnn-bias"),
    works("--moe-router-init fan_in --moe-router-type linear"),
    works("--moe-router-rnn-hidden-size 1"),
    refused("--moe-router-type lsmt", r"unknown router type 'lsmt', did you mean lstm\?"),
    refused("--moe-router-type nowhere.at_all:Router", "cannot import 'nowhere.at_all' .ModuleNotFoundError"),
    refused("--moe-router-type math:Router", "math has no Router"),
    refused("--moe-router-type product_key", "product_key needs a square number of experts, as 16 or 64, got 8"),
    refused("--moe-router-head product_key", "needs a square number of experts, as 16 or 64, got 8"),
    refused("--moe-router-type mlp --moe-router-rnn-hidden-size 8", "belongs to .*gru.*: leave it out with mlp"),
    refused("--moe-router-mlp-hidden-size 8", "--moe-router-mlp-hidden-size belongs to --moe-router-type mlp: leave"),
    refused("--moe-router-type linear --moe-router-residual 1", "--moe-router-residual belongs to"),
    refused("--moe-router-recurrence some", "--moe-router-recurrence: invalid choice: 'some'"),
    refused("--moe-router-residual -1", "--moe-router-residual.* must be a number of at least 0, got -1"),
    refused("--moe-router-residual nan", "--moe-router-residual.* must be a number of at least 0, got nan"),
    refused("--moe-router-head xmoe --moe-router-temperature 0", "--moe-router-temperature.*above 0, got 0"),
    refused("--moe-router-residual 1 --moe-z-loss-coeff 0.1", "residual does not work with --moe-z-loss-coeff"),
    refused("--moe-router-residual 1 --moe-router-pre-softmax", "residual does not work with --moe-router-pre-softmax"),
    refused(
        "--moe-router-residual 1 --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0",
        "--moe-router-residual does not work with --moe-router-load-balancing-type sinkhorn",
    ),
    refused(
        "--moe-router-residual 1 --moe-router-score-function sigmoid",
        "--moe-router-residual does not work with --moe-router-score-function sigmoid",
    ),
    own(
        "a router type that is no module", "class Router: pass\n", "no subclass of rmoe_megablocks.routing.RouterLayer"
    ),
    own("a router type without a step", BASE_CLASS + "    pass\n", "Router has no method route"),
    own("a router type whose module raises", "1 / 0\n", r"cannot import 'own' \(ZeroDivisionError: division by zero"),
    own(
        "a router type with an argument of another spelling",
        BASE_CLASS + "    arguments = (Argument('--x', 1, ''),)\n" + ROUTE,
        "--x must begin with --moe-router-",
    ),
    own(
        "a router type with another type's argument",
        BASE_CLASS + "    arguments = (Argument('--moe-router-mlp-hidden-size', 1, ''),)\n" + ROUTE,
        "--moe-router-mlp-hidden-size is another type's argument already",
    ),
    own(
        "a router type that these sizes do not fit",
        BASE_CLASS + "    @classmethod\n    def check(cls, config): raise ValueError('too few')\n" + ROUTE,
        "--moe-router-type own:Router: too few",
    ),
    Case(
        "a configuration file with another type's argument",
        "pretrain --config config.yaml",
        files=two_types,
        refused="--moe-router-rnn-hidden-size belongs to .*: leave it out with mlp .*tiny.yaml, line",
    ),
    works("--moe-router-type mlp"),  # tiny.yaml's arguments of gru are dropped
    works("--moe-router-type product_key --num-experts 16"),
    works("--moe-router-residual 0.5 --moe-router-recurrence none"),
    works("--moe-router-type xmoe --moe-router-temperature 0.07"),
    Case(
        "the linear router in bf16",
        f"{TINY} {SHORT} --moe-router-type linear --bf16",
        works=trained,
        trains=True,
        seconds=120,
    ),
]
