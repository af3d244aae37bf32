"""The routing state in a Megatron model: router, layer, shared recurrence, stage boundary, and what installs them."""
