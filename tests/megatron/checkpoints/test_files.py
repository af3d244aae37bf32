"""What a restart loads, decided from the files alone."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import files as checkpoint_files
from rmoe_megablocks.megatron.checkpoints.files import CONFIG, MANIFEST, TRACKER, choose
from rmoe_megablocks.megatron.checkpoints.safety import Saves, clear, make_latest


def save(folder: Path, iteration: int, manifest: bool = True, tracker: bool = True) -> Path:
    """Leaves what a save of ``iteration`` leaves."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True, exist_ok=True)
    for name in (".metadata", "__0_0.distcp", CONFIG):
        (path / name).write_text(json.dumps([name, iteration]))
    if manifest:
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
        checkpoint_files.seal(path, {"algorithm": "sha256", "files": files})
    if tracker:
        track(folder, iteration)
    return path


def track(folder: Path, text: object, seconds_later: float = 1) -> None:
    """The tracker, written ``seconds_later`` than everything else."""
    (folder / TRACKER).write_text(str(text))
    times = [path.stat().st_mtime_ns for path in folder.glob(f"iter_*/{MANIFEST}")]
    if times:
        time = max(times) + int(seconds_later * 1e9)
        os.utime(folder / TRACKER, ns=(time, time))


def age(folder: Path, seconds: float) -> None:
    """Makes everything in ``folder`` older, as time does."""
    for path in folder.rglob("*"):
        time = path.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(time, time))


def three(folder: Path) -> Path:
    for iteration in (2, 4, 6):
        age(folder, 10)
        save(folder, iteration)
    return folder


def refusal(folder: Path, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        choose(folder, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_nothing_there(tmp_path):
    assert choose(tmp_path / "nowhere") == checkpoint_files.Choice(tmp_path / "nowhere", None, None)


def test_the_ordinary_case_needs_no_reason(tmp_path):
    choice = choose(three(tmp_path))
    assert (choice.iteration, choice.note) == (6, f"continuing from iteration 6 in {tmp_path}")


def test_modification_times_mean_nothing_to_a_copy(tmp_path):
    for iteration in (4, 2, 6):  # the order in which a copy wrote them
        path = three(tmp_path / "original") / f"iter_{iteration:07d}"
        age(tmp_path / "copy", 10)
        shutil.copytree(path, tmp_path / "copy" / path.name, copy_function=shutil.copyfile)
    shutil.copyfile(tmp_path / "original" / TRACKER, tmp_path / "copy" / TRACKER)
    age(tmp_path / "copy" / "iter_0000006", 100)
    assert choose(tmp_path / "copy").note == f"continuing from iteration 6 in {tmp_path / 'copy'}"


@pytest.mark.parametrize(("text", "said"), [(None, "is missing"), ("", "is empty"), ("4", "still names iter_0000004")])
def test_killed_between_data_and_tracker(tmp_path, text, said):
    three(tmp_path)
    if text is None:
        (tmp_path / TRACKER).unlink()
    else:
        track(tmp_path, text, seconds_later=-5)
    choice = choose(tmp_path)
    assert choice.iteration == 6 and choice.note.startswith(f"continuing from iteration 6 in {tmp_path} (")
    assert said in choice.note


def test_killed_in_a_later_save(tmp_path):
    three(tmp_path)
    save(tmp_path, 8, manifest=False, tracker=False)
    assert choose(tmp_path).iteration == 6


def test_killed_in_the_first_save(tmp_path):
    save(tmp_path, 2, manifest=False, tracker=False)
    choice = choose(tmp_path)
    assert choice.iteration is None and "from the beginning: iter_0000002 is incomplete" in choice.note
    assert "complete ones: none" not in choice.note


def test_an_edited_tracker_is_not_taken_for_a_killed_save(tmp_path):
    track(three(tmp_path), 4)
    text = refusal(tmp_path)
    assert "names iter_0000004, but iter_0000006 was saved later" in text
    assert "--ckpt-step 4" in text and "--ckpt-step 6" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [("8", "iter_0000008, but it does not exist"), ("6 ½", "says '6 ½'"), ("-1", "says '-1'"), ("\0\0", "says '")],
)
def test_a_damaged_tracker(tmp_path, text, said):
    track(three(tmp_path), text)
    assert said in (text := refusal(tmp_path)) and "add --ckpt-step 6" in text


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", CONFIG])
def test_a_missing_file_is_named_and_no_older_checkpoint_taken_unasked(tmp_path, name):
    (three(tmp_path) / "iter_0000006" / name).unlink()
    assert f"names iter_0000006, but {name} is missing; add --ckpt-step 4" in refusal(tmp_path)
    assert choose(tmp_path, step=4).iteration == 4
    assert "complete ones: 4, 2" in refusal(tmp_path, step=6)


def test_no_older_checkpoint_is_taken_for_a_damaged_one_without_a_tracker(tmp_path):
    (three(tmp_path) / "iter_0000006" / "__0_0.distcp").unlink()
    (tmp_path / TRACKER).unlink()
    told = refusal(tmp_path)
    assert "is missing, and in iter_0000006 __0_0.distcp is missing; add --ckpt-step 4" in told


def test_every_damaged_byte_of_a_manifest_is_noticed(tmp_path):
    path = three(tmp_path) / "iter_0000006" / MANIFEST
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        if checkpoint_files.inspect(tmp_path, 6).state is checkpoint_files.State.COMPLETE:
            unnoticed.append(position)
            assert checkpoint_files.read_manifest(path.parent)["files"] == json.loads(content)["files"]
            assert choose(tmp_path).iteration == 6
        else:
            assert "integrity.json is damaged; add --ckpt-step 4" in refusal(tmp_path)
    assert len(unnoticed) <= len("checksum")  # its name: then it is a manifest of Megatron's
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "integrity.json is damaged; add --ckpt-step 4" in refusal(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, CONFIG, ""])
def test_what_cannot_be_read_is_neither_missing_nor_damaged(tmp_path, name):
    """An older checkpoint would be the newest complete one: with a tracker that is gone it was taken, with a line."""
    path = three(tmp_path) / "iter_0000006" / name
    (tmp_path / TRACKER).unlink()
    path.rename(tmp_path / "away")
    path.symlink_to(path)  # for root too
    assert re.search(f"{re.escape(str(path))} cannot be read \\(Too many levels", refusal(tmp_path))


