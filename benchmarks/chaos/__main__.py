"""`make chaos`: every fault that training is to survive, put into a real run; exit status 1 if one is not.

A table on stdout, a row a fault. A fault that this machine does not let be made, such as a full disk without the right
to mount one, is told and does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.chaos import files, numbers, signals
from benchmarks.chaos.runs import Seen, Workshop


class Fault(NamedTuple):
    """A fault, what is expected of it, and the function that makes it and looks."""

    name: str
    fault: str
    expected: str
    make: Callable[[Workshop], Seen]


STOPS = "finishes the step, saves it, exit {}; the next start goes on at step + 1"
USED = "named, the step before is used"
TOLD = "a message with the file, exit 2, before step 1"
DIE = "the other ends with an error within the heartbeat, none hangs"

FAULTS = (
    Fault("sigterm", "SIGTERM in a step", STOPS.format(143), signals.sigterm),
    Fault("sigterm-of-several", "SIGTERM to one of two processes", "both the same", signals.sigterm_of_several),
    Fault("sigint", "SIGINT once", STOPS.format(130), signals.sigint),
    Fault("sigint-twice", "SIGINT twice", "ends at once, exit 130", signals.sigint_twice),
    Fault(
        "killed-while-saving",
        "SIGKILL while a checkpoint is written",
        "goes on from the last whole one; torn folders are removed; losses as without",
        signals.killed_while_saving,
    ),
    Fault(
        "killed-at-random",
        "SIGKILL at 20 random moments of 200 steps",
        "losses bitwise those of a run left alone",
        signals.killed_at_random,
    ),
    Fault("killed-of-several", "SIGKILL to one of two processes", DIE, signals.killed_of_several),
    Fault("error-of-several", "an exception in one of two processes", DIE, signals.error_of_several),
    Fault(
        "disk-about-full",
        "a disk with no room for the next checkpoint",
        "a message with path and bytes, exit 2; earlier steps intact",
        files.disk_about_full,
    ),
    Fault("disk-full", "a disk that is full while saving", "the same", files.disk_full),
    Fault("truncated", "a truncated file in the newest step", USED, files.truncated),
    Fault("flipped", "a flipped bit in the newest step", USED, files.flipped),
    Fault("missing", "a missing file in the newest step", USED, files.missing),
    Fault("empty-folder", "an empty newer folder", USED, files.empty_folder),
    Fault("foreign-folder", "a foreign newer folder", USED, files.foreign_folder),
    Fault("forty-flips", "40 bit flips in a step", "40 found", files.forty_flips),
    Fault(
        "another-config",
        "a checkpoint of another config",
        "refused before any weight is read, with the difference",
        files.another_config,
    ),
    Fault("nan-once", "a batch of NaN", "skipped, bitwise; counted", numbers.nan_once),
    Fault("nan-five", "five of them in a row", "stops, exit 1; the last good checkpoint kept", numbers.nan_five),
    Fault("spike", "a loss spike", "logged", numbers.spike),
    Fault("spike-skipped", "a loss spike, guard.skip_spikes", "logged, skipped bitwise", numbers.spike_skipped),
    Fault("hang", "a step that hangs", "the stack of every thread, exit 1", numbers.hang),
    Fault("no-text", "a data file that is missing", TOLD, files.no_text),
    Fault("short-text", "one that is short", TOLD, files.short_text),
    Fault("not-utf8", "one that is not UTF-8", "the same, with the byte", files.not_utf8),
    Fault("vocabulary", "a token id >= the vocabulary", "the same, with its place", files.token_out_of_vocabulary),
    Fault("read-only", "a read-only run folder", "refused with a message, exit 2", files.read_only),
    Fault("folder-of-another", "a run folder of another config, or of no run", "the same", files.folder_of_another),
)


def main() -> None:
    """Exit status 0: all went as expected."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    names = [each.name for each in FAULTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    chosen = parser.parse_args().only or names
    began, wrong, left_out = time.monotonic(), [], []
    print("| fault | expected | what happened | ok |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        for each in FAULTS:
            if each.name not in chosen:
                continue
            try:
                seen = each.make(shop)
            except files.NotHere as error:
                left_out.append(each.name)
                print(f"| {each.fault} | {each.expected} | not made here: {error} | - |", flush=True)
                continue
            except Exception:
                traceback.print_exc()
                seen = Seen(["an error of the program itself, see stderr"], ok=False)
            if not seen.ok:
                wrong.append(each.name)
                print(shop.last_said(), file=sys.stderr, flush=True)
            print(f"| {each.fault} | {each.expected} | {seen} | {'yes' if seen.ok else 'NO'} |", flush=True)
    print(f"\n{len(chosen)} faults, {time.monotonic() - began:.0f} s", end="")
    print(f"; not made here: {', '.join(left_out)}" if left_out else "")
    if wrong:
        sys.exit(f"not as expected: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
