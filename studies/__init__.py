"""Questions that were asked of the models, each with the commands that answer it again: ``python -m studies.NAME``."""
