"""The benchmark of the routing step: its providers are right, a wrong one is refused, and what it prints."""

import csv

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.measuring.errors import WrongResult
from benchmarks.routing_step import check, inputs, providers, roofline, sizes
from benchmarks.routing_step.inputs import Inputs, recurrence
from benchmarks.routing_step.providers import PROVIDERS, Provider
from benchmarks.routing_step.sizes import BF16, FP32, SIZES, Size

CPU = torch.device("cpu")
TINY = {
    "fp32": Size("a test's", 40, 16, 8, FP32, FP32, (70,), "cpu"),
    "bf16": Size("a test's", 40, 16, 8, BF16, BF16, (70,), "cpu"),
    "mixed": Size("a test's", 40, 16, 8, BF16, FP32, (70,), "cpu"),
}


@pytest.fixture
def tiny(monkeypatch):
    """Small sizes in the place of the declared ones, and a quickly measured machine."""
    monkeypatch.setattr(sizes, "SIZES", TINY)
    monkeypatch.setattr("benchmarks.routing_step.table.SIZES", TINY)
    monkeypatch.setattr(sizes, "DEFAULT", {"cpu": ("fp32",)})
    monkeypatch.setattr(roofline, "_COPIED", {"cpu": 2**20})
    monkeypatch.setattr(roofline, "_ROWS", {"cpu": 64})


@pytest.mark.parametrize("size", TINY)
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_agrees_with_float64(name, size, monkeypatch):
    monkeypatch.setattr(providers, "COMPILER", "aot_eager")  # inductor takes half a minute
    provider, size = PROVIDERS[name], TINY[size]
    reason = provider.why_not(size, CPU)
    if reason is not None:
        pytest.skip(reason)
    given = Inputs(size, 70, CPU)
    step = provider.build(given, provider.arithmetic(size))
    outputs, gradients = check.Check(given).errors(provider, step)
    assert 0 < outputs < 2e-2 and 0 < gradients < 2e-2
    if size.hidden == FP32:
        assert outputs < 1e-6 and gradients < 2e-6
    shapes = [tuple(output.shape) for output in step.run()]
    assert shapes == [(70, 8), (70, 16)] if provider.equations is recurrence else [(70, 8)]


def test_each_takes_its_own_parameters():
    """Six matrices and six biases are leaves of released; and all of them have the values that all others have."""
    given = Inputs(TINY["fp32"], 5, CPU)
    released = PROVIDERS["released"].build(given, FP32).leaves
    assert [len(released[name]) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "router")] == [
        3,
        3,
        3,
        3,
        1,
    ]
    eager = PROVIDERS["eager"].build(given, FP32).leaves
    for name, parts in released.items():
        assert torch.equal(torch.cat(parts), *eager[name])


def wrong(run) -> Provider:
    """naive with other arithmetic."""

    def build(given: Inputs, dtype: torch.dtype) -> inputs.Step:
        step = PROVIDERS["naive"].build(given, dtype)
        leaves = {name: parts[0] for name, parts in step.leaves.items()}
        return inputs.Step(lambda: run(dict(leaves)), step.leaves)

    return Provider("wrong", "a fault", build)


def swapped_gates(v):
    v["weight_hh"] = v["weight_hh"].roll(16, 0)
    return recurrence(v)


def weaker_gradient(v):
    v["h"] = v["h"].detach() * 0.01 + v["h"] * 0.99
    return recurrence(v)


def detached_state(v):
    v["h"] = v["h"].detach()
    return recurrence(v)


def not_finite(v):
    logits, h = recurrence(v)
    return logits * float("nan"), h


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (swapped_gates, "wrong: logits is off by"),
        (weaker_gradient, "wrong: the gradient of h is off by 1.0e-02"),
        (detached_state, "wrong: h has no gradient"),
        (not_finite, "wrong: logits is off by nan"),
    ],
)
def test_a_wrong_provider_is_refused(run, words):
    given, provider = Inputs(TINY["fp32"], 70, CPU), wrong(run)
    with pytest.raises(WrongResult, match=words):
        check.Check(given).errors(provider, provider.build(given, FP32))


def test_a_wrong_provider_ends_the_benchmark_in_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "wrong", wrong(swapped_gates))
    assert benchmarks.main(["routing_step", "--providers", "released", "wrong", "--rounds", "2"]) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "rmoe" in line]
    assert out == "" and line.startswith("rmoe: error: --providers wrong: logits is off by") and "not timed" in line


