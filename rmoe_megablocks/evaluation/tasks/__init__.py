"""``rmoe eval --tasks``: lm-evaluation-harness's stock tasks, on the hub's rows or on those of files."""
