"""The guard's decisions, and the watchdog."""

import math
import subprocess
import sys
import time

import pytest

from mixtral_jax.errors import InputError
from mixtral_jax.train import config as configs
from mixtral_jax.train.guard import Diverged, Guard, GuardConfig, spike_limit
from mixtral_jax.train.metrics import MetricsLog
from mixtral_jax.train.watchdog import Watchdog


def test_the_limit_is_by_medians():
    # Of 2.0 2.1 2.2 2.3 9.0 the median is 2.2, and 0.1 that of 0.2 0.1 0.0 0.1 6.8.
    assert spike_limit([2.3, 9.0, 2.0, 2.1, 2.2], 10) == pytest.approx(3.2, rel=1e-6)
    # The same loss again and again: a hundredth of it counts as a deviation.
    assert spike_limit([4.0] * 5, 10) == pytest.approx(4.4, rel=1e-6)


def test_a_step_is_judged_by_the_losses_up_to_the_one_before_the_last():
    guard = Guard(GuardConfig(spike_window=3, spike_deviations=10.0))
    for step, loss in enumerate([2.0, 2.1, 2.2, 50.0]):
        assert guard.limit(step) == math.inf
        guard.see(step, loss, skipped=False)
    assert guard.limit(4) == spike_limit([2.0, 2.1, 2.2], 10)  # that of step 3 is not known when step 4 is begun
    assert guard.limit(5) == spike_limit([2.1, 2.2, 50.0], 10)
    spike, told = guard.see(4, 3.3, skipped=True)
    assert spike
    assert told == ["warning: step 5: loss 3.300 is a spike, above 3.100, the update is skipped"]
    assert guard.see(5, math.nan, skipped=True) == (
        False,
        ["warning: step 6: loss or gradient is not finite, the update is skipped"],
    )
    assert Guard(GuardConfig(spike_deviations=math.inf)).limit(10) == math.inf


def test_it_gives_up_after_so_many_in_a_row_or_in_all():
    guard = Guard(GuardConfig(skipped_in_a_row=2, skipped_in_all=3))
    for step, skipped in enumerate([True, False, True, False]):
        guard.see(step, 1.0, skipped)
        guard.check(step)
    guard.see(4, math.nan, True)
    with pytest.raises(Diverged, match="in 3 steps of this run, the last of them step 5"):
        guard.check(4)
    guard.see(5, math.nan, True)
    with pytest.raises(Diverged, match="not finite in 2 steps in a row, up to step 6"):
        guard.check(5)


def test_it_remembers_what_is_in_the_runs_folder(tmp_path):
    whole, resumed = Guard(GuardConfig(spike_window=4)), Guard(GuardConfig(spike_window=4))
    with MetricsLog(tmp_path, 0) as metrics:
        for step in range(9):
            loss, skipped = (math.nan, True) if step in (3, 8) else (2.0 + 0.1 * step, False)
            whole.see(step, loss, skipped)
            metrics.write(step, {"loss": loss, "skipped": skipped})
    resumed.recall(tmp_path)
    assert [resumed.limit(step) for step in (9, 10)] == [whole.limit(step) for step in (9, 10)]
    assert (resumed.in_a_row, resumed.in_all) == (whole.in_a_row, whole.in_all) == (1, 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("guard.skipped_in_a_row=0", "guard.skipped_in_a_row = 0: a number above zero"),
        ("guard.hang_seconds=-1", "guard.hang_seconds = -1.0: a number above zero, or inf"),
        ("guard.spike_windw=3", "guard.spike_windw = 3: unknown key; did you mean 'spike_window'"),
    ],
)
def test_refuses(toy_config, setting, message):
    with pytest.raises(InputError, match=message):
        configs.load(toy_config, [setting])


HANGS = """
import pathlib, sys, threading
from mixtral_jax.train.watchdog import Watchdog

def stuck():
    threading.Event().wait()

with Watchdog(0.2, pathlib.Path(sys.argv[1])) as dog:
    dog.alive()
    stuck()
"""


def test_what_hangs_is_ended_with_the_stack_of_every_thread(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "no step has ended for 0.2 s (guard.hang_seconds)" in done.stderr
    for stacks in (done.stderr, (tmp_path / "hang.txt").read_text()):
        assert "in stuck" in stacks
        assert "in _watch" in stacks


def test_the_watch_begins_with_the_first_sign_and_ends_with_the_context(tmp_path):
    with Watchdog(0.01, tmp_path):
        time.sleep(0.1)
    with Watchdog(0.01, tmp_path) as dog:
        pass
    dog.alive()
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())
