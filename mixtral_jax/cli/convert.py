"""`mixtral-jax convert`: a model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mixtral_jax.cli.progress import bar, print_notes


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model in any format, or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[Literal["native", "huggingface", "consolidated"], typer.Option(help="The format to write.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: as stored, and float32 for what is quantised."),
    ] = None,
) -> None:
    """Write a model in another format, a tensor at a time; the same command goes on with what was interrupted."""
    from mixtral_jax.checkpoints.convert import convert as write
    from mixtral_jax.checkpoints.opening import open_source

    opened = open_source(source)
    print_notes(opened.notes)
    with bar(f"writing {target}") as progress:
        write(opened, target, to, dtype, progress)
    typer.echo(f"wrote {target}")
