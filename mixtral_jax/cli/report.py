"""`mixtral-jax report`: a run's pictures and its last numbers; `report routing`: where a text's tokens go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from mixtral_jax.cli import platform
from mixtral_jax.cli.progress import bar, print_notes
from mixtral_jax.errors import InputError

_RUN = "of-run"


class _RunByDefault(TyperGroup):
    """`report RUN` is `report of-run RUN`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Puts the command's name in front where there is none."""
        if args and args[0] not in (*self.commands, "--help"):
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Draw a training run (report RUN), follow it (report RUN --watch), or a model's routing (report routing).",
)


@app.command(name=_RUN, hidden=True)
def run_report(
    run: Annotated[str, typer.Argument(help="The folder of a training run, on a disk or in a bucket.")],
    watch: Annotated[bool, typer.Option("--watch", help="Prints the steps as they are done, until the last.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Between two looks of --watch.")] = 2.0,
) -> None:
    """Draw a run's loss, throughput and expert load, and print where it stands."""
    from mixtral_jax.train.goodput import describe, read_goodput
    from mixtral_jax.train.metrics import METRICS, VALIDATION, read
    from mixtral_jax.train.report import readable, write_report

    if watch:
        _watch(run, every)
    paths = write_report(run)
    with readable(run) as folder:
        last, validation = read(folder / METRICS)[-1], read(folder / VALIDATION)
        goodput = read_goodput(folder)
    typer.echo(f"step {last['step'] + 1}: " + ", ".join(f"{key} {_short(last[key])}" for key in last if key != "step"))
    for found in validation[-1:]:
        entropy = found.get("unigram_entropy")
        gap = "" if entropy is None else f", {entropy - found['loss']:.2f} under the unigram entropy"
        typer.echo(f"held out, at step {found['step']}: loss {found['loss']:.3f}{gap}")
        for layer, load in enumerate(found.get("load", [])):
            typer.echo(f"  layer {layer}: expert load max/mean {max(load):.2f}, min/mean {min(load):.2f}")
    if goodput:
        typer.echo(describe(goodput))
    for path in paths:
        typer.echo(f"wrote {path}")


def _watch(run: str, every: float) -> None:
    from mixtral_jax.train import watch

    try:
        for line in watch.follow(run, every):
            typer.echo(watch.describe(line))
    except KeyboardInterrupt:
        typer.echo("no longer followed; the run goes on")


@app.command()
def routing(
    model: Annotated[str, typer.Argument(help="A Mixtral in any format, a training run, or a hub id.")],
    files: Annotated[list[Path], typer.Argument(help="Texts in UTF-8; of several endings, each is told apart.")],
    window: Annotated[int, typer.Option(help="Tokens read at a time.")] = 512,
    pictures: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to draw PNG files.")] = None,
    dtype: platform.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    device: platform.Device = None,
) -> None:
    """Show which experts a text's tokens go to, by layer and kind of token, and how often neighbours go together."""
    platform.start(device)
    import numpy as np

    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.evaluation import routing_pictures
    from mixtral_jax.evaluation import routing_report as r
    from mixtral_jax.loading import from_source

    source = open_source(model)
    print_notes(source.notes)
    loaded = from_source(source, dtype)
    if loaded.tokenizer is None:
        raise InputError("MODEL", model, "this model has no tokenizer")
    texts = [r.read_text(path, loaded.tokenizer) for path in files]
    parts: list[np.ndarray] = []
    windows: list[np.ndarray] = []
    with bar("routing") as progress:
        for text in texts:
            expert_LNA, window_N = loaded.routing(text.ids, min(window, loaded.config.max_position), progress)
            parts.append(expert_LNA)
            windows.append(window_N + (windows[-1][-1] + 1 if windows else 0))
    assert loaded.config.moe is not None
    everything = np.concatenate(parts, axis=1), np.concatenate(windows)
    found = r.summarise(texts, *everything, loaded.config.moe.num_experts)
    for line in [json.dumps(found)] if as_json else routing_pictures.table(found):
        typer.echo(line)
    for path in routing_pictures.draw(found, pictures) if pictures is not None else []:
        typer.echo(f"wrote {path}", err=as_json)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
