"""Whose experts compute: the choice of the backend, and MegaBlocks' experts as Megatron's MoE layer."""
