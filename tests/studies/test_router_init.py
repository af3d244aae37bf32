"""The study of the router's initialisation: names, commands, figures and tables from runs that are known."""

import json
import subprocess

import numpy as np
import pytest
import torch

from rmoe_megablocks.errors import UsageError
from studies.router_init import __main__ as study
from studies.router_init import arms, entry, report, runs
from tests.studies.runs import finished


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("linear_init_method", "--moe-router-type linear --moe-router-init init_method"),
        ("gru_fan_in", "--moe-router-type gru --moe-router-init fan_in"),
        ("linear_fan_in_no_clip", "--moe-router-type linear --moe-router-init fan_in --clip-grad 0"),
        ("gru_init_method_bias", "--moe-router-type gru --moe-router-init init_method --moe-router-rnn-bias"),
    ],
)
def test_arms(arm, options):
    assert arms.options(arm) == options.split()


@pytest.mark.parametrize(
    "arm", ["", "gru", "no_aux", "gru_no_aux", "gru_fan_in_", "gru_fan_in_zeros", "linear_fan_in_bias", "xgru_fan_in"]
)
def test_no_arms(arm):
    with pytest.raises(UsageError, match="--arms .*: expected one of gru_init_method, gru_fan_in"):
        arms.options(arm)


def test_names():
    name = arms.name_of("gru_fan_in_no_aux+x5+enwik8-seed12")
    assert name == arms.Name("gru_fan_in_no_aux", "x5+enwik8", 12) and str(name) == "gru_fan_in_no_aux+x5+enwik8-seed12"
    assert str(name.baseline) == "linear_init_method+x5+enwik8-seed12"
    for other in ("data", "gru_fan_in", "gru_fan_in-seed", "gru_fan_in-seedx", "gru-seed1", "gru_fan_in-seed1.log"):
        assert arms.name_of(other) is None


def started(tmp_path, monkeypatch, *argv: str, code: int = 0) -> list[list[str]]:
    """The commands that ``run`` would start."""
    commands = []

    def fake(command, **options):
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        commands.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(runs.subprocess, "run", fake)
    assert study.main(["run", "--runs-dir", str(tmp_path), *argv]) == (1 if code else 0)
    return commands


def test_all_arms_of_a_seed_run_before_the_next_seed(tmp_path, monkeypatch, capsys):
    commands = started(tmp_path, monkeypatch, "--seeds", "1", "2")
    named = [command[command.index("--run-name") + 1] for command in commands]
    assert named == [f"{arm}-seed{seed}" for seed in (1, 2) for arm in arms.DEFAULT]
    assert " ".join(commands[0]) == (
        f"bash launch/pretrain_rmoe.sh --nproc-per-node 1 --config {runs.CONFIG} --run-name gru_init_method-seed1 "
        f"--seed 1 --runs-dir {tmp_path} --pipeline-model-parallel-size 1 --no-checkpoints --moe-router-type gru "
        "--moe-router-init init_method"
    )
    assert "8 runs, 0 of them done" in capsys.readouterr().out


def test_faster_arms_have_an_entry_of_their_own(tmp_path, monkeypatch):
    (command,) = started(tmp_path, monkeypatch, "--seeds", "1", "--arms", "gru_fan_in_fast10")
    assert command[1:4] == ["-m", "studies.router_init.entry", "10"] and "--nproc-per-node" not in command
    assert command[-2:] == ["--moe-router-init", "fan_in"]


def test_routing_parameters_learn_faster_and_decay_as_before(monkeypatch):
    from megatron.core.optimizer import OptimizerConfig, combine_param_group_overrides
    from megatron.training import training

    monkeypatch.setattr(training, "get_standard_config_overrides", training.get_standard_config_overrides)
    entry.multiply_learning_rates(10)
    found = training.get_standard_config_overrides(OptimizerConfig(lr=1e-3, min_lr=1e-4))
    matrix, bias, fast = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2)), {"max_lr": 1e-2}

    def of(name, parameter):
        return combine_param_group_overrides([to for key, to in found.items() if key.matches(parameter, name)])

    for name in ("decoder.layers.0.mlp.router.weight", "decoder.layers.1.mlp.router.routing_layer.projector"):
        assert of(name, matrix) == fast | {"min_lr": 1e-3, "wd_mult": 0.1}
    assert of("rnn_router.bias_hh", bias) == fast | {"min_lr": 1e-3, "wd_mult": 0}
    assert "max_lr" not in of("decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight", matrix)


def test_what_is_there_is_left_and_what_is_unfinished_is_not(tmp_path, monkeypatch):
    finished(tmp_path, "gru_fan_in-seed1", 3.0, 3.0, iterations=240)
    finished(tmp_path, "gru_fan_in-seed2", 3.0, 3.0, iterations=239)
    cut = finished(tmp_path, "gru_fan_in-seed3", 3.0, 3.0, iterations=240) / "summary.json"
    summary = json.loads(cut.read_text())
    summary["evaluation"]["test"] = {"left_out": "not finished"}
    cut.write_text(json.dumps(summary))
    commands = started(tmp_path, monkeypatch, "--arms", "gru_fan_in", "--seeds", "1", "2", "3", "4")
    assert [command[command.index("--seed") + 1] for command in commands] == ["2", "3", "4"]


