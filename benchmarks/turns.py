"""A process that works when it is told to: contenders of other environments take their turns so."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def told(
    command: Sequence[str], name: str, environment: Mapping[str, str], folder: Path | None = None
) -> Iterator[Callable[[str], str]]:
    """A call that gives the process a line, and gives back the line that it answers with; it ends with the context.

    Args:
      name: of it, in errors.
      environment: added to this process's.
      folder: that it runs in.

    Raises:
      RuntimeError: it ended instead; with the last it said on standard error.
    """
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, env=os.environ | environment, cwd=folder, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def tell(line: str) -> str:
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                answer = ""
            else:
                answer = process.stdout.readline()
            if not answer:
                log.seek(0)
                raise RuntimeError(f"{name} ended: {''.join(log.readlines()[-20:])}")
            return answer

        yield tell
