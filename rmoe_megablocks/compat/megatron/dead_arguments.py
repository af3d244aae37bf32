"""Arguments that Megatron-Core 0.19's parser takes and that nothing in a run of our entry reads.

Some are read nowhere any more, some by programs that are not pretraining (inference, RL, vision), some by the training
script alone, whose place our entry takes. Whoever types one expects it to do something, so it is refused by name.
``tests/megatron/dead_arguments.py`` finds them in the installed Megatron, and its test holds this list against it.
"""

from collections.abc import Iterable

from rmoe_megablocks.errors import UsageError

_NOWHERE = "nothing in Megatron-Core 0.19 reads it"
_SCRIPT = "Megatron's own pretrain_gpt.py reads it, this entry does not; see 'A Megatron job that you already have'"

#: option -> what to do instead
DEAD: dict[str, str] = {
    "--rampup-batch-size": f"{_NOWHERE}; use --step-batch-size-schedule 'TOKENS:BATCH TOKENS:BATCH ...'",
    "--use-flash-attn": f"{_NOWHERE}; use --attention-backend flash",
    "--openai-gelu": f"{_NOWHERE}; the model would have Megatron's own GELU",
    "--apply-residual-connection-post-layernorm": f"{_NOWHERE}; residuals stay before the layer norm",
    "--onnx-safe": _NOWHERE,
    "--exit-signal-handler-for-dataloader": f"{_NOWHERE}; --exit-signal-handler is on anyway",
    "--dist-ckpt-format": f"{_NOWHERE}; use --ckpt-format",
    "--dist-ckpt-save-pre-mcore-014": _NOWHERE,
    "--enable-full-sharding-in-hsdp": _NOWHERE,
    "--vocab-extra-ids": _NOWHERE,
    "--mask-prob": _NOWHERE,
    "--short-seq-prob": _NOWHERE,
    "--sample-rate": _NOWHERE,
    "--head-lr-mult": _NOWHERE,
    "--data-per-class-fraction": _NOWHERE,
    "--classes-fraction": _NOWHERE,
    "--decoder-num-layers": "only encoder-decoder models have a decoder of their own; use --num-layers",
    "--decoder-seq-length": "only encoder-decoder models have a decoder of their own; use --seq-length",
    "--encoder-num-layers": "use --num-layers",
    "--encoder-seq-length": "use --seq-length",
    "--hybrid-layer-pattern": "this entry trains GPT models; use your own script (see README)",
    "--hybrid-override-pattern": "this entry trains GPT models; use your own script (see README)",
    "--mtp-hybrid-override-pattern": "this entry trains GPT models; use your own script (see README)",
    "--use-checkpoint-args": f"{_SCRIPT}; write the model's arguments out, arguments.json of its run has them",
    "--local-rank": "torchrun says it in LOCAL_RANK; leave it out",
    "--yaml-cfg": "use --config, whose MODEL_ARGS are these same arguments",
    "--check-for-spiky-loss": _SCRIPT,
    "--max-seqlen-per-dp-cp-rank": _SCRIPT,
    "--log-straggler": _SCRIPT,
    "--sft-tokenizer-prompt-format": _SCRIPT,
}
for _part in ("eod-token", "fragment-rate", "middle-token", "no-prefix", "pad-token", "prefix-token", "rate"):
    DEAD[f"--fim-{_part}"] = _SCRIPT
for _part in ("split-sample", "spm-rate", "suffix-token"):
    DEAD[f"--fim-{_part}"] = _SCRIPT

#: what options begin with -> the program that reads them
OTHER_PROGRAMS: dict[str, str] = {
    "--bert-": "BERT",
    "--biencoder-": "retrieval",
    "--block-data-path": "retrieval",
    "--embedding-path": "retrieval",
    "--evidence-data-path": "retrieval",
    "--ict-": "retrieval",
    "--indexer-": "retrieval",
    "--query-in-block-prob": "retrieval",
    "--retriever-": "retrieval",
    "--titles-data-path": "retrieval",
    "--use-one-sent-docs": "retrieval",
    "--dino-": "vision",
    "--img-": "vision",
    "--iter-per-epoch": "vision",
    "--mask-": "vision",
    "--num-channels": "vision",
    "--num-classes": "vision",
    "--patch-dim": "vision",
    "--swin-": "vision",
    "--vision-": "vision",
    "--grpo-": "reinforcement learning",
    "--langrl-": "reinforcement learning",
    "--perform-rl-step": "reinforcement learning",
    "--rl-": "reinforcement learning",
    "--no-rl-": "reinforcement learning",
    "--decode-only-cuda-graphs": "inference",
    "--enable-chunked-prefill": "inference",
    "--inference-": "inference",
    "--no-inference-": "inference",
    "--max-tokens-to-oom": "inference",
    "--moe-pad-experts-for-cuda-graph-inference": "inference",
    "--nccl-all-reduce-for-prefill": "inference",
    "--num-speculative-tokens": "inference",
    "--output-bert-embeddings": "inference",
    "--use-legacy-static-engine": "inference",
    "--use-same-sampling-seed-across-dp-ranks": "inference",
    "--disable-mamba-": "hybrid models",
    "--mamba-": "hybrid models",
    "--inprocess-": "in-process restart",
    "--logits-load-": "distillation",
}

#: nothing reads these either, but what they ask for is so anyway
HARMLESS = {
    "--ckpt-fully-parallel-save": "it is the default",
    "--disable-msc": "it is the default",
    "--use-dist-ckpt": "--ckpt-format torch_dist is the default",
    "--use-mcore-models": "there are no others",
}


def refuse_dead_arguments(explicit: Iterable[str]) -> None:
    """Raises UsageError for the first option that would do nothing. ``explicit``: the options that the user named."""
    for option in sorted(explicit):
        if option in DEAD:
            raise UsageError(f"{option} would do nothing: {DEAD[option]}")
        for prefix, program in OTHER_PROGRAMS.items():
            if option.startswith(prefix):
                raise UsageError(f"{option} belongs to {program}, which is not what this entry does: leave it out")
