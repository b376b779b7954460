"""`mixtral-jax bench`: measures what is running."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.cli.progress import bar
from mixtral_jax.cli.serve import KEY_VARIABLE
from mixtral_jax.errors import InputError

app = typer.Typer(help="Measure a server.")


@app.callback()
def bench() -> None:
    """Measure a server."""


@app.command()
def serve(
    url: Annotated[str, typer.Argument(help="A server with OpenAI's API, such as http://127.0.0.1:8000")],
    rate: Annotated[list[float], typer.Option(help="Requests a second, at random times; several are done in turn.")],
    duration: Annotated[float, typer.Option(help="Seconds in which requests are begun, a rate.")] = 30.0,
    requests: Annotated[int, typer.Option(min=1, help="At most so many, a rate.")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt, at random.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, which has all of them.")] = 64,
    wait: Annotated[float, typer.Option(help="Seconds after which a request counts as an error.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the times and prompts.")] = 0,
    model: Annotated[str | None, typer.Option(help="Default: the one that the server names first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=KEY_VARIABLE, help="The server's.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Writes all, in seconds.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draws them, as a PNG.")] = None,
) -> None:
    """Ask a server at given rates, whether it keeps up or not, and say how long its clients wait."""
    try:
        from mixtral_jax.serving import load, load_report
    except ImportError as error:
        wanted = f"needs a client of HTTP ({error}): pip install 'mixtral-jax[serve]'"
        raise InputError("bench serve", None, wanted) from None
    config = load.LoadConfig(
        url=url,
        model=model,
        api_key=api_key.split()[0] if api_key and api_key.strip() else None,
        seconds=duration,
        requests=requests,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        wait_seconds=wait,
        seed=seed,
    )
    with bar("requests") as progress:
        measured = asyncio.run(load.measure(config, rate, progress))
    summaries = [load_report.summary(each) for each in measured]
    _print(load_report.table(summaries))
    try:
        if as_json is not None:
            as_json.write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            load_report.plot(summaries, picture)
    except (OSError, ValueError) as error:
        raise InputError("--json, --plot", None, f"can't be written: {error}") from None


def _print(rows: list[list[str]]) -> None:
    """One column a rate: there are more numbers than rates."""
    widths = [max(map(len, row)) for row in rows]
    for cells in zip(*rows, strict=True):
        name, *values = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        typer.echo("  ".join([name.lstrip().ljust(widths[0]), *values]))
    typer.echo("times in milliseconds")
