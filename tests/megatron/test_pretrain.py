"""How the training entry ends before there is anything to train."""

import argparse
from pathlib import Path

import pytest

from rmoe_megablocks.errors import CommonError, UsageError
from rmoe_megablocks.megatron import preflight, pretrain
from rmoe_megablocks.megatron.resolve import Run, resolve
from tests.distributed.arguments import BASE


@pytest.mark.parametrize(("code", "reason"), [(2, "exit code 2"), (None, "exit code 0"), ("no data", "no data")])
def test_an_exit_before_the_first_iteration_says_why(monkeypatch, code, reason):
    def run_megatron(args, on_model):
        raise SystemExit(code)

    monkeypatch.setattr(pretrain, "run_megatron", run_megatron)
    run = Run(argparse.Namespace(), Path("runs/x"), None, None, [], [], {})
    with pytest.raises(CommonError) as caught:
        pretrain._train(run)
    assert str(caught.value) == (
        f"Megatron ended the run before its first iteration ({reason}); its log is runs/x/logs/rank0.log"
    )


def test_what_is_evaluated_untrained_is_told(tmp_path):
    def notes(*words: str) -> list[str]:
        return resolve([*BASE, "--run-name", "x", "--runs-dir", str(tmp_path), *words], 1).notes

    told = "--skip-train: there is no checkpoint, so the model that is evaluated was never trained"
    assert told in notes("--skip-train") and told not in notes()


def test_more_processes_than_gpus(monkeypatch):
    preflight.check_devices(1000, "--nproc-per-node")  # CPU mode has as many as one likes
    monkeypatch.setattr(preflight.megatron_cpu, "active", lambda: False)
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 2)
    preflight.check_devices(2, "--nproc-per-node")
    with pytest.raises(UsageError, match="^--nproc-per-node 3: this machine has 2 GPUs, one for each process$"):
        preflight.check_devices(3, "--nproc-per-node")
