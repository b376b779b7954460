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
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the run lives, a folder or s3://bucket/folder; one that is there goes on. Default: runs/NAME.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Stop where the newest checkpoint is damaged, rather than use the one before.")
    ] = False,
    device: platform.Device = None,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of several processes' first; a cluster's own is found.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which one this is, from 0.")] = None,
    profile_steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="Traces steps A to B, from 1, into the run's folder.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Sends the numbers to Weights & Biases, if it is installed.")
    ] = None,
) -> None:
    """Pretrain a model; started again with the same folder, it goes on where it was."""
    platform.choose(device)
    from mixtral_jax.sharding import distributed

    distributed.join(coordinator, num_processes, process_id)
    platform.start(device)
    with distributed.ends_with_the_others():
        status = _train(config, set_, run_dir, strict, profile_steps, wandb)
    raise typer.Exit(status)


def _train(
    config: str, set_: list[str], run_dir: str | None, strict: bool, profile: str | None, wandb: str | None
) -> int:
    """The exit status."""
    from mixtral_jax.sharding.distributed import is_first
    from mixtral_jax.train import config as configs
    from mixtral_jax.train import loop, report
    from mixtral_jax.train.guard import Diverged
    from mixtral_jax.train.progress import Progress
    from mixtral_jax.train.tracking import Tracking, profile_steps

    tracking = Tracking(profile_steps(profile), wandb)
    settings = configs.load(config, set_)
    folder = run_dir or str(Path("runs") / Path(config).stem)
    progress = Progress()
    progress.say(f"run folder: {folder}")
    try:
        ending = loop.train(settings, folder, progress, strict, tracking)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if ending.signal is not None:
        progress.say(
            f"stopped by {ending.signal.name}, saved at step {ending.step}; the same command goes on from there"
        )
        return 128 + ending.signal
    if is_first():
        for path in report.write_report(folder):
            progress.say(f"wrote {path}")
    return 0
