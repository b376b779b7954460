"""Where a run's time went."""

import json
import time

import pytest

from mixtral_jax.train import goodput as g


def test_parts_add_up_over_starts(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 4.0, 10.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with g.Goodput(tmp_path, 0, 8) as goodput, goodput.of("step"):
        pass  # 1 to 4, and the end at 4
    first = g.read_goodput(tmp_path)
    assert (first["step"], first["total"], first["other"], first["goodput"]) == (3, 4, 1, 0.75)
    with g.Goodput(tmp_path, 0, 8):
        pass  # 10 to 10
    assert g.read_goodput(tmp_path) == first | {"starts": 2}


def test_steps_that_are_done_again_are_lost(tmp_path):
    """Three of four, of 16 tokens at 4 a second; the rate of one is unknown."""
    rates = [4.0, None, 4.0, 4.0]
    lines = [{"step": step, "tokens_per_second": rate} for step, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert g.Goodput(tmp_path, 1, 16).summary()["lost"] == 12
    assert g.Goodput(tmp_path, 4, 16).summary()["lost"] == 0


def test_an_exception_is_counted_and_written(tmp_path):
    with pytest.raises(KeyError), g.Goodput(tmp_path, 0, 8) as goodput, goodput.of("data"):
        raise KeyError
    assert g.describe(g.read_goodput(tmp_path)).startswith("goodput 0.0% of 0 s in 1 start(s): ")


def test_a_process_without_the_folder_writes_nothing():
    with g.Goodput(None, 0, 8) as goodput, goodput.of("step"):
        pass
    assert goodput.summary()["starts"] == 1
