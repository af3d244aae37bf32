"""Measures of routing: pure functions on arrays.

Shapes: T tokens, L MoE layers, E experts, K chosen experts a token; ``chosen_TK`` are experts' numbers in the order of
their scores, ``scores_TE`` the whole distribution of a layer (a softmax, not only the chosen ones). Every measure whose
value by chance is not zero says so, and what to put beside it: :func:`.chance.shuffled` for whatever relates two
layers, a uniform router's value for what describes one.
"""
