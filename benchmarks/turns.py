"""A process that works when it is told to: contenders of other environments take their turns so."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
      RuntimeError: it ended instead; with how, and the last it said on standard error.
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
            with suppress(BrokenPipeError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
                if answer := process.stdout.readline():
                    return answer
            with suppress(BrokenPipeError):
                process.stdin.close()  # which would else be tried once more as the context ends
            code = process.wait()
            log.seek(0)
            raise RuntimeError(f"{name} ended with {code}: {''.join(log.readlines()[-20:])}")

        yield tell
