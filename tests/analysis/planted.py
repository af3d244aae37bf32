"""Recordings made of arrays, with what is to be found planted in them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

COLUMNS = ("margin", "state_norm", "update_gate", "reset_gate")


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def best_first(scores_TLE, k):
    return np.argsort(-scores_TLE, axis=-1, kind="stable")[..., :k].astype(np.int16)


class Planted:
    """What ``Recording`` offers, of arrays; batches of ``rows`` rows."""

    def __init__(self, scores_TLE, k=2, *, choices_TLK=None, window=64, domain_T=None, token_T=None, rows=1000,
                 name="planted", weights=None, **columns):  # fmt: skip
        tokens, layers, experts = scores_TLE.shape
        self.rows = rows
        self.arrays = {
            "token_T": np.arange(tokens, dtype=np.int32) % 50 if token_T is None else token_T,
            "position_T": np.arange(tokens, dtype=np.int32) % window,
            "window_T": np.arange(tokens, dtype=np.int32) // window,
            "domain_T": np.full(tokens, "text") if domain_T is None else domain_T,
            "choices_TLK": best_first(scores_TLE, k) if choices_TLK is None else choices_TLK,
            "scores_TLE": scores_TLE.astype(np.float16),
        }
        tokens_T = self.arrays["token_T"]
        self.arrays["next_token_T"] = columns.pop("next_token_T", np.append(tokens_T[1:], -1).astype(np.int32))
        self.arrays["predicted_T"] = columns.pop("predicted_T", np.full(tokens, -1, np.int32))
        self.arrays |= {f"{name}_TL": columns.pop(name, None) for name in COLUMNS}
        self.about = SimpleNamespace(
            name=name, layers=list(range(1, layers + 1)), experts=experts, topk=self.arrays["choices_TLK"].shape[2],
            tokens=tokens, router_type="gru", recurrent=True, score_function="softmax", seed=None, iteration=100,
            seq_length=window, config={}, data=[{"label": "text", "name": "text", "tokens": tokens, "sha256": "0"}],
            null_experts=0, hidden_size=8, state_size=4, tokenizer={"kind": "bytes"},
        )  # fmt: skip
        for key, value in columns.items():
            assert hasattr(self.about, key), key
            setattr(self.about, key, value)
        self.weights = weights or {}
        self.vocabulary = {}

    def batches(self, columns=None):
        for start in range(0, len(self.arrays["token_T"]), self.rows):
            yield SimpleNamespace(
                **{key: None if v is None else v[start : start + self.rows] for key, v in self.arrays.items()}
            )


def written(place, made):
    """The planted recording as a folder, which is returned."""
    from rmoe_megablocks.analysis.recording.about import About
    from rmoe_megablocks.analysis.recording.writing import Writer

    with Writer(place, About(model="planted", **vars(made.about))) as writer:
        for batch in made.batches():
            rows = {name: array for name, array in vars(batch).items() if array is not None}
            writer.write(**{"margin_TL": np.zeros(batch.scores_TLE.shape[:2])} | rows)
        writer.finish(vocabulary=made.vocabulary)
    return place


def routers(scale=1.0, layers=4, tokens=6000, experts=16, seed=0):
    """Scores of layers that know nothing of each other: softmaxes of Gaussian logits, float16."""
    logits = scale * np.random.default_rng(seed).standard_normal((tokens, layers, experts))
    return softmax(logits).astype(np.float16)
