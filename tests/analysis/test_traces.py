"""Megatron-Core's routing trace, held against its own writer and reader."""

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rmoe-megablocks[analyze]'")

import torch
from megatron.core.transformer.moe.router_trace import RouterTracer, load_logits_for_record

from rmoe_megablocks.analysis.recording.about import About
from rmoe_megablocks.analysis.recording.reading import Recording
from rmoe_megablocks.analysis.recording.recorders import traces
from rmoe_megablocks.analysis.recording.writing import Writer
from rmoe_megablocks.errors import UsageError

T, L, E, K, S = 40, 2, 5, 2, 16


def recorded(place, **changes) -> tuple[Recording, np.ndarray]:
    logits = np.random.default_rng(0).standard_normal((T, L, E)).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choices = np.argsort(-logits, -1)[..., :K].astype(np.int16)
    about = About("a", "m", "gru", True, [1, 3], E, K, seq_length=S)
    with Writer(place, about, rows=12) as writer:
        rows = dict(token_T=np.arange(T), next_token_T=np.arange(T), position_T=np.arange(T) % S,
                    window_T=np.arange(T) // S, domain_T=np.full(T, "a"), choices_TLK=choices, scores_TLE=scores,
                    margin_TL=np.zeros((T, L)))  # fmt: skip
        writer.write(**rows | changes)
        writer.finish()
    return Recording.open(place), choices


def test_the_lines_are_those_of_its_writer(tmp_path):
    recording, choices = recorded(tmp_path / "r")
    traces.write(recording, tmp_path / "router_trace_rank0.jsonl")
    tracer = RouterTracer(str(tmp_path / "theirs"), max_steps=10, rank=0)
    for window in range(3):
        part = np.sort(choices[window * S : (window + 1) * S], -1).astype(np.int64)
        tracer.record_indices(torch.from_numpy(part), step=window, layer_ids=[0, 2])
    tracer.flush()
    ours = (tmp_path / "router_trace_rank0.jsonl").read_text()
    assert ours == (tmp_path / "theirs" / "router_trace_rank0.jsonl").read_text()


class Router(torch.nn.Module):
    """What the tracer hooks, as far as it looks."""

    def __init__(self):
        super().__init__()
        self.topk = K
        self.weight = torch.nn.Parameter(torch.randn(E, 8))

    def gating(self, x):
        return x @ self.weight.T

    def forward(self, x):
        logits = self.gating(x.flatten(0, -2))
        chosen = logits.topk(K).indices
        return logits, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A trace with logits of three steps and two layers, by Megatron's own hooks."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.manual_seed(0)
    tracer = RouterTracer(str(tmp_path / "trace"), max_steps=10, rank=0, capture_logits=True)
    layers = [Router(), Router()]
    for number, layer in enumerate(layers):
        layer.register_forward_hook(tracer.make_hook(f"decoder.layers.{number + 1}.mlp.router"))
    for _ in range(3):
        for layer in layers:
            layer(torch.randn(6, 2, 8))
    tracer.flush()
    return tmp_path / "trace" / "router_trace_rank0.jsonl"


def test_its_trace_is_read(theirs, tmp_path):
    traces.read(theirs, "t", tmp_path / "out")
    recording = Recording.open(tmp_path / "out")
    (batch,) = recording.batches()
    assert (recording.about.layers, recording.about.experts, recording.about.tokens) == ([2, 3], E, 36)
    assert batch.window_T.tolist() == [0] * 12 + [1] * 12 + [2] * 12 and (batch.token_T == -1).all()
    for record in map(json.loads, theirs.read_text().splitlines()):
        logits = load_logits_for_record(record, str(theirs.parent)).float()
        rows = (slice(record["step"] * 12, (record["step"] + 1) * 12), record["layer"] - 1)
        np.testing.assert_allclose(batch.scores_TLE[rows], logits.softmax(-1), atol=1e-3)
        assert np.array_equal(np.sort(batch.choices_TLK[rows], -1), np.sort(record["top_indices"], -1))
        assert np.array_equal(batch.choices_TLK[rows][:, 0], logits.argmax(-1))


def test_a_trace_through_the_command(theirs, tmp_path, capsys):
    """Recorded, measured and shown without tokens; written again it is a trace of choices, which is refused."""
    pytest.importorskip("matplotlib", reason="pip install 'rmoe-megablocks[analyze]'")
    pytest.importorskip("jinja2", reason="pip install 'rmoe-megablocks[analyze]'")
    from rmoe_megablocks import cli
    from rmoe_megablocks.analysis.report import gallery

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "entries", lambda: [])  # the page's text is looked at
        words = ["--out", tmp_path / "out", "--report", tmp_path / "page", "--write-trace", tmp_path / "again.jsonl"]
        assert cli.main(["analyze", str(theirs), *map(str, words), "--resamples", "20"]) == 0
    assert "router_trace_rank0: 36 tokens" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "router_trace_rank0" / "measures.json").read_text())
    counts = np.zeros((2, E))
    for record in map(json.loads, theirs.read_text().splitlines()):
        counts[record["layer"] - 1] += np.bincount(np.ravel(record["top_indices"]), minlength=E)
    np.testing.assert_allclose(found["measures"]["load"]["value"], counts / 72)
    assert {"vocabulary_specialisation", "expert_similarity", "state_norm"} <= found["left_out"].keys()
    page = (tmp_path / "page" / "index.html").read_text()
    assert "no token id was recorded" in page and '"name": "router_trace_rank0"' in page
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in theirs.read_text().splitlines()]
    choices = {(one["step"], one["layer"]): np.sort(one["top_indices"]).tolist() for one in whole}
    assert {(one["step"], one["layer"]): one["top_indices"] for one in again} == choices
    assert cli.main(["analyze", str(tmp_path / "again.jsonl"), "--out", str(tmp_path / "other")]) == 2
    assert "again.jsonl has choices alone" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_damage_is_one_line(theirs, tmp_path):
    whole = theirs.read_text()
    first = json.loads(whole.splitlines()[0])
    for text, said in (
        ("", "is empty"),
        (whole[:-40], "line 6: not a record of a routing trace"),
        ("[]\n", "line 1: not a record"),
        ("{}\n", "line 1: not a record of a routing trace .it has no step"),
        (json.dumps(first | {"top_indices": [[0, 9]] * 12}), "top_indices are not 2 of 5 experts"),
        (json.dumps({key: value for key, value in first.items() if "logit" not in key}), "has choices alone"),
        (json.dumps(first | {"logit_offset": 10**6}), "has no logits for step 0, layer 1"),
        ("\n".join(whole.splitlines()[:3]), "step 1 has layers .1., the first one .1, 2."),
    ):
        theirs.write_text(text)
        with pytest.raises(UsageError, match=said):
            traces.read(theirs, "t", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_a_trace_cannot_say(tmp_path):
    recording, choices = recorded(tmp_path / "r", choices_TLK=np.full((T, L, K), -1))
    with pytest.raises(UsageError, match="a token chose fewer than 2 experts"):
        traces.write(recording, tmp_path / "t.jsonl")
    assert not list(tmp_path.glob("t.jsonl*"))
