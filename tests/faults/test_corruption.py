"""Every file of a checkpoint, damaged in every way: it is noticed and named, or what is loaded is what was saved.

docs/checkpoints.md has the outcomes as a table. The checkpoint is a real one of two ranks; each case goes the way of a
run, from the choice of the checkpoint to the tensors, in this process. A few go through Megatron on two ranks.
"""

import shutil
from pathlib import Path

import pytest
import torch

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checkpoints import compatibility, safety
from rmoe_megablocks.megatron.checkpoints import files as checkpoint_files
from rmoe_megablocks.megatron.checkpoints.files import MANIFEST, TRACKER
from tests.checkpoints import flip, flip_in_a_weight, load_tensors, stored
from tests.distributed.arguments import of_type
from tests.faults.test_kills import TINY, run_steps

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "integrity.json", "metadata.json", TRACKER)
HARMLESS = {(TRACKER, "truncate to nothing"), (TRACKER, "delete"), (MANIFEST, "delete")}
PP2 = "--pipeline-model-parallel-size 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corruption")


def argv(folder: Path, name: str, *words: str) -> list[str]:
    return [*TINY, *PP2, "--runs-dir", str(folder), "--run-name", name, *words]


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    """The checkpoint, and what two ranks of Megatron do with damaged copies of it."""
    steps = [{"name": "saved", "ranks": 2, "argv": argv(folder, "saved", "--exit-interval", "4")}]
    for name, damage, words in (
        ("truncated", "truncated data", []),
        ("flipped", "flipped tensor", []),
        ("not verified", "flipped tensor", ["--no-verify-integrity"]),
        ("older", "flipped tensor", ["--ckpt-step", "2"]),
    ):
        step = {"name": name, "ranks": 2, "folder": str(folder / name), "before": ["copy saved", damage]}
        steps.append(step | {"argv": argv(folder, name, *words)})
    return run_steps(steps, folder)


@pytest.fixture
def saved(folder, results, tmp_path) -> Path:
    """A copy of the checkpoints, to damage."""
    assert results["saved"]["codes"] == [0, 0], results["saved"]["output"]
    return shutil.copytree(folder / "saved" / "checkpoints", tmp_path / "checkpoints")


