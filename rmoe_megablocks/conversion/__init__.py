"""Checkpoints of Megatron (torch_dist) to Hugging Face folders and back: ``rmoe export``, ``rmoe import``."""
