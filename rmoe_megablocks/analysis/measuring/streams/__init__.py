"""Measures that are added up a piece of a recording at a time.

Each has ``add(piece)``, ``entries()``, which is what measures.json gets, and ``scalars(weights_BJ)``: of every row of
weights of the blocks the figures [B] that stand for the whole model, for the bootstrap. What each adds up is what the
functions of ``analysis/measures`` compute of all tokens at once, which the tests hold it against.
"""
