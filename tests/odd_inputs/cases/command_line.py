"""What is typed behind ``bash launch/pretrain_rmoe.sh``: spellings, what takes something back, names and layouts."""

import json

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import SHORT, TINY, trained, would_start

DRY = f"{TINY} --dry-run"


def prints(*lines, absent=()):
    def check(outcome):
        printed = outcome.out.splitlines()
        assert all(f"#   {line}" in printed for line in lines), outcome.out
        assert not any(line.startswith(f"#   {name}") for line in printed for name in absent), outcome.out
        assert not outcome.new and not (outcome.folder / "runs").exists(), f"left behind: {outcome.new}"

    return check


def tied(outcome):
    """The flag of the file was taken back, for the whole run, and the run's configuration starts it again."""
    trained(outcome)
    (arguments,) = outcome.folder.rglob("arguments.json")
    arguments = json.loads(arguments.read_text())
    assert (arguments["untie_embeddings_and_output_weights"], arguments["lr_warmup_fraction"]) == (False, None)
    text = (outcome.folder / "runs" / "x" / "config.yaml").read_text()
    assert "--lr: 0.002\n" in text and "--num-layers: 2\n" in text and "untie" not in text and "warmup" not in text
    assert "\r" not in outcome.out + outcome.err
    for log in (outcome.folder / "runs" / "x" / "logs").iterdir():
        assert "\r" not in log.read_bytes().decode(), log


def stopped(outcome):
    assert "stopped after iteration 1: nothing was saved, as --no-checkpoints asks" in outcome.err, outcome.err
    assert "None" not in outcome.err


def helped(outcome):
    assert "--moe-router-rnn-hidden-size P" in outcome.out and "--help-megatron" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


# what torchrun starts
WORKER = "sh python {repository}/launch/pretrain_rmoe.sh"

