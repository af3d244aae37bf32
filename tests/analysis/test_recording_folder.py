"""The folder of a recording: what is written is read, in batches; what is damaged or partial says so in one line."""

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rmoe-megablocks[analyze]'")

from rmoe_megablocks.analysis.recording.about import About
from rmoe_megablocks.analysis.recording.reading import Recording
from rmoe_megablocks.analysis.recording.writing import Writer
from rmoe_megablocks.errors import UsageError

L, E, K = 3, 5, 2


def about(**changes) -> About:
    return About(
        **dict(name="a", model="m", router_type="gru", recurrent=True, layers=[2, 3, 4], experts=E, topk=K) | changes
    )


def rows(tokens: int, recurrent: bool = True) -> dict:
    random = np.random.default_rng(tokens)
    made = {
        "token_T": random.integers(0, 50, tokens),
        "next_token_T": random.integers(-1, 50, tokens),
        "predicted_T": random.integers(-1, 50, tokens),
        "position_T": np.arange(tokens) % 16,
        "window_T": np.arange(tokens) // 16,
        "domain_T": np.where(np.arange(tokens) < tokens // 3, "ö wiki", "code"),
        "choices_TLK": random.integers(-1, E, (tokens, L, K)),
        "scores_TLE": random.random((tokens, L, E)).astype(np.float16),
        "margin_TL": random.random((tokens, L), np.float32),
    }
    if recurrent:
        made |= {f"{name}_TL": random.random((tokens, L), np.float32) for name in ("state_norm", "update_gate")}
    return made


def recording(place, tokens=1000, step=130, shard=300, **kind):
    made = rows(tokens, **kind)
    writer = Writer(place, about(), rows=shard)
    for start in range(0, tokens, step):
        writer.write(**{name: array[start : start + step] for name, array in made.items()})
    weights = {"expert_similarity_LEE": np.eye(E)[None].repeat(L, 0)}
    writer.finish(weights=weights, vocabulary={number: f"t{number}" for number in writer.token_ids})
    return made


@pytest.mark.parametrize("recurrent", [True, False])
def test_what_is_written_is_read(tmp_path, recurrent):
    made = recording(tmp_path / "r", recurrent=recurrent)
    read = Recording.open(tmp_path / "r")
    assert (read.about.complete, read.about.tokens, len(read.about.shards)) == (True, 1000, 4)
    batches = list(read.batches())
    for name, array in made.items():
        found = np.concatenate([getattr(batch, name) for batch in batches])
        assert found.shape == array.shape and np.array_equal(found, array), name
    assert batches[0].scores_TLE.dtype == np.float16 and batches[0].choices_TLK.dtype == np.int16
    assert all(batch.reset_gate_TL is None and (batch.state_norm_TL is None) != recurrent for batch in batches)
    assert read.weights["expert_similarity_LEE"].shape == (L, E, E)
    assert read.vocabulary == {number: f"t{number}" for number in range(50)}
    assert not (list((tmp_path / "r").glob("*.part")))


def test_columns_alone(tmp_path):
    made = recording(tmp_path)
    (first, *_) = Recording.open(tmp_path).batches(columns=["choices"])
    assert np.array_equal(first.choices_TLK, made["choices_TLK"][: len(first.choices_TLK)])
    assert first.token_T is None and first.scores_TLE is None
    with pytest.raises(ValueError, match="no recording has a column 'sores'"):
        next(Recording.open(tmp_path).batches(columns=["sores"]))


def test_a_killed_writer_leaves_whole_shards_that_say_partial(tmp_path, capsys):
    writer = Writer(tmp_path, about(), rows=300)
    with pytest.raises(UsageError, match="has no tokens"):
        Recording.open(tmp_path)
    writer.write(**rows(700))
    read = Recording.open(tmp_path)
    assert "partial: 600 tokens" in capsys.readouterr().err
    assert (read.about.complete, read.about.tokens, sum(len(one.token_T) for one in read.batches())) == (
        False,
        600,
        600,
    )


def test_nothing_is_written_over(tmp_path):
    recording(tmp_path / "r")
    with pytest.raises(UsageError, match="holds a recording already"):
        Writer(tmp_path / "r", about())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="holds something else"):
        Writer(tmp_path / "file", about())


def test_arrays_of_another_shape(tmp_path):
    writer = Writer(tmp_path, about())
    for name, array, said in (
        ("scores_TLE", np.zeros((8, L, E + 1)), r"scores: expected \[8, 3, 5\]"),
        ("domain_T", np.array(["a"]), "domain: 1 rows beside 8"),
    ):
        with pytest.raises(ValueError, match=said):
            writer.write(**rows(8) | {name: array})
    writer.write(**rows(8))
    with pytest.raises(ValueError, match="behind rows of columns"):
        writer.write(**rows(8, recurrent=False))


def test_damage_is_one_line(tmp_path):
    made = recording(tmp_path)
    shard = tmp_path / "part-00001.parquet"
    whole = shard.read_bytes()
    for damage, said in (
        (whole[:-100], "part-00001.parquet is damaged"),
        (b"", "part-00001.parquet is damaged"),
        (None, "part-00001.parquet: no such file"),
        (shard.with_name("part-00003.parquet").read_bytes(), "says 1000 tokens, the shards have 800"),
    ):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        with pytest.raises(UsageError, match=said):
            Recording.open(tmp_path)
        shard.write_bytes(whole)
    raised = 0
    for place in range(
        100, 12_000, 500
    ):  # one bit: in a page's bytes its checksum finds it, in a header it may do nothing
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = np.concatenate([batch.scores_TLE for batch in Recording.open(tmp_path).batches()])
        except UsageError as error:
            assert "part-00001.parquet is damaged" in str(error)
            raised += 1
        else:
            assert np.array_equal(found, made["scores_TLE"])
    assert raised > 15
    (tmp_path / "weights.npz").write_bytes(b"PK")
    shard.write_bytes(whole)
    with pytest.raises(UsageError, match="weights.npz is damaged"):
        Recording.open(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": 2}, "has the format 2, this version reads 1"),
        ({"layers": []}, "there is no layer with experts"),
        ({"experts": 0}, "there are no experts"),
        ({"topk": "2"}, "topk is '2'"),
        ({"shards": ["../x"]}, "shards is"),
        ({"experts": 6}, "scores is .* means 18 numbers a token"),
    ],
)
def test_what_a_recording_must_say(tmp_path, change, said):
    recording(tmp_path)
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=said):
        Recording.open(tmp_path)


def test_no_recording(tmp_path):
    with pytest.raises(UsageError, match="is no recording"):
        Recording.open(tmp_path)
    (tmp_path / "recording.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        Recording.open(tmp_path)
    (tmp_path / "recording.json").write_text('{"format": 1}')
    with pytest.raises(UsageError, match="lacks experts"):
        Recording.open(tmp_path)
