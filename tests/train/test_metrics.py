"""The files of metrics."""

import numpy as np
import pytest

from mixtral_jax.config import model_config
from mixtral_jax.model.flops import forward_flops, training_flops, visible_keys
from mixtral_jax.train import metrics


def test_steps_that_will_be_done_again_are_forgotten(tmp_path):
    with metrics.MetricsLog(tmp_path, 0) as log:
        for step in range(4):
            log.write(step, {"loss": np.float32(step), "expert_load": np.ones((2, 3))})
    with metrics.MetricsLog(tmp_path, 2) as log:
        log.write(2, {"loss": np.float32(9)})
    assert [(each["step"], each["loss"]) for each in metrics.read(tmp_path / metrics.METRICS)] == [
        (0, 0),
        (1, 1),
        (2, 9),
    ]
    assert metrics.read(tmp_path / metrics.ROUTING)[-1] == {"step": 1, "load": [[1, 1, 1], [1, 1, 1]]}


def test_a_line_cut_off_in_the_writing_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]


def test_what_is_not_a_number_is_null(tmp_path):
    with metrics.MetricsLog(tmp_path, 0) as log:
        assert log.write(0, {"loss": np.float32("nan"), "skipped": np.bool_(True)}) == {
            "step": 0,
            "loss": None,
            "skipped": True,
        }


def test_utilisation_is_null_where_the_peak_is_unknown():
    assert metrics.utilisation(model_config("tiny-mixtral"), 512, 1000.0) == {"mfu": None, "mfu_full": None}


@pytest.mark.parametrize(("length", "window", "keys"), [(4, 2, 7 / 4), (4, None, 10 / 4), (4, 9, 10 / 4), (4, 1, 1)])
def test_visible_keys(length, window, keys):
    assert visible_keys(length, window) == keys


def test_training_flops_of_mixtral():
    """Six operations a token for each active parameter that multiplies (all but the embedding), and attention."""
    config = model_config("mixtral-8x7b")
    norms = (2 * config.num_layers + 1) * config.dim
    products = 12_879_925_248 - config.vocab_size * config.dim - norms
    attention = config.num_layers * 3 * 4 * config.num_heads * config.head_dim
    flops = training_flops(config, 4096)
    assert flops.full == 6 * products + attention * 4096
    assert flops.causal == 6 * products + attention * 4097 / 2
    assert forward_flops(config, 4096).full * 3 == flops.full
