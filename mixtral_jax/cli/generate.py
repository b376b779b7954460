"""`mixtral-jax generate`: continues a prompt, on the terminal as it is written."""

from __future__ import annotations

from typing import Annotated

import typer

from mixtral_jax.cli import meshes, platform
from mixtral_jax.cli.progress import print_notes


def generate(
    model: Annotated[str, typer.Argument(help="A model in any format, a training run, or a hub id.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token, always.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that together reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only so many of the likeliest; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Only those at least this fraction as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    stop: Annotated[list[str], typer.Option(help="A string that ends the text.")] = [],  # noqa: B006
    stop_at_eos: Annotated[bool, typer.Option(help="Whether the end-of-text token ends it.")] = True,
    dtype: platform.Dtype = "auto",
    quantize: platform.Quantize = None,
    cache_dtype: platform.CacheDtype = None,
    mesh: meshes.Mesh = None,
    device: platform.Device = None,
) -> None:
    """Continue a prompt; prints the prompt and what follows as it comes."""
    platform.start(device)
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.inference.sampling import SamplingConfig
    from mixtral_jax.loading import from_source

    sampling = SamplingConfig(
        repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    source = open_source(model)
    print_notes(source.notes)
    loaded = from_source(source, dtype, meshes.decoding_mesh(mesh), quantize, cache_dtype)
    typer.echo(prompt, nl=False)
    shown = 0
    for (text,) in loaded.stream([prompt], max_new_tokens, sampling, seed, stop, stop_at_eos):
        typer.echo(text[shown:], nl=False)
        shown = len(text)
    typer.echo()
