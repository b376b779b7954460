"""Several processes that train one model, over the command line: on one machine, two or four, with two devices each."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_run import train

from mixtral_jax.train import metrics

COMMAND = [sys.executable, "-c", "from mixtral_jax.cli.main import main; main()", "train"]
TWO = ["mesh.data=1", "mesh.expert=2", "mesh.context=2"]


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Processes:
    """Processes that run the command together, and what they said."""

    def __init__(self, config, folder, count, settings, devices=2):
        stem = f"{folder.name}-{time.monotonic_ns()}"
        self.logs = [folder.parent / f"{stem}-{number}.log" for number in range(count)]
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
        command = [*COMMAND, config, "--run-dir", folder, *(f"--set={each}" for each in settings)]
        if count > 1:
            command += ["--coordinator", f"127.0.0.1:{_port()}", "--num-processes", str(count), "--process-id"]
        self.all = []
        for number, log in enumerate(self.logs):
            own = [*command, str(number)] if count > 1 else command
            with log.open("w") as output:
                self.all.append(subprocess.Popen(own, stdout=output, stderr=subprocess.STDOUT, env=environment))

    def wait(self, seconds=240):
        """Exit statuses; a process that hangs is killed, and fails the test."""
        end = time.monotonic() + seconds
        try:
            return [each.wait(max(end - time.monotonic(), 0.1)) for each in self.all]
        finally:
            for each in self.all:
                each.kill()

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)

    def wait_for_step(self, folder, step, seconds=200):
        end = time.monotonic() + seconds
        while len(metrics.read(folder / metrics.METRICS)) <= step:
            assert time.monotonic() < end, self.said()
            assert all(each.poll() is None for each in self.all), self.said()
            time.sleep(0.05)


def _losses(folder):
    return [each["loss"] for each in metrics.read(folder / metrics.METRICS)]


@pytest.mark.xdist_group("processes")
def test_four_train_what_one_trains(toy_config, tmp_path, whole):
    """On a mesh whose axes, `context` among them, lie over several processes."""
    folder = tmp_path / "run"
    processes = Processes(toy_config, folder, 4, ["mesh.data=1", "mesh.context=2", "mesh.expert=2", "mesh.fsdp=2"])
    assert processes.wait() == [0] * 4, processes.said()
    np.testing.assert_allclose(_losses(folder), _losses(whole[0]), rtol=1e-5)
    assert ["loss" in log.read_text() for log in processes.logs] == [True, False, False, False]


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_both_at_one_step_and_one_goes_on(toy_config, tmp_path, number):
    folder = tmp_path / "run"
    processes = Processes(toy_config, folder, 2, [*TWO, "steps=2000", "save_every=1000", "validate_every=none"])
    processes.wait_for_step(folder, 2)
    processes.all[1].send_signal(number)
    assert processes.wait() == [128 + number] * 2, processes.said()
    assert f"{number.name}: stopping after step" in processes.said()
    done = len(_losses(folder))
    assert [int(each.name) for each in (folder / "checkpoints").iterdir()] == [done]
    train(toy_config, folder, steps=done + 2, save_every=1000, validate_every="none")
    assert len(_losses(folder)) == done + 2


@pytest.mark.xdist_group("processes")
def test_none_outlives_one_that_is_killed_and_its_run_goes_on(toy_config, tmp_path):
    folder = tmp_path / "run"
    processes = Processes(toy_config, folder, 2, [*TWO, "steps=2000", "save_every=2", "validate_every=none"])
    processes.wait_for_step(folder, 4)
    processes.all[1].kill()
    killed = time.monotonic()
    statuses = processes.wait(120)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] != 0
    assert time.monotonic() - killed < 100
    saved = max(int(each.name) for each in (folder / "checkpoints").iterdir() if each.name.isdigit())
    train(toy_config, folder, steps=saved + 2, validate_every="none")
    assert len(_losses(folder)) == saved + 2


@pytest.mark.xdist_group("processes")
def test_what_one_refuses_ends_all(toy_config, tmp_path):
    """The first finds the folder taken by something else."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    processes = Processes(toy_config, tmp_path / "run", 2, TWO)
    assert processes.wait() == [2, 2], processes.said()
    first, second = (log.read_text() for log in processes.logs)
    assert "holds files but no run" in first
    assert "process 0: stopped, with a message of its own" in second
