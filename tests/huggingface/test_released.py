"""The released Llama-style layout: a reference written from the paper's equations and its weights' names alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import rmoe_megablocks.huggingface  # noqa: F401  registers the model type
from tests.huggingface.built import close

H, HEADS, GROUPS, L, MOE, E, K, P, FF, F_E, F_S, V, EPS = 32, 4, 2, 4, 3, 5, 2, 6, 40, 12, 20, 50, 1e-5
CONFIG = dict(
    model_type="llama_moe_rnn", architectures=["LlamaMoeRnnForCausalLM"], hidden_size=H, num_attention_heads=HEADS,
    num_key_value_heads=GROUPS, num_hidden_layers=L, moe_num_layers=MOE, num_local_experts=E, num_experts_per_tok=K,
    moe_router_rnn_hidden_size=P, intermediate_size=FF, moe_expert_intermediate_size=F_E, vocab_size=V,
    rms_norm_eps=EPS, rope_theta=10000.0, max_position_embeddings=64, hidden_act="silu", tie_word_embeddings=False,
    moe_share_expert_intermediate_size=F_S, moe_weight=0.5, share_weight=0.25, add_moe_bias=False,
    attention_bias=False, router_aux_loss_coef=0.01, output_router_logits=False,
)  # fmt: skip


def weights_of(kind: str, shared: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
    w = {"model.embed_tokens.weight": draw(V, H), "model.norm.weight": 1 + draw(H), "lm_head.weight": draw(V, H)}
    for gate in {"gru": "rzn", "rnn": "n"}.get(kind, ""):
        for side in "ih":
            w[f"model.rnn_router.weight_{side}{gate}"] = draw(P, P) * 3
            w[f"model.rnn_router.bias_{side}{gate}"] = draw(P)
    for i in range(L):
        p, D = f"model.layers.{i}.", H // HEADS
        for name, rows in (("q", H), ("k", GROUPS * D), ("v", GROUPS * D), ("o", H)):
            w[f"{p}self_attn.{name}_proj.weight"] = draw(rows, H)
        for name in ("input_layernorm", "post_attention_layernorm"):
            w[f"{p}{name}.weight"] = 1 + draw(H)
        mlps = [] if i >= L - MOE else [("mlp", FF)]
        for name, width in mlps + [("mlp_share", F_S)] * (shared and i >= L - MOE):
            w |= {f"{p}{name}.{x}_proj.weight": draw(width, H) for x in ("gate", "up")}
            w[f"{p}{name}.down_proj.weight"] = draw(H, width)
        if i < L - MOE:
            continue
        if kind in ("gru", "rnn"):
            w |= {f"{p}block_sparse_moe.weight1": draw(P, H) * 2, f"{p}block_sparse_moe.weight2": draw(E, P) * 5}
        else:
            w[f"{p}block_sparse_moe.gate.weight"] = draw(E, H)
        for j in range(E):
            q = f"{p}block_sparse_moe.experts.{j}."
            w |= {f"{q}w1.weight": draw(F_E, H), f"{q}w3.weight": draw(F_E, H), f"{q}w2.weight": draw(H, F_E)}
    return w


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def attention(w, p, x):
    B, S, D = *x.shape[:2], H // HEADS
    q, k, v = ((x @ w[f"{p}{n}_proj.weight"].T).view(B, S, -1, D) for n in "qkv")
    angle = torch.arange(S)[:, None] * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # as complex numbers: (first half, second half)

    def turned(y):
        z = torch.complex(*(part.double() for part in y.chunk(2, -1))) * turn
        return torch.cat((z.real, z.imag), -1).to(y.dtype)

    q, k, v = turned(q), turned(k).repeat_interleave(HEADS // GROUPS, 2), v.repeat_interleave(HEADS // GROUPS, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5
    scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", scores, v).reshape(B, S, H) @ w[f"{p}o_proj.weight"].T


def mlp(w, p, x):
    gate, up, down = (w[f"{p}.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def step(w, kind, x, h):
    """Eq. 2, 3 and 5, or the plain recurrence, with one matrix a gate."""
    part = lambda side, gate, v: (  # noqa: E731
        v @ w[f"model.rnn_router.weight_{side}{gate}"].T + w[f"model.rnn_router.bias_{side}{gate}"]
    )
    if kind == "rnn":
        return torch.tanh(part("i", "n", x) + part("h", "n", h))
    r, z = (torch.sigmoid(part("i", gate, x) + part("h", gate, h)) for gate in "rz")
    n = torch.tanh(part("i", "n", x) + r * part("h", "n", h))
    return (1 - z) * n + z * h


def reference(w, kind, shared, ids):
    x = w["model.embed_tokens.weight"][ids]
    h = torch.zeros(*ids.shape, P)
    for i in range(L):
        p = f"model.layers.{i}."
        x = x + attention(w, f"{p}self_attn.", norm(x, w[f"{p}input_layernorm.weight"]))
        y = norm(x, w[f"{p}post_attention_layernorm.weight"])
        if i < L - MOE:
            x = x + mlp(w, f"{p}mlp", y)
            continue
        q = f"{p}block_sparse_moe."
        if kind in ("gru", "rnn"):
            h = step(w, kind, y @ w[f"{q}weight1"].T, h)
            logits = h @ w[f"{q}weight2"].T
        else:
            logits = y @ w[f"{q}gate.weight"].T
        gates, chosen = logits.softmax(-1).topk(K)
        gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(y)
        for j in range(E):
            w1, w2, w3 = (w[f"{q}experts.{j}.w{n}.weight"] for n in (1, 2, 3))
            weight = (gates * (chosen == j)).sum(-1, keepdim=True)
            out = out + weight * ((F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T)
        x = x + (0.5 * out + 0.25 * mlp(w, f"{p}mlp_share", y) if shared else out)
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["gru", "rnn", "topk"])
def test_a_released_folder_gives_the_papers_numbers_and_is_written_back(tmp_path, kind, shared):
    weights = weights_of(kind, shared)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = CONFIG | {"moe_router_type": kind, "add_moe_share_expert": shared}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    ids = torch.randint(V, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(weights, kind, shared, ids)
        close(made(ids).logits, expected, 1e-5 * expected.abs().max().clamp_min(1).item())
        made.save_pretrained(tmp_path / "again")
        written = load_file(tmp_path / "again" / "model.safetensors")
        assert written.keys() == weights.keys()
        assert all(written[name].equal(tensor) for name, tensor in weights.items())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        close(again(ids).logits, expected, 1e-5 * expected.abs().max().clamp_min(1).item())


@pytest.mark.parametrize("name", ["add_moe_bias", "attention_bias"])
def test_biases_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=True of a llama_moe_rnn model cannot be loaded"):
        rmoe_megablocks.huggingface.LlamaMoeRnnConfig(**(CONFIG | {"moe_router_type": "gru", name: True}))
