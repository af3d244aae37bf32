"""Recordings of folders: what the model chose, with its scores, states and gates; one line for bad input."""

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rmoe-megablocks[analyze]'")
pytest.importorskip("transformers", reason="pip install 'rmoe-megablocks[hf]'")

import torch
import transformers

from rmoe_megablocks import cli
from rmoe_megablocks.analysis.recording.reading import Recording
from rmoe_megablocks.analysis.recording.recorders import folders
from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.evaluation import loading
from rmoe_megablocks.routing.parts.recurrent import RecurrentLayer
from rmoe_megablocks.routing.reference import gru_step, layerwise_logits
from rmoe_megablocks.routing.watching import choice_of
from tests.evaluation.made import TEXT, folder
from tests.huggingface.built import routers

WINDOW = 16


def analyze(place, model, *words, text=TEXT) -> Recording:
    (place / "text").write_bytes(text)
    done = cli.main(["analyze", str(model), "--data", f"wiki={place / 'text'}", "--out", str(place / "out"),
                     "--no-measures", *map(str, words)])  # fmt: skip
    assert done == 0
    return Recording.open(place / "out" / model.name)


def whole(recording: Recording) -> dict[str, np.ndarray]:
    batches = list(recording.batches())
    names = [name for name, array in vars(batches[0]).items() if array is not None]
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names}


def refused(capsys, *words) -> str:
    assert cli.main([str(word) for word in words]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("recording")]
    assert len(err) == 1 and err[0].startswith("rmoe: error: "), err
    return err[0]


@torch.inference_mode()
def passes(place, tokens: np.ndarray):
    """Of each window on its own, nothing padded: (inputs and outputs of each router, next-token logits)."""
    model = loading.model(place, torch.float32, torch.device("cpu"))
    for start in range(0, len(tokens) - 1, WINDOW):
        end = min(start + WINDOW, len(tokens) - 1)
        calls: list = []
        hooks = [r.register_forward_hook(lambda m, i, o, calls=calls: calls.append((m, i, o))) for r in routers(model)]
        logits = model(torch.from_numpy(tokens[start:end].astype(np.int64))[None], use_cache=False).logits
        for hook in hooks:
            hook.remove()
        yield start, end, calls, logits


