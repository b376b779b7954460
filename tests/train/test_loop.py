"""Whole runs: what they leave behind, and that stopping and going on changes nothing."""

import json
import signal

import numpy as np
import pytest
from toy_run import train

import mixtral_jax as mj
from mixtral_jax.checkpoints.run import read_params
from mixtral_jax.errors import InputError
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.train import config as configs
from mixtral_jax.train import loop
from mixtral_jax.train.metrics import METRICS, ROUTING, VALIDATION, read
from mixtral_jax.train.run_folder import RunFolder

KEYS = {
    "step",
    "loss",
    "balance_loss",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "mfu",
    "mfu_full",
    "dropped_fraction",
    "expert_load_max",
    "expert_load_min",
    "router_entropy",
    "skipped",
}


def _losses(folder):
    return [each["loss"] for each in read(folder / METRICS)]


def test_a_run_leaves_what_it_promises(whole):
    folder, ending, said = whole
    assert ending == loop.Ending(6, None)
    names = {each.name for each in folder.iterdir()}
    assert {"config.toml", "environment.json", "tokenizer.model", "checkpoints", "tensorboard"} <= names
    metrics = read(folder / METRICS)
    assert [each["step"] for each in metrics] == list(range(6))
    assert all(KEYS - {"mfu", "mfu_full"} <= each.keys() for each in metrics)
    assert metrics[-1].keys() == KEYS
    assert np.array(read(folder / ROUTING)[0]["load"]).shape == (2, 4)
    assert [each["step"] for each in read(folder / VALIDATION)] == [3, 6]
    assert any((folder / "tensorboard").iterdir())
    assert json.loads((folder / "environment.json").read_text())["packages"]["jax"]
    for line in ("devices: 8 cpu", "data 2 x expert 4", "parameters", "compiling", "under the unigram entropy"):
        assert line in said


def test_it_learns(whole):
    losses = _losses(whole[0])
    assert losses[-1] < losses[0] - 0.1
    validation = read(whole[0] / VALIDATION)
    assert validation[-1]["loss"] < validation[0]["loss"]


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(whole, toy_config, tmp_path, monkeypatch):
    """Three times: SIGTERM after a step, then to the end."""
    folder = tmp_path / "run"
    record = loop.Run._record

    def interrupted(self, step, values):
        record(self, step, values)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "_record", interrupted)
    ending, said = train(toy_config, folder)
    monkeypatch.undo()
    assert ending.signal == signal.SIGTERM
    assert 3 <= ending.step < 6
    assert "SIGTERM: stopping after step" in said
    ending, _ = train(toy_config, folder)
    assert ending == loop.Ending(6, None)
    assert _losses(folder) == _losses(whole[0])
    assert [each["step"] for each in read(folder / METRICS)] == list(range(6))
    config = configs.load(toy_config).model
    (mine, _), (theirs, _) = read_params(folder, config), read_params(whole[0], config)
    np.testing.assert_array_equal(mine["embedding"], theirs["embedding"])
    np.testing.assert_array_equal(mine["layers"]["moe"]["router"], theirs["layers"]["moe"]["router"])


def test_a_finished_run_is_left_alone(whole, toy_config):
    before = _losses(whole[0])
    ending, _ = train(toy_config, whole[0])
    assert ending == loop.Ending(6, None)
    assert _losses(whole[0]) == before


def test_what_decides_the_model_or_the_data_may_not_change(whole, toy_config):
    with pytest.raises(InputError, match=r"data.seed was None, is 3|data.seed was 0, is 3"):
        train(toy_config, whole[0], **{"data.seed": 3})
    with pytest.raises(InputError, match="steps = 2: the run has already done 6"):
        train(toy_config, whole[0], steps=2)


def test_a_folder_in_use_is_refused(whole, toy_config):
    with (
        RunFolder(whole[0], configs.load(toy_config)),
        pytest.raises(InputError, match="in use by another process"),
    ):
        train(toy_config, whole[0])


def test_a_folder_of_something_else_is_refused(toy_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="holds files but no run"):
        train(toy_config, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(toy_config, tmp_path, monkeypatch):
    record = loop.Run._record
    monkeypatch.setattr(loop.Run, "_record", lambda self, step, values: record(self, step, values | {"skipped": True}))
    with pytest.raises(loop.Diverged, match="5 steps up to 4"):
        train(toy_config, tmp_path / "run")
    _, step = read_params(tmp_path / "run", configs.load(toy_config).model)
    assert step == 4


def test_a_tokenizer_of_another_kind_stays_what_it_is(whole, toy_config, tmp_path):
    """A tokenizer.json, given to a run, is the one that its model speaks with."""
    load_tokenizer(whole[0]).save_into(tmp_path / "tokenizer", "huggingface")
    (tmp_path / "tokenizer" / "tokenizer.model").unlink()
    given = tmp_path / "tokenizer" / "tokenizer.json"
    train(toy_config, tmp_path / "run", steps=1, **{"data.tokenizer": json.dumps(str(given))})
    assert not (tmp_path / "run" / "tokenizer.model").exists()
    assert mj.load(tmp_path / "run").tokenizer.encode("def f") == load_tokenizer(given).encode("def f")
