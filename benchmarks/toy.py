"""A Mixtral that trains in seconds, and text for it."""

MODEL = """
[model]
dim = 16
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 8
hidden_dim = 16
vocab_size = 300
sliding_window = 8
max_position = 64

[model.moe]
num_experts = 4
experts_per_token = 2
"""
"""Of a run's config, as TOML."""

TEXT = "".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in range(400))
