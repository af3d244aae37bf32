"""Reading arguments: what follows from them, and what is told when something is missing, unknown or wrong."""

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.arguments import add_run_arguments
from rmoe_megablocks.megatron.command_line import parser
from rmoe_megablocks.planning import options, read_settings

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --vocab-size 100 "
    "--max-position-embeddings 32 "
)


@pytest.fixture(scope="module")
def actions():
    return parser.build(add_run_arguments)._option_string_actions


def test_megatron_knows_every_option_of_the_lists(actions):
    lists = (options.COUNTED, options.REFUSED, options._NEUTRAL)
    assert [option for known in lists for option in known if option not in actions] == []
    assert len(set(sum(lists, []))) == sum(map(len, lists))  # in one list only


def test_groups_that_move_no_figure_exist(actions):
    assert options._NEUTRAL_GROUPS <= {group.title for group in parser.build(add_run_arguments)._action_groups}


def read(extra=""):
    return read_settings((SIZES + extra).split())


def test_what_follows_from_other_arguments():
    settings = read("--swiglu --num-experts 8 --tensor-model-parallel-size 2")
    assert (settings.head_size, settings.query_groups, settings.ffn_size) == (16, 4, 128)
    assert (settings.expert_ffn_size, settings.expert_tensor, settings.vocab_size) == (128, 2, 256)
    assert read("--num-experts 8").ffn_size == 256
    assert read("--dataset nowhere").vocab_size == 128
    assert read("--bf16").fused_attention and not read().fused_attention  # fp32 has no fused kernel


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [("1", [1, 1, 1, 1]), ("2", [1, 0, 1, 0]), ("([0]*1+[1]*3)", [0, 1, 1, 1]), ("[0,1,1,0]", [0, 1, 1, 0])],
)
def test_dense_layers(frequency, expected):
    assert read(f"--num-experts 8 --moe-layer-freq {frequency}").moe_layers == tuple(map(bool, expected))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--num-layers 4", "--hidden-size is missing"),
        (SIZES + "--num-layers four", "--num-layers: invalid value: 'four' is not a whole number"),
        (SIZES + "--num-layers 0", "--num-layers 0: must be at least 1"),
        (SIZES + "--num-layers -4", "--num-layers -4: must be at least 1"),
        (SIZES + "--num-layers 4 5", "--num-layers: takes one value, found 2: 4 5"),
        (SIZES + "--global-batch-size 0", "--global-batch-size 0: must be at least 1"),
        (SIZES + "--nmu-layers 3", r"unrecognized arguments: --nmu-layers 3 .did you mean --num-layers\?"),
        (
            SIZES + "--num-experts 8 --moe-router-type lsmt",
            "--moe-router-type: unknown router type 'lsmt', did you mean",
        ),
        (SIZES + "--num-experts 8 --moe-router-type Gru", r"unknown router type 'Gru', did you mean gru\?"),
        (SIZES + "--moe-router-type gru", "--moe-router-type gru: the model has no experts to route to"),
        (SIZES + "--multi-latent-attention", "cannot compute with --multi-latent-attention"),
        (SIZES + "--optimizer muon", "cannot compute with --optimizer"),
        (SIZES + "--softmax-type learnable", "cannot compute with --softmax-type"),
        (SIZES + "--use-checkpoint-args --load x", "--use-checkpoint-args would do nothing"),
        (SIZES + "--transformer-impl inference_optimized", "cannot compute with --transformer-impl inference_opt"),
        (SIZES + "--position-embedding-type relative", "cannot compute with --position-embedding-type relative"),
        (SIZES + "--hidden-size 66", "--hidden-size 66 is not a multiple of --num-attention-heads 4, and no --kv"),
        (
            SIZES + "--group-query-attention --num-query-groups 3",
            "--num-attention-heads 4 is not a multiple of --num-query-groups 3",
        ),
        (SIZES + "--num-experts 4 --moe-router-topk 5", "--moe-router-topk 5 is more than --num-experts 4"),
        (SIZES + "--num-experts 4 --moe-router-topk 0", "--moe-router-topk 0: must be at least 1"),
        (SIZES + "--seq-length 64", "--seq-length 64 exceeds --max-position-embeddings 32"),
        (SIZES + "--num-experts 4 --moe-shared-expert-gate", "--moe-shared-expert-gate without a shared expert"),
        (SIZES + "--fp16 --bf16", "--fp16 and --bf16 exclude each other"),
        (
            SIZES + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            "--num-layers 4 is not a multiple of --num-layers-per-virtual-pipeline-stage 3 times .* 2",
        ),
        (SIZES + "--num-experts 8 --moe-layer-freq [1]*3", "--moe-layer-freq: .* neither a number nor a list of 4"),
        (SIZES + "--num-experts 8 --moe-layer-freq 0", "--moe-layer-freq 0: must be at least 1"),
        (SIZES + "--num-experts 8 --moe-layer-freq -1", "--moe-layer-freq -1: must be at least 1"),
        (SIZES + "--num-experts 8 --moe-layer-freq [0,2,1,1]", "--moe-layer-freq: .* zeros and ones"),
        (
            SIZES + "--recompute-granularity selective --recompute-modules mla_up_proj",
            "cannot compute with --recompute",
        ),
        (SIZES.replace("--vocab-size 100", "--mock-data"), "the vocabulary's size is not known"),
        (SIZES.replace("--vocab-size 100", "--dataset nowhere"), "--dataset: .*nowhere"),
    ],
)
def test_errors_are_one_line(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_settings(argv.split())
    assert "\n" not in str(caught.value)


def test_what_the_figures_leave_out_is_named():
    extra = "--lr 1e-3 --save x --num-experts 8 --expert-model-parallel-size 2"
    assert read(extra + " --cpu-offloading-num-layers 1").not_counted == (
        "--cpu-offloading-num-layers",
        "--moe-token-dispatcher-type allgather",
    )
    assert read("--num-experts 8 --moe-token-dispatcher-type allgather --seed 7").not_counted == ()  # one rank
    assert read(extra + " --moe-token-dispatcher-type alltoall").not_counted == ()
    assert read("--softmax-type vanilla --optimizer adam").not_counted == ()  # Megatron's defaults