def test_longer_runs_and_another_text_have_names_of_their_own(tmp_path, monkeypatch):
    data = tmp_path / "enwik8"
    data.mkdir()
    words = ("--arms", "gru_fan_in", "--seeds", "7", "--iterations-factor", "5", "--data", str(data))
    (command,) = started(tmp_path / "runs", monkeypatch, *words)
    assert command[command.index("--run-name") + 1] == "gru_fan_in+x5+enwik8-seed7"
    assert " ".join(command).count("--train-iters 1200 --eval-interval 200 --log-interval 50") == 1
    assert f"--dataset {data} --eval-tokens 500000" in " ".join(command)


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    assert len(started(tmp_path, monkeypatch, "--seeds", "1", code=3)) == 4
    assert (
        f"gru_init_method-seed1: exit code 3, see {tmp_path / 'gru_init_method-seed1.log'}" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("run --arms gru", "--arms gru: expected one of"),
        ("run --iterations-factor 0", "--iterations-factor 0: must be at least 1"),
        ("run --jobs 0", "--jobs 0: must be at least 1"),
        ("run --data nowhere", "--data nowhere: there is no such file or folder"),
        ("report", "no finished run of this study"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argv, line):
    command, *rest = argv.split()
    assert study.main([command, "--runs-dir", str(tmp_path / "runs"), *rest]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


@pytest.fixture
def folder(tmp_path):
    """Three pairs whose differences are .1, .2 and .3, a seed without a partner, and what is none of the study's."""
    for seed, difference in ((1, 0.1), (2, 0.2), (3, 0.3)):
        finished(tmp_path, f"linear_init_method-seed{seed}", 3 + seed / 10, 2.9)
        finished(tmp_path, f"gru_init_method-seed{seed}", 3 + seed / 10 + difference, 2.9 - difference)
    finished(tmp_path, "gru_init_method-seed4", 3.9, 2.9)
    finished(tmp_path, "gru_fan_in+x5-seed1", 2.0, 1.9, iterations=40, partial="_partial")
    finished(tmp_path, "something else", 1.0, 1.0)
    (tmp_path / "gru_fan_in-seed1").mkdir()  # not finished
    return tmp_path


def test_the_table(folder, capsys):
    assert study.main(["report", "--runs-dir", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"][2:]
    assert [row[0] for row in rows] == ["linear_init_method", "gru_init_method", "gru_fan_in+x5"]
    linear, gru, longer = rows
    assert linear[1:5] == ["1, 2, 3", "3.2000 ± 0.1000", "2.9000 ± 0.0000", "0"]
    assert gru[1:3] == [
        "1, 2, 3, 4",
        f"{np.mean([3.2, 3.4, 3.6, 3.9]):.4f} ± {np.std([3.2, 3.4, 3.6, 3.9], ddof=1):.4f}",
    ]
    assert gru[4].startswith("+0.2000 [+0.1000, +0.3000] (3)") and gru[5].startswith("-0.2000 [-0.3000, -0.1000] (3)")
    assert gru[6:] == ["", "1.700", "1.500", "1.100", "0.01", "0.08"]  # iterations 2, 4 and 8, mean of both layers
    assert longer[1:6] == ["1", "2.0000", "1.9000", "- (no pair)", "- (no pair)"]


def test_runs_of_an_earlier_table_and_a_variants_own_pairs(tmp_path, capsys):
    """What was run elsewhere counts, unless it is here as well; a variant is also held against its own router."""
    finished(tmp_path / "old", "gru_fan_in-seed1", 3.0, 3.0)
    finished(tmp_path / "old", "gru_fan_in-seed2", 3.5, 3.0)
    assert study.main(["report", "--runs-dir", str(tmp_path / "old")]) == 0
    finished(tmp_path / "new", "gru_fan_in_no_aux-seed1", 3.2, 3.0)
    finished(tmp_path / "new", "gru_fan_in-seed2", 4.0, 3.0)
    capsys.readouterr()
    words = ["report", "--runs-dir", str(tmp_path / "new"), "--earlier", str(tmp_path / "old" / "runs.csv")]
    assert study.main(words) == 0
    plain, variant = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| gru")]
    assert plain[1:3] == ["1, 2", "3.5000 ± 0.7071"] and plain[6] == ""
    assert variant[1] == "1" and variant[6] == "+0.2000 (1)"
    assert study.main([*words[:-1], str(tmp_path / "new" / "report.md")]) == 2
    err = capsys.readouterr().err
    assert "is no runs.csv of this study" in err and err.count("\n") == 1


def test_the_figures_of_every_run(folder):
    report.run(type("Args", (), {"runs_dir": folder, "output": folder / "out", "figure": False, "earlier": None}))
    head, *rows = (folder / "out" / "runs.csv").read_text().splitlines()
    assert head.startswith("arm,condition,seed,iterations,test,valid,entropy_quarter")
    assert rows[0].startswith("linear_init_method,,1,8,3.1,2.9,1.7") and len(rows) == 8
    assert rows[-1].startswith("gru_fan_in,x5,1,40,2.0,1.9")


def test_runs_of_an_older_version_lack_the_logits_spread(tmp_path):
    run = finished(tmp_path, "gru_init_method-seed1", 3.0, 3.0)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.get("routing", {}).pop("logits_std", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = report.collect(tmp_path)
    assert next(iter(found.values()))["logits_std_start"] is None
    assert report.markdown(found).splitlines()[-1].endswith("| - | - |") and ",,\n" in report.as_csv(found)


def test_the_interval_is_the_bootstraps():
    """Of two values a resampled mean is the low, the middle or the high one: 1/4, 1/2, 1/4."""
    assert report.interval([0.0, 1.0]) == (0.0, 1.0)
    assert report.interval([0.5]) is None and report.interval([]) is None
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = report.interval(values)
    half = 1.96 * values.std() / 20  # the normal theory's, of as many values
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert report.interval(values) == (low, high)


def test_a_figure_without_matplotlib_is_refused_and_with_it_drawn(folder, capsys):
    code = study.main(["report", "--runs-dir", str(folder), "--figure"])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert code == 2 and "rmoe-megablocks[studies]" in capsys.readouterr().err
    else:
        assert code == 0 and (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
