"""``rmoe sweep``: the runs of a study, one after another, and their comparison."""
