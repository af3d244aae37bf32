"""Faults that a test run plants to see that something notices."""

import contextlib
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from rmoe_megablocks.megatron.checkpoints import resharding, safety
from rmoe_megablocks.megatron.inputs import batches
from rmoe_megablocks.megatron.recurrence import install, layer, stage_boundary
from rmoe_megablocks.megatron.recurrence.layer import RecurrentTransformerLayer
from rmoe_megablocks.megatron.recurrence.router import RecurrentTopKRouter
from rmoe_megablocks.megatron.recurrence.shared import SharedRecurrence


@contextlib.contextmanager
def _detached_state():
    pack = stage_boundary.pack
    with mock.patch.object(layer.stage_boundary, "pack", lambda x, h, config: pack(x, h.detach(), config)):
        yield


@contextlib.contextmanager
def _changed_parameters(part: str = "", **attributes):
    original = SharedRecurrence.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for place, parameter in self.named_parameters():
            for name, value in attributes.items() if part in place else ():
                setattr(parameter, name, value)

    with mock.patch.object(install.SharedRecurrence, "__init__", init):
        yield


@contextlib.contextmanager
def _routing_not_sequence_parallel():
    original = RecurrentTopKRouter.reset_parameters

    def reset_parameters(self):
        original(self)
        for parameter in self.routing_layer.parameters():
            parameter.sequence_parallel = False

    with mock.patch.object(RecurrentTopKRouter, "reset_parameters", reset_parameters):
        yield


@contextlib.contextmanager
def _frozen_weights_trained():
    original = RecurrentTopKRouter.reset_parameters

    def reset_parameters(self):
        original(self)
        self.routing_layer.requires_grad_(True)

    layers = mock.patch.object(RecurrentTopKRouter, "reset_parameters", reset_parameters)
    with layers, _changed_parameters(requires_grad=True):
        yield


@contextlib.contextmanager
def _layers_detach_state():
    original = RecurrentTransformerLayer.forward

    def forward(self, *args, **kwargs):
        hidden_states, state = original(self, *args, **kwargs)
        return hidden_states, state.detach()

    with mock.patch.object(RecurrentTransformerLayer, "forward", forward):
        yield


@contextlib.contextmanager
def _changed_experts(change):
    from rmoe_megablocks.megatron.experts.megablocks_experts import MegaBlocksExperts  # needs MegaBlocks

    original = MegaBlocksExperts.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        change(self)

    with mock.patch.object(MegaBlocksExperts, "__init__", init):
        yield


def _scale_gradients(experts) -> None:
    experts.dropless.mlp.gradient_scale = 1 / experts.ep_group.size()  # as MegaBlocks sets it


def _reduce_as_dense(experts) -> None:
    for parameter in experts.parameters():
        parameter.allreduce = True


def _at_iteration(iteration: int, layer_number: int, change):
    """Calls ``change(layer)`` in the forward step of an iteration, on the stage that has the layer."""
    forward_step, done = batches.forward_step, []

    def planted(data_iterator, model):
        if get_args().curr_iteration == iteration - 1 and not done:
            for layer in unwrap_model(model).decoder.layers:
                if layer.layer_number == layer_number:
                    done.append(change(layer))
        return forward_step(data_iterator, model)

    return mock.patch.object(batches, "forward_step", planted)


@torch.no_grad()
def _spoil_weight(layer) -> None:
    layer.self_attention.linear_qkv.weight[0, 0] = torch.nan


def _spoil_gradient(layer) -> None:
    layer.self_attention.linear_qkv.weight.register_hook(lambda gradient: gradient + torch.inf)


def _keys_gradient_not_summed():
    from rmoe_megablocks.compat.megatron_cpu.context_parallel import ContextParallelAttention  # CPU mode alone

    def gather(self, tensor):
        return tensor_parallel.gather_from_sequence_parallel_region(
            tensor, tensor_parallel_output_grad=False, group=self.pg_collection.cp
        )

    return mock.patch.object(ContextParallelAttention, "_gather", gather)


def _another_checkpoint_on_rank_1():
    check = safety.check_agreement

    def differing(args):
        if torch.distributed.get_rank() == 1:
            args.ckpt_step = 7
        check(args)

    return mock.patch.object(safety, "check_agreement", differing)


_BREAKAGES = {
    None: contextlib.nullcontext,
    "detached state": _detached_state,
    "no gradient sync over stages": lambda: _changed_parameters(pipeline_parallel=False),
    "frozen weights trained": _frozen_weights_trained,
    "counted on every stage": lambda: _changed_parameters(shared=False),
    "no gradient sync over tensor ranks": _routing_not_sequence_parallel,
    "state recomputed without its gradient": _layers_detach_state,
    "random state not restored": lambda: mock.patch.object(random, "_set_all_rng_states", lambda *states: None),
    "experts' gradients divided twice": lambda: _changed_experts(_scale_gradients),
    "experts reduced as dense weights": lambda: _changed_experts(_reduce_as_dense),
    "keys' gradient not summed": _keys_gradient_not_summed,
    "weight": lambda: _at_iteration(3, 2, _spoil_weight),
    "gradient": lambda: _at_iteration(3, 3, _spoil_gradient),
    "no check of the optimizer's layout": lambda: mock.patch.object(resharding, "check_optimizer_layout"),
    "another checkpoint on rank 1": _another_checkpoint_on_rank_1,
    "shared projectors not synced over stages": lambda: _changed_parameters("projectors", pipeline_parallel=False),
    "no bucket of its own": lambda: _changed_parameters(shared_embedding=False),
}


def applied(name: str | None):
    """Context in which the named fault is planted."""
    return _BREAKAGES[name]()
