"""Where stand-ins are put, and where they give way; each case in a process of its own."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from rmoe_megablocks.compat import megablocks as megablocks_compat
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megablocks import integer_ops

ROOT = Path(__file__).parents[2]
ON_A_GPU = "from rmoe_megablocks.compat import megatron_cpu; megatron_cpu.needed = lambda: False\n"
ENABLE = "from rmoe_megablocks.compat import megablocks as m; found = m.enable()\n"


def run(code: str, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_stand_ins_in_cpu_mode_whose_torch_claims_a_gpu():
    assert torch.cuda.is_available()
    expected = "stand-in" if megatron_cpu.needed() else None
    for name, kind in megablocks_compat.enable().items():
        assert expected in (kind, None)
        assert importlib.util.find_spec(name)  # dies for a module without a spec
    assert megablocks_compat.enable() == megablocks_compat.enable()
    if expected:
        assert sys.modules["megablocks_ops"].sort is integer_ops.sort


def test_without_cpu_mode_and_after_an_import_that_failed():
    if importlib.util.find_spec("megablocks_ops").origin:
        pytest.skip("MegaBlocks' compiled operations are installed: the import does not fail")
    code = """
        try:
            import megablocks
        except ModuleNotFoundError as error:
            print(error)
        """
    code = textwrap.dedent(code) + ENABLE + "from megablocks import Arguments; Arguments(mlp_impl='grouped', device=0)"
    assert "No module named 'megablocks_ops'" in run(code)


def test_compiled_modules_are_used_where_there_is_a_gpu(tmp_path):
    names = "exclusive_cumsum, histogram, indices, inclusive_cumsum, replicate_backward, replicate_forward, sort"
    source = f"from rmoe_megablocks.compat.megablocks.integer_ops import {names}\n"
    tmp_path.joinpath("megablocks_ops.py").write_text(source)
    show = (
        "import megablocks_ops, sys; print(found, sorted(k for k in found if hasattr(sys.modules[k], '__stand_in__')))"
    )
    expected = "{'megablocks_ops': 'compiled', 'grouped_gemm': 'stand-in'} ['grouped_gemm']"
    assert expected in run(ON_A_GPU + ENABLE + show, tmp_path)
    expected = "['grouped_gemm', 'megablocks_ops']"  # the compiled one takes CUDA tensors only
    assert expected in run(ENABLE + show, tmp_path)


def test_a_compiled_module_for_another_torch_is_told_and_replaced(tmp_path):
    tmp_path.joinpath("grouped_gemm.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    output = run(ON_A_GPU + ENABLE + "print(found['grouped_gemm'])", tmp_path)
    assert "stand-in" in output and "undefined symbol: _ZN3c10" in output


def test_other_releases_and_late_calls_are_refused():
    late = """
        import sys, types
        sys.modules["megablocks"] = types.ModuleType("megablocks")
        try:
            m.enable()
        except RuntimeError as error:
            print(error)
        """
    enable = "from rmoe_megablocks.compat import megablocks as m\n"
    assert "before the first import of megablocks" in run(enable + textwrap.dedent(late))
    other = """
        import importlib.metadata
        importlib.metadata.version = lambda name: "0.7.0"
        try:
            m.enable()
        except ImportError as error:
            print(error)
        """
    assert "MegaBlocks 0.10.x is supported, found 0.7.0" in run(enable + textwrap.dedent(other))


def test_tensors_on_a_gpu_keep_the_triton_kernels():
    kernel = megablocks_compat._by_device(lambda x, y: ("gpu", y), lambda x, y: ("cpu", y))
    assert kernel(torch.zeros(1), 3) == ("cpu", 3)
    assert kernel(types.SimpleNamespace(device=torch.device("cuda", 0)), 3) == ("gpu", 3)
