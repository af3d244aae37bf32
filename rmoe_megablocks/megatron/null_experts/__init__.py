"""Null experts (``--moe-null-experts``) in Megatron: argument and refusals, router, dispatch, installation."""
