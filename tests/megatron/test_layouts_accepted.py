"""No check refuses a layout that docs/layouts.md says works: arguments alone, without training.

The checks run before and after Megatron's validation, which gives many arguments another value.
"""

import pytest

from rmoe_megablocks.megatron.resolve import resolve
from tests.distributed.cases import compared, model


@pytest.mark.parametrize("case", compared(), ids=lambda case: case.name)
def test_is_accepted(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # tensor parallelism insists
    args = resolve([*model(case.shape), *case.argv, "--runs-dir", str(tmp_path)], world_size=case.processes).args
    assert args.world_size == case.processes
