"""Checkpoints of torch.distributed.checkpoint (torch_dist), read and written without a process group.

Nothing that a checkpoint says is run: its index is read by an unpickler that knows a dozen classes, everything else by
torch.load(weights_only=True).
"""
