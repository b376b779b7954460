"""Inference on token ids: prepared weights, prefill, the jitted decode loop, sampling. Knows nothing of text."""
