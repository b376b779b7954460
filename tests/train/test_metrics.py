"""The files of metrics."""

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from mixtral_jax.config import model_config
from mixtral_jax.errors import InputError
from mixtral_jax.model.flops import forward_flops, training_flops, visible_keys
from mixtral_jax.train import metrics
from mixtral_jax.train.run_folder import told_of_full_disk


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


def _events(records):
    """TFRecord: 8 bytes of length and 4 of its checksum, the event, 4 of its checksum."""
    while records:
        length = int.from_bytes(records[:8], "little")
        yield Event.FromString(records[12 : 12 + length])
        records = records[16 + length :]


def test_tensorboard_reads_what_was_written_and_forgets_what_is_done_again(tmp_path):
    for first, loss in ((0, 5.0), (2, 3.0)):
        with metrics.MetricsLog(tmp_path, first) as log:
            for step in range(first, 4):
                log.write(step, {"loss": np.float32(loss - step), "skipped": np.bool_(False), "mfu": None})
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    events = [event for file in files for event in _events(file.read_bytes())]
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert [each[::2] for each in found if each[1] == "loss"] == [(0, 5), (1, 4), (2, 3), (3, 2), (2, 1), (3, 0)]
    assert {each[1] for each in found} == {"loss", "skipped"}
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [0, 2]


def test_a_full_disk_is_told_and_hangs_nothing(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log._metrics.close()
    log._metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with (
        pytest.raises(InputError, match=r"--run-dir = 'it': No space left .*as they were"),
        told_of_full_disk("it"),
        log,
    ):
        log.write(0, {"loss": np.float32(1)})
