"""Text out of files: which files, how compressed, in which format, which rows."""
