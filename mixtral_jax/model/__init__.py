"""The model: pure functions for the maths, Flax modules for the parameters.

Shapes are in names, one letter a dimension:
  B batch, T tokens (queries), S keys or cache slots, D model, N query heads, K key-value heads, G = N / K, H head size,
  F feed-forward, E experts, A experts a token, C capacity, V vocabulary, L layers.
"""
