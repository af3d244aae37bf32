"""``rmoe compare``: what many runs say about one setting, with seeds, intervals and what else differs."""
