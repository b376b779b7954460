"""Independent implementations that the tests compare with: simple, slow, in float64 NumPy unless they say otherwise."""
