"""The arms of the comparison: what is changed of configs/tiny.yaml, and how their runs are called.

An arm is ROUTER_INIT or ROUTER_INIT_VARIANT, as ``gru_fan_in_no_aux``. What is tried for one router is tried for the
other: every variant has both, but those of what a linear router does not have. Its run is called ARM-seedN; under other
conditions than the configuration's own length and text ARM+CONDITION-seedN, as ``gru_fan_in+x5+enwik8-seed1``.
"""

from typing import NamedTuple

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import LAYER_INITS

ROUTERS = ("gru", "linear")
BASELINE = "linear_init_method"

#: what each variant tells apart
VARIANTS: dict[str, tuple[str, ...]] = {
    # weight decay pulls routing matrices to 0 (Megatron has one weight decay for all matrices: of the whole model)
    "no_decay": ("--weight-decay", "0"),
    # the load-balancing loss holds flat gates flat
    "no_aux": ("--moe-aux-loss-coeff", "0"),
    # routing gradients are scaled down with everybody else's
    "no_clip": ("--clip-grad", "0"),
    # the warm-up leaves too few large steps
    "no_warmup": ("--lr-warmup-fraction", "0"),
    # the scale of N(0, std) alone, of the whole model: .05 is what fan_in's projector has at H 128, .1 twice as much
    "std_05": ("--init-method-std", "0.05"),
    "std_10": ("--init-method-std", "0.1"),
}
#: how many times as fast routing parameters learn (entry.py): whether it is the speed of the logits that is missing
FASTER = {"fast3": 3, "fast10": 10}
#: of the recurrent router alone
GRU_VARIANTS: dict[str, tuple[str, ...]] = {
    # as the paper's small models
    "bias": ("--moe-router-rnn-bias",),
    # a cell with less gain still: if scale is the cause, this must be worse
    "small_cell": ("--moe-router-rnn-init", "init_method"),
    # twice the width of the state: the router matrix has more inputs
    "p128": ("--moe-router-rnn-hidden-size", "128"),
}
DEFAULT = tuple(f"{router}_{init}" for router in ROUTERS for init in LAYER_INITS)


class Name(NamedTuple):
    """A run's name, taken apart."""

    arm: str
    condition: str
    seed: int

    def __str__(self) -> str:
        return f"{self.labelled}-seed{self.seed}"

    @property
    def labelled(self) -> str:
        """The arm with its condition."""
        return f"{self.arm}+{self.condition}" if self.condition else self.arm

    @property
    def baseline(self) -> "Name":
        """The run that this one is paired with."""
        return self._replace(arm=BASELINE)

    @property
    def plain(self) -> "Name":
        """The run of the same router and initialisation without the variant, which a variant is paired with too."""
        return self._replace(arm=next(plain for plain in DEFAULT if self.arm.startswith(plain)))


def options(arm: str) -> list[str]:
    """The arm's arguments. Raises UsageError for no arm's name."""
    for router in ROUTERS:
        variants = {"": ()} | VARIANTS | dict.fromkeys(FASTER, ()) | (GRU_VARIANTS if router == "gru" else {})
        for init in LAYER_INITS:
            for variant, changed in variants.items():
                if arm == "_".join(filter(None, (router, init, variant))):
                    return ["--moe-router-type", router, "--moe-router-init", init, *changed]
    known = ", ".join((*VARIANTS, *FASTER, *GRU_VARIANTS))
    raise UsageError(f"--arms {arm}: expected one of {', '.join(DEFAULT)}, with _ and one of {known} or none")


def learning_rate_factor(arm: str) -> float:
    """Of its routing parameters."""
    return FASTER.get(arm.rpartition("_")[2], 1)


def rank(arm: str) -> int:
    """The baseline first, then the other arms without a variant, then the rest."""
    return (BASELINE, *DEFAULT).index(arm) if arm in DEFAULT else len(DEFAULT)


def name_of(text: str) -> Name | None:
    """The parts of a run's name, None where it is none of this study's."""
    labelled, seed, number = text.rpartition("-seed")
    arm, _, condition = labelled.partition("+")
    try:
        options(arm)
    except UsageError:
        return None
    return Name(arm, condition, int(number)) if seed and number.isascii() and number.isdigit() else None
