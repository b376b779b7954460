"""Signals and deaths, of one process and of one of several."""

from __future__ import annotations

import random
import signal
import time

from benchmarks.chaos.runs import STEPS, Run, Seen, Workshop
from mixtral_jax.sharding.distributed import HEARTBEAT

SLOW = "slow=0.03"
TOGETHER = ("mesh.expert=2", "validate_every=none")


def sigterm(shop: Workshop) -> Seen:
    """In the middle of a run."""
    return _asked(shop, signal.SIGTERM)


def sigint(shop: Workshop) -> Seen:
    """Once."""
    return _asked(shop, signal.SIGINT)


def _asked(shop: Workshop, number: signal.Signals) -> Seen:
    seen, name = Seen(), number.name.lower()
    run = shop.start(name, "steps=60", fault=SLOW)
    run.wait_for_step(23)
    run.processes[0].send_signal(number)
    (status,) = run.wait()
    done = len(run.losses())
    seen.that(status == 128 + number, f"exit {status}")
    seen.that(run.saved()[-1] == done, f"step {done} saved")
    _goes_on(seen, shop, name, 60)
    return seen


def _goes_on(seen: Seen, shop: Workshop, name: str, steps: int) -> None:
    run = shop.start(name, f"steps={steps}")
    (status,) = run.wait()
    seen.that(status == 0, "goes on")
    seen.that(run.losses() == shop.reference[:steps], f"{steps} losses bitwise those of a run left alone")


def sigterm_of_several(shop: Workshop) -> Seen:
    """To the second of two processes."""
    seen = Seen()
    run = shop.start("sigterm-of-several", "steps=150", *TOGETHER, fault=SLOW, processes=2)
    run.wait_for_step(5)
    run.processes[1].send_signal(signal.SIGTERM)
    statuses, done = run.wait(), len(run.losses())
    seen.that(statuses == [143, 143], f"exit {statuses}")
    seen.that(run.saved()[-1] == done, f"step {done} saved")
    again = shop.start("sigterm-of-several", f"steps={done + 2}", "validate_every=none")
    seen.that(again.wait() == [0] and len(again.losses()) == done + 2, f"one process goes on at step {done + 1}")
    return seen


def sigint_twice(shop: Workshop) -> Seen:
    """While a step does not end."""
    seen = Seen()
    run = shop.start("sigint-twice", fault="hang=12")
    run.wait_for_step(11)
    time.sleep(0.5)
    run.processes[0].send_signal(signal.SIGINT)
    time.sleep(1)
    seen.that(run.processes[0].poll() is None, "waits for the step after the first")
    run.processes[0].send_signal(signal.SIGINT)
    began = time.monotonic()
    (status,) = run.wait(60)
    seen.that(status == 130, f"exit {status}, {time.monotonic() - began:.1f} s after the second")
    seen.that(run.saved() == [10], f"saved {run.saved()}")
    return seen


def killed_while_saving(shop: Workshop) -> Seen:
    """Five times, as soon as a step's folder is there that is not whole yet."""
    seen, torn, folder = Seen(), 0, shop.folder / "killed-while-saving" / "checkpoints"
    for wanted in range(5):
        run = shop.start("killed-while-saving", "save_every=5", f"steps={STEPS}", fault=SLOW)
        run.wait_for_step(5 + 20 * wanted)
        before = set(folder.iterdir())
        while not any("tmp" in each.name for each in set(folder.iterdir()) - before):
            pass
        _kill(run)
        torn += any("tmp" in each.name for each in folder.iterdir())
    seen.that(torn > 0, f"killed 5 times, {torn} torn folders")
    _goes_on(seen, shop, "killed-while-saving", STEPS)
    seen.that(not any("tmp" in each.name for each in folder.iterdir()), "none left")
    return seen


def killed_at_random(shop: Workshop) -> Seen:
    """At twenty random moments, each later than the one before."""
    seen, dice = Seen(), random.Random(0)
    for step in sorted(dice.sample(range(1, STEPS - 1), 20)):
        run = shop.start("killed-at-random", fault="slow=0.01")
        run.wait_for_step(step)
        time.sleep(dice.uniform(0, 0.02))
        _kill(run)
    seen.that(True, "killed 20 times")
    _goes_on(seen, shop, "killed-at-random", STEPS)
    return seen


def _kill(run: Run) -> None:
    for each in run.processes:
        each.kill()
        each.wait()


def killed_of_several(shop: Workshop) -> Seen:
    """The second of two processes, by SIGKILL."""
    run = shop.start("killed-of-several", *TOGETHER, fault=SLOW, processes=2)
    run.wait_for_step(15)
    run.processes[1].kill()
    return _others(run, time.monotonic())


def error_of_several(shop: Workshop) -> Seen:
    """An exception in the second of two processes."""
    run = shop.start("error-of-several", *TOGETHER, fault=f"{SLOW}+error=15,1", processes=2)
    run.wait_for_step(14)
    return _others(run, time.monotonic())


def _others(run: Run, began: float) -> Seen:
    seen = Seen()
    statuses = run.wait(HEARTBEAT + 60)
    seen.that(None not in statuses and 0 not in statuses, f"exit {statuses} after {time.monotonic() - began:.1f} s")
    seen.that(run.saved()[-1] == 10, f"saved {run.saved()}")
    return seen
