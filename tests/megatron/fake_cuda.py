"""The whole model with gru on fake CUDA tensors: no operand on another device, no value read on the host. No GPU.

python -m tests.megatron.fake_cuda, from test_fake_cuda.py, in a process of its own: CPU mode, off here, makes torch
take "cuda" for the CPU (stand-ins: no_gpu.py). Cut out of Megatron: its dropless dispatch, which reads the experts'
numbers of tokens on the host. Experts are padded to a capacity here, and those numbers, constants on the CPU then, are
kept as real ones. Backward passes of autograd need a real device: check_backward calls what they run of ours.
"""

from tests.megatron import no_gpu  # noqa: F401  isort: skip  before Megatron

import contextlib
import functools

import torch
from megatron.core import mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from rmoe_megablocks.kernels import gru_arithmetic
from rmoe_megablocks.kernels.gru_route import _backward as route_backward
from rmoe_megablocks.kernels.products import mm_fp32
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.recurrence.install import _recurrent_layer_spec, connect_stages
from rmoe_megablocks.megatron.recurrence.router import RecurrentTopKRouter
from rmoe_megablocks.routing import RoutingConfig

BF16, FP32 = torch.bfloat16, torch.float32
S, B, H, P, E, LAYERS, VOCABULARY = 8, 2, 32, 16, 4, 3, 64
_preprocess = MoEAlltoAllTokenDispatcher.preprocess


def preprocess(self, routing_map):
    """Numbers of tokens that are known without looking at the map."""
    with unset_fake_temporarily():
        return _preprocess(self, torch.empty(routing_map.shape, dtype=torch.bool, device="meta"))


MoEAlltoAllTokenDispatcher.preprocess = preprocess
CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()  # nothing is drawn


def build(impl: str, dtype: torch.dtype, router_dtype: str | None) -> GPTModel:
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=H, num_attention_heads=2, ffn_hidden_size=32, moe_ffn_hidden_size=32,
        num_moe_experts=E, moe_router_topk=2, moe_router_dtype=router_dtype, moe_aux_loss_coeff=0.01,
        moe_router_load_balancing_type="aux_loss", moe_z_loss_coeff=0.01, moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=1.5, moe_pad_expert_input_to_capacity=True, add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        hidden_dropout=0.0, attention_dropout=0.0, perform_initialization=False, params_dtype=dtype,
        pipeline_dtype=dtype, bf16=dtype == BF16, masked_softmax_fusion=False, bias_dropout_fusion=False,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    config.moe_router_type, config.router_state_size = "gru", P
    config.routing = RoutingConfig(H, E, {"moe_router_impl": impl, "moe_router_rnn_hidden_size": P}, LAYERS)
    spec = get_gpt_layer_local_spec(num_experts=E, moe_grouped_gemm=False, normalization="RMSNorm")
    model = GPTModel(
        config, _recurrent_layer_spec(spec), VOCABULARY, S, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    connect_stages([model], seed=1)
    return model.train()


def forward(impl: str, dtype: torch.dtype, router_dtype: str | None):
    """Logits of the model, its layers' states and the model, its routing measured as in a logged iteration."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake parameters cannot be converted or moved: they are made as they shall be
        try:
            with torch.device("cuda"):
                model = build(impl, dtype, router_dtype)
        finally:
            torch.set_default_dtype(before)
        # from here on without a default device: what forgets to name one is on the CPU
        RoutingHealth(LAYERS, 0, E).watch([model])
        routed = []
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda layer, args, output: routed.append(output[1]))
        tokens = torch.zeros(B, S, dtype=torch.long, device="cuda")
        logits = model(tokens, torch.zeros_like(tokens), None)
    return logits, routed, model


def check_backward() -> int:
    """The routing's own backward functions, called by hand: gradients on the GPU, in the shapes of what they are of."""
    # torch 2.11 takes addmm with an out_dtype on a GPU and not on fake tensors: two operations here
    route_backward.__globals__["addmm_fp32"] = lambda total, a, b: total + mm_fp32(a, b)
    count = 0
    for dtype, weights in ((FP32, FP32), (FP32, BF16), (BF16, BF16)):
        with FakeTensorMode():
            new = functools.partial(torch.zeros, device="cuda")
            x, h, grad = (new(S, B, P, dtype=dtype) for _ in range(3))
            cell = [new(3 * P, P, dtype=dtype), new(3 * P, P, dtype=dtype), *new(2, 3 * P, dtype=dtype)]
            for first in (h, None):
                _, gates, recurrent = gru_arithmetic.forward(x, first, *cell)
                for kept in ((gates, recurrent), (None, None)):
                    check_gradients(gru_arithmetic.backward(grad, x, first, *kept, *cell), [x, first, *cell])
                matrix, grad_logits = new(E, P, dtype=weights), new(S, B, E, dtype=dtype)
                low = [weight.to(weights) for weight in cell[:2]]
                found = route_backward(grad_logits, grad, x, first, x, *low, *cell[2:], matrix, None)
                check_gradients(found, [x, first, *cell, matrix, None])
                count += 3
    return count


def check_gradients(found, of) -> None:
    for gradient, value in zip(found, of, strict=True):
        if value is not None:
            assert (gradient.device.type, gradient.shape) == ("cuda", value.shape)


def main() -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    mpu.initialize_model_parallel(create_gloo_process_groups=False)
    count = 0
    for impl in ("eager", "recompute", "triton"):
        for dtype, router_dtype in ((BF16, "fp32"), (BF16, None), (FP32, None)):
            logits, states, model = forward(impl, dtype, router_dtype)
            expected = FP32 if router_dtype else dtype
            assert logits.device.type == "cuda" and logits.shape == (B, S, VOCABULARY)
            assert [(h.dtype, h.device.type, h.shape) for h in states] == [(expected, "cuda", (S, B, P))] * LAYERS
            assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
            count += 1
    faults = 0
    gating = RecurrentTopKRouter.gating

    def reads(self, input):
        logits = gating(self, input)
        return logits * logits.sum().item()

    def mixes(self, input):
        return gating(self, input) + torch.ones(E, device="cpu").to(FP32)

    for fault, error in ((reads, DataDependentOutputException), (mixes, RuntimeError)):
        RecurrentTopKRouter.gating = fault
        try:
            forward("eager", BF16, "fp32")
        except error as found:
            assert fault is reads or "two different devices" in str(found), found
            faults += 1
    print(f"{count} models, {check_backward()} backward passes, {faults} faults seen")


if __name__ == "__main__":
    main()
