"""A file for each part of the package, each with its list ``CASES``."""
