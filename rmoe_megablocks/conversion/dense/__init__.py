"""``rmoe import --split-ffn``: a dense Llama-style model as a mixture of experts, to be trained on (LLaMA-MoE)."""
