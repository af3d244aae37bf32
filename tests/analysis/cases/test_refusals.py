"""What cannot be read, measured or compared: one line, exit code 2, nothing left."""

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rmoe-megablocks[analyze]'")

from rmoe_megablocks import cli, data, yaml12
from rmoe_megablocks.analysis.recording import about
from rmoe_megablocks.analysis.recording.recorders import checkpoints
from rmoe_megablocks.analysis.recording.texts import Named
from rmoe_megablocks.errors import UsageError
from tests.analysis.planted import Planted, routers, written


def refused(capsys, *words) -> str:
    assert cli.main(["analyze", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("measuring ")]
    assert not out and len(lines) == 1 and lines[0].startswith("rmoe: error: "), (out, err)
    return lines[0]


def recording(place, name, words=None, **changes):
    made = Planted(routers(layers=2, tokens=256, experts=4), name=name, **changes)
    made.vocabulary = words or {}
    return written(place / name, made)


def test_a_damaged_recording(tmp_path, capsys):
    place = recording(tmp_path, "a")
    shard = place / "part-00000.parquet"
    whole = shard.read_bytes()
    middle = len(whole) // 2
    turned = bytes(byte ^ 255 for byte in whole[middle : middle + 64])
    before = sorted(place.iterdir())
    for damage, said in (
        (whole[:-50], "part-00000.parquet is damaged"),
        (whole[:middle] + turned + whole[middle + 64 :], "part-00000.parquet is damaged"),
        (None, "part-00000.parquet: no such file"),
    ):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        assert said in refused(capsys, place, "--out", tmp_path / "out", "--report", tmp_path / "page")
        assert not (tmp_path / "out").exists() and not (tmp_path / "page").exists()
        shard.write_bytes(whole)
    assert sorted(place.iterdir()) == before
    (place / "vocabulary.json").write_text("{")
    assert "vocabulary.json is damaged" in refused(capsys, place)


def test_other_tokenizers_are_not_set_side_by_side(tmp_path, capsys):
    letters = {number: chr(97 + number % 26) for number in range(50)}
    pieces = {number: f" word{number}" for number in range(50)}
    models = [recording(tmp_path, name, words) for name, words in (("bytes", letters), ("pieces", pieces))]
    said = refused(capsys, *models)
    assert "bytes and pieces have different tokenizers (id 0 is 'a' and ' word0')" in said
    assert not list(tmp_path.rglob("measures.json"))
    # special ids spelled in another way are no other tokenizer
    alike = recording(tmp_path, "alike", letters | {0: "<s>", 1: "</s>"}, router_type="linear")
    assert cli.main(["analyze", str(models[0]), str(alike), "--resamples", "20"]) == 0


def test_options_that_want_several_models(tmp_path, capsys):
    place = recording(tmp_path, "a")
    assert "--compare needs two models or more" in refused(capsys, place, "--compare")
    assert "--baseline is for several models" in refused(capsys, place, "--baseline", "a")
    other = recording(tmp_path, "b")
    assert "leave --no-measures out" in refused(capsys, place, other, "--compare", "--no-measures")
    assert not list(tmp_path.rglob("measures.json"))


def test_seeds_of_one_setting_are_measured_and_not_compared(tmp_path, capsys):
    places = [recording(tmp_path, f"seed-{seed}", seed=seed) for seed in (1, 2)]
    assert cli.main(["analyze", *map(str, places), "--resamples", "20"]) == 0
    assert "rmoe: not compared: compare: all recordings are seeds of one setting" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("measures.json"))) == 2
    assert cli.main(["analyze", *map(str, places), "--resamples", "20", "--compare"]) == 2


