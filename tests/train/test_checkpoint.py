"""Checkpoints that are damaged, of another model, or for which there is no room."""

import errno
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_run import train

import mixtral_jax as mj
from mixtral_jax.checkpoints import digests
from mixtral_jax.checkpoints.digests import Standing, saved_steps, verify, write_digests
from mixtral_jax.checkpoints.run import read_params
from mixtral_jax.errors import InputError
from mixtral_jax.train import checkpoint, loop
from mixtral_jax.train import config as configs
from mixtral_jax.train.metrics import METRICS, read
from mixtral_jax.train.retention import Retention, kept


def _losses(folder):
    return [each["loss"] for each in read(folder / METRICS)]


def _files(step):
    return sorted(file for file in step.rglob("*") if file.is_file())


def _flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of a finished run, which has the steps 4 and 6."""
    assert saved_steps(whole[0] / "checkpoints") == [4, 6]
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def test_forty_flipped_bits_are_forty_found(copy):
    """Each in a place of its own, chosen evenly over all bytes of a step's files, the digests' among them."""
    step, dice = copy / "checkpoints" / "6", random.Random(0)
    files = _files(step)
    sizes = [file.stat().st_size for file in files]
    assert verify(step).standing == Standing.VERIFIED
    for _ in range(40):
        (file,) = dice.choices(files, sizes)
        bit = dice.randrange(8 * file.stat().st_size)
        _flip(file, bit)
        standing, fault = verify(step)
        assert standing == Standing.DAMAGED
        assert str(file) in fault
        _flip(file, bit)
    for file in files:  # a small file, too, which few random bits meet
        if file.stat().st_size:
            _flip(file, 5)
            assert verify(step).standing == Standing.DAMAGED
            _flip(file, 5)
    assert verify(step).standing == Standing.VERIFIED


def _truncate(step):
    largest = max(_files(step / "params"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return f"{largest}: "


def _remove(step):
    largest = max(_files(step / "params"), key=lambda file: file.stat().st_size)
    largest.unlink()
    return f"{largest}: missing"


def _flip_one(step):
    largest = max(_files(step / "params"), key=lambda file: file.stat().st_size)
    _flip(largest, 8 * 100)
    return f"{largest}: its SHA-256 is not what was written"


def _empty(step):
    step.with_name("9").mkdir()
    return f"{step.with_name('9')}/DIGESTS.0-of-1: no digests"


def _foreign(step):
    step.with_name("9").mkdir()
    (step.with_name("9") / "thesis.tex").write_text("dear")
    return f"{step.with_name('9')}/DIGESTS.0-of-1: no digests"


@pytest.mark.parametrize("damage", [_truncate, _remove, _flip_one, _empty, _foreign])
def test_damage_is_named_and_the_step_before_is_used(whole, copy, toy_config, damage):
    said = damage(copy / "checkpoints" / "6")
    used = 6 if damage in (_empty, _foreign) else 4
    with pytest.raises(InputError, match="--strict: a checkpoint is not verified") as error:
        loop.train(configs.load(toy_config), copy, loop.Progress(), strict=True)
    assert said in str(error.value)
    with pytest.warns(UserWarning, match="CHECKPOINT . IS NOT USED") as caught:
        assert read_params(copy, configs.load(toy_config).model)[1] == used
    assert said in str(caught[0].message)
    assert f"step {used} is used" in str(caught[0].message)
    with pytest.warns(UserWarning, match="CHECKPOINT . IS NOT USED"):
        assert mj.load(copy, dtype="float32").config.dim == 16
    with pytest.warns(UserWarning, match="CHECKPOINT . IS NOT USED"):
        ending, _ = train(toy_config, copy)
    assert ending.step == 6
    assert _losses(copy) == _losses(whole[0])
    assert saved_steps(copy / "checkpoints") == [4, 6]
    assert len(list((copy / "damaged").iterdir())) == 1
    assert train(toy_config, copy)[0].step == 6  # without a warning


def test_where_none_is_whole(copy, toy_config, run):
    for step in (4, 6):
        _flip_one(copy / "checkpoints" / str(step))
    with pytest.raises(InputError, match=r"checkpoints = \[4, 6\]: none of these steps is whole: .*; .*SHA-256"):
        train(toy_config, copy)
    status, _, err = run("generate", copy, "--prompt", "def f")
    assert status == 2
    assert "none of these steps is whole" in err
    with pytest.raises(InputError, match="none of these steps is whole"):
        read_params(copy, configs.load(toy_config).model, 6)


def test_a_step_whose_digests_were_not_written_in_time(copy, toy_config):
    """It is passed by where there is one before it, and taken, with a warning, where there is none."""
    for file in (copy / "checkpoints").glob("*/DIGESTS*"):
        file.unlink()
    with pytest.warns(UserWarning, match="CHECKPOINT 6 IS NOT VERIFIED"):
        train(toy_config, copy)
    assert verify(copy / "checkpoints" / "6").standing == Standing.VERIFIED
    (copy / "checkpoints" / "6" / "DIGESTS.0-of-1").unlink()
    write_digests(copy / "checkpoints" / "4")
    with pytest.warns(UserWarning, match="CHECKPOINT 6 IS NOT USED"):
        train(toy_config, copy)
    assert list((copy / "damaged").glob("6-*"))


def test_every_process_leaves_digests_of_its_share(copy):
    step = copy / "checkpoints" / "6"
    (step / "DIGESTS.0-of-1").unlink()
    write_digests(step, 0, 2, {"validation_loss": 1.5})
    assert verify(step).standing == Standing.UNFINISHED
    write_digests(step, 1, 2)
    assert digests.read_about(step) == {"validation_loss": 1.5}
    assert [verify(step, part, 3).standing for part in range(3)] == [Standing.VERIFIED] * 3
    _flip_one(step)
    assert sorted(verify(step, part, 3).standing for part in range(3)) == [0, 0, Standing.DAMAGED]


def test_strict_stops_the_command_line(copy, toy_config, run):
    said = _flip_one(copy / "checkpoints" / "6")
    status, _, err = run("train", toy_config, "--run-dir", copy, "--strict")
    assert status == 2
    assert "--strict: a checkpoint is not verified" in err
    assert said in err
    assert saved_steps(copy / "checkpoints") == [4, 6]


def test_what_was_torn_is_gone(copy, toy_config):
    torn = copy / "checkpoints" / "8.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "part").write_text("half")
    train(toy_config, copy)
    assert not torn.exists()


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(copy, toy_config, monkeypatch):
    other = copy.parent / "other"
    train(toy_config, other, steps=2, **{"model.hidden_dim": 32})
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(other / "checkpoints", copy / "checkpoints")
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", None)  # nothing is read
    with pytest.raises(InputError, match=r"of another config: .*gate is float32\[.*32\], not float32\[.*16\]"):
        train(toy_config, copy)


def test_a_full_disk_is_told_before_it_is_written_to(toy_config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    room = iter([usage.free, 1000, 1000, 1000])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=next(room)))
    with pytest.raises(InputError, match=r"checkpoints/4': [\d,]+ bytes are needed, 1,000 are free; the steps before"):
        train(toy_config, tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
    assert verify(tmp_path / "run" / "checkpoints" / "2").standing == Standing.VERIFIED


def test_a_disk_that_fills_up_in_the_writing(toy_config, tmp_path, monkeypatch):
    write = digests.write_digests

    def full(step, *rest):
        if step.name == "4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(step, *rest)

    monkeypatch.setattr(checkpoint, "write_digests", full)
    with pytest.raises(InputError, match=r"checkpoints/4': [\d,]+ bytes are needed, the disk is full; the steps"):
        train(toy_config, tmp_path / "run")
    monkeypatch.undo()
    assert verify(tmp_path / "run" / "checkpoints" / "2").standing == Standing.VERIFIED
    with pytest.warns(UserWarning, match="CHECKPOINT 4 IS NOT USED"):
        assert train(toy_config, tmp_path / "run")[0].step == 6


def test_which_steps_are_kept():
    losses = {10: 3.0, 20: 2.0, 30: None, 40: 2.5, 50: None, 60: 2.7}
    assert kept(losses, Retention(last=2)) == {50, 60}
    assert kept(losses, Retention(last=1, every=20)) == {20, 40, 60}
    assert kept(losses, Retention(last=1, best=2)) == {20, 40, 60}
    assert kept(losses, Retention(last=1, every=30, best=1)) == {20, 30, 60}
    assert kept({}, Retention()) == set()


def test_a_run_keeps_them(toy_config, tmp_path):
    """Of the steps 1 to 6: the last, the multiples of 4, and the best validated, which at this learning rate is the
    first of those at 2, 4 and 6."""
    changes = {"save_every": 1, "validate_every": 2, "keep_checkpoints": 1, "keep_every": 4, "keep_best": 1}
    train(toy_config, tmp_path / "run", **changes, **{"optimizer.learning_rate": 10.0})
    losses = {each["step"]: each["loss"] for each in read(tmp_path / "run" / "validation.jsonl")}
    best = min(losses, key=losses.get)
    assert saved_steps(tmp_path / "run" / "checkpoints") == sorted({4, 6, best})


def test_restored_on_another_mesh(whole, copy, toy_config):
    _flip_one(copy / "checkpoints" / "6")
    with pytest.warns(UserWarning, match="step 4 is used"):
        train(toy_config, copy, **{"mesh.data": 1, "mesh.expert": 2, "mesh.fsdp": 4})
    assert jax.device_count() == 8
    np.testing.assert_allclose(_losses(copy), _losses(whole[0]), rtol=1e-5)
