"""The datasets' compiled helper where a checkout has none."""

import importlib.util
import shutil

import numpy
import pytest
from megatron.core.datasets import helpers_cpp, utils

from rmoe_megablocks.compat import megatron_cpu, versions
from rmoe_megablocks.compat.megatron_cpu import dataset_helper
from rmoe_megablocks.errors import UsageError

SOURCE = versions.megatron_folder() / "core" / "datasets" / "helpers.cpp"
ofwheel = pytest.mark.skipif(dataset_helper.of_wheel(SOURCE.parent) is None, reason="needs the wheel of this Megatron")


@ofwheel
def test_the_wheels_helper_serves_a_checkout_of_the_same_source_alone(tmp_path):
    shutil.copy(SOURCE, tmp_path)
    finder = dataset_helper._HelperOfTheWheel()
    spec = finder.find_spec(dataset_helper.MODULE, [str(tmp_path)])
    assert spec.origin == str(dataset_helper.of_wheel(SOURCE.parent))
    assert finder.find_spec("megatron.core.datasets.helpers", [str(tmp_path)]) is None
    (tmp_path / "helpers.cpp").write_text(SOURCE.read_text() + "\n// changed\n")
    assert finder.find_spec(dataset_helper.MODULE, [str(tmp_path)]) is None


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_helper_is_compiled_without_pybind11_and_counts_alike(tmp_path, monkeypatch):
    shutil.copy(SOURCE, tmp_path)
    monkeypatch.setattr(dataset_helper, "_FLAGS", ("-O0", *dataset_helper._FLAGS[1:]))  # takes half the time
    file = dataset_helper.compile_into(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["helpers.cpp", file.name]
    spec = importlib.util.spec_from_file_location("helpers_cpp", file)
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    sizes = numpy.array([5, 9, 1, 12], dtype=numpy.int32)
    documents = numpy.array([2, 0, 3, 1], dtype=numpy.int32)
    arguments = (sizes, documents, 4, 1, int(sizes.sum()), True, 1)
    expected = helpers_cpp.build_sample_idx_int32(*arguments)
    assert expected.shape == (7, 2) and numpy.array_equal(compiled.build_sample_idx_int32(*arguments), expected)


def test_without_a_compiler_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"helpers\.cpp.*cannot be compiled \(no-such-compiler: No such file"):
        dataset_helper.compile_into(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not megatron_cpu.active(), reason="CPU mode is off")
def test_nothing_is_compiled_where_it_is_there(monkeypatch):
    monkeypatch.setattr(dataset_helper, "compile_into", lambda folder: pytest.fail("compiled"))
    utils.compile_helpers()
    monkeypatch.setattr(dataset_helper, "is_there", lambda: False)
    folders = []
    monkeypatch.setattr(dataset_helper, "compile_into", folders.append)
    utils.compile_helpers()
    assert folders == [SOURCE.parent.resolve()]
