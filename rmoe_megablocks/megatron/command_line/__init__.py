"""Megatron's command line with ours: its parser, the arguments that router types declare, help texts."""
