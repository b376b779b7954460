"""`mixtral-jax chat`: a conversation in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from mixtral_jax.cli import meshes, platform
from mixtral_jax.cli.progress import print_notes
from mixtral_jax.errors import InputError

if TYPE_CHECKING:
    from mixtral_jax.inference.sampling import SamplingConfig
    from mixtral_jax.language_model import Model

Format: TypeAlias = Annotated[
    Literal["v1", "v2", "v3", "template"] | None,
    typer.Option("--format", help="How conversations are written. Default: as the tokenizer's model was trained."),
]

HELP = "/reset begins anew, /save FILE writes the conversation as JSON, /exit or Ctrl-D ends; Ctrl-C stops an answer"


def chat(
    model: Annotated[str, typer.Argument(help="A model in any format, or a hub id; one tuned on instructions.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token, always.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that together reach this probability.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    format_: Format = None,
    dtype: platform.Dtype = "auto",
    quantize: platform.Quantize = None,
    cache_dtype: platform.CacheDtype = None,
    mesh: meshes.Mesh = None,
    device: platform.Device = None,
) -> None:
    """Talk to a model."""
    platform.start(device)
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.inference.sampling import SamplingConfig
    from mixtral_jax.loading import from_source

    sampling = SamplingConfig(repetition_penalty=repetition_penalty, temperature=temperature, top_p=top_p)
    source = open_source(model)
    print_notes(source.notes)
    conversation = Conversation(
        from_source(source, dtype, meshes.decoding_mesh(mesh), quantize, cache_dtype),
        system,
        sampling,
        max_new_tokens,
        seed,
        format_,
    )
    typer.echo(HELP)
    while (line := _ask()) is not None:
        try:
            if not _command(line, conversation):
                _answer(line, conversation)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)


class Conversation:
    """What was said, and a model that goes on with it.

    Attributes:
      messages: OpenAI-style, the system's first where there is one.
    """

    def __init__(
        self,
        model: Model,
        system: str | None,
        sampling: SamplingConfig,
        max_new_tokens: int,
        seed: int = 0,
        format_: Literal["v1", "v2", "v3", "template"] | None = None,
    ):
        """Raises InputError: the model has no tokenizer."""
        if model.tokenizer is None:
            raise InputError("MODEL", None, "it came without a tokenizer, which a conversation needs")
        self._model, self._tokenizer, self._format = model, model.tokenizer, format_
        self._sampling, self._max_new_tokens, self._seed = sampling, max_new_tokens, seed
        self._system: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._system)

    def reset(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = list(self._system)

    def answer(self, text: str) -> Iterator[str]:
        """Says a text and yields the answer so far as it grows; what was yielded last stands in the history.

        An answer of nothing, as one that is stopped at once, is forgotten with its question: no format has room for it.

        Raises:
          InputError: the conversation has no room left; the text is then not part of it.
        """
        from mixtral_jax.text.chat import encode_chat

        said = [*self.messages, {"role": "user", "content": text}]
        ids = encode_chat(said, self._tokenizer, self._format)
        room = self._model.config.max_position - len(ids)
        if room < 1:
            limit = self._model.config.max_position
            raise InputError("conversation", len(ids), f"tokens are over the model's {limit}; /reset begins anew")
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        self.messages = [*said, answer]
        seed = self._seed + len(said)  # an answer that is asked for again in other words is drawn anew
        try:
            for (shown,) in self._model.stream([ids], min(self._max_new_tokens, room), self._sampling, seed):
                answer["content"] = shown
                yield shown
        finally:
            if not answer["content"].strip():
                self.messages = said[:-1]

    def save(self, path: Path) -> None:
        """Writes the messages as JSON. Raises InputError where that can't be done."""
        try:
            path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError("/save", str(path), f"can't be written: {error.strerror}") from None


def _ask() -> str | None:
    """The next line, or None at the end; Ctrl-C while it is typed begins it anew."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line in ("/exit", "/quit"):
            return None
        if line:
            return line


def _command(line: str, conversation: Conversation) -> bool:
    """Carries out what begins with a slash; whether it did."""
    if not line.startswith("/"):
        return False
    verb, _, rest = line.partition(" ")
    if verb == "/reset":
        conversation.reset()
        typer.echo("a new conversation")
    elif verb == "/save" and rest.strip():
        conversation.save(Path(rest.strip()).expanduser())
        typer.echo(f"saved {len(conversation.messages)} messages to {rest.strip()}")
    else:
        typer.echo(HELP)
    return True


def _answer(line: str, conversation: Conversation) -> None:
    shown = 0
    try:
        for text in conversation.answer(line):
            typer.echo(text[shown:], nl=False)
            shown = len(text)
    except KeyboardInterrupt:
        typer.echo(" (stopped)", nl=False)
    typer.echo()
