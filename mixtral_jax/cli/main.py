"""`mixtral-jax`: the verbs, and what a mistake or a signal turns into."""

from __future__ import annotations

import sys

import typer

from mixtral_jax.cli import (
    bench,
    chat,
    convert,
    evaluate,
    generate,
    inspect,
    perplexity,
    plan,
    report,
    serve,
    tokenizer,
    train,
    upcycle,
)
from mixtral_jax.errors import InputError
from mixtral_jax.version import __version__

app = typer.Typer(
    name="mixtral-jax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mistral 7B and Mixtral 8x7B in JAX.",
)
app.command()(train.train)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(convert.convert)
app.command()(upcycle.upcycle)
app.command()(inspect.inspect)
app.command()(plan.plan)
app.command()(perplexity.perplexity)
app.command(name="eval")(evaluate.evaluate)
app.add_typer(report.app, name="report")
app.add_typer(bench.app, name="bench")
app.add_typer(tokenizer.app, name="tokenizer")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it.")) -> None:
    """Mistral 7B and Mixtral 8x7B in JAX."""


def main() -> None:
    """Runs a verb. Exit status: 0 done, 2 the user's mistake, 143 and 130 after a signal, 1 anything else."""
    try:
        app()  # ends the process; typer itself prints a usage error, and exits with 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
