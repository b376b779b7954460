"""The program that makes faults: that it sees what happens, and that what should not happen is told."""

import subprocess
import sys
from pathlib import Path

from benchmarks.chaos.runs import Seen

ROOT = Path(__file__).parents[2]


def test_a_fault_is_made_and_its_outcome_printed():
    command = [sys.executable, "-m", "benchmarks.chaos", "--only", "no-text", "--only", "hang"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| a ")]
    assert len(rows) == 2
    assert all(row.endswith("| yes |") for row in rows)
    assert "exit 2" in rows[1]
    assert "no such file or folder" in rows[1]


def test_what_is_not_so_is_told():
    seen = Seen()
    seen.that(True, "exit 0")
    assert (seen.ok, str(seen)) == (True, "exit 0")
    seen.that(False, "saved [10]")
    assert (seen.ok, str(seen)) == (False, "exit 0; NOT SO: saved [10]")
