"""Layerwise recurrent routing for Mixture-of-Experts training on Megatron-Core and MegaBlocks.

Tensor names carry their shape as a suffix, one letter a dimension::

    T  tokens                  x_TH       hidden states entering an MoE layer
    H  hidden size             p_TP       projected hidden states (x' of Eq. 4)
    P  router state size       h_TP       routing state handed from layer to layer (h_i of Eq. 5)
    E  number of experts       logits_TE  router logits (Eq. 6)
    S  sequence, B  micro-batch: ``hidden_SBH`` is Megatron's layout, T = S x B.

"Eq." and "paper" mean "Layerwise Recurrent Router for Mixture-of-Experts" (ICLR 2025, arXiv 2408.06793).
"""

__version__ = "0.1.0"
