"""Small training jobs of one process, and the command lines they share."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.compat.megatron_cpu import ARGUMENTS
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
STOCK_SCRIPT = FOLDER / "stock_script.py"

TRAINING = """
--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 32 --swiglu --normalization RMSNorm
--num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear
--hidden-dropout 0 --attention-dropout 0
--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4
--train-iters 4 --eval-iters 1 --eval-interval 4 --save-interval 4 --log-interval 1
--lr 1e-2 --lr-decay-style constant --clip-grad 1.0 --seed 7
--mock-data --tokenizer-type NullTokenizer --vocab-size 96 --split 90,5,5 --num-workers 0
--no-create-attention-mask-in-dataloader
""".split()
GRU = ["--moe-router-type", "gru", "--moe-router-rnn-hidden-size", "16"]

OWN_ENTRY = "import sys; from rmoe_megablocks.megatron import pretrain; sys.exit(pretrain.main(sys.argv[1:]))"
# a script as its owner runs it; the first import is what lets Megatron run without a GPU
STOCK = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import rmoe_megablocks.megatron
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WRAPPER = ["-m", "rmoe_megablocks.megatron.run"]


@dataclass
class Job:
    """A started job. Its checkpoint and log lie in ``folder``."""

    folder: Path
    process: subprocess.Popen

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def end(self) -> tuple[int, str]:
        """Exit code and everything it printed, Megatron's log of our own entry included."""
        try:
            self.process.wait(timeout=300)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        logs = [self.folder / "output.log", *sorted(self.folder.glob("runs/*/logs/rank*.log"))]
        return self.process.returncode, "".join(log.read_text() for log in logs)


def start(
    folder: Path, command: list[str], arguments: list[str], torchrun: int = 0, pythonpath: Path | None = None
) -> Job:
    """Starts Python with ``command`` and the arguments of a training of its own in ``folder``.

    They are a GPU's: only a stock script, which nothing of ours parses for, is given those that CPU mode needs.

    Args:
        torchrun: number of processes to start with torchrun; 0 for one process without it.
        pythonpath: a folder of further modules.
    """
    folder.mkdir(parents=True)
    needed = ARGUMENTS if STOCK in command else ()
    own = ["--save", str(folder / "checkpoint"), "--data-cache-path", str(folder / "cache")]
    env = {name: value for name, value in os.environ.items() if name not in ("RMOE_CPU_MODE_ANNOUNCED", "SLURM_PROCID")}
    paths = [str(path) for path in (pythonpath, ROOT) if path is not None]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if torchrun:
        rendezvous = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={torchrun}"]
        command = ["-m", "torch.distributed.run", *rendezvous, *command]
    else:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, *TRAINING, *needed, *own, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=folder,
        )
    return Job(folder, process)


def losses(output: str) -> list[str]:
    """What Megatron logged of each iteration's losses and gradient norm, and of both evaluations."""
    lines = re.findall(r"iteration +\d+/.*?(lm loss: .*?grad norm: \S+)", output)
    return lines + re.findall(r"(validation loss at .*?lm loss value: \S+)", output)


def as_own_entry(lines: list[str]) -> list[str]:
    """What our own entry logs of the same job: it leaves Megatron's second validation after the last iteration out."""
    return [line for line in lines if "on validation set" not in line]
