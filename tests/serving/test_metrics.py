"""What is counted; the server's own numbers are in test_chat."""

from mixtral_jax.serving.metrics import Metrics


def test_tokens_that_come_together_are_as_many_gaps():
    metrics = Metrics()
    metrics.note_tokens(3, 1.5, is_first=True)
    metrics.note_tokens(2, 0.5, is_first=False)
    found = {"first_token_seconds_count": 1, "next_token_seconds_count": 4, "next_token_seconds_sum": 0.5}
    lines = metrics.text().decode().splitlines()
    for name, value in found.items():
        assert f"mixtral_jax_{name} {float(value)}" in lines
