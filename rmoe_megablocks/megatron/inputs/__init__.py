"""What a run reads: which datasets, in which blend, and how many sequences and tokens an iteration takes."""
