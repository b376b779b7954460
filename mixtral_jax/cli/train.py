"""`mixtral-jax train`: pretrains a model from a config."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.cli import platform


def train(
    config: Annotated[str, typer.Argument(help="A TOML file, or a shipped config such as runs/demo.")],
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, such as optimizer.warmup_steps=10."),
    ] = [],  # noqa: B006
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run lives; one that is there goes on. Default: runs/NAME.")
    ] = None,
    device: platform.Device = None,
) -> None:
    """Pretrain a model; started again with the same folder, it goes on where it was."""
    platform.start(device)
    from mixtral_jax.train import config as configs
    from mixtral_jax.train import loop, report
    from mixtral_jax.train.progress import Progress

    settings = configs.load(config, set_)
    folder = run_dir or Path("runs") / Path(config).stem
    progress = Progress()
    progress.say(f"run folder: {folder}")
    try:
        ending = loop.train(settings, folder, progress)
    except loop.Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if ending.signal is not None:
        progress.say(
            f"stopped by {ending.signal.name}, saved at step {ending.step}; the same command goes on from there"
        )
        raise typer.Exit(128 + ending.signal)
    for path in report.write_report(folder):
        progress.say(f"wrote {path}")
