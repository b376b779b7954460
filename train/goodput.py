"""Where a run's time goes: the share of it that brought the model further."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mixtral_jax.errors import unless_told
from mixtral_jax.train.metrics import METRICS, read

GOODPUT = "goodput.json"

Part = Literal["compile", "data", "step", "checkpoint", "validation"]
PARTS: tuple[Part, ...] = ("compile", "data", "step", "checkpoint", "validation")


class Goodput:
    """Adds up the seconds of a run's parts over all its starts; a context manager, around the loop.

    The host's clock: a step is what the host waits for it, so what overlaps with it costs nothing.

    Args:
      folder: the run's; None: of several processes, one that writes nothing.
      first_step: where this start goes on. Steps that were done after it are lost: they are done again.
      tokens: of a step.
    """

    def __init__(self, folder: Path | None, first_step: int, tokens: int):
        self._file = None if folder is None else folder / GOODPUT
        self._before = read_goodput(folder) if folder is not None else {}
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._lost = 0.0 if folder is None else _lost(folder, first_step, tokens)
        self._began = time.perf_counter()

    @contextmanager
    def of(self, part: Part) -> Iterator[None]:
        """What happens in the context is this part's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - began

    def summary(self) -> dict[str, Any]:
        """Seconds by part, of all starts so far, and the fraction of all in steps that were kept."""
        own = self._seconds | {"lost": self._lost, "total": time.perf_counter() - self._began}
        sums = {part: self._before.get(part, 0.0) + seconds for part, seconds in own.items()}
        sums["other"] = max(0.0, sums["total"] - sum(sums[part] for part in PARTS))
        kept = max(0.0, sums["step"] - sums["lost"])
        rounded = {part: round(seconds, 3) for part, seconds in sums.items()}
        return rounded | {"goodput": round(kept / max(sums["total"], 1e-9), 4), "starts": self._starts}

    @property
    def _starts(self) -> int:
        return int(self._before.get("starts", 0)) + 1

    def write(self) -> None:
        """Writes the summary so far: a start that is killed keeps what it had at its last checkpoint."""
        if self._file is not None:
            partial = self._file.with_name(f"{GOODPUT}.partial")
            partial.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")
            partial.replace(self._file)

    def __enter__(self) -> Goodput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with unless_told(error):
            self.write()


def read_goodput(folder: Path) -> dict[str, Any]:
    """The summary of a run's folder; empty where there is none."""
    file = folder / GOODPUT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def describe(summary: dict[str, Any]) -> str:
    """The summary in a line, the largest part first."""
    parts = sorted((*PARTS, "other"), key=lambda part: -summary[part])
    shares = ", ".join(f"{part} {summary[part] / max(summary['total'], 1e-9):.1%}" for part in parts)
    return (
        f"goodput {summary['goodput']:.1%} of {summary['total']:,.0f} s in {summary['starts']} start(s): {shares};"
        f" lost {summary['lost']:,.1f} s"
    )


def _lost(folder: Path, first_step: int, tokens: int) -> float:
    """Seconds of the steps that will be done again, as far as their rate is known."""
    again = [line for line in read(folder / METRICS) if line["step"] >= first_step]
    rates = [line["tokens_per_second"] for line in again if line.get("tokens_per_second")]
    return len(again) * tokens * len(rates) / sum(rates) if rates else 0.0
