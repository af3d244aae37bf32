"""Recordings of checkpoints: ranks' pieces in text order; with RMOE_TEST_ALL_CELLS=1 a run's, in three layouts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rmoe-megablocks[analyze]'")

from rmoe_megablocks import cli, data, yaml12
from rmoe_megablocks.analysis.recording.about import About
from rmoe_megablocks.analysis.recording.reading import Recording
from rmoe_megablocks.analysis.recording.recorders.checkpoints import Pass, Streams, _join, _prepared, _tokenizer_of
from rmoe_megablocks.analysis.recording.texts import Named
from rmoe_megablocks.analysis.recording.writing import Writer
from rmoe_megablocks.data import embedded_corpus
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing.watching import row_dtype
from tests.test_end_to_end import ENVIRONMENT, LAUNCHER, REPOSITORY, SMALL

ALL_CELLS = os.environ.get("RMOE_TEST_ALL_CELLS") == "1"
E, K, S, TOKENS, RANKS, ROWS = 4, 2, 8, 61, 2, 3
LAYERS = [2, 4]
CARRIED = ("state_norm", "update_gate", "reset_gate")


def whole(recording: Recording) -> dict[str, np.ndarray]:
    batches = list(recording.batches())
    names = [name for name, array in vars(batches[0]).items() if array is not None]
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names}


def planted(folder, windows: int) -> np.ndarray:
    """Files of two stages of a layer each and two data-parallel ranks; rows [window, layer, S] that count upwards."""
    folder.mkdir()
    rows = np.zeros((windows, len(LAYERS), S), row_dtype(E, K, CARRIED))
    rows["margin"] = np.arange(rows.size).reshape(rows.shape)
    rows["choices"] = (np.arange(rows.size).reshape(rows.shape) % E)[..., None]
    rows["scores"] = (np.arange(rows.size) / rows.size).reshape(rows.shape)[..., None]
    for name in CARRIED:
        rows[name] = rows["margin"] + len(name)
    for stage, layer in enumerate(LAYERS):
        for rank in range(RANKS):
            mine = [window for window in range(windows) if window // ROWS % RANKS == rank]
            (folder / f"layer-{layer:05}.dp-{rank}.bin").write_bytes(rows[mine, stage].tobytes())
            ids = np.array(mine)[:, None].repeat(S, 1).astype("<i4")
            (folder / f"predicted.dp-{rank}.bin").write_bytes(ids.tobytes())
            said = {"layers": [layer], "columns": [CARRIED], "state_size": 6, "ranks": RANKS, "rows": ROWS}
            (folder / f"rank-{stage * RANKS + rank}.json").write_text(json.dumps(said))
    return rows


@pytest.mark.parametrize("missing", [False, True])
def test_pieces_are_joined_in_text_order(tmp_path, missing):
    windows = 12  # of which the last four are padding
    rows = planted(tmp_path / "streams", 6 if missing else windows)
    (tmp_path / "text").write_text("")
    streams = Streams.of(tmp_path / "streams")
    assert (streams.layers, streams.columns, streams.state_size) == (LAYERS, CARRIED, 6)
    tokens = np.arange(TOKENS + 1)
    one = Pass(Named("a", tmp_path / "text"), tokens, "bytes", tmp_path / "streams", {"seq_length": S}, 7, missing)
    with Writer(tmp_path / "out", About("a", "m", "gru", True, LAYERS, E, K), rows=20) as writer:
        assert _join(writer, [one]) == (not missing)
        writer.finish(not missing)
    found = whole(Recording.open(tmp_path / "out"))
    expected = 6 * S if missing else TOKENS
    assert np.array_equal(found["token_T"], tokens[:expected])
    assert np.array_equal(found["next_token_T"], tokens[1 : expected + 1])
    assert np.array_equal(found["predicted_T"], np.arange(expected) // S)
    for name, column in (("margin", "margin_TL"), ("choices", "choices_TLK"), ("scores", "scores_TLE"),
                         ("update_gate", "update_gate_TL")):  # fmt: skip
        flat = rows[name].swapaxes(1, 2).reshape(-1, *found[column].shape[1:])
        assert np.array_equal(found[column], flat[:expected]), name


def test_no_pieces(tmp_path):
    with pytest.raises(UsageError, match="have recorded no routing"):
        Streams.of(tmp_path)


def test_bad_input_is_one_line(tmp_path, capsys):
    there = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        (there / f"iter_{step:07}").mkdir(parents=True)
    (there / "latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "text").write_text("a text")
    usual = ["analyze", there, "--data", tmp_path / "text", "--out", tmp_path / "out"]
    for words, said in (
        (usual, "config.yaml: no such file"),
        ([*usual, "--dtype", "bfloat16"], "--dtype is for Hugging Face folders"),
        ([*usual, "--tensor-model-parallel-size", 2], "--tensor-model-parallel-size 2: routing is recorded with 1"),
        ([*usual, "--context-parallel-size=2"], "--context-parallel-size 2: routing is recorded with 1"),
        ([*usual, "--steps", "2,3"], "has no checkpoint of iteration 3"),
        ([*usual, "--steps", "some"], "--steps some: expected all"),
        (["analyze", there / "iter_0000002", *usual[2:], "--steps", "all"], "is one checkpoint; name the folder above"),
    ):
        assert cli.main([str(word) for word in words]) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("rmoe: error: ") and said in line, words
    (tmp_path / "run" / "config.yaml").write_text(yaml12.write({"MODEL_ARGS": {"--mock-data": True}}))
    assert cli.main([str(word) for word in usual]) == 2
    assert "is recorded on a folder of rmoe data prepare" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LAYOUTS = {
    "one": [],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "ep2": ["--expert-model-parallel-size", "2"],
}


@pytest.mark.skipif(not ALL_CELLS, reason="trains, and records in three layouts; RMOE_TEST_ALL_CELLS=1 runs it")
def test_layouts_and_export_agree(tmp_path):
    (tmp_path / "text").write_bytes(embedded_corpus()[:20_000])
    data.prepare([tmp_path / "text"], tmp_path / "data", split="16000B,0B,2500B")
    command = [*LAUNCHER, *SMALL, "--train-iters", "4", "--pipeline-model-parallel-size", "1", "--eval-iters", "0"]
    command += ["--dataset", str(tmp_path / "data"), "--runs-dir", str(tmp_path), "--run-name", "run"]
    subprocess.run([*command, "--no-final-evaluation"], env=ENVIRONMENT, cwd=REPOSITORY, check=True)
    there, rmoe = tmp_path / "run" / "checkpoints", [sys.executable, "-m", "rmoe_megablocks.cli"]
    subprocess.run([*rmoe, "export", there, tmp_path / "export" / "run", "--no-verify"], env=ENVIRONMENT, check=True)
    recordings = {}
    for name, model, words in [("hf", tmp_path / "export" / "run", []), *((n, there, w) for n, w in LAYOUTS.items())]:
        command = [*rmoe, "analyze", model, "--data", tmp_path / "data", "--out", tmp_path / name, *words]
        subprocess.run(command, env=ENVIRONMENT, check=True)
        recordings[name] = Recording.open(tmp_path / name / "run"), tmp_path / name / "run" / "measures.json"
    reference, said = recordings.pop("hf")
    found, measures = whole(reference), json.loads(said.read_text())["figures"]
    for name, (recording, said) in recordings.items():
        assert recording.about.iteration == 4 and recording.about.seed == 1234
        assert recording.about.data[0]["sha256"] == reference.about.data[0]["sha256"]
        other = whole(recording)
        assert other.keys() == found.keys()
        for column, array in found.items():
            if array.dtype.kind in "iU":
                assert np.array_equal(other[column], array), (name, column)
            elif array.dtype == np.float16:  # the same but where a last bit of fp32 lies between two of fp16
                np.testing.assert_array_max_ulp(other[column], array, 1)
                assert (other[column] != array).mean() < 1e-3, (name, column)
            else:
                np.testing.assert_allclose(other[column], array, atol=1e-6, rtol=1e-6, err_msg=f"{name} {column}")
        for key, matrix in reference.weights.items():
            np.testing.assert_allclose(recording.weights[key], matrix, atol=1e-6)
        for figure, entry in json.loads(said.read_text())["figures"].items():
            assert entry["value"] == pytest.approx(measures[figure]["value"], abs=1e-6), (name, figure)


@pytest.mark.skipif(not ALL_CELLS, reason="trains, and records two checkpoints; RMOE_TEST_ALL_CELLS=1 runs it")
def test_checkpoints_of_a_run_on_a_text_file(tmp_path):
    """A run on the embedded text, recorded on a file that is prepared for it, from the first checkpoint to the page."""
    pytest.importorskip("matplotlib", reason="pip install 'rmoe-megablocks[analyze]'")
    text = embedded_corpus()[-1500:]
    (tmp_path / "text").write_bytes(text)
    command = [*LAUNCHER, *SMALL, "--train-iters", "2", "--save-interval", "1", "--eval-iters", "0"]
    command += ["--pipeline-model-parallel-size", "1", "--runs-dir", str(tmp_path), "--run-name", "run"]
    subprocess.run([*command, "--no-final-evaluation"], env=ENVIRONMENT, cwd=REPOSITORY, check=True)
    words = ["--steps", "all", "--data", f"prose={tmp_path / 'text'}", "--out", tmp_path / "out", "--resamples", "20"]
    command = [sys.executable, "-m", "rmoe_megablocks.cli", "analyze", tmp_path / "run" / "checkpoints", *words]
    subprocess.run([*command, "--report", tmp_path / "page"], env=ENVIRONMENT, check=True)
    recordings = [Recording.open(tmp_path / "out" / f"run-{step}") for step in (1, 2)]
    for step, recording in enumerate(recordings, 1):
        assert recording.about.iteration == step and recording.about.complete
        assert whole(recording)["token_T"].tolist() == list(text[:-1])
    first, last = (whole(recording)["choices_TLK"] for recording in recordings)
    measures = json.loads((tmp_path / "out" / "run-2" / "measures.json").read_text())["measures"]
    same = (first[..., :, None] == last[..., None, :]).any(2).mean((0, 2))
    assert measures["saturation"]["value"] == [pytest.approx(same), [1] * len(same)]
    page = (tmp_path / "page" / "index.html").read_text()
    assert 'id="figure-saturation"' in page and '"name": "run-2"' in page and '"name": "run-1"' not in page


def test_a_text_is_a_dataset_of_one_split(tmp_path):
    (tmp_path / "text").write_bytes(b"a text that is no UTF-8: \xff")
    (tmp_path / "config.yaml").write_text(yaml12.write({"MODEL_ARGS": {"--num-layers": 2}}))
    one = Named("text", tmp_path / "text")
    _, place, split = _prepared(one, None, tmp_path / "config.yaml", tmp_path)
    assert data.DatasetMetadata.load(place).splits[split].tokens == 26


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"--num-layers": 2}, "bytes"),  # the embedded text
        ({"--tokenizer-type": "GPTSentencePieceTokenizer"}, None),
        ({"--train-data-path": ["a"]}, None),
        ({"--per-split-data-args-path": "a.json"}, None),
        ({"--mock-data": True}, None),
        ({"--dataset": "nowhere"}, None),
    ],
)
def test_the_tokenizer_of_a_run_without_a_dataset(given, kind):
    assert _tokenizer_of(given) == kind