def test_keep_going(tiny, monkeypatch, capsys):
    """The others are measured, and the status says that not all is well."""

    def crashing(given, dtype):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setitem(PROVIDERS, "wrong", wrong(swapped_gates))
    monkeypatch.setitem(PROVIDERS, "crashing", Provider("crashing", "a fault", crashing))
    argv = ["routing_step", "--rounds", "2", "--keep-going", "--providers"]
    assert benchmarks.main([*argv, "wrong", "released", "crashing"]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "rmoe: error" in line]
    assert lines[0].startswith("rmoe: error: --providers wrong: logits is off by")
    assert lines[1:] == ["rmoe: error: --providers crashing: RuntimeError: no compiler (fp32, T 70)"]
    assert "| released: six linears" in out and "wrong" not in out and "crashing" not in out
    assert benchmarks.main([*argv, "wrong"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "rmoe: error: no provider is left to measure at fp32, T 70" in err


def test_table_and_csv(tiny, tmp_path, capsys):
    names = ["released", "eager", "megatron_linear"]
    argv = ["routing_step", "--sizes", "fp32", "mixed", "--providers", *names, "--tokens", "9", "70", "--rounds", "3"]
    argv += ["--against", "eager", "--csv", str(tmp_path / "r.csv"), "--output", str(tmp_path / "r.md")]
    assert benchmarks.main(argv) == 0
    table = (tmp_path / "r.md").read_text()
    assert capsys.readouterr().out == table
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 2  # sizes, tokens, providers, passes
    assert {row["size"] for row in rows} == {"fp32", "mixed"} and {row["tokens"] for row in rows} == {"9", "70"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["ratio_to_eager_low"]) <= float(row["ratio_to_eager"]) <= float(row["ratio_to_eager_high"])
        assert row["rounds"] == "3" and row["device"] and "torch" in row["machine"] and row["clock"] == "wall time"
        assert bool(row["roofline_ms"]) == (row["pass"] == "forward" and row["provider"] != "megatron_linear")
    eager = [row for row in rows if row["provider"] == "eager"]
    assert {float(row["ratio_to_eager"]) for row in eager} == {1.0}
    assert {row["saved_bytes_a_token"] for row in eager if row["size"] == "fp32"} == {str(6.0 * 16 * 4)}
    assert table.count("| eager: ours, gates kept | forward |") == 4 and table.count("bf16, state fp32; 3 rounds") == 2


def test_the_roofline_is_that_of_the_step():
    mixed = SIZES["0.9b_mixed"]
    assert roofline.forward_bytes(mixed) == 2560 + 512 + 512 + 64 + 256 == 3904
    assert roofline.forward_flop(mixed) == 2 * (1280 * 128 + 6 * 128 * 128 + 128 * 16)
    assert roofline.Rates(3904e6, 1e18).forward_seconds(mixed, 1000) == pytest.approx(1e-3)
    assert roofline.Rates(1e18, roofline.forward_flop(mixed) * 1e6).forward_seconds(mixed, 1000) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["routing_step", "--sizes", "0.9"], "--sizes 0.9: there is none of that name (did you mean 0.9b?)"),
        (
            ["routing_step", "--providers", "grucell"],
            "--providers grucell: there is none of that name (did you mean GRU",
        ),
        (["routing_step", "--providers", "eager", "eager"], "--providers: eager is named twice"),
        (["routing_step", "--providers", "upcast"], "--providers upcast: it is for an fp32 state beside bf16"),
        (
            ["routing_step", "--providers", "eager", "--against", "naive"],
            "--against naive: it is not among the providers",
        ),
        (["routing_step", "--rounds", "1"], "argument --rounds: must be at least 2, got 1"),
        (["routing_step", "--tokens", "many"], "argument --tokens: must be a whole number, got 'many'"),
        (["routing_step", "--threads", "2", "--processor-time"], "--processor-time: adds up all threads"),
        (["routing_step", "--csv", "nowhere/r.csv"], "--csv nowhere/r.csv: there is no folder nowhere"),
        (["router_overhead", "--output", "."], "--output .: is a folder"),
        (["router_overhead", "--layers", "2", "4"], "--layers 2 4: expected one number, or two of which"),
        (["router_overhead", "--impl", "triton"], "--impl: --moe-router-impl triton: it needs a CUDA GPU"),
        (["router_overhead", "--pairs", "0"], "argument --pairs: must be at least 2, got 0"),
        (["speed"], "argument NAME: invalid choice: 'speed'"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    if "triton" in argv and torch.cuda.is_available() and PROVIDERS["triton"].why_not(SIZES["0.9b"], CPU) is None:
        pytest.skip("the interpreter runs kernels here")
    threads = torch.get_num_threads()
    try:
        assert benchmarks.main(argv) == 2
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"rmoe: error: {words}"), err
