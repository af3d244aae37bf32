"""A run that resumes with another length, batch or learning rate."""

import math
from types import SimpleNamespace

import pytest

from rmoe_megablocks.compat.megatron import schedule as megatron_schedule
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import preflight
from rmoe_megablocks.megatron.checkpoints import compatibility, schedule
from rmoe_megablocks.megatron.inputs import batches
from tests.distributed.arguments import BASE

COSINE = "--lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1".split()  # 10 iterations of batch 4


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """Arguments and notes of a run that resumes iteration 10 of one with COSINE (and ``saved``), and ``words``."""

    def arguments(*words):
        args = preflight.check([*BASE, *COSINE, *words, "--runs-dir", str(tmp_path)]).run.args
        args.explicit = {word for word in words if word.startswith("--")}
        return args

    def resume(*words, saved=()):
        theirs = arguments(*saved)
        scheduler = megatron_schedule.scheduler_of(theirs).state_dict() | {"num_steps": 10 * theirs.global_batch_size}
        state = {"args": theirs, "iteration": 10, "opt_param_scheduler": scheduler}
        args = arguments(*words)
        args.load = "runs/x"
        monkeypatch.setattr(compatibility, "saved_state", lambda folder, step: state)
        return args, schedule.choose(args)

    yield resume
    megatron_schedule.load_with({})


def loaded(args, steps):
    """Megatron's scheduler of ``args`` after it has loaded a checkpoint of BASE and COSINE at ``steps`` samples."""
    scheduler = megatron_schedule.scheduler_of(args)
    scheduler.load_state_dict(
        {"max_lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": 4.0, "lr_decay_steps": 40, "lr_decay_style": "cosine"}
        | {"num_steps": steps, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 40, "wd_incr_style": "constant"}
    )
    return scheduler


def cosine(iteration, of, peak=1e-3, low=1e-4):
    """The rate after ``iteration`` iterations, a tenth of them warm-up."""
    if iteration <= of / 10:
        return peak * iteration / (of / 10)
    return low + (peak - low) * (1 + math.cos(math.pi * (iteration / of - 0.1) / 0.9)) / 2


def test_the_same_run_has_nothing_to_say(resumed):
    args, notes = resumed()
    assert not notes and not args.override_opt_param_scheduler


def test_a_longer_run_follows_the_schedule_of_its_new_length(resumed):
    args, (note,) = resumed("--train-iters", "40")
    scheduler = loaded(args, 40)
    assert scheduler.num_steps == 40
    for iteration in range(10, 41):
        expected = cosine(iteration, 40)
        assert math.isclose(schedule.learning_rate(scheduler, 4 * iteration), expected, rel_tol=1e-9), iteration
    assert "that of --train-iters 40 (was 10): learning rate 0.0001 at iteration 10 becomes" in note
    assert f"{cosine(10, 40):.4g}, and 0.0001 at the end; add --use-checkpoint" in note


def test_a_longer_run_may_keep_the_old_schedule(resumed):
    args, (note,) = resumed("--train-iters", "40", schedule.USE_CHECKPOINT)
    scheduler = loaded(args, 20)
    assert math.isclose(schedule.learning_rate(scheduler, 20), cosine(5, 10), rel_tol=1e-9)
    assert schedule.learning_rate(scheduler, 80) == 1e-4
    assert "is the checkpoint's (was 10): learning rate 0.0001 at iteration 10 becomes 0.0001, and 0.0001 at" in note


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr 2e-3", "saved with --lr 0.001, this run has 0.002"),
        ("--min-lr 0", "--min-lr 0.0001, this run has 0.0"),
        ("--global-batch-size 8", "--global-batch-size 4, this run has 8"),
        ("--train-iters 40 --lr 2e-3", "--lr 0.001, this run has 0.002"),
        ("--train-iters 40 --lr-decay-iters 20", "--lr-decay-iters 10, this run has 20"),
        ("--lr-warmup-fraction 0.2", "--lr-warmup-fraction 0.1, this run has 0.2"),
        ("--lr-decay-style linear", "--lr-decay-style cosine, this run has linear"),
        ("--weight-decay 0.2", "--start-weight-decay 0.1, this run has 0.2"),
        ("--lr-warmup-init 1e-5", "--lr-warmup-init 0.0, this run has 1e-05"),
    ],
)
def test_any_other_difference_names_both_values_and_the_ways_out(resumed, words, said):
    with pytest.raises(UsageError) as error:
        resumed(*words.split())
    text = str(error.value)
    assert said in text and schedule.OVERRIDE in text and schedule.USE_CHECKPOINT in text and "\n" not in text


