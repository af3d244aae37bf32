"""Every example that people copy runs: the literal blocks of docstrings, and README's blocks of Python and YAML."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rmoe_megablocks.launcher.config import load_config
from tests.distributed.arguments import BASE

ROOT = Path(__file__).resolve().parents[1]
NODES = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstring_examples() -> dict[str, str]:
    """Place of an example -> its code: blocks behind "::" with an import. Others are shapes, formulas, commands."""
    found = {}
    for path in sorted((ROOT / "rmoe_megablocks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, NODES) else None
            for block in re.findall(r"::\n\n((?:[ ]+\S.*\n|\n)+)", f"{text}\n"):
                if re.search(r"^\s*(from \S+ )?import ", block, re.MULTILINE):
                    place = f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}".rstrip(":")
                    found[place] = textwrap.dedent(block)
            assert ">>>" not in (text or ""), f"{path}: write examples as a block behind '::', which is run here"
    return found


def readme(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, *argv: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{code}\n{result.stderr}"
    return result.stdout


EXAMPLES = docstring_examples()


def test_docstring_examples_run():
    """One after the other in one process, each with names of its own."""
    assert {"rmoe_megablocks/megablocks/__init__.py", "rmoe_megablocks/compat/megatron_cpu/__init__.py"} <= set(
        EXAMPLES
    )
    lines = [f"exec(compile({code!r}, {place!r}, 'exec'), {{}})" for place, code in EXAMPLES.items()]
    run("\n".join(lines))


def test_the_megablocks_docstring_gives_every_layer_a_state():
    names: dict = {}
    exec(EXAMPLES["rmoe_megablocks/megablocks/__init__.py"], names)
    assert names["router_state"].shape == (16, 2, 128) and names["aux_loss"] > 0 and len(names["layers"]) == 4
    names["aux_loss"].backward()
    assert all(p.grad is not None for p in names["recurrence"].parameters())


def test_readmes_megablocks_block():
    (block,) = [block for block in readme("python") if "RecurrentStack" in block]
    names: dict = {}
    exec("import torch\nfrom torch import nn\nembedded_tokens = torch.randn(8, 2, 64)\n" + block, names)
    assert names["x"].shape == (8, 2, 64) and names["aux_loss"] > 0


def test_readmes_two_calls_in_your_own_code():
    """With the names that a Megatron script has anyway, and a command line."""
    (block,) = [block for block in readme("python") if "install_router(" in block]
    first, rest = block.split("\n", 1)
    theirs = (
        "from megatron.training.argument_utils import gpt_config_from_args\n"
        "from megatron.training.arguments import parse_and_validate_args\n"
    )
    local = "--transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion"
    local += " --no-gradient-accumulation-fusion --attention-backend unfused --distributed-backend gloo"
    shown = "\nprint('routing' in vars(model_config.transformer), model_config.transformer.router_state_size)"
    # --eval-interval: Megatron's parser has no default for it
    assert "True 16\n" in run(f"{first}\n{theirs}{rest}{shown}", *BASE, "--eval-interval", "100", *local.split())


@pytest.mark.parametrize("block", readme("yaml"))
def test_readmes_configuration(block, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(block)
    config = load_config(path)
    assert config.arguments == {"--num-layers": 24, "--moe-router-type": "gru", "--swiglu": True}
