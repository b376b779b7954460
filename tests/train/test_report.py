"""The pictures of a run."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from mixtral_jax.errors import InputError
from mixtral_jax.train.report import write_report


def _write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pictures(tmp_path):
    _write(tmp_path / "metrics.jsonl", [{"step": s, "loss": 5 - s, "tokens_per_second": 10.0 * s} for s in range(3)])
    _write(tmp_path / "routing.jsonl", [{"step": s, "load": [[1.0, 1.0], [2.0, 0.0]]} for s in range(3)])
    _write(tmp_path / "validation.jsonl", [{"step": 3, "loss": 3.0, "unigram_entropy": 4.0}])
    paths = write_report(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "throughput.png", "expert_load.png"]
    for path in paths:
        assert np.ptp(imread(path)) > 0.5  # there is something on it


def test_a_dense_model_has_no_experts_to_draw(tmp_path):
    _write(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 5.0, "tokens_per_second": None}])
    assert [path.name for path in write_report(tmp_path)] == ["loss.png", "throughput.png"]


def test_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"no metrics.jsonl with at least one step"):
        write_report(tmp_path)
