"""``rmoe eval`` of a run's checkpoints: what it has the launcher do; with RMOE_TEST_ALL_CELLS=1 the figures, too."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rmoe_megablocks import cli, data, yaml12
from rmoe_megablocks.data import embedded_corpus
from rmoe_megablocks.evaluation import checkpoints, texts
from tests.evaluation.made import refused
from tests.test_end_to_end import ENVIRONMENT, LAUNCHER, REPOSITORY, SMALL

ALL_CELLS = os.environ.get("RMOE_TEST_ALL_CELLS") == "1"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("data")
    (place / "text").write_bytes(embedded_corpus()[:30_000])
    data.prepare([place / "text"], place / "enwik8_1mb", split="20000B,4000B,6000B")
    return place / "enwik8_1mb"


def a_run(place: Path, **arguments) -> Path:
    """The folder of checkpoints of a run, as far as the launcher's arguments depend on it."""
    (place / "checkpoints" / "iter_0000003").mkdir(parents=True)
    (place / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    (place / "config.yaml").write_text(yaml12.write({"MODEL_ARGS": arguments}))
    return place / "checkpoints"


def words_of(settings: Path, *typed: str, **options) -> list[str]:
    args = Namespace(**dict(seq_length=None, micro_batch_size=None, eval_tokens=None) | options)
    args.megatron_arguments = list(typed)
    return checkpoints.argv(args, settings, settings.parent / "checkpoints", None)


def test_one_process_unless_a_layout_is_named(tmp_path):
    saved = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2, "--sequence-parallel": True}
    a_run(tmp_path, **saved, **{"--save": "there", "--eval-tokens": 9})
    fixed = ["--config", str(tmp_path / "config.yaml"), "--load", str(tmp_path / "checkpoints")]
    fixed += ["--skip-train", "--no-load-optim", "--no-checkpoints"]
    words = words_of(tmp_path / "config.yaml")
    assert words == [
        *(*fixed, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
        *("--sequence-parallel=null", "--save=null", "--eval-tokens=null"),
    ]
    words = words_of(tmp_path / "config.yaml", "--pipeline-model-parallel-size", "4", eval_tokens=5)
    assert words == [
        *(*fixed, "--tensor-model-parallel-size", "1", "--sequence-parallel=null", "--save=null"),
        *("--eval-tokens=null", "--eval-tokens", "5", "--pipeline-model-parallel-size", "4"),
    ]


def test_one_split_alone(dataset, tmp_path):
    metadata = data.DatasetMetadata.load(dataset)
    checkpoints.one_split(dataset, "valid", metadata, tmp_path / "one")
    one = data.DatasetMetadata.load(tmp_path / "one")
    assert {name: split.tokens for name, split in one.splits.items()} == {"train": 0, "valid": 0, "test": 4000}
    assert bytes(data.read_tokens(tmp_path / "one" / "test").astype("u1")) == embedded_corpus()[20_000:24_000]


def test_an_interrupted_one_has_the_figures_of_its_beginning(dataset, tmp_path, capsys, monkeypatch):
    """As an evaluation of the first tokens alone has, but for the word for it."""
    there, bits = a_run(tmp_path / "run"), 2.5

    def launcher(told):
        def launch(words):
            place = Path(words[words.index("--runs-dir") + 1]) / "eval"
            place.mkdir()
            (place / "summary.json").write_text(json.dumps({"layout": "1 process", **told}))
            (place / "arguments.json").write_text(json.dumps({"seq_length": 64}))
            return 0

        return launch

    results = []
    capped = {"test_bpc_partial": bits, "evaluation": {"test": {"tokens": 640, "of": 5999}}}
    stopped = {"left_out": "interrupted by a signal", "first_tokens": 640, "first_tokens_bpc": bits, "of": 5999}
    for told, code in ((capped, 0), ({"evaluation": {"test": stopped}}, 130)):
        monkeypatch.setattr(checkpoints, "launch", launcher(told))
        words = ["eval", there, "--data", dataset, "--json", tmp_path / "result.json"]
        assert cli.main(list(map(str, words))) == code
        assert ("PARTIAL (interrupted): the first 640 of 5,999 tokens" in capsys.readouterr().out) == (code == 130)
        results.append(json.loads((tmp_path / "result.json").read_text()))
    for result in results:
        assert result.pop("bits_per_byte") == pytest.approx(bits) and result.pop("tokens") == 640
        result.pop("seconds")
    assert results[0].pop("interrupted") is False and results[1].pop("interrupted") is True
    assert results[0] == results[1]


def test_prompts_that_the_training_leaves_out_count(tmp_path):
    row = {"text": "ask\n### Response:\nsay"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
    data.prepare(
        [tmp_path / "rows.json"], tmp_path / "out", split="50%,0,50%", json_key="text", loss_after="### Response:"
    )
    text, metadata = texts.of_dataset(tmp_path / "out", "test")
    assert len(text.tokens) == 2 * len(row["text"]) and "'### Response:', counts here" in text.notes[-1]
    checkpoints.one_split(tmp_path / "out", "test", metadata, tmp_path / "one")
    assert data.DatasetMetadata.load(tmp_path / "one").loss_after is None


def test_bad_input(dataset, tmp_path, capsys):
    there = a_run(tmp_path / "run")
    assert "--stride is for Hugging Face folders" in refused(capsys, "eval", there, "--data", dataset, "--stride", 2)
    (tmp_path / "text").write_text("a text")
    assert "a folder of rmoe data prepare" in refused(capsys, "eval", there, "--data", tmp_path / "text")
    (tmp_path / "run" / "config.yaml").unlink()
    assert "config.yaml: no such file" in refused(capsys, "eval", there, "--data", dataset)
    assert "neither a Hugging Face folder" in refused(capsys, "eval", tmp_path / "run", "--data", dataset)


def test_a_checkpoint_by_its_own_name(tmp_path):
    there = a_run(tmp_path).resolve()
    assert checkpoints.locate(there / "iter_0000003") == (there, 3)
    assert checkpoints.locate(there) == (there, None)


LAYOUTS = {
    "1 process": [],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "EP2": ["--expert-model-parallel-size", "2"],
}


@pytest.mark.skipif(not ALL_CELLS, reason="trains, and evaluates in three layouts; RMOE_TEST_ALL_CELLS=1 runs it")
def test_layouts_and_export_agree(dataset, tmp_path, capfd):
    command = [*LAUNCHER, *SMALL, "--dataset", str(dataset), "--runs-dir", str(tmp_path), "--run-name", "run"]
    subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    there, rmoe = tmp_path / "run" / "checkpoints", [sys.executable, "-m", "rmoe_megablocks.cli"]
    subprocess.run([*rmoe, "export", there, tmp_path / "hf", "--no-verify"], env=ENVIRONMENT, check=True)
    for name, model, words in [("hf", tmp_path / "hf", []), *((name, there, words) for name, words in LAYOUTS.items())]:
        for split in ("test", "valid") if name in ("hf", "1 process") else ("test",):
            command = [*rmoe, "eval", model, "--data", dataset, "--split", split, *words]
            subprocess.run([*command, "--json", tmp_path / "result.json"], env=ENVIRONMENT, check=True)
            result = json.loads((tmp_path / "result.json").read_text())
            assert result["bits_per_byte"] == pytest.approx(summary[f"{split}_bpc"], abs=1e-5), name
            assert name == "hf" or result["layout"].split(" DP")[0] == name
    before = capfd.readouterr()
    damaged = next((there / "iter_0000020").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = subprocess.run([*rmoe, "eval", there, "--data", dataset], env=ENVIRONMENT, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("rmoe: error: ")]
    assert done.returncode == 2 and len(said) == 1 and damaged.name in said[0], (done, before)
