"""The error that a user can cause: it names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress


class InputError(ValueError):
    """Something given from outside (a config key, a flag, a file) that can't be used.

    The command line prints the message alone and exits with status 2.

    Args:
      key: what was set, in the user's words: a dotted config key, a flag or a path.
      value: what it was set to; None where it was not set.
      allowed: what would have been accepted, as a phrase that follows the value.
    """

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"{key}: {allowed}" if value is None else f"{key} = {value!r}: {allowed}")
        self.key = key
        self.value = value
        self.allowed = allowed


def together(problems: Sequence[InputError]) -> InputError:
    """The first of at least one problem, with the message of all, a line each."""
    first = problems[0]
    if len(problems) > 1:
        first.args = ("\n".join(str(problem) for problem in problems),)
    return first


def nearest(name: str, known: Iterable[str]) -> str:
    """A did-you-mean phrase for a misspelt name: `did you mean 'dim'? ` or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def unless_told(error: BaseException | None, kind: type[Exception] = OSError) -> AbstractContextManager[None]:
    """For what is closed on the way out: while an error is on its way already, one of this kind does not hide it."""
    return nullcontext() if error is None else suppress(kind)
