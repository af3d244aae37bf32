"""The example that the README shows."""

import runpy
from pathlib import Path

import torch


def test_the_example_learns_and_trains_the_shared_gru(capsys):
    names = runpy.run_path(str(Path(__file__).with_name("plain_torch_example.py")))
    assert capsys.readouterr().out.startswith("loss ")
    assert sum(names["losses"][-10:]) / 10 < 0.6 * names["losses"][0]
    stack = names["stack"]
    assert all(p.grad.abs().max() > 0 for p in stack.rnn_router.parameters())
    assert all(block.moe.router.routing_layer.projector.grad.abs().max() > 0 for block in stack.layers)
    assert isinstance(stack.layers[0].moe, torch.nn.Module) and type(stack.layers[0].moe).__name__ == "RecurrentdMoE"
