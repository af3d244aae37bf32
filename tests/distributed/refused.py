"""What the recurrent router does not work with: arguments, and a part of the one line that refuses them."""

_GRU = "--moe-router-type gru does not work with "

REFUSED = {
    "--cuda-graph-impl local": _GRU + "--cuda-graph-impl: a captured layer gives no gradient to what lies outside it",
    "--cuda-graph-impl full_iteration": (
        "--cuda-graph-impl full_iteration without padded experts does not work: the host reads how many tokens"
    ),
    "--cuda-graph-impl full_iteration --moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity": (
        "--cuda-graph-impl full_iteration without a GPU does not work: leave it out"
    ),
    "--overlap-moe-expert-parallel-comm": _GRU + "--overlap-moe-expert-parallel-comm: its schedule splits layers apart",
    "--use-megatron-fsdp": _GRU + "--use-megatron-fsdp: use --use-distributed-optimizer",
    "--use-torch-fsdp2": _GRU + "--use-torch-fsdp2: use --use-distributed-optimizer",
    "--transformer-impl inference_optimized": _GRU + "--transformer-impl inference_optimized: use local",
    "--mtp-num-layers 1 --pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Ett|ttm|L": (
        "multi-token prediction (m) before the last stage: put m on the stage of the loss (L)"
    ),
    "--moe-routing-trace-path trace --moe-routing-trace-capture-logits": (
        "it computes them a second time, without the layer's state"
    ),
    "--moe-routing-trace-path trace --moe-routing-trace-dump-weights": "there is no single router matrix to dump",
    "--tensor-model-parallel-size 2": "--tensor-model-parallel-size above 1 with experts does not work: "
    "add --sequence-parallel",
    "--moe-token-dispatcher-type flex": "flex without DeepEP and a GPU does not work: use alltoall",
    "--moe-router-fusion": "--moe-router-fusion without Transformer Engine does not work",
    "--moe-latent-size 32": "--moe-latent-size without Transformer Engine does not work",
    "--multi-latent-attention": "--multi-latent-attention without Transformer Engine does not work",
    "--cpu-offloading-num-layers 1": "--cpu-offloading-num-layers without Transformer Engine does not work",
    "--fine-grained-activation-offloading --offload-modules core_attn": (
        _GRU + "--fine-grained-activation-offloading: nobody has shown that the state and its gradient survive it"
    ),
    "--moe-paged-stash": _GRU + "--moe-paged-stash: nobody has shown that the state and its gradient survive it",
    "--delay-wgrad-compute": _GRU + "--delay-wgrad-compute: nobody has shown that the state and its gradient survive",
    "--mtp-num-layers 2 --mtp-use-repeated-layer": (
        _GRU + "--mtp-use-repeated-layer: nobody has shown that the state and its gradient survive it"
    ),
    "--mtp-num-layers 1 --moe-router-share-head all": "--moe-router-share-head does not work with --mtp-num-layers",
    "--mtp-num-layers 1 --moe-router-share-projector 2": (
        "--moe-router-share-projector does not work with --mtp-num-layers, whose layers are numbered on their own"
    ),
    "--moe-layer-freq [1,1,0,0] --moe-router-share-projector 2": (
        "--moe-router-share-projector 2: the block of layers 3 to 4 has no layer with experts"
    ),
    "--mlp-chunks-for-training 2": _GRU
    + "--mlp-chunks-for-training: it calls the router for one piece of the sequence",
    "--mlp-chunks-for-prefill 2": _GRU + "--mlp-chunks-for-prefill: it calls the router for one piece of the sequence",
    "--use-mup": _GRU + "--use-mup: it scales learning rates by width, and knows no recurrence",
    "--optimizer muon": _GRU + "--optimizer muon: use adam or sgd",
    "--tensor-parallel-num-weight-shards 2": (
        _GRU + "--tensor-parallel-num-weight-shards: its shards of weights are gathered outside the layer's call"
    ),
    "--enable-cuda-graph": _GRU + "--cuda-graph-impl: a captured layer gives no gradient to what lies outside it",
    "--recompute-granularity selective --recompute-modules moe_act": (
        "moe_act in recompute_modules is only supported with moe_grouped_gemm"
    ),
    "--moe-permute-fusion": "fused permutation is not available. Please install TE",
    "--moe-router-load-balancing-type sinkhorn": "sinkhorn with an auxiliary loss does not work: set",
    "--context-parallel-size 2 --reset-attention-mask": "--reset-attention-mask does not work with --context-parallel",
    "--moe-null-experts 5 --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0": (
        "it would balance null experts one by one"
    ),
    "--moe-null-experts 5 --moe-expert-capacity-factor 1.0": (
        "--moe-null-experts does not work with --moe-expert-capacity-factor"
    ),
    "--moe-null-experts 5 --mtp-num-layers 1": "--moe-null-experts does not work with --mtp-num-layers",
    "--moe-null-experts 5 --moe-router-pre-softmax": "weights are normalised over the chosen real experts",
    "--fp8-format hybrid": "supports MoE FP8 training",
}
