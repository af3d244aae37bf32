"""What the reporter writes and says of iterations and evaluations, on one process without a model."""

import argparse
import json
import math
import os

import pytest
from megatron.core import num_microbatches_calculator as calculator
from megatron.training import training

from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.megatron.monitoring import reporting
from rmoe_megablocks.megatron.monitoring.reporting import Reporter

NATS = 2 * math.log(2)  # two bits a token


@pytest.fixture
def args(one_process, monkeypatch):
    args = argparse.Namespace(
        cuda_graph_impl="none",
        seq_length=64,
        train_iters=4,
        log_interval=2,
        curr_iteration=0,
        tensorboard_log_interval=1,
        eval_iters=3,
        eval_global_batch_size=4,
        multiple_validation_sets=False,
        validation_set_names=None,
    )
    scalars = {}
    writer = argparse.Namespace(add_scalar=lambda name, value, step: scalars.setdefault((name, step), value))
    monkeypatch.setattr(reporting, "get_args", lambda: args)
    monkeypatch.setattr(reporting, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(reporting, "get_wandb_writer", lambda: None)
    args.scalars = scalars
    return args


@pytest.fixture
def batches():
    """Of 4 samples, and of 8 after 16 samples."""
    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(
        -1, micro_batch_size=2, data_parallel_size=1, step_batch_size_schedule="0:4 16:8"
    )
    yield
    calculator.unset_num_microbatches_calculator()


def train(reporter: Reporter, iteration: int, samples_before: int) -> None:
    calculator.update_num_microbatches(samples_before)
    reporter.on_iteration({"lm loss": NATS}, 1e-3, iteration, 0, 0.5)


def lines(reporter: Reporter) -> list[dict]:
    return [json.loads(line) for line in reporter.metrics.path.read_text().splitlines()]


def test_an_iteration_has_its_own_batch_and_an_evaluation_takes_none_of_its_time(args, batches, tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 3.0, 53.0, 57.0])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    reporter = Reporter(tmp_path, {"train": 2.0, "valid": 4.0}, None)
    reporter.start()
    train(reporter, 3, samples_before=8)
    train(reporter, 4, samples_before=16)
    reporter.on_evaluation("valid", 0, 4, {"lm loss": NATS}, seconds=50.0)
    train(reporter, 5, samples_before=24)
    first, second, valid, third = lines(reporter)
    assert [line["tokens"] for line in (first, second, third)] == [4 * 64, 8 * 64, 8 * 64]
    assert [line["seconds"] for line in (first, second, third)] == [1.0, 2.0, 4.0]
    assert second["tokens_per_second"] == 256 and second["bpc"] == pytest.approx(1.0)
    assert reporter.metrics.totals(5) == {"seconds": 7.0, "tokens": 20 * 64}
    assert valid == {
        "kind": "valid",
        "iteration": 4,
        "lm_loss": NATS,
        "bpc": pytest.approx(0.5),  # of its own split's bytes
        "tokens": 3 * 4 * 64,
        "trained_tokens": 12 * 64,
        "seconds": 50.0,
    }
    assert args.scalars["bpc validation", 4] == pytest.approx(0.5) and args.scalars["bpc", 4] == pytest.approx(1.0)


def test_several_validation_sets_have_names_and_without_bytes_no_bpc(args, batches, tmp_path, capfd):
    args.multiple_validation_sets, args.eval_iters = True, [1, 2]
    reporter = Reporter(tmp_path, {}, None)
    train(reporter, 1, samples_before=0)
    for index in (0, 1):
        reporter.on_evaluation("valid", index, 1, {"lm loss": NATS}, 1.0)
    args.validation_set_names = ["law", "code"]
    reporter.on_evaluation("valid", 1, 1, {"lm loss": NATS}, 1.0)
    records = [line for line in lines(reporter) if line["kind"] == "valid"]
    assert [(line["set"], line["tokens"]) for line in records] == [("0", 256), ("1", 512), ("code", 512)]
    assert not any("bpc" in line for line in lines(reporter)) and not any("bpc" in name for name, _ in args.scalars)
    assert "| valid code | loss 1.3863 | 512 tokens | 00:01" in capfd.readouterr().err
    assert not reporter.wants_evaluation("test", 4)  # Megatron would fail


