"""Start of a training run: configuration file, checks, torchrun, signals."""
