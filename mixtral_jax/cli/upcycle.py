"""`mixtral-jax upcycle`: a dense Mistral as a Mixtral."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mixtral_jax.cli.progress import bar, print_notes


def upcycle(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="A dense model in any format, or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    experts: Annotated[int, typer.Option(help="How many experts; each begins as the dense feed-forward.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token.")] = 2,
    noise: Annotated[float, typer.Option(help="Added to each expert, relative to its own spread; 0: none.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides the routers and the noise.")] = 0,
    to: Annotated[Literal["native", "huggingface", "consolidated"], typer.Option(help="The format.")] = "native",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: as stored, and float32 for what is quantised."),
    ] = None,
) -> None:
    """Make a mixture of a dense model; without noise it computes the same function at the start."""
    from mixtral_jax.checkpoints.convert import convert
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.checkpoints.upcycle import Upcycled

    source = Upcycled(open_source(dense), experts, top_k, noise, seed)
    print_notes(source.notes)
    with bar(f"writing {target}") as progress:
        convert(source, target, to, dtype, progress)
    typer.echo(f"wrote {target}: {experts} experts, {top_k} a token")
