"""Runs whose folder is in a bucket: what is done on a disk is done there, over a real S3 client."""

import signal

import fsspec
import numpy as np
import pytest
from toy_run import train

import mixtral_jax as mj
from mixtral_jax.checkpoints import buckets
from mixtral_jax.errors import InputError
from mixtral_jax.train import bucket_lock, loop, run_folder
from mixtral_jax.train import config as configs
from mixtral_jax.train.metrics import METRICS, read
from mixtral_jax.train.report import readable


def _losses(run):
    with readable(run) as folder:
        return [each["loss"] for each in read(folder / METRICS)]


@pytest.fixture(scope="module")
def resumed(bucket, toy_config):
    """A run in a bucket that SIGTERM stopped, and that went on to its end: its URL and how it ended, twice."""
    run, record = f"{bucket}/stopped/run", loop.Run._record

    def interrupted(self, step, values):
        record(self, step, values)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_record", interrupted)
        first, _ = train(toy_config, run)
    return run, first, train(toy_config, run)[0]


def test_a_run_that_is_stopped_goes_on_as_on_a_disk(resumed, whole):
    run, first, second = resumed
    assert first.signal == signal.SIGTERM
    assert 3 <= first.step < 6
    assert second == loop.Ending(6, None)
    assert _losses(run) == _losses(whole[0])


def test_it_leaves_there_what_it_leaves_on_a_disk(resumed, whole):
    system = fsspec.filesystem("s3")
    names = {name.split("/run/", 1)[1] for name in system.find(resumed[0])}
    small = {each.name for each in whole[0].iterdir() if each.is_file() and each.name != ".lock"}
    assert {name for name in names if "/" not in name} == small
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {
        each.name for each in (whole[0] / "checkpoints").iterdir()
    }
    assert any(name.startswith("tensorboard/") for name in names)


def test_its_model_is_the_one_of_a_disk(resumed, whole, run):
    ours, theirs = mj.load(resumed[0], dtype="float32"), mj.load(whole[0], dtype="float32")
    tokens = np.arange(20).reshape(1, 20)
    np.testing.assert_array_equal(ours.logits(tokens), theirs.logits(tokens))
    status, out, err = run("generate", resumed[0], "--prompt", "def f", "--max-new-tokens", 4)
    assert (status, err) == (0, "")
    assert out == run("generate", whole[0], "--prompt", "def f", "--max-new-tokens", 4)[1]


def test_its_report(resumed, run):
    status, out, _ = run("report", resumed[0])
    assert status == 0
    assert f"wrote {resumed[0]}/report/loss.png" in out
    assert fsspec.filesystem("s3").cat_file(f"{resumed[0]}/report/loss.png").startswith(b"\x89PNG")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket_lock, "REFRESH", 0.1)
    monkeypatch.setattr(bucket_lock, "GRACE", 1.0)


def test_a_folder_in_use_is_refused_and_then_free(bucket, toy_config, quick):
    folder, config = buckets.folder_at(f"{bucket}/used/run", "--run-dir"), configs.load(toy_config)
    with run_folder.take(folder, config), pytest.raises(InputError, match="in use by another process"):
        run_folder.take(folder, config)
    with run_folder.take(folder, config):
        pass


def test_the_lock_of_a_process_that_died_is_taken_over(bucket, quick):
    folder = buckets.folder_at(f"{bucket}/dead/run", "--run-dir")
    lock = f"{folder}/.lock"
    fsspec.filesystem("s3").pipe_file(lock, b"someone 7")
    taken = bucket_lock.BucketLock(folder)
    taken.check()
    fsspec.filesystem("s3").pipe_file(lock, b"someone 8")
    taken._thread.join(5)
    with pytest.raises(InputError, match="another process has taken it over"):
        taken.check()
    taken.release()
    assert fsspec.filesystem("s3").cat_file(lock) == b"someone 8"


def test_a_folder_of_something_else_or_another_run_is_refused(bucket, toy_config, resumed):
    fsspec.filesystem("s3").pipe_file("bucket/thesis/chapter.tex", b"dear")
    with pytest.raises(InputError, match="holds files but no run"):
        train(toy_config, f"{bucket}/thesis")
    assert fsspec.filesystem("s3").find("bucket/thesis") == ["bucket/thesis/chapter.tex"]
    with pytest.raises(InputError, match=r"data.seed was 0, is 3"):
        train(toy_config, resumed[0], **{"data.seed": 3})


def test_what_cannot_be_reached_is_told(bucket, toy_config, run):
    with pytest.raises(InputError, match=r"--run-dir = 's3://nowhere/run': .*; a bucket that can be read and written"):
        train(toy_config, "s3://nowhere/run")
    status, _, err = run("generate", f"{bucket}/nothing", "--prompt", "a")
    assert (status, err) == (
        2,
        f"error: model = '{bucket}/nothing': no training run is there; a model of another kind is read from a disk\n",
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("http://host/run", "'http://host/run': a folder of this machine, or one in a bucket: gs://bucket/folder, s3"),
        ("s3://bucket", "'s3://bucket': a bucket and a folder in it are needed: s3://bucket/folder"),
        ("s3:///run", "a bucket and a folder in it are needed"),
    ],
)
def test_what_is_no_folder(path, message):
    with pytest.raises(InputError, match=message):
        buckets.folder_at(path, "--run-dir")


@pytest.mark.parametrize(("scheme", "needed"), [("s3", "s3fs"), ("gs", "gcsfs and google.cloud.storage")])
def test_without_its_extra(monkeypatch, scheme, needed):
    monkeypatch.setattr(buckets, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{scheme}:// needs {needed}: pip install 'mixtral-jax\[{scheme}\]'"):
        buckets.folder_at(f"{scheme}://bucket/run", "--run-dir")
