"""`mixtral-jax perplexity`: how well a model foretells a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.cli import meshes, platform
from mixtral_jax.cli.progress import bar, print_notes
from mixtral_jax.errors import InputError


def perplexity(
    model: Annotated[str, typer.Argument(help="A model in any format, a training run, or a hub id.")],
    file: Annotated[Path, typer.Argument(help="A text in UTF-8.")],
    window: Annotated[int | None, typer.Option(help="Tokens read at a time. Default: 2048, or the model's.")] = None,
    stride: Annotated[int | None, typer.Option(help="From one window to the next. Default: half a window.")] = None,
    dtype: platform.Dtype = "auto",
    quantize: platform.Quantize = None,
    cache_dtype: platform.CacheDtype = None,
    mesh: meshes.Mesh = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    device: platform.Device = None,
) -> None:
    """Show a text's perplexity, by windows that overlap, every token scored once."""
    text = _read(file)
    platform.start(device)
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.inference.perplexity import DEFAULT_WINDOW
    from mixtral_jax.loading import from_source

    source = open_source(model)
    print_notes(source.notes)
    size = window or min(DEFAULT_WINDOW, source.config.max_position)
    loaded = from_source(source, dtype, meshes.decoding_mesh(mesh), quantize, cache_dtype)
    with bar("scoring") as progress:
        found = loaded.perplexity(text, size, stride or size // 2, progress)
    if as_json:
        report = {"perplexity": found.value, "loss": found.loss, "tokens": found.tokens}
        typer.echo(json.dumps({**report, "window": size, "stride": stride or size // 2}))
        return
    bits = found.nats / 0.6931471805599453 / max(1, len(text.encode()))
    typer.echo(
        f"perplexity {found.value:.4f}: {found.loss:.5f} nats a token over {found.tokens:,}, {bits:.4f} bits a byte"
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("FILE", str(file), f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError("FILE", str(file), f"not UTF-8 at byte {error.start}") from None
