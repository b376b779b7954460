"""Tokenizers of SentencePiece: Mistral's `.model` files and the ones trained here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from mixtral_jax.text.tokenizer import Hints, Layout, Tokenizer, write_beside, write_whole

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
BYTES_OF_SPACE_MARK = tuple(f"<0x{byte:02X}>" for byte in SPACE.encode())


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    `decode(encode(text)) == text` for every text that UTF-8 can write, if the model came from `train_tokenizer`.
    Models with a dummy prefix (Mistral's) keep all but a literal U+2581, exactly as SentencePiece does.
    """

    def __init__(self, model: bytes, hints: Hints | None = None):
        """Args: model: the bytes of a `.model` file. Raises RuntimeError when they are none."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.hints = hints or Hints()
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.pad_id, self.unk_id = self._processor.pad_id(), self._processor.unk_id()
        space = self._processor.piece_to_id(SPACE)
        self.drops_first_space = self._processor.decode([space, space]) != "  "
        mark = [self._processor.piece_to_id(piece) for piece in BYTES_OF_SPACE_MARK]
        self._space_mark = mark if all(map(self._processor.is_byte, mark)) and not self.drops_first_space else None

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the model's bytes, in hexadecimal."""
        return hashlib.sha256(self._model).hexdigest()

    @cached_property
    def controls(self) -> Mapping[str, int]:
        """The control pieces by name."""
        tokens = filter(self._processor.is_control, range(self.vocab_size))
        return {self._processor.id_to_piece(token): token for token in tokens}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on several threads; the same as `encode` of each."""
        if self._space_mark is None or not any(SPACE in text for text in texts):
            return self._processor.encode(list(texts), num_threads=-1 if len(texts) > 1 else 1)
        return [self._encode_around_space_marks(text) for text in texts]

    def _encode_around_space_marks(self, text: str) -> list[int]:
        """SentencePiece takes a literal U+2581 for a space: its three bytes are written instead."""
        first, *rest = self._processor.encode(text.split(SPACE), num_threads=1)
        return first + [token for part in rest for token in (*(self._space_mark or ()), *part)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids are silent, bytes that are no UTF-8 become U+FFFD."""
        return self._processor.decode([int(token) for token in ids])

    def is_control(self, token: int) -> bool:
        """Whether the id has no text: begin, end, and Mistral's `[INST]` and its like."""
        return self._processor.is_control(token)

    def piece(self, token: int) -> str | bytes:
        """The text of one id, or its byte if it is one of the 256 of byte fallback."""
        name = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(name[3:5], 16)])
        if self._processor.is_unknown(token):
            return self._processor.decode([token])
        return "" if self.is_control(token) else name.replace(SPACE, " ")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the `.model` file, whole or not at all; makes the folder."""
        write_whole(path, self._model)

    def save_into(self, folder: str | os.PathLike[str], layout: Layout = "huggingface") -> None:
        """Writes `tokenizer.model` or, where Mistral's version is known, `tokenizer.model.v3` or the like.

        The layout "huggingface" has the plain name in any case, and a `tokenizer.json`: transformers 5 makes wrong ids
        of a `.model` alone.
        """
        version = self.hints.chat_version
        if layout == "consolidated" and version is None and "[INST]" in self.controls:
            version = "v3"
        if version is not None:
            self.save(Path(folder, f"tokenizer.model.{version}"))
        if layout == "huggingface":
            from mixtral_jax.text.conversion import fast_from_sentencepiece

            self.save(Path(folder, "tokenizer.model"))
            fast_from_sentencepiece(self._model, self.hints).save_into(folder)
            return
        if version is None:
            self.save(Path(folder, "tokenizer.model"))
        if self.chat_template is not None or self.hints.eos_ids:
            write_beside(self, folder, {})
