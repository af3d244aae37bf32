"""One recorder for each kind of model: Hugging Face folders, checkpoints, routing traces."""
