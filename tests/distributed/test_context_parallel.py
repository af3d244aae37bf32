"""What is special when a sequence is split over ranks: CPU mode's attention, logged figures and evaluation.

That losses and gradients are one process's is in test_layouts.py and test_gradients.py.
"""

import pytest

NAME, ONE = "CP2 @ fp32", "base @ fp32"


def test_attention_is_upstreams(lab):
    for rank in lab.results[NAME]:
        assert len(rank["attention"]) == 8
        assert all(difference < 2e-6 for difference in rank["attention"].values()), rank["attention"]


def test_logged_figures_are_one_processs(lab):
    (one,) = lab.results[ONE]
    for rank in lab.results[NAME]:
        assert rank["health"].keys() == one["health"].keys() and len(one["health"]["state_norm"]) == 4
        for name, values in one["health"].items():
            assert rank["health"][name] == pytest.approx(values, rel=1e-5), name


def test_evaluation_is_one_processs(lab):
    (one,) = lab.results[ONE]
    for rank in lab.results[NAME]:
        assert rank["evaluation"] == pytest.approx(one["evaluation"], rel=1e-6)


def test_a_fault_in_attention_is_noticed(lab):
    ranks = lab.results["fault: keys' gradient not summed"]
    wrong = {name for rank in ranks for name, difference in rank["attention"].items() if difference > 1e-3}
    assert wrong == {f"{mask} {name}" for mask in ("causal", "window") for name in ("key", "value")}
