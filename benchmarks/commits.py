"""This checkout beside a commit of it, on the benchmarks of this one: two processes in turns.

python -m benchmarks.commits COMMIT [NAME ...] --repeats 7

Of the commit its package alone is taken. With one from before the package had all that a benchmark imports, that ends
with the ImportError.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.own_work import BENCHMARKS
from benchmarks.timing import Row, amounts, interleave, show
from benchmarks.turns import told

ROOT = Path(__file__).parents[1]
PACKAGE = ("mixtral_jax", "sharding", "train", "configs")
OURS = "this checkout"


def compare(commit: str, package: Path, name: str, repeats: int) -> list[Row]:
    """Milliseconds of each contender of a benchmark: this checkout's, and those of the package in that folder."""
    command = [sys.executable, "-m", "benchmarks.own_work", name]
    # Neither runs in this checkout, whose package would come before that of PYTHONPATH.
    with (
        tempfile.TemporaryDirectory() as folder,
        told(command, OURS, importing(ROOT), Path(folder)) as ours,
        told(command, commit, importing(package), Path(folder)) as theirs,
    ):
        contenders = ours("").rstrip("\n").split("\t")
        theirs("")
        rows = []
        for contender in contenders:
            calls = {OURS: partial(ours, contender), commit: partial(theirs, contender)}
            seconds = interleave(calls, repeats)
            found = {who: [1000 * each for each in times] for who, times in seconds.items()}
            title = contender if contender.startswith(name) else f"{name}, {contender}"
            rows += amounts(title, "ms", found, OURS)
    return rows


def importing(package: Path) -> dict[str, str]:
    """The environment of a process that takes the package from a folder, and the benchmarks from this checkout."""
    return {"PYTHONPATH": os.pathsep.join((str(package), str(ROOT)))}


def extract(commit: str, folder: Path) -> None:
    """The package as it was at a commit."""
    command = ["git", "archive", commit, *PACKAGE]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def main() -> None:
    """Prints the times of both, and how many times the commit's this checkout's are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commits", description=__doc__)
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            extract(arguments.commit, Path(folder))
        except FileNotFoundError:
            parser.error("git is needed, and was not found")
        except subprocess.CalledProcessError as error:
            parser.error(f"git has no package of commit {arguments.commit!r}: {error.stderr.decode().strip()}")
        rows: list[Row] = []
        try:
            for name in arguments.names or BENCHMARKS:
                rows += compare(arguments.commit, Path(folder), name, arguments.repeats)
        except RuntimeError as error:
            sys.exit(str(error))
        finally:
            show(rows, arguments.json)


if __name__ == "__main__":
    main()
