"""Several processes that train one model, over the command line, with two devices each: two or four on one machine, and
two in network namespaces with addresses of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import quick_compiler
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

    def __init__(self, config, folder, count, settings, devices=2, hosts=(), program=COMMAND):
        stem = f"{folder.name}-{time.monotonic_ns()}"
        self.logs = [folder.parent / f"{stem}-{number}.log" for number in range(count)]
        flags = f"--xla_force_host_platform_device_count={devices} {quick_compiler.FLAGS}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
        command = [*program, config, "--run-dir", folder, *(f"--set={each}" for each in settings)]
        if count > 1:
            address = hosts[0].address if hosts else "127.0.0.1"
            command += ["--coordinator", f"{address}:{_port()}", "--num-processes", str(count), "--process-id"]
        self.all = []
        for number, log in enumerate(self.logs):
            own = [*command, str(number)] if count > 1 else command
            own = [*hosts[number].enter, *own] if hosts else own
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


class Host(NamedTuple):
    """A network namespace, as a machine of its own."""

    address: str
    enter: list
    """What a command begins with to run there."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two hosts joined by a cable, each of which knows its own name by its own address, and no other network."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    names, found = [f"mj{os.getpid()}{letter}" for letter in "ab"], []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        for number, name in enumerate(names, 1):
            address = f"192.0.2.{number}"  # of the block that is kept for examples
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
            known = tmp_path_factory.mktemp("host") / "hosts"
            known.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            own_name = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(known)]
            found.append(Host(address, ["ip", "netns", "exec", name, *own_name]))
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _losses(folder):
    return [each["loss"] for each in metrics.read(folder / metrics.METRICS)]


def test_four_train_what_one_trains(toy_config, tmp_path, whole):
    """On a mesh whose axes, `context` among them, lie over several processes."""
    folder = tmp_path / "run"
    processes = Processes(toy_config, folder, 4, ["mesh.data=1", "mesh.context=2", "mesh.expert=2", "mesh.fsdp=2"])
    assert processes.wait() == [0] * 4, processes.said()
    np.testing.assert_allclose(_losses(folder), _losses(whole[0]), rtol=1e-5)
    assert ["loss" in log.read_text() for log in processes.logs] == [True, False, False, False]


def test_two_hosts_train_what_one_process_trains(toy_config, tmp_path, whole, hosts):
    folder = tmp_path / "run"
    processes = Processes(toy_config, folder, 2, TWO, hosts=hosts)
    assert processes.wait() == [0, 0], processes.said()
    np.testing.assert_allclose(_losses(folder), _losses(whole[0]), rtol=1e-5)


@pytest.mark.parametrize("apart", [False, True], ids=["one host", "two hosts"])
def test_sigterm_to_one_stops_both_at_one_step_and_one_goes_on(toy_config, tmp_path, apart, request):
    _stop(toy_config, tmp_path, signal.SIGTERM, request.getfixturevalue("hosts") if apart else ())


def test_sigint_does_as_well(toy_config, tmp_path):
    _stop(toy_config, tmp_path, signal.SIGINT)


def _stop(toy_config, tmp_path, number, hosts=()):
    folder, settings = tmp_path / "run", [*TWO, "steps=2000", "save_every=1000", "validate_every=none"]
    processes = Processes(toy_config, folder, 2, settings, hosts=hosts)
    processes.wait_for_step(folder, 2)
    processes.all[1].send_signal(number)
    assert processes.wait() == [128 + number] * 2, processes.said()
    assert f"{number.name}: stopping after step" in processes.said()
    done = len(_losses(folder))
    assert [int(each.name) for each in (folder / "checkpoints").iterdir()] == [done]
    train(toy_config, folder, steps=done + 2, save_every=1000, validate_every="none")
    assert len(_losses(folder)) == done + 2


# Killed before it has written its digests, the step before is used, and that is told.
@pytest.mark.filterwarnings("ignore:.*IS NOT USED:UserWarning")
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


def test_an_exception_in_one_ends_both(toy_config, tmp_path):
    folder, settings = tmp_path / "run", [*TWO, "steps=2000", "save_every=1000", "validate_every=none"]
    faulty = [sys.executable, "-m", "benchmarks.chaos.injected", "error=3,1", "train"]
    processes = Processes(toy_config, folder, 2, settings, program=faulty)
    statuses = processes.wait(120)
    assert statuses[1] == 1, processes.said()
    assert statuses[0] != 0
    assert "RuntimeError: injected at step 3" in processes.logs[1].read_text()


def test_what_one_refuses_ends_all(toy_config, tmp_path):
    """The first finds the folder taken by something else."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    processes = Processes(toy_config, tmp_path / "run", 2, TWO)
    assert processes.wait() == [2, 2], processes.said()
    first, second = (log.read_text() for log in processes.logs)
    assert "holds files but no run" in first
    assert "process 0: stopped, with a message of its own" in second
