"""`mixtral-jax report`: a run's pictures and its last numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="The folder of a training run.")]) -> None:
    """Draw a run's loss, throughput and expert load, and print where it stands."""
    from mixtral_jax.train.metrics import METRICS, VALIDATION, read
    from mixtral_jax.train.report import write_report

    paths = write_report(run)
    last = read(run / METRICS)[-1]
    typer.echo(f"step {last['step'] + 1}: " + ", ".join(f"{key} {_short(last[key])}" for key in last if key != "step"))
    for found in read(run / VALIDATION)[-1:]:
        gap = found["unigram_entropy"] - found["loss"]
        typer.echo(f"held out, at step {found['step']}: loss {found['loss']:.3f}, {gap:.2f} under the unigram entropy")
        for layer, load in enumerate(found.get("load", [])):
            typer.echo(f"  layer {layer}: expert load max/mean {max(load):.2f}, min/mean {min(load):.2f}")
    for path in paths:
        typer.echo(f"wrote {path}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
