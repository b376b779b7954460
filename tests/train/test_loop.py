"""Whole runs: what they leave behind, and that stopping and going on changes nothing."""

import json
import signal
from functools import partial

import jax
import numpy as np
import pytest
from toy_run import train

import mixtral_jax as mj
from mixtral_jax.checkpoints.run import read_params
from mixtral_jax.errors import InputError
from mixtral_jax.sharding.mesh import make_mesh
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.train import config as configs
from mixtral_jax.train import loop
from mixtral_jax.train.batches import training_batches
from mixtral_jax.train.data import prepare
from mixtral_jax.train.guard import Diverged
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
    "spike",
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
    # Where each step is waited for, the last one's end is not seen with that of the one before.
    assert metrics[-1]["tokens_per_second"] < 100 * metrics[-2]["tokens_per_second"]
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


def test_goes_on_on_fewer_devices(whole, toy_config, tmp_path, monkeypatch):
    """Saved on eight, gone on with on four, saved, and on one: as the run that stayed on eight, no text twice or left
    out."""
    folder, seen, endings = tmp_path / "run", [], []
    record, batches = loop.Run._record, loop.Feed.training

    def interrupted(self, step, values):
        record(self, step, values)
        if step == 2 * len(endings):
            signal.raise_signal(signal.SIGTERM)

    def noted(self, first):
        for batch in batches(self, first):
            seen.append(batch.tokens)
            yield batch

    monkeypatch.setattr(loop.Run, "_record", interrupted)
    monkeypatch.setattr(loop.Feed, "training", noted)
    for devices, mesh in ((8, {}), (4, {"data": 1, "fsdp": 2, "expert": 2}), (1, {"data": 1, "expert": 1})):
        monkeypatch.setattr(loop, "make_mesh", partial(make_mesh, devices=jax.devices()[:devices]))
        monkeypatch.setattr(loop.jax, "device_count", lambda count=devices: count)
        changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        endings.append(train(toy_config, folder, **changes)[0])
    first, second, last = endings
    assert first.step < second.step < last.step == 6
    np.testing.assert_allclose(_losses(folder), _losses(whole[0]), rtol=1e-5)
    config = configs.load(toy_config).data
    expected = training_batches(prepare(config).training, config)
    np.testing.assert_array_equal(seen, [next(expected).tokens for _ in range(6)])
    expected.close()


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


@pytest.fixture
def spoil(monkeypatch):
    """Makes the batches of some steps, counted from 0, give another loss."""
    training = loop.Feed.training

    def spoil_steps(steps, change):
        def changed(self, first):
            for step, batch in enumerate(training(self, first), first):
                yield change(batch) if step in steps else batch

        monkeypatch.setattr(loop.Feed, "training", changed)

    return spoil_steps


def _not_a_number(batch):
    return batch._replace(loss_weight=batch.loss_weight * np.float32("nan"))


def _never_seen(batch):
    """Tokens at random, of which hardly any are in the text."""
    return batch._replace(targets=np.random.default_rng(0).integers(0, 40, batch.targets.shape, np.int32))


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(toy_config, tmp_path, spoil):
    """No step that is saved is of those that made no update: with one checkpoint kept, it would be the only one."""
    spoil(range(2, 9), _not_a_number)
    with pytest.raises(
        Diverged, match="not finite in 5 steps in a row, up to step 7; the last checkpoint is from befo"
    ):
        train(toy_config, tmp_path / "run", steps=9, keep_checkpoints=1, save_every=1)
    _, step = read_params(tmp_path / "run", configs.load(toy_config).model)
    assert step == 2
    assert [each["skipped"] for each in read(tmp_path / "run" / METRICS)] == [False] * 2 + [True] * 5


def test_spikes_are_skipped_if_asked_and_a_resume_decides_the_same(toy_config, tmp_path, spoil, monkeypatch):
    spoil((5, 7), _never_seen)
    changes = {"steps": 9, "save_every": 100, "validate_every": "none", "guard.spike_window": 3}
    changes |= {"guard.spike_deviations": 2.0, "guard.skip_spikes": "true"}
    _, said = train(toy_config, tmp_path / "whole", **changes)
    lines = read(tmp_path / "whole" / METRICS)
    assert [each["step"] for each in lines if each["spike"]] == [5, 7]
    assert [each["step"] for each in lines if each["skipped"]] == [5, 7]
    assert "warning: step 6: loss" in said
    assert "is a spike, above" in said
    assert ", the update is skipped" in said

    record = loop.Run._record

    def interrupted(self, step, values):
        record(self, step, values)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_record", interrupted)
        assert train(toy_config, tmp_path / "resumed", **changes)[0].step < 9
    train(toy_config, tmp_path / "resumed", **changes)
    resumed = read(tmp_path / "resumed" / METRICS)
    for key in ("loss", "spike", "skipped"):
        assert [each[key] for each in resumed] == [each[key] for each in lines], key


def test_a_tokenizer_of_another_kind_stays_what_it_is(whole, toy_config, tmp_path):
    """A tokenizer.json, given to a run, is the one that its model speaks with."""
    load_tokenizer(whole[0]).save_into(tmp_path / "tokenizer", "huggingface")
    (tmp_path / "tokenizer" / "tokenizer.model").unlink()
    given = tmp_path / "tokenizer" / "tokenizer.json"
    train(toy_config, tmp_path / "run", steps=1, **{"data.tokenizer": json.dumps(str(given))})
    assert not (tmp_path / "run" / "tokenizer.model").exists()
    assert mj.load(tmp_path / "run").tokenizer.encode("def f") == load_tokenizer(given).encode("def f")