def test_what_is_evaluated_only_once(args, tmp_path):
    reporter = Reporter(tmp_path, {}, None, exact=("valid", "test"))
    assert reporter.wants_evaluation("valid", 4)
    reporter.on_evaluation("valid", 0, 4, {"lm loss": NATS}, 1.0)
    assert not reporter.wants_evaluation("valid", 4)  # the loop's last one, and the one after the loop
    assert not reporter.wants_evaluation("test", 4)  # comes exactly
    assert Reporter(tmp_path, {}, None).wants_evaluation("test", 4)
    assert not (tmp_path / "metrics.jsonl").exists()  # nothing was trained: not a point of the curve


def test_a_file_gets_whole_lines_and_a_terminal_what_fits(args, batches, tmp_path, capfd, monkeypatch):
    reporter = Reporter(tmp_path, {"train": 1.0}, None)
    train(reporter, 2, samples_before=0)
    err = capfd.readouterr().err
    assert "\r" not in err and err.count("\n") == 1 and "tokens/s | left " in err
    words = ["iteration      4/4", "loss 5.4", "x" * 50, "y"]
    assert reporting._fitting(words) == " | ".join(words)
    monkeypatch.setattr(reporting.sys, "__stderr__", argparse.Namespace(isatty=lambda: True, fileno=lambda: 2))
    monkeypatch.setattr(reporting.os, "get_terminal_size", lambda _: argparse.Namespace(columns=60))
    assert reporting._fitting(words) == "iteration      4/4 | loss 5.4"
    monkeypatch.setattr(reporting.os, "get_terminal_size", lambda _: argparse.Namespace(columns=5))
    assert reporting._fitting(words) == words[0]


def test_the_hook_tells_each_set_and_leaves_out_what_is_not_wanted(monkeypatch):
    told, evaluated, written = [], [], []

    def evaluate(*args, **kwargs):
        evaluated.append(args)
        return ({"lm loss": float(len(evaluated))}, None, False) if len(evaluated) < 4 else (None, None, True)

    def evaluate_and_print_results(prefix, forward_step_func, iterator, model, iteration, write_to_tensorboard=True):
        written.append(write_to_tensorboard)
        for _ in iterator:
            training.evaluate(forward_step_func)

    monkeypatch.setattr(training, "evaluate", evaluate)
    monkeypatch.setattr(training, "evaluate_and_print_results", evaluate_and_print_results)
    megatron_hooks.observe_evaluations(lambda split, iteration: iteration != 5, lambda *found: told.append(found[:4]))
    training.evaluate_and_print_results("iteration 3", None, "ab", None, 3)
    training.evaluate_and_print_results("iteration 5 on validation set", None, "a", None, 5)
    training.evaluate_and_print_results("iteration 6 on test set", None, "ab", None, 6)
    assert told == [
        ("valid", 0, 3, {"lm loss": 1.0}),
        ("valid", 1, 3, {"lm loss": 2.0}),
        ("test", 0, 6, {"lm loss": 3.0}),
    ]
    assert written == [True, False]  # the test split is no point of TensorBoard's validation curve
    assert training.evaluate is evaluate


def test_what_compiled_code_prints_goes_to_the_log(tmp_path, monkeypatch, capfd):
    """To the file descriptor, past Python's sys.stdout."""
    monkeypatch.delenv("RANK", raising=False)
    with reporting.megatron_output_to(tmp_path):
        os.write(1, b"[Gloo] Rank 0 is connected\n")
    os.write(1, b"afterwards\n")
    assert (tmp_path / "rank0.log").read_text() == "[Gloo] Rank 0 is connected\n"
    assert capfd.readouterr().out == "afterwards\n"
