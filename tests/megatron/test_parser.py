"""A command line held against Megatron's parser: what it means, what it is refused for, and as a configuration file."""

import sys

import pytest

from rmoe_megablocks.command_line import program_arguments
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher.config import REPOSITORY, load_config, merge, to_argv
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.command_line import help_text, parser
from rmoe_megablocks.yaml12 import write


@pytest.fixture(scope="module")
def megatrons():
    return parser.build(arguments.add_run_arguments)


@pytest.mark.parametrize(
    ("typed", "checked"),
    [
        ("--lr 1 --seed 2 --lr=3", "--seed 2 --lr 3"),
        ("--lr 1 --lr=null", ""),
        ("--lr=null", ""),
        ("--bf16=false", ""),
        ("--bf16 --bf16=false", ""),
        ("--bf16=true --swiglu", "--bf16 --swiglu"),
        ("--no-rope-fusion=false", ""),
        # other names of the same argument
        ("--save-interval 5 --persistent-save-interval=null", ""),
        ("--save-interval 5 --persistent-save-interval 6", "--persistent-save-interval 6"),
        ("--override-opt_param-scheduler --override-opt-param-scheduler=false", ""),
        # a flag with two directions
        ("--rl-partial-rollouts=false", "--no-rl-partial-rollouts"),
        ("--no-rl-partial-rollouts=false", "--rl-partial-rollouts"),
        # argparse takes a separate one for an option
        ("--lr -1e-3", "--lr=-1e-3"),
        ("--lr=-1e-3", "--lr=-1e-3"),
        ("--train-data-path 0.3 a 0.7 b", "--train-data-path 0.3 a 0.7 b"),
        ("--attention-backend unfused", "--attention-backend unfused"),
    ],
)
def test_each_argument_once(megatrons, typed, checked):
    words = parser.check(typed.split(), megatrons)
    assert words == checked.split()
    assert parser.check(words, megatrons) == words
    megatrons.parse_args(words)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--train-itres", "5"], "unrecognized arguments: --train-itres 5 (did you mean --train-iters?)"),
        (["--train_iters=5"], "unrecognized arguments: --train_iters=5 (did you mean --train-iters?)"),
        (["--train-iter", "5"], "unrecognized arguments: --train-iter 5 (did you mean --train-iters?)"),
        (["--lrr=null"], "unrecognized arguments: --lrr=null (did you mean --lr?)"),
        (
            ["--moe-router-tpye", "gru"],
            "unrecognized arguments: --moe-router-tpye gru (did you mean --moe-router-type?)",
        ),
        (["--nothing-like-it"], "unrecognized arguments: --nothing-like-it"),
        (["5"], "'5' is not an argument (expected --name value)"),
        (
            ["--moe-router-type", "gur"],
            "argument --moe-router-type: unknown router type 'gur', did you mean gru? (known: linear, cosine, eda, "
            "gru, hyper, lstm, mlp, omni, product_key, random, rnn, xmoe; one of yours is module:Class)",
        ),
        (
            ["--attention-backend", "unfussed"],
            "argument --attention-backend: invalid choice: 'unfussed' (did you mean unfused?) "
            "(choose from flash, fused, unfused, local, auto)",
        ),
        (["--cuda-graph-modules", "x"], "argument --cuda-graph-modules: invalid value: 'x' ('x')"),
        (
            ["--moe-layer-freq", "[1"],
            "argument --moe-layer-freq: invalid value: '[1' ('[' was never closed (<string>, line 1))",
        ),
        (["--seed", "1:30"], "argument --seed: invalid value: '1:30' is not a whole number"),
        (["--seed", "1", "2"], "argument --seed: takes one value, found 2: 1 2"),
        (["--seed"], "argument --seed: expected one value"),
        (["--lr", "nan"], "argument --lr: invalid value: 'nan' is not a number"),
        (
            ["--dataset="],
            "argument --dataset: the value is empty (an unset variable?); --dataset=null leaves the argument out",
        ),
        (["--train-data-path", "a", " "], None),
        (["--save=false"], "argument --save: takes a value, not false; --save=null leaves it out"),
        (
            ["--swiglu", "yes"],
            "argument --swiglu: takes no value, found 'yes': it is switched on by --swiglu (true in a file), "
            "off by --swiglu=false",
        ),
        (["--onnx-safe", "false"], None),
    ],
)
def test_refused_by_name(megatrons, typed, message):
    with pytest.raises(UsageError) as caught:
        parser.check(typed, megatrons)
    assert str(caught.value) == message or (message is None and typed[0] in str(caught.value))


def test_a_runs_configuration_has_numbers_as_numbers_and_starts_the_same_run(tmp_path):
    typed = "--run-name 007 --seed 010 --lr 1e-4 --train-data-path 0.3 a 0.7 b --split 1,2,3 --no-rope-fusion"
    typed = [
        *typed.split(),
        "--moe-layer-freq",
        "([0]*1+[1]*3)",
        "--moe-aux-loss-coeff",
        "1e-2",
        "--wandb-exp-name",
        "1e-4",
    ]
    argv = merge(to_argv(load_config(REPOSITORY / "configs" / "tiny.yaml").arguments), typed)
    args = arguments.parse(argv)
    config = args.as_config
    assert config["--seed"] == 10 and config["--lr"] == 1e-4 and config["--num-layers"] == 4
    assert config["--run-name"] == "007" and config["--train-data-path"] == ["0.3", "a", "0.7", "b"]
    path = tmp_path / "config.yaml"
    path.write_text(write({"MODEL_ARGS": config}))
    for words in ("--run-name: '007'", "--seed: 10", "--lr: 0.0001", "--hidden-dropout: 0.0", "--swiglu: true"):
        assert f"  {words}\n" in path.read_text()
    again = arguments.parse(to_argv(load_config(path).arguments))
    assert again.as_config == config
    ignored = {"as_config", "argv"}
    assert {k: v for k, v in vars(again).items() if k not in ignored} == {
        k: v for k, v in vars(args).items() if k not in ignored
    }


def test_megatrons_modules_that_parse_once_more_find_the_merged_arguments():
    """As ft_integration.setup does at the start of Megatron's pretrain, whatever the command line of the process is."""
    from megatron.training.arguments import parse_args

    args = arguments.parse("--lr-warmup-fraction=null --untie-embeddings-and-output-weights=false --seed 5".split())
    before = list(sys.argv)
    with program_arguments(args.argv):
        assert parse_args(ignore_unknown_args=True).seed == 5
    assert sys.argv == before


def test_the_launchers_help_is_that_of_the_parser():
    page = (REPOSITORY / "rmoe_megablocks" / "launcher" / "arguments_help.txt").read_text()
    assert page == help_text.own(), "write it anew: see rmoe_megablocks/megatron/command_line/help_text.py"
