"""The benchmark of whole steps: what it concludes from known times, and that its models are those it names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from benchmarks import __main__ as benchmarks
from benchmarks import router_overhead
from benchmarks.router_overhead import table, training
from benchmarks.router_overhead.table import CONTROL, GRU, LINEAR, Depth
from rmoe_megablocks.megatron.monitoring.health import observe_routers
from rmoe_megablocks.megatron.recurrence.router import RecurrentTopKRouter

TOKENS, PAIRS = 500, 200
WORK = 2e-3  # seconds of linear's step


def depth(layers: int, extra: float, control: float = 1.0, noise: float = 2e-3) -> Depth:
    """Times on a machine whose speed drifts, of which ``extra`` seconds a layer are gru's."""
    generator = np.random.default_rng(layers)
    speed = np.linspace(1, 2, PAIRS)

    def steps(seconds: float) -> list:
        times = seconds * (1 + noise * generator.normal(size=PAIRS))
        return [SimpleNamespace(wall=wall, processor=t) for wall, t in zip(times * speed, times, strict=True)]

    seconds = {GRU: steps(WORK + layers * extra), LINEAR: steps(WORK), CONTROL: steps(WORK * control)}
    saved = {GRU: TOKENS * (1000 + 100 * layers), LINEAR: TOKENS * 1000, CONTROL: TOKENS * 1000}
    return Depth(layers, TOKENS, seconds, saved, {GRU: 1030, LINEAR: 1000, CONTROL: 1000})


def test_known_times():
    """Five microseconds a layer of two milliseconds: 1 % with four layers, 10 ns a token and layer."""
    text = table.markdown([depth(4, 5e-6), depth(2, 5e-6)], "here", "what", "cuda")
    verdicts = [line.split("gru takes ")[1].split()[0] for line in text.splitlines() if "gru takes" in line]
    assert [float(percent) for percent in verdicts] == pytest.approx([1, 1], abs=0.05)
    found = depth(4, 5e-6)
    ratio = found.ratio(GRU, "wall")
    assert ratio.low < 1.01 < ratio.high and ratio.high - ratio.low < 2e-3
    extra = [nanoseconds / 4 for nanoseconds in found.extra("processor")]
    assert np.median(extra) == pytest.approx(10, rel=0.1)
    slope = text.split("4 against 2, adds to the difference: ")[1].split("processor (all threads) ")[1].split()[0]
    assert float(slope) == pytest.approx(10, rel=0.2)
    assert "gru 1,400, linear 1,000, +40.00%, +100 a layer" in text and "+3.00%" in text


@pytest.mark.parametrize("control", [0.99, 1.002, 1.01])
def test_no_verdict_where_the_control_is_off(control):
    text = table.markdown([depth(4, 5e-6, control), depth(2, 5e-6)], "here", "what", "cpu")
    assert text.count("no verdict: the control") == 2 and "gru takes" not in text
    assert text.count("no verdict, see the control") == 2


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A whole run with a small model, and what its models were seen to do."""
    seen, folder = [], tmp_path_factory.mktemp("overhead")
    with pytest.MonkeyPatch.context() as patch:
        small = {"--hidden-size": "48", "--num-attention-heads": "4", "--moe-ffn-hidden-size": "32"}
        model = list(router_overhead.MODEL)
        for option, value in small.items():
            model[model.index(option) + 1] = value
        patch.setattr(router_overhead, "MODEL", model)
        patch.setattr(router_overhead, "_LOGGED", 4)
        timed, choices = training.TrainedModel.timed, {}

        def watched(self, is_logged):
            if self not in choices:
                choices[self] = []
                observe_routers(self.chunks, lambda router, logits, chosen: choices[self].append(chosen))
            before = [parameter.detach().clone() for chunk in self.chunks for parameter in chunk.parameters()]
            result = timed(self, is_logged)
            (chunk,) = self.chunks
            seen.append(
                SimpleNamespace(
                    model=self,
                    logged=is_logged,
                    layers=self._args.num_layers,
                    routers=[type(module) for module in chunk.modules() if isinstance(module, TopKRouter)],
                    gradients={n: p.main_grad.norm().item() for n, p in chunk.named_parameters() if "router" in n},
                    chosen=choices[self][-1],
                    moved=max((p - b).norm() / b.norm() for p, b in zip(chunk.parameters(), before, strict=True)),
                )
            )
            return result

        patch.setattr(training.TrainedModel, "timed", watched)
        argv = ["router_overhead", "--pairs", "3", "--layers", "2", "1", "--sequence-length", "16"]
        argv += ["--micro-batch-size", "2", "--vocab-size", "127", "--output", str(folder / "table.md")]
        assert benchmarks.main(argv) == 0
    assert not torch.distributed.is_initialized()
    return (folder / "table.md").read_text(), seen


def test_models_take_their_steps_in_turn(tiny_run):
    _, seen = tiny_run
    deep = [step for step in seen if step.layers == 2]
    gru, linear, control = models = list(dict.fromkeys(step.model for step in deep))
    assert [models.index(step.model) for step in deep] == ([0, 1, 2, 2, 1, 0] * 3)
    assert len({id(model) for model in models}) == 3 and linear._optimizer is not control._optimizer
    shallow = [step for step in seen if step.layers == 1]
    assert len(shallow) == 6 * 2 and len({step.model for step in shallow}) == 2
    logged = [step.logged for step in deep]
    assert logged == [index // 3 % 4 == 3 for index in range(18)]


def test_they_are_what_they_are_called(tiny_run):
    _, seen = tiny_run
    kinds = {}
    for step in seen:
        kinds.setdefault((step.layers, step.model), step.routers)
    assert list(kinds.values()) == [
        [RecurrentTopKRouter] * 2, [TopKRouter] * 2, [TopKRouter] * 2, [RecurrentTopKRouter], [TopKRouter]
    ]  # fmt: skip


def test_every_step_has_the_work_of_training_and_changes_nothing(tiny_run):
    """Experts are chosen at random, but the router's backward pass is there; weights are updated by next to nothing."""
    _, seen = tiny_run
    for step in seen:
        # one layer has no previous state: its weight_hh and that bias's first two thirds have a gradient of zero
        names = [name for name in step.gradients if step.layers > 1 or "weight_hh" not in name]
        assert names and all(step.gradients[name] > 0 for name in names), step.gradients
        assert step.moved < 1e-6


def test_experts_are_chosen_at_random(tiny_run):
    """Else two routers that are drawn otherwise have experts of other sizes, and that is what would be measured."""
    _, seen = tiny_run
    for model in {step.model for step in seen}:
        chosen = [step.chosen for step in seen if step.model is model]
        assert not any(torch.equal(a, b) for a, b in zip(chosen, chosen[1:], strict=False))


def test_the_table_of_a_run(tiny_run):
    text, _ = tiny_run
    assert "2 layers of the 0.91B model: 2 x 16 tokens a step, vocabulary 127, fp32" in text and "gru by eager" in text
    assert "3 pairs of steps in turn" in text and "each layer more, 2 against 1" in text
    # eager keeps 6P values of a layer with a previous state and 5P of the first: 5.5 * 128 * 4 bytes
    assert text.strip().endswith("+2,816 a layer")
