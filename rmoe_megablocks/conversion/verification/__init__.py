"""Whether a written folder computes what the checkpoint does: logits of both on the same text, each in a process."""