@pytest.mark.parametrize("package", ["pyarrow", "pandas", "scipy", "tabulate", "matplotlib", "jinja2"])
def test_each_missing_package_is_named_before_anything_is_read(tmp_path, capsys, monkeypatch, package):
    places = [recording(tmp_path, name) for name in ("a", "b")]
    real = about.importlib.util.find_spec
    monkeypatch.setattr(about.importlib.util, "find_spec", lambda name, *more: None if name == package else real(name))
    said = refused(capsys, *places, "--report", tmp_path / "page")
    assert said.endswith(f"{package} is not installed: pip install 'rmoe-megablocks[analyze]'")
    assert not list(tmp_path.rglob("measures.json")) and not (tmp_path / "page").exists()


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A dataset of bytes, and a function that makes one of pieces of it, as far as dataset.json goes."""
    (tmp_path / "text").write_bytes(b"a text of some bytes " * 20)
    data.prepare([tmp_path / "text"], tmp_path / "data", split="50%,25%,25%")

    def of_pieces(name, checksum):
        place = tmp_path / name
        place.mkdir()
        for file in (tmp_path / "data").iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        said = json.loads((place / "dataset.json").read_text())
        said |= {"tokenizer": "sentencepiece", "tokenizer_model": "a.model", "tokenizer_sha256": checksum * 64}
        (place / "dataset.json").write_text(json.dumps(said))
        return place

    return tmp_path / "data", of_pieces


def test_a_checkpoint_is_not_recorded_on_other_ids(tmp_path, prepared):
    plain, of_pieces = prepared
    pieces, others = of_pieces("pieces", "a"), of_pieces("others", "b")
    for own, given, said in (
        (None, pieces, "was prepared with the tokenizer a.model, the run has been trained on bytes"),
        (plain, pieces, "was prepared with the tokenizer a.model, the run has been trained on bytes"),
        (pieces, plain, "was prepared with the tokenizer bytes, the run has been trained on sentencepiece"),
        (pieces, others, "the run has been trained on sentencepiece of another model"),
        (plain, plain, None),
        (pieces, pieces, None),
        (tmp_path / "gone", pieces, None),  # nobody knows
    ):
        settings = tmp_path / "config.yaml"
        settings.write_text(yaml12.write({"MODEL_ARGS": {"--dataset": str(own)} if own else {"--num-layers": 2}}))
        one = Named("text", given)
        if said is None:
            assert checkpoints._prepared(one, None, settings, tmp_path) == (one, given, "test")
        else:
            with pytest.raises(UsageError, match=said):
                checkpoints._prepared(one, None, settings, tmp_path)


def test_a_text_for_a_checkpoint_is_prepared_when_the_cpu_mode_is_installed(tmp_path, monkeypatch):
    """Preparing imports Megatron; a later installation would be refused, after the first text was recorded."""
    done = []
    monkeypatch.setattr(checkpoints.megatron_cpu, "install", lambda announce: done.append("install"))
    monkeypatch.setattr(checkpoints.datasets, "prepare", lambda *args, **more: done.append("prepare"))
    (tmp_path / "text").write_text("a text")
    (tmp_path / "config.yaml").write_text(yaml12.write({"MODEL_ARGS": {"--num-layers": 2}}))
    checkpoints._prepared(Named("text", tmp_path / "text"), None, tmp_path / "config.yaml", tmp_path)
    assert done == ["install", "prepare"]


def test_an_empty_text_for_a_checkpoint(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "config.yaml").write_text(yaml12.write({"MODEL_ARGS": {"--num-layers": 2}}))
    with pytest.raises(UsageError, match="empty") as told:
        checkpoints._prepared(Named("empty", tmp_path / "empty"), None, tmp_path / "config.yaml", tmp_path)
    assert "\n" not in str(told.value)


def test_what_stands_for_all_layers_is_missing_where_there_is_one(tmp_path, capsys):
    """One layer alone: no figure between layers, and the CSV of its information is that of one number."""
    made = Planted(routers(layers=1, tokens=256, experts=4), name="alone")
    place = written(tmp_path / "alone", made)
    assert cli.main(["analyze", str(place), "--resamples", "20"]) == 0
    assert "alone has one layer with experts: nothing compares layers" in capsys.readouterr().err
    lines = (place / "mutual_information.csv").read_text().splitlines()
    assert lines[0] == "layer,other_layer,value,baseline,adjusted" and len(lines) == 2
    figures = json.loads((place / "measures.json").read_text())["figures"]
    assert not {"mutual_information", "transition_information", "predictability"} & figures.keys()
    assert not (place / "transitions.csv").exists() and np.isfinite(figures["entropy"]["value"])
