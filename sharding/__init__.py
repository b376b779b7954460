"""Meshes, the rules that lay named axes on them, and partitioning. Has never heard of a model."""
