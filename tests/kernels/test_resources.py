"""The kernels compile for A100 and H100, keep to registers and use tensor cores, as far as machine code tells."""

import importlib.util
import os

import pytest

from tests.kernels import table

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
# beside the products: bias, sigmoid, tanh and the gradients, unrolled; a product on scalar units has thousands
LARGEST_FFMA = 400
REGISTERS = 255


def faults(found: dict) -> list[str]:
    """What is wrong with one compiled kernel."""
    checks = {
        "spills": found["stack"] == found["local"] == 0,
        "registers": found["registers"] <= REGISTERS,
        "shared memory": found["shared"] <= LARGEST_SHARED[found["target"]],
        "no tensor cores": found["tensor_core"] > 0 or found["kernel"].startswith("pointwise"),
        "scalar products": found["ffma"] <= LARGEST_FFMA,
        "narrow loads": found["wide_loads"] > 0,
    }
    return [what for what, fine in checks.items() if not fine]


def test_every_kernel_compiles_and_keeps_to_its_bounds():
    """A part of them; all with RMOE_TEST_ALL_KERNELS=1 (about three minutes)."""
    every = os.environ.get("RMOE_TEST_ALL_KERNELS") == "1"
    found = table.measured("all" if every else "some")
    assert len(found) >= 8
    assert not [(table.row(one), wrong) for one in found if (wrong := faults(one))]


def test_the_page_lists_every_case():
    from tests.kernels.resources import ALL, SOME, TARGETS  # with the interpreter or without, nothing is compiled here

    assert set(SOME) <= set(ALL)
    assert table.listed() == {table.names(case, target) for case in ALL for target in TARGETS}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "spills"),
        ({"local": 2}, "spills"),
        ({"shared": 200 * 1024}, "shared memory"),
        ({"tensor_core": 0}, "no tensor cores"),
        ({"ffma": 4000}, "scalar products"),
        ({"wide_loads": 0}, "narrow loads"),
    ],
)
def test_a_fault_is_named(change, fault):
    fine = {
        "kernel": "forward", "target": 80, "registers": 200, "stack": 0, "local": 0, "shared": 1024,
        "tensor_core": 9, "ffma": 100, "wide_loads": 9,
    }  # fmt: skip
    assert faults(fine) == [] and faults(fine | change) == [fault]
