"""`mixtral-jax serve`: a model behind OpenAI's API, until a signal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from mixtral_jax.cli import meshes, platform
from mixtral_jax.cli.chat import Format
from mixtral_jax.cli.progress import print_notes
from mixtral_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mixtral_jax.inference.engine import Engine
    from mixtral_jax.language_model import Model

MIB = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "MIXTRAL_JAX_API_KEY"


def serve(
    model: Annotated[str, typer.Argument(help="A model in any format, a training run, or a hub id.")],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: on all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str], typer.Option(envvar=KEY_VARIABLE, help="Clients need it, or another; the variable takes several.")
    ] = [],  # noqa: B006
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its folder's name, or its hub id.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Texts that are continued at a time.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt and its answer. Default: 4096, or the model's.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens taken in between two decode steps.")] = 256,
    prefix_blocks: Annotated[
        int, typer.Option(min=0, help="Blocks of so many tokens kept, for prompts that begin alike; 0: none.")
    ] = 32,
    speculation: Annotated[
        Literal["lookup", "draft"] | None, typer.Option(help="Where the next tokens are guessed from.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="A smaller model with the same vocabulary, that guesses.")] = None,
    speculated_tokens: Annotated[int, typer.Option(min=1, help="Guesses a step.")] = 4,
    max_waiting: Annotated[int, typer.Option(min=0, help="Texts that wait for a slot; more are refused.")] = 256,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts of one request.")] = 64,
    max_stops: Annotated[int, typer.Option(min=1, help="Stop strings of one request.")] = 16,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request's body.")] = 4,
    body_seconds: Annotated[float, typer.Option(help="How long a request's body may take to come.")] = 30.0,
    send_seconds: Annotated[float, typer.Option(help="How long a client may read nothing of what waits.")] = 60.0,
    drain_seconds: Annotated[float, typer.Option(help="How long requests may go on after SIGTERM.")] = 30.0,
    format_: Format = None,
    dtype: platform.Dtype = "auto",
    quantize: platform.Quantize = None,
    cache_dtype: platform.CacheDtype = None,
    mesh: meshes.Mesh = None,
    device: platform.Device = None,
) -> None:
    """Serve a model with OpenAI's API, and a page to chat at /."""
    platform.start(device)
    try:
        from mixtral_jax.serving import run
        from mixtral_jax.serving.server import create_app
        from mixtral_jax.serving.settings import Settings
    except ImportError as error:
        raise InputError("serve", None, f"needs a web server ({error}): pip install 'mixtral-jax[serve]'") from None
    from mixtral_jax.inference.requests import EngineConfig

    settings = Settings(
        model_name=_name(model) if model_name is None else model_name,
        api_keys=tuple(api_key),
        chat_format=format_,
        max_waiting=max_waiting,
        max_texts=max_texts,
        max_stops=max_stops,
        max_body_bytes=max_body * MIB,
        body_seconds=body_seconds,
        send_seconds=send_seconds,
        drain_seconds=drain_seconds,
    )
    config = EngineConfig(
        slots=slots,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        prefix_blocks=prefix_blocks,
        speculation=speculation,
        speculated_tokens=speculated_tokens,
    )
    # The port first: that it is taken is known before minutes of loading.
    with run.listen(host, port, send_seconds) as sock:
        how = _How(dtype, meshes.decoding_mesh(mesh), quantize, cache_dtype)
        loaded = _load(model, how)
        engine = loaded.engine(config, None if draft is None else _load(draft, how))
        guard = create_app(engine, loaded.tokenizer, loaded.config.vocab_size, settings)
        _warm_up(engine)
        if host not in LOOPBACK and not api_key:
            print("note: anybody who reaches this address may use the model; see --api-key", file=sys.stderr)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        named = f"[{host}]" if ":" in host else host
        ready = f"{settings.model_name} is served at http://{named}:{sock.getsockname()[1]}"
        raise typer.Exit(run.run(guard, sock, lambda: typer.echo(ready)))


def _name(model: str) -> str:
    path = Path(model)
    return path.resolve().name if path.exists() else model


class _How(NamedTuple):
    """How a model is loaded, in the order of `from_source`."""

    dtype: Literal["bfloat16", "float32", "auto"]
    mesh: Mesh | None
    quantize: platform.Bits | None
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None


def _load(model: str, how: _How) -> Model:
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.loading import from_source

    source = open_source(model)
    print_notes(source.notes)
    return from_source(source, *how)


def _warm_up(engine: Engine) -> None:
    import time

    print("compiling", file=sys.stderr, flush=True)
    begin = time.monotonic()
    engine.warm_up()
    print(f"compiled in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
