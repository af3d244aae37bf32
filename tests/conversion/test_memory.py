"""A model of a billion parameters is converted in the memory of one shard. Takes 6 GB of disk for minutes."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch

from rmoe_megablocks.conversion.importing import write_checkpoint
from rmoe_megablocks.conversion.mapping.weights import entries
from tests.conversion.cells import ALL_CELLS

CONFIG = {
    **{"model_type": "rmoe", "architectures": ["RmoeForCausalLM"], "hidden_size": 1280, "num_hidden_layers": 24},
    **{"num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 64, "intermediate_size": 3456},
    **{"moe_intermediate_size": 448, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 96512},
    **{"moe_layer_freq": [1] * 24, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "router_type": "gru"},
    **{"router_options": {"moe_router_rnn_hidden_size": 512}, "max_position_embeddings": 4096},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SHARD = 500 * 10**6
# VmHWM, not getrusage: that begins with what the parent had when it made the process
MEASURED = """
import json, re, sys
from pathlib import Path
from rmoe_megablocks import cli
code = cli.main(sys.argv[1:])
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"code": code, "peak": peak}))
"""


class Drawn:
    """Stands for a folder: weights that are made when they are read."""

    config = CONFIG

    def __init__(self) -> None:
        pairs = [pair for entry in entries(CONFIG) for pair in zip(entry.names, entry.shapes, strict=True)]
        self.tensors = {name: (shape, torch.bfloat16) for name, shape in pairs}

    def read(self, name: str) -> torch.Tensor:
        return torch.empty(self.tensors[name][0], dtype=torch.bfloat16).uniform_(-0.05, 0.05)

    def padding(self) -> dict:
        return {}


def measured(*words: object) -> tuple[int, float]:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr[-500:]
    return found["peak"], time.monotonic() - start


@pytest.mark.skipif(not ALL_CELLS, reason="RMOE_TEST_ALL_CELLS=1")
def test_memory(tmp_path):
    drawn = Drawn()
    parameters = sum(torch.Size(shape).numel() for shape, _ in drawn.tensors.values())
    assert parameters > 9e8
    if shutil.disk_usage(tmp_path).free < 8 * 10**9:
        pytest.skip("needs 8 GB of disk")
    write_checkpoint(drawn, entries(CONFIG), tmp_path / "checkpoints")
    words = ["--no-verify", "--tokenizer", "none", "--max-shard-size", SHARD]
    peak, seconds = measured("export", tmp_path / "checkpoints", tmp_path / "folder", *words)
    size = sum(path.stat().st_size for path in (tmp_path / "folder").iterdir())
    print(f"export: {parameters:,} parameters, {size:,} bytes, {seconds:.0f} s, peak {peak:,} bytes")
    assert peak < SHARD + (1 << 30)
    shutil.rmtree(tmp_path / "checkpoints")
    peak, seconds = measured("import", tmp_path / "folder", tmp_path / "again")
    print(f"import: {seconds:.0f} s, peak {peak:,} bytes")
    assert peak < SHARD + (1 << 30)