CASES = [
    Case("--help", "pretrain --help", works=helped),
    Case(
        "--name=null and --flag=false of what the file sets",
        f"{TINY} {SHORT} --run-name x --lr-warmup-fraction=null --untie-embeddings-and-output-weights=false",
        trains=True,
        works=tied,
        seconds=120,
    ),
    Case(
        "--exit-interval with --no-checkpoints",
        f"{TINY} {SHORT} --exit-interval 1 --no-checkpoints",
        trains=True,
        works=stopped,
        seconds=120,
    ),
    Case("--dry-run leaves nothing", DRY, works=prints("--run-name tiny")),
    Case("--flag=false of what nobody set", f"{TINY} --bf16=false", works=would_start),
    Case("--flag=true", f"{TINY} --sequence-parallel=true", works=would_start),
    Case("--name=null under another name", f"{TINY} --persistent-save-interval=null", works=would_start),
    Case("--name=null of an unknown argument", f"{TINY} --lrr=null", refused=r"--lrr=null \(did you mean --lr\?\)"),
    Case("--name null", f"{TINY} --save null", refused="--save null: write --save=null"),
    Case("--name=false of a text", f"{TINY} --save=false", refused="--save: takes a value, not false"),
    Case("--name= of an unset variable", f"{TINY} --dataset=", refused="--dataset: the value is empty"),
    Case("--name '' of an unset variable", f"{TINY} --load ''", refused="--load: the value is empty"),
    Case("--flag with a value", f"{TINY} --bf16 true", refused="--bf16: takes no value, found 'true'"),
    Case("an argument twice", f"{DRY} --lr 1e-3 --seed 7 --lr 1.5e-3", works=prints("--seed 7", "--lr 1.5e-3")),
    Case("a value without its argument", f"{TINY} 5", refused="'5' is not an argument"),
    Case("two values for one", f"{TINY} --seed 1 2", refused="--seed: takes one value, found 2: 1 2"),
    Case("no value", f"{TINY} --seed", refused="--seed: expected one value"),
    Case("not a number", f"{TINY} --lr nan", refused="--lr: invalid value: 'nan'"),
    Case("an abbreviation", f"{TINY} --train-iter 5", refused="--train-iter 5 .did you mean --train-iters"),
    Case(
        "a misspelt argument of Megatron", f"{TINY} --num-layres 5", refused="--num-layres 5 .did you mean --num-layers"
    ),
    Case(
        "a misspelt argument of the router", f"{TINY} --moe-router-tpye gru", refused="did you mean --moe-router-type"
    ),
    Case("a misspelt argument of the run", f"{TINY} --run-nmae x", refused="did you mean --run-name"),
    Case("a misspelt argument of the launcher", f"{TINY} --dryrun", refused="did you mean --dry-run"),
    Case("a misspelt --config", "pretrain --confg x.yaml", refused="did you mean --config"),
    Case("underscores for hyphens", f"{TINY} --num_layers 4", refused="did you mean --num-layers"),
    Case("a misspelt choice", f"{TINY} --moe-router-type gur", refused=r"'gur', did you mean gru\?"),
    Case("a misspelt choice of an enum", f"{TINY} --attention-backend unfussed", refused="did you mean unfused"),
    Case("an expression without end", f"{TINY} --moe-layer-freq '([1'", refused="--moe-layer-freq: invalid value"),
    Case("--run-name with a slash", f"{TINY} --run-name a/b", refused="--run-name a/b: expected a name, not a path"),
    Case("--run-name ..", f"{TINY} --run-name ..", refused=r"--run-name \.\.: expected a name"),
    Case("--run-name empty", f"{TINY} --run-name ''", refused="--run-name: the value is empty"),
    Case("--run-name with a line break", f"{TINY} --run-name 'a\nb'", refused="--run-name 'a"),
    Case("--run-name of 300 letters", f"{TINY} --run-name {'a' * 300}", refused="--run-name aaa.*300 bytes"),
    Case("--run-name with a space", f"{TINY} --run-name 'a b'", works=would_start),
    Case(
        "--runs-dir below a file", f"{TINY} --runs-dir x/y", files={"x": ""}, refused="--runs-dir: cannot write to x/y"
    ),
    Case("--save below a file", f"{TINY} --save x/y", files={"x": ""}, refused="--save: cannot write to x/y"),
    Case("--nproc-per-node 0", f"{TINY} --nproc-per-node 0", refused="--nproc-per-node: expected a positive"),
    Case("--nproc-per-node -1", f"{TINY} --nproc-per-node=-1", refused="--nproc-per-node: expected a positive"),
    Case("--nproc-per-node abc", f"{TINY} --nproc-per-node abc", refused="--nproc-per-node: expected a positive"),
    Case("--nproc-per-node 3 of a layout of 2", f"{TINY} --nproc-per-node 3", refused="3 processes for a layout of 2"),
    Case("--nproc_per_node", f"{TINY} --nproc_per_node 2", works=would_start),
    Case("--nnodes alone", f"{TINY} --nnodes 2", refused="--nnodes needs --master-addr"),
    Case("--node-rank alone", f"{TINY} --node-rank 1", refused="--node-rank 1 does not fit --nnodes 1"),
    Case(
        "--node-rank as large as --nnodes",
        f"{TINY} --nnodes 2 --node-rank 2 --master-addr localhost",
        refused="--node-rank 2 does not fit --nnodes 2",
    ),
    Case("--node-rank -1", f"{TINY} --node-rank=-1", refused="--node-rank -1 does not fit"),
    Case("--node-rank abc", f"{TINY} --node-rank abc", refused="--node-rank: invalid int value: 'abc'"),
    Case("--master-port 99999", f"{TINY} --master-port 99999", refused="--master-port 99999 is not a port"),
    Case("--master-port 0", f"{TINY} --master-port 0", refused="--master-port: expected a positive"),
    Case(
        "--nproc-per-node under torchrun",
        f"{WORKER} --nproc-per-node 2",
        refused="--nproc-per-node comes before",
    ),
    Case("--dry-run under torchrun", f"{WORKER} --dry-run", refused="--dry-run is for bash"),
    Case(
        "rmoe plan: --flag=false of what nobody set",
        "rmoe plan {repository}/configs/tiny.yaml --bf16=false --json",
        works=lambda outcome: json.loads(outcome.out),
    ),
]