@pytest.mark.parametrize("words", ["--adam-beta2 0.9", "--adam-eps 1e-6", "--optimizer sgd"])
def test_what_a_loaded_optimizer_would_ignore(resumed, words):
    option, value = words.split()
    for allowed in ((), (schedule.OVERRIDE,)):
        with pytest.raises(UsageError, match=f"the checkpoint's optimizer has {option} .*--no-load-optim"):
            resumed(option, value, *allowed)
    (note,) = resumed(option, value, "--no-load-optim")[1]
    assert note == (
        "--no-load-optim: the optimizer starts anew, and the learning rate's schedule with it, at 0 and not at 0.0001"
    )


def test_another_peak_when_asked_for(resumed):
    args, (note,) = resumed("--lr", "2e-3", "--train-iters", "20", schedule.OVERRIDE)
    assert math.isclose(schedule.learning_rate(loaded(args, 40), 40), cosine(10, 20, 2e-3), rel_tol=1e-9)
    assert f"becomes {cosine(10, 20, 2e-3):.4g}, and 0.0001 at the end" in note and "add " not in note


def test_the_checkpoints_peak_when_asked_for(resumed):
    args, _ = resumed("--lr", "2e-3", schedule.USE_CHECKPOINT)
    assert (args.lr, args.min_lr) == (1e-3, 1e-4)  # Megatron tells parameter groups by them


def test_another_batch_size_tells_where_its_learning_rate_ends(resumed):
    _, (note,) = resumed("--global-batch-size", "8", "--train-iters", "20", schedule.OVERRIDE)
    assert f"{cosine(40 + 10 * 8, 160):.4g} at the end" in note  # 120 of 160 samples


def test_a_smaller_batch_still_has_data_for_all_iterations():
    args = SimpleNamespace(train_iters=20, iteration=10, global_batch_size=2, consumed_train_samples=40)
    args.step_batch_size_schedule = args.phase_transition_iterations = None
    assert batches.training_samples(args, 20 * 2) == 40 + 10 * 2
    args.consumed_train_samples = 20
    assert batches.training_samples(args, 40) == 40


def test_the_groups_of_a_load_are_the_checkpoints_and_then_the_runs_own(monkeypatch):
    seen, optimizer = [], SimpleNamespace(param_groups=[{"max_lr": 2e-3, "min_lr": 0.0}, {"max_lr": 5.0}])
    steps = SimpleNamespace(step=seen.append)

    def load(model, optimizer, scheduler):
        seen.append([dict(group) for group in optimizer.param_groups])
        return 7, 0

    monkeypatch.setattr(megatron_schedule.training, "load_checkpoint", load)
    megatron_schedule.load_with({"max_lr": (2e-3, 1e-3), "min_lr": (0.0, 1e-4)})
    assert megatron_schedule.training.load_checkpoint([], optimizer, steps) == (7, 0)
    assert seen == [[{"max_lr": 1e-3, "min_lr": 1e-4}, {"max_lr": 5.0}], 0]
    assert optimizer.param_groups == [{"max_lr": 2e-3, "min_lr": 0.0}, {"max_lr": 5.0}]
    megatron_schedule.load_with({})
    assert megatron_schedule.training.load_checkpoint is load
