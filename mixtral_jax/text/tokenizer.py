"""What every tokenizer can do, whatever file it came from, and the decoding of a stream of ids."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

REPLACEMENT = "\ufffd"
Layout = Literal["huggingface", "consolidated", "native"]


@dataclass(frozen=True)
class Hints:
    """What is known of a tokenizer beside its own file."""

    chat_template: str | None = None
    """The Jinja template of its model's conversations."""

    chat_version: Literal["v1", "v2", "v3"] | None = None
    """Mistral's version, where the file's name ends with it."""

    eos_ids: tuple[int, ...] = ()
    """Ids that end an answer, beside the tokenizer's own."""


class Tokenizer(ABC):
    """Text to ids and back.

    Text never becomes a control id: to `encode`, "</s>" and "[INST]" are characters like any other.

    Attributes:
      vocab_size: how many ids there are; they run from 0.
      bos_id, eos_id, pad_id, unk_id: the ids that begin and end a document, of padding, and of what can't be written
        otherwise; -1 where there is none.
      adds_bos: whether the model wants `bos_id` before a text; `encode(text, bos=True)` heeds it.
      drops_first_space: whether a text's first space is the tokenizer's own, not the text's.
      strays_apart: whether each byte that belongs to no character becomes a U+FFFD of its own, or each run that
        begins like a character becomes one.
      hints: what files beside its own say.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    adds_bos: bool = True
    drops_first_space: bool
    strays_apart: bool = True
    hints: Hints

    @property
    @abstractmethod
    def controls(self) -> Mapping[str, int]:
        """The ids without text, by their names such as "</s>" or "<|im_start|>"."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """The SHA-256 of the content, in hexadecimal."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    @abstractmethod
    def piece(self, token: int) -> str | bytes:
        """The text of one id; bytes where it may be a part of a character; empty for a control id."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's one file, whole or not at all; makes the folder."""

    @abstractmethod
    def save_into(self, folder: str | os.PathLike[str], layout: Layout = "huggingface") -> None:
        """Writes the files that a model's folder of this layout has for its tokenizer.

        In the layouts "huggingface" and "native", `transformers.AutoTokenizer.from_pretrained(folder)` gives the ids
        that this gives.
        """

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the model's conversations, if it came with one."""
        return self.hints.chat_template

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer, `eos_id` first; empty if there is none."""
        return tuple(dict.fromkeys(token for token in (self.eos_id, *self.hints.eos_ids) if token >= 0))

    @cached_property
    def control_names(self) -> Mapping[int, str]:
        """The names of the ids without text."""
        return {token: name for name, token in self.controls.items()}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, which never become control ids, with the begin and end ids if asked and if there are."""
        begin = [self.bos_id] if bos and self.adds_bos and self.bos_id >= 0 else []
        end = [self.eos_id] if eos and self.eos_id >= 0 else []
        return begin + self.encode_batch([text])[0] + end

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """The ids of texts with control ids between them, as the model's own tokenizer splits such a text."""
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are silent, bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self)
        return "".join(map(decoder.feed, ids)) + decoder.flush()

    def is_control(self, token: int) -> bool:
        """Whether the id has no text: begin, end, and Mistral's `[INST]` and its like."""
        return token in self.control_names


class StreamDecoder:
    """Turns ids into text one by one: what it returns, joined, is `Tokenizer.decode` of all ids.

    A character of several byte tokens comes whole, with its last byte. With `after`, the text continues those ids, so
    a first space is kept: `StreamDecoder(tokenizer, after=prompt)`.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._pending = b""
        self._drop_space = tokenizer.drops_first_space
        for token in after:
            self.feed(token)

    def feed(self, token: int) -> str:
        """The text that is certain after one more id; may be empty."""
        piece = self._tokenizer.piece(int(token))
        if isinstance(piece, bytes):
            self._drop_space = False
            text, self._pending = _certain_text(self._pending + piece, self._tokenizer.strays_apart)
            return text
        text = self.flush()
        if self._tokenizer.is_control(int(token)):
            return text
        if self._drop_space and token != self._tokenizer.unk_id:
            piece = piece.removeprefix(" ")
        self._drop_space = False
        return text + piece

    def flush(self) -> str:
        """The text of the bytes held back, when no more ids come: U+FFFD."""
        held, self._pending = self._pending, b""
        return REPLACEMENT * (len(held) if self._tokenizer.strays_apart else bool(held))


def _certain_text(data: bytes, strays_apart: bool) -> tuple[str, bytes]:
    """Splits bytes into the text that no further byte can change and the start of a character.

    Bytes that can't belong to any character become U+FFFD: each for itself as in SentencePiece, or one for each start
    of a character as in byte-level models.
    """
    text = ""
    while True:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            if error.reason == "unexpected end of data":
                return text, data[error.start :]
            text += REPLACEMENT * (error.end - error.start if strays_apart else 1)
            data = data[error.end :]


def write_beside(tokenizer: Tokenizer, folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Writes what a tokenizer's own file does not hold: tokenizer_config.json, and the ends if there are several."""
    names = {part: tokenizer.control_names.get(getattr(tokenizer, f"{part}_id")) for part in ("bos", "eos", "pad")}
    said: dict[str, Any] = {f"{part}_token": name for part, name in names.items() if name is not None}
    said |= {"add_bos_token": tokenizer.adds_bos, "clean_up_tokenization_spaces": False, **config}
    if tokenizer.chat_template is not None:
        said["chat_template"] = tokenizer.chat_template
    _write_json(Path(folder, "tokenizer_config.json"), said)
    if len(tokenizer.eos_ids) > 1:
        _write_json(Path(folder, "generation_config.json"), {"eos_token_id": list(tokenizer.eos_ids)})


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False).encode())


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, whole or not at all; makes its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(target)
