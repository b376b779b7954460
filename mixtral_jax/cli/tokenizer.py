"""`mixtral-jax tokenizer`: trains a SentencePiece model on the user's text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral_jax.errors import InputError

if TYPE_CHECKING:
    from mixtral_jax.text.tokenizer import Tokenizer
    from mixtral_jax.train.corpus import SourceFile

app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")


@app.callback()
def tokenizer() -> None:
    """Make tokenizers."""


@app.command()
def train(
    files: Annotated[list[str], typer.Argument(help="Text or .jsonl files, folders, globs, URLs, or python-stdlib.")],
    vocab_size: Annotated[int, typer.Option(help="How many ids the tokenizer gets.")],
    out: Annotated[Path, typer.Option(help="Where to write the .model file.")],
    text_field: Annotated[str, typer.Option(help="The field of a .jsonl line that holds the text.")] = "text",
) -> None:
    """Train a byte-pair tokenizer in Mistral's layout that loses no character of any text."""
    from mixtral_jax.train.corpus import find_files

    found = find_files(files, key="FILES")
    trained = _train(found, vocab_size, out, text_field)
    print(f"learnt from {len(found)} file{'s' * (len(found) != 1)}")
    print(f"wrote {out}: {trained.vocab_size} ids, {out.stat().st_size} bytes, sha256 {trained.digest}")


def _train(files: list[SourceFile], vocab_size: int, out: Path, text_field: str) -> Tokenizer:
    from mixtral_jax.text.training import train_tokenizer
    from mixtral_jax.train.corpus import DOCUMENT_BYTES, read_documents

    try:
        return train_tokenizer(read_documents(files, text_field, DOCUMENT_BYTES), vocab_size, out)
    except InputError as error:
        key = "--vocab-size" if error.key == "vocab_size" else error.key
        raise InputError(key, error.value, error.allowed) from None
    except OSError as error:
        raise InputError("--out", str(out), f"{error.strerror}; a writable path is wanted") from None
