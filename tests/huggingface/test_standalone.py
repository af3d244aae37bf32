"""Folders with their own code: loaded, run and saved again by a process that cannot import the package."""

import os
import subprocess
import sys

import pytest
import torch

from rmoe_megablocks.huggingface import LlamaMoeRnnConfig, RmoeConfig
from rmoe_megablocks.huggingface.folders.standalone import write_code
from rmoe_megablocks.routing import HEAD, LINEAR, RECURRENCE, RESIDUAL, get_router_type, router_types
from tests.huggingface.built import M, config, having, model, tokens

WITHOUT = """
import sys
sys.modules["rmoe_megablocks"] = sys.modules["megatron"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    made = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.load(folder + "/ids.pt")
    trained = torch.load(folder + "/trained.pt")
    assert {name: p.requires_grad for name, p in made.named_parameters()} == trained
    drawn = type(made)(made.config)  # by its own code
    deviations = [p.std() for name, p in drawn.named_parameters() if p.dim() > 1 and ".router." in name]
    assert {name: p.requires_grad for name, p in drawn.named_parameters()} == trained
    assert all(0 < deviation < 2 for deviation in deviations)
    made.save_pretrained(folder + "/again")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
    padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), 1)
    mask = torch.cat((torch.zeros_like(ids[:, :3]), torch.ones_like(ids)), 1)
    common = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for search in ({}, {"num_beams": 3}):
        plain = made.generate(ids, use_cache=False, **search, **common)
        assert made.generate(ids, **search, **common).equal(plain)
        assert made.generate(ids, cache_implementation="static", **search, **common).equal(plain)
        for cached in (False, True):
            found = made.generate(padded, attention_mask=mask, use_cache=cached, **search, **common)
            assert found[:, 3:].equal(plain)
    made.train()(ids, labels=ids, output_router_logits=True).loss.backward()
    torch.save([made.eval()(ids).logits.detach(), again(ids).logits.detach()], folder + "/logits.pt")
"""


def test_code_beside_the_weights(tmp_path):
    stateful, cosine = having(RECURRENCE)[0], having(HEAD)[0]
    frozen = next(name for name in router_types() if not all(p.requires_grad for p in model(name).parameters()))
    kinds = {
        "linear": (LINEAR, None, dict(router_score_function="sigmoid", router_enable_expert_bias=True)),
        "stateful": (stateful, {RESIDUAL: 0.5}, {}),
        "frozen": (frozen, None, {}),
        "head": (cosine, {HEAD: "cosine"}, dict(num_null_experts=M, router_dtype="float32")),
    }
    expected = {}
    for name, (kind, options, further) in kinds.items():
        folder, made = tmp_path / name, model(kind, options, **further)
        made.save_pretrained(folder)
        written = write_code(folder, made.config)
        assert all("from rmoe_megablocks" not in (folder / file).read_text() for file in written)
        layers = [get_router_type(of).layer for of in (kind, RmoeConfig.router_type)]
        modules = {layer.__module__.removeprefix("rmoe_megablocks.").replace(".", "_") for layer in layers if layer}
        found = {file for file in written if file.startswith("rmoe_routing_types_state")}
        assert found == {f"rmoe_{module}.py" for module in modules}
        torch.save(tokens(), folder / "ids.pt")
        torch.save({name: p.requires_grad for name, p in made.named_parameters()}, folder / "trained.pt")
        expected[folder] = made(tokens()).logits
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    # another environment, of torch and transformers alone: RMOE_TEST_ALONE=/its/bin/python
    python = os.environ.get("RMOE_TEST_ALONE", sys.executable)
    done = subprocess.run(
        [python, "-c", WITHOUT, *map(str, expected)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, logits in expected.items():
        for found in torch.load(folder / "logits.pt"):
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_what_has_no_code_to_write_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="make an RmoeConfig of it"):
        write_code(tmp_path, LlamaMoeRnnConfig(num_hidden_layers=2))
    made = config()
    kind, _ = made.routing()
    monkeypatch.setattr(kind.layer, "__module__", "mine.router")
    with pytest.raises(ValueError, match="is not of this package"):
        write_code(tmp_path, made)
