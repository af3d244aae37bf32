"""Odd surroundings: folders, locales, variables, a second start."""

import json
from dataclasses import asdict, replace

from rmoe_megablocks import run_lock
from tests.odd_inputs.case import Case

TINY = "pretrain --config {repository}/configs/tiny.yaml"
SMALL = "--num-layers 2 --hidden-size 16 --ffn-hidden-size 16 --moe-ffn-hidden-size 16 --num-attention-heads 2"
ONE = "--pipeline-model-parallel-size 1 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1"
SHORT = f"{SMALL} {ONE} --global-batch-size 2 --train-iters 2 --eval-iters 1 --no-final-evaluation"


PORT_IN_USE = (
    "python -c \"import socket, subprocess, sys; s = socket.create_server(('', 29617)); "
    'sys.exit(subprocess.call(sys.argv[1:]))" bash {repository}/launch/pretrain_rmoe.sh '
    "--config {repository}/configs/tiny.yaml --master-port 29617"
)


def locked(alive, place="runs/tiny"):
    """Makes a run's folder that another process of this machine uses, or used until it was killed."""

    def make(folder):
        (folder / place).mkdir(parents=True)
        holder = replace(run_lock._myself(), **({} if alive else {"pid": 2**22 + 5}))
        (folder / place / run_lock.NAME).write_text(json.dumps(asdict(holder)))

    return make


def linked_runs(folder):
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to("elsewhere")


def broken_link(folder):
    (folder / "link").symlink_to("nowhere")


def started_two(outcome):
    assert "would start 2 processes" in outcome.out, outcome.out + outcome.err


def would_start(outcome):
    assert "would start" in outcome.out, outcome.out + outcome.err


def trained(outcome):
    """Two iterations, one line each, and a summary that says so."""
    (summary,) = outcome.folder.rglob("summary.json")
    assert json.loads(summary.read_text())["iterations"] == 2
    lines = [json.loads(line) for line in (summary.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "grad_norm" in line] == [1, 2]


ENTRY = "sh bash {repository}/launch/pretrain_rmoe.sh --config {repository}/configs/tiny.yaml --dry-run"


def dry(outcome):
    assert "rmoe_megablocks.launcher.worker" in outcome.out, outcome.out + outcome.err


CASES = [
    Case(
        "PYTHONOPTIMIZE, which strips Megatron's checks", ENTRY, env={"PYTHONOPTIMIZE": "1"}, refused="PYTHONOPTIMIZE"
    ),
    Case(
        "variables of another torchrun: RANK, WORLD_SIZE", TINY, env={"RANK": "3", "WORLD_SIZE": "8"}, works=started_two
    ),
    Case("a temporary folder that is not there", ENTRY, env={"TMPDIR": "/nonexistent"}, works=dry),
    Case("a terminal of 20 columns", ENTRY, env={"COLUMNS": "20"}, works=dry),
    Case("no standard input", f"{ENTRY} <&-", works=dry),
    Case("a runs folder behind a link", f"{TINY} --runs-dir link", files=linked_runs, works=would_start),
    Case(
        "a runs folder behind a broken link", f"{TINY} --runs-dir link", files=broken_link, refused="--runs-dir.*link"
    ),
    Case("a run whose folder another run uses", TINY, files=locked(True), refused=r"tiny is in use .*process \d+"),
    Case("a run that kill -9 ended", TINY, files=locked(False), works=would_start),
    Case(
        "a folder of checkpoints that another run uses",
        f"{TINY} --save shared",
        files=locked(True, "shared"),
        refused="shared is in use .*--save",
    ),
    Case("a port that is in use", f"sh {PORT_IN_USE}", refused="port 29617 is in use"),
    Case("a folder whose name has a space", f"{TINY} --runs-dir 'my runs'", works=would_start),
    Case("a runs folder that is a file", f"{TINY} --runs-dir file", files={"file": ""}, refused="--runs-dir.*file"),
    Case("the C locale", f"{TINY} {SHORT}", env={"LC_ALL": "C"}, trains=True, works=trained, seconds=120),
    Case("no home folder", f"{TINY}", env={"HOME": None}, works=would_start),
    Case("OMP_NUM_THREADS is not a number", f"{TINY}", env={"OMP_NUM_THREADS": "many"}, works=would_start),
]