def test_a_checkpoint_without_a_manifest_is_loaded_and_said_to_be_unverified(tmp_path):
    for iteration in (2, 4):
        save(tmp_path, iteration, manifest=False)
    choice = choose(tmp_path)
    assert choice.iteration == 4 and "damage to its files would go unnoticed" in choice.note
    assert choose(tmp_path, step=2).iteration == 2
    (tmp_path / "iter_0000004" / CONFIG).unlink()
    assert "it has no metadata.json" in refusal(tmp_path)


def test_megatron_alone_went_on_in_the_folder(tmp_path):
    three(tmp_path)
    save(tmp_path, 8, manifest=False)
    assert choose(tmp_path).iteration == 8


def test_release(tmp_path):
    track(tmp_path, "release")
    assert choose(tmp_path).iteration == 0


def test_ckpt_step(tmp_path):
    three(tmp_path)
    (tmp_path / TRACKER).write_text("")
    assert choose(tmp_path, step=2).note == f"continuing from iteration 2 in {tmp_path} (as --ckpt-step asks)"
    assert "--ckpt-step 3: --load" in (text := refusal(tmp_path, step=3)) and "complete ones: 6, 4, 2" in text


class Arguments:
    def __init__(self, folder: Path, step: int | None) -> None:
        self.load, self.save, self.ckpt_step, self.finetune = str(folder), str(folder), step, False


def test_after_a_roll_back_the_latest_is_not_the_highest(tmp_path):
    """Rolled back to 2 and saved 4 again, then killed before the tracker."""
    three(tmp_path)
    age(tmp_path, 10)
    saves = Saves(Arguments(tmp_path, 2))
    assert saves.prepare(tmp_path, 4)
    assert (tmp_path / TRACKER).read_text() == "2" and choose(tmp_path).iteration == 2
    assert not list((tmp_path / "iter_0000004").iterdir())
    age(tmp_path, 10)
    save(tmp_path, 4, tracker=False)
    choice = choose(tmp_path)
    assert choice.iteration == 4 and "still names iter_0000002" in choice.note
    track(tmp_path, 4)
    assert choose(tmp_path).note == f"continuing from iteration 4 in {tmp_path}"


def test_killed_while_the_rolled_back_checkpoint_becomes_the_latest(tmp_path, monkeypatch):
    three(tmp_path)
    age(tmp_path, 10)
    write = checkpoint_files.write_atomically

    def killed(path: Path, text: str) -> None:
        if path.name == TRACKER:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(checkpoint_files, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        make_latest(checkpoint_files.inspect(tmp_path, 2))
    assert choose(tmp_path).iteration == 2


def test_what_was_loaded_and_not_trained_further_is_not_written_again(tmp_path):
    three(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not Saves(Arguments(tmp_path, 6)).prepare(tmp_path, 6)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    elsewhere = Arguments(tmp_path, 6)
    elsewhere.save = str(tmp_path / "other")
    assert Saves(elsewhere).prepare(tmp_path / "other", 6)


def test_the_manifest_of_an_overwritten_checkpoint_goes_first(tmp_path, monkeypatch):
    folder = save(tmp_path, 2)
    order = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **kwargs: (order.append(path.name), unlink(path, **kwargs)))
    (folder / "left").mkdir()
    clear(folder)
    assert order[0] == MANIFEST and not list(folder.iterdir())


def test_names_in_words():
    assert checkpoint_files.listed(["a"]) == "a is"
    assert checkpoint_files.listed(["a", "b"]) == "a and b are"
    assert re.fullmatch(r"a, b, c and 3 others are", checkpoint_files.listed(list("abcdef")))