def start(folder: Path) -> tuple[checkpoint_files.Choice, dict[str, torch.Tensor]]:
    """What a run loads from ``folder``, by the steps that its start takes. Raises UsageError as it does."""
    choice = checkpoint_files.choose(folder)
    compatibility.saved_arguments(folder, choice.iteration)
    safety.verify(folder / f"iter_{choice.iteration:07d}")
    (folder / TRACKER).write_text(str(choice.iteration))  # for the reader below, which knows only that
    return choice, load_tensors(folder)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def positions(path: Path) -> list[int]:
    """Where to flip a byte: all over the file, every one of a small file."""
    size = path.stat().st_size
    return list(range(size)) if size < 100 else sorted({size * i // 40 for i in range(40)} | {1, size - 1})


DAMAGES = ["truncate to nothing", "truncate to half", "lose the last byte", "delete", "append"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
        return
    kept = {"truncate to nothing": 0, "truncate to half": len(content) // 2, "lose the last byte": -1}
    path.write_bytes(content + b"\n" if how == "append" else content[: kept[how]])


def path_of(folder: Path, name: str) -> Path:
    return folder / name if name == TRACKER else folder / "iter_0000004" / name


def test_these_are_all_the_files(saved):
    assert sorted(path.name for path in (saved / "iter_0000004").iterdir()) == sorted(set(FILES) - {TRACKER})


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_or_harmless(saved, name, how):
    before = load_tensors(saved)
    damage(path_of(saved, name), how)
    if how == "append" and name in (MANIFEST, TRACKER):  # a line feed after text changes nothing
        assert same(start(saved)[1], before)
    elif name == TRACKER and how in ("truncate to half", "lose the last byte"):  # it is one character: nothing is left
        assert same(start(saved)[1], before)
    elif (name, how) in HARMLESS:
        choice, loaded = start(saved)
        assert choice.iteration == 4 and same(loaded, before)
        assert "is empty" in choice.note or "is missing" in choice.note or "go unnoticed" in choice.note
    else:
        assert_refused(saved, name)


def assert_refused(folder: Path, name: str) -> None:
    """By one line that names the file and the older checkpoint, which is then loaded when asked for."""
    with pytest.raises(UsageError) as caught:
        start(folder)
    text = str(caught.value)
    assert name in text and "--ckpt-step" in text and "\n" not in text and len(text) < 400
    assert checkpoint_files.choose(folder, step=2).iteration == 2


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_named_or_harmless(saved, name):
    path, before, refused = path_of(saved, name), load_tensors(saved), 0
    for position in positions(path):
        content = path.read_bytes()
        flip(path, position)
        try:
            choice, loaded = start(saved)
        except UsageError as error:
            assert name in str(error) and "--ckpt-step" in str(error)
            refused += 1
        else:
            assert choice.iteration == 4 and same(loaded, before), position
        path.write_bytes(content)
        (saved / TRACKER).write_text(path.read_text() if name == TRACKER else "4")
    # of the manifest, the name of its checksum and white space may go unnoticed
    assert refused == len(positions(path)) or (name == MANIFEST and refused > 0.8 * len(positions(path)))


def test_the_router_is_checked_in_the_checkpoint_that_ckpt_step_names(saved):
    """For existing jobs as well, where Megatron alone decides what to load."""
    shutil.rmtree(saved / "iter_0000004")
    args = arguments.parse([*TINY, "--load", str(saved), *of_type("linear")])
    with pytest.raises(UsageError, match="iter_0000004 is missing"):
        compatibility.check_router_matches(args)
    args.ckpt_step = 2
    with pytest.raises(UsageError, match="the checkpoint's router is gru, this run's is linear"):
        compatibility.check_router_matches(args)
    args.pretrained_checkpoint, args.load = args.load, str(saved / "nothing")
    with pytest.raises(UsageError, match="--pretrained-checkpoint .* the checkpoint's router is gru"):
        compatibility.check_router_matches(args)


def test_a_flip_in_the_pickled_arguments_is_named(saved):
    path, offset, length = stored(saved / "iter_0000004", "common_state")
    content = path.read_bytes()
    for i in range(25):
        flip(path, offset + length * i // 25)
        assert_refused(saved, path.name)
        path.write_bytes(content)


def test_without_verification_a_flipped_weight_goes_unnoticed(saved, monkeypatch):
    """Torch does not look at the checksums of its own file format: nothing but the manifest notices."""
    before = load_tensors(saved)
    path = flip_in_a_weight(saved / "iter_0000004")
    monkeypatch.setattr(safety, "verify", lambda folder: None)
    assert not same(start(saved)[1], before)
    monkeypatch.undo()
    assert_refused(saved, path.name)


@pytest.mark.parametrize("name", ["truncated", "flipped"])
def test_megatron_refuses_on_every_rank_in_one_line(results, name):
    result = results[name]
    assert result["codes"] == [2, 2], result["output"]  # no hang, see steps.TIMEOUT
    errors = [line for line in result["output"].splitlines() if line.startswith("rmoe: error: ")]
    assert "iter_0000004 is damaged or incomplete: __1_0.distcp is not as saved" in errors[0]
    assert "add --ckpt-step 2 to continue" in errors[0] and "Traceback" not in result["output"]
    assert len(errors) == 1


def test_megatron_loads_it_all_the_same_when_told_not_to_verify(results):
    assert results["not verified"]["codes"] == [0, 0], results["not verified"]["output"]
    assert "continuing from iteration 4" in results["not verified"]["output"]


def test_megatron_loads_the_older_one_when_asked(results, folder):
    assert results["older"]["codes"] == [0, 0], results["older"]["output"]
    assert "continuing from iteration 2" in results["older"]["output"]
    assert checkpoint_files.choose(folder / "older" / "checkpoints").iteration == 6