KINDS = {
    "gru": ("gru", {}),
    "linear": ("linear", {}),
    "lstm": ("lstm", {}),
    "eda": ("eda", {}),
    "null experts": ("gru", {"num_null_experts": 2}),
    "sigmoid and bias": ("gru", {"router_score_function": "sigmoid", "router_enable_expert_bias": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_chose(tmp_path, kind):
    name, changes = KINDS[kind]
    place = folder(tmp_path / "model", name, **changes)
    recording = analyze(tmp_path, place, "--micro-batch-size", 3)
    about, found = recording.about, whole(recording)
    tokens = np.frombuffer(TEXT, np.uint8)
    assert about.layers == [2, 3, 5] and about.complete and about.recurrent == (name != "linear")
    assert np.array_equal(found["token_T"], tokens[:-1]) and np.array_equal(found["next_token_T"], tokens[1:])
    assert np.array_equal(found["window_T"], np.arange(len(tokens) - 1) // WINDOW)
    assert ("update_gate_TL" in found, "state_norm_TL" in found) == (name == "gru", name != "linear")
    for start, end, calls, logits in passes(place, tokens):
        assert np.array_equal(found["predicted_T"][start:end], logits[0].argmax(-1).numpy())
        for place_, (router, _, (logits_TN, weights_TK, experts_TK, h_BSP)) in enumerate(calls):
            rows = (slice(start, end), place_)
            scores = logits_TN.sigmoid() if "sigmoid" in kind else logits_TN.softmax(-1)
            np.testing.assert_allclose(found["scores_TLE"][rows], scores[:, :4], atol=1e-3)
            real = experts_TK.masked_fill(weights_TK == 0, -1)
            assert np.array_equal(found["choices_TLK"][rows], real.numpy())
            if router.expert_bias is not None:
                scores = scores + router.expert_bias
            ranked = (scores if "sigmoid" in kind else logits_TN).sort(-1, descending=True).values
            np.testing.assert_allclose(found["margin_TL"][rows], ranked[:, 1] - ranked[:, 2], atol=1e-5)
            if name != "linear":
                read = router.layer.read(h_BSP) if isinstance(router.layer, RecurrentLayer) else h_BSP
                np.testing.assert_allclose(found["state_norm_TL"][rows], read[0].norm(dim=-1), rtol=1e-5)
    if kind == "null experts":
        assert (found["choices_TLK"] == -1).any()
    assert {"expert_similarity_LEE", "router_similarity_LEE"} - set(recording.weights) <= {"router_similarity_LEE"}


@torch.inference_mode()
def test_gates_are_those_between_the_states(tmp_path):
    """h_i = (1 - z) n + z h_{i-1}: states that the reference makes of the layers' inputs have the recorded lengths."""
    place = folder(tmp_path / "model", "gru")
    found = whole(analyze(tmp_path, place))
    start, end, calls, _ = next(iter(passes(place, np.frombuffer(TEXT, np.uint8))))
    shared = calls[0][1][2]
    gru = (shared.weight_ih, shared.weight_hh, shared.bias_ih, shared.bias_hh)
    layers = [router.layer for router, _, _ in calls]
    xs = [inputs[0][0] for _, inputs, _ in calls]
    projectors = [(layer.projector, layer.projector_bias) for layer in layers]
    _, states = layerwise_logits(xs, projectors, gru, [(layer.router, layer.router_bias) for layer in layers])
    before = torch.zeros_like(states[0])
    for place_, (x, layer, state) in enumerate(zip(xs, layers, states, strict=True)):
        np.testing.assert_allclose(found["state_norm_TL"][start:end, place_], state.norm(dim=-1), rtol=1e-5)
        p = x @ layer.projector.T
        # torch's own cell, with its gates read off its weights in another order of operations
        gates = p @ gru[0].T + gru[2], before @ gru[1].T + gru[3]
        reset, update = ((gates[0] + gates[1])[:, i * 6 : (i + 1) * 6].sigmoid() for i in (0, 1))
        np.testing.assert_allclose(found["reset_gate_TL"][start:end, place_], reset.mean(-1), atol=1e-6)
        np.testing.assert_allclose(found["update_gate_TL"][start:end, place_], update.mean(-1), atol=1e-6)
        torch.testing.assert_close(gru_step(p, before, *gru), state, rtol=0, atol=1e-6)
        before = state


def others(place, kind: str):
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=24, max_position_embeddings=WINDOW, num_experts_per_tok=2)  # fmt: skip
    config, model = {
        "mixtral": (transformers.MixtralConfig(num_local_experts=4, **sizes), transformers.MixtralForCausalLM),
        "olmoe": (transformers.OlmoeConfig(num_experts=4, **sizes), transformers.OlmoeForCausalLM),
        "llama": (transformers.LlamaConfig(**{k: v for k, v in sizes.items() if "experts" not in k}),
                  transformers.LlamaForCausalLM),
    }[kind]  # fmt: skip
    made = model(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    made.save_pretrained(place)
    tokenizers._bytes(None).save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_other_mixtures_of_experts(tmp_path, kind):
    place = others(tmp_path / kind, kind)
    recording = analyze(tmp_path, place)
    found = whole(recording)
    assert (recording.about.layers, recording.about.recurrent, recording.about.router_type) == ([1, 2], False, "linear")
    model = loading.model(place, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        ids = torch.tensor([list(TEXT[:WINDOW])])
        recorded = model(ids, output_router_logits=True, use_cache=False).router_logits
    for layer, logits in enumerate(recorded):
        top = logits.topk(2).indices.numpy()
        assert np.array_equal(found["choices_TLK"][:WINDOW, layer], top)
        np.testing.assert_allclose(found["scores_TLE"][:WINDOW, layer], logits.softmax(-1).numpy(), atol=1e-3)
    assert recording.weights["expert_similarity_LEE"].shape == recording.weights["router_similarity_LEE"].shape


def test_choices_the_host_restricts():
    """Within groups the chosen are not the best of all: they are recorded as they are, the margin is negative."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    chosen = torch.tensor([[True, False, True, False]])
    choice = choice_of(logits, chosen, 4, 2, "softmax")
    assert choice.choices_TK.tolist() == [[0, 2]] and choice.margin_T.tolist() == [-1.0]
    dropped = choice_of(logits, torch.tensor([[False, True, False, False]]), 4, 2, "softmax")
    assert dropped.choices_TK.tolist() == [[1, -1]]
    assert choice_of(logits, torch.ones(1, 4, dtype=torch.bool), 4, 4, "softmax").margin_T.isnan().all()


def test_an_interruption_leaves_a_partial_recording(tmp_path, monkeypatch, capsys):
    place = folder(tmp_path / "model", "gru")
    real, asked = folders.batch_of, []

    def interrupted(*args):
        asked.append(args)
        if len(asked) == 2:
            import signal

            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(folders, "batch_of", interrupted)
    (tmp_path / "text").write_bytes(TEXT)
    words = ["analyze", place, "--data", tmp_path / "text", "--out", tmp_path / "out", "--micro-batch-size", 1]
    assert cli.main([str(word) for word in words]) == 130
    assert "is partial: interrupted" in capsys.readouterr().err
    recording = Recording.open(tmp_path / "out" / "model")
    assert not recording.about.complete and recording.about.tokens == 2 * WINDOW
    assert "32 tokens, then it was interrupted" in capsys.readouterr().err


def test_domains_tokens_and_measures(tmp_path, capsys):
    place = folder(tmp_path / "model", "gru")
    (tmp_path / "a").write_bytes(TEXT * 30)
    (tmp_path / "b").write_bytes(TEXT[::-1] * 30)
    words = ["analyze", place, "--data", tmp_path / "a", "--data", f"back={tmp_path / 'b'}", "--tokens", 500]
    assert cli.main([str(word) for word in [*words, "--out", tmp_path / "out"]]) == 0
    recording = Recording.open(tmp_path / "out" / "model")
    found = whole(recording)
    assert (found["domain_T"] == "a").sum() == (found["domain_T"] == "back").sum() == 500
    assert [part["tokens"] for part in recording.about.data] == [500, 500]
    assert (np.diff(found["window_T"]) >= 0).all() and len(np.unique(found["window_T"])) == 64
    said = json.loads((tmp_path / "out" / "model" / "measures.json").read_text())
    assert said["tokens"] == 1000 and "mutual_information" in said["measures"]
    capsys.readouterr()
    assert cli.main(["analyze", str(tmp_path / "out" / "model"), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "model" / "measures.json").read_text())
    assert again["measures"]["load"] == said["measures"]["load"]


def test_bad_input_is_one_line(tmp_path, capsys):
    place, text, out = folder(tmp_path / "model", "gru"), tmp_path / "text", tmp_path / "out"
    text.write_bytes(TEXT)
    (tmp_path / "empty").write_bytes(b"")
    usual = ["analyze", place, "--data", text, "--out", out]
    for words, said in (
        (["analyze", tmp_path / "none", *usual[2:]], "none: no such file or folder"),
        (["analyze", text, *usual[2:]], "is a file: a model is a folder"),
        (["analyze", tmp_path, *usual[2:]], "neither a Hugging Face folder"),
        (["analyze", others(tmp_path / "llama", "llama"), *usual[2:]], "a dense model (llama) has nothing to analyze"),
        (["analyze", place, "--data", tmp_path / "empty", "--out", out], "empty is empty"),
        (["analyze", place, "--data", tmp_path / "x", "--out", out], "x: no such file or folder"),
        (["analyze", place, "--out", out], "--data WHAT is needed"),
        (["analyze", place, "--data", text], "--out DIR is needed"),
        ([*usual, "--data", f"text={text}"], "the label text is there twice"),
        ([*usual, "--tokens", 0], "--tokens 0: expected at least 1"),
        ([*usual, "--steps", "all"], "--steps is for folders of checkpoints"),
        ([*usual, "--split", "test"], "--data names a file"),
        ([*usual, "--pipeline-model-parallel-size", 2], "unrecognized arguments for what is no checkpoint"),
        ([*usual, "--seq-length", 17], "--seq-length 17: the model has been made for 16"),
        (["analyze", place, place, *usual[2:]], "two of the models are called model"),
    ):
        assert said in refused(capsys, *words), words
        assert not out.exists() or not any(out.iterdir()), words
    out.mkdir(exist_ok=True)
    (out / "model").mkdir()
    (out / "model" / "mine").write_text("")
    assert "holds something else already" in refused(capsys, *usual)


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    from rmoe_megablocks.analysis.recording import about

    monkeypatch.setattr(about.importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, "analyze", tmp_path, "--data", tmp_path, "--out", tmp_path / "out")
    assert "pyarrow is not installed: pip install 'rmoe-megablocks[analyze]'" in said


def test_one_layer_alone(tmp_path, capsys):
    place = folder(tmp_path / "model", "gru", moe_layer_freq=[0, 0, 1, 0, 0])
    (tmp_path / "text").write_bytes(TEXT * 20)
    words = ["analyze", place, "--data", tmp_path / "text", "--out", tmp_path / "out"]
    assert cli.main([str(word) for word in words]) == 0
    assert "has one layer with experts: nothing compares layers" in capsys.readouterr().err
