"""Meshes, the rules that lay named axes on them, and partitioning. Knows jax and flax, and has never heard of a model."""
