"""`mixtral-jax convert`: a model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mixtral_jax.cli import platform
from mixtral_jax.cli.progress import bar, print_notes


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model in any format, or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[
        Literal["native", "huggingface", "consolidated", "peft"],
        typer.Option(help="The format to write; peft: the factors alone of a run that trained such."),
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: as stored, and float32 for what is quantised."),
    ] = None,
    quantize: Annotated[
        platform.Bits | None,
        typer.Option(help="Round the layers' matrices to so many bits, as `generate --quantize` does; --to native."),
    ] = None,
) -> None:
    """Write a model in another format, a tensor at a time; the same command goes on with what was interrupted."""
    from mixtral_jax.checkpoints.convert import convert as write
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.checkpoints.peft import write_adapter
    from mixtral_jax.errors import InputError

    opened = open_source(source)
    print_notes(opened.notes)
    if to == "peft":
        if dtype is not None or quantize is not None:
            raise InputError("--to", "peft", "factors are written in float32; without --dtype and --quantize")
        write_adapter(opened, target)
        typer.echo(f"wrote {target}")
        return
    with bar(f"writing {target}") as progress:
        write(opened, target, to, dtype, progress, quantize)
    typer.echo(f"wrote {target}")
