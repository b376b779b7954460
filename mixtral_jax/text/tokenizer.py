"""SentencePiece tokenizers: load, encode, decode whole or token by token, and train one that loses nothing."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from mixtral_jax.errors import InputError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
BYTES_OF_SPACE_MARK = tuple(f"<0x{byte:02X}>" for byte in SPACE.encode())
REPLACEMENT = "\ufffd"

SAMPLE_BYTES = 32 << 20
LINE_CHARACTERS = 16384
LINE_BREAKS = 16
QUIET = 2  # SentencePiece's log level for errors only
LINE_BREAK = re.compile(r"\n[\n\t ]*")
NOT_IN_A_WORD = re.compile(f"[\n\t{SPACE}]+")


class Tokenizer:
    """A SentencePiece model: text to ids and back.

    `decode(encode(text)) == text` for every text that UTF-8 can write, if the model came from `train_tokenizer`.
    Models with a dummy prefix (Mistral's) keep all but a literal U+2581, exactly as SentencePiece does.
    """

    def __init__(self, model: bytes):
        """Args: model: the bytes of a `.model` file. Raises RuntimeError when they are none."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        space = self._processor.piece_to_id(SPACE)
        self.drops_first_space = self._processor.decode([space, space]) != "  "
        mark = [self._processor.piece_to_id(piece) for piece in BYTES_OF_SPACE_MARK]
        self._space_mark = mark if all(map(self._processor.is_byte, mark)) and not self.drops_first_space else None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a `.model` file. Raises InputError naming the path if it can't be read or holds no model."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            wanted = f"{error.strerror}; a SentencePiece .model file is wanted"
            raise InputError("tokenizer", os.fspath(path), wanted) from None
        if not model:
            raise InputError("tokenizer", os.fspath(path), "the file is empty; a SentencePiece .model file is wanted")
        try:
            return cls(model)
        except RuntimeError:
            wanted = f"the file ({len(model)} bytes) is not a whole SentencePiece model"
            raise InputError("tokenizer", os.fspath(path), wanted) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the `.model` file, whole or not at all; makes the folder."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.write_bytes(self._model)
        partial.replace(target)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the model's bytes, in hexadecimal."""
        return hashlib.sha256(self._model).hexdigest()

    @property
    def vocab_size(self) -> int:
        """How many ids there are; they run from 0."""
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        """The id that begins a document; -1 if the model has none."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """The id that ends a document; -1 if the model has none."""
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """The id of padding; -1 in Mistral's models and ours, which have none."""
        return self._processor.pad_id()

    @property
    def unk_id(self) -> int:
        """The id of what can't be written otherwise; never used by a model with byte fallback."""
        return self._processor.unk_id()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, which never become control ids, with the begin and end ids if asked."""
        return [self.bos_id] * bos + self.encode_batch([text])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on several threads; the same as `encode` of each."""
        if self._space_mark is None or not any(SPACE in text for text in texts):
            return self._processor.encode(list(texts), num_threads=-1 if len(texts) > 1 else 1)
        return [self._encode_around_space_marks(text) for text in texts]

    def _encode_around_space_marks(self, text: str) -> list[int]:
        """SentencePiece takes a literal U+2581 for a space: its three bytes are written instead."""
        first, *rest = self._processor.encode(text.split(SPACE), num_threads=1)
        return first + [token for part in rest for token in (*(self._space_mark or ()), *part)]

    def decode(self, ids: Sequence[int]) -> str:
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
            self._pending += piece
            text, self._pending = _certain_text(self._pending)
            return text
        text = self.flush()
        if self._tokenizer.is_control(int(token)):
            return text
        if self._drop_space and token != self._tokenizer.unk_id:
            piece = piece.removeprefix(" ")
        self._drop_space = False
        return text + piece

    def flush(self) -> str:
        """The text of the bytes held back, when no more ids come: U+FFFD for each."""
        held, self._pending = self._pending, b""
        return REPLACEMENT * len(held)


def _certain_text(data: bytes) -> tuple[str, bytes]:
    """Splits bytes into the text that no further byte can change and the start of a character.

    A byte that can't belong to any character becomes U+FFFD, each for itself as in SentencePiece.
    """
    text = ""
    while True:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data":
                return text, data
            text, data = text + REPLACEMENT, data[1:]


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    out: str | os.PathLike[str] | None = None,
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Trains a byte-pair model of exactly `vocab_size` ids in Mistral's layout (unk 0, bos 1, eos 2, no padding).

    Nothing is normalised and no space is added, so text comes back unchanged; rare characters are spelled in bytes.
    Digits stand alone; line breaks, alone or with the commonest indentations after them, are pieces. The same
    documents give the same bytes.

    Args:
      documents: texts, read once.
      vocab_size: number of ids; 261 and the corpus's commonest characters are the least.
      out: where to save the model, if anywhere.
      sample_bytes: about how much of the documents, evenly spread, is learnt from.

    Raises:
      InputError: there is no text, or `vocab_size` is out of the bounds that the text sets.
    """
    if vocab_size < 1:
        raise InputError("vocab_size", vocab_size, "a positive number of ids is wanted")
    sample = _sample(documents, sample_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=_line_breaks(sample),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * LINE_CHARACTERS,
            num_threads=2,  # stands in the model's bytes
            minloglevel=QUIET,
        )
    except RuntimeError as error:
        raise InputError("vocab_size", vocab_size, _vocabulary_bound(str(error))) from None
    tokenizer = Tokenizer(model.getvalue())
    if out is not None:
        tokenizer.save(out)
    return tokenizer


def _sample(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Every n-th document, n the power of two that keeps the sample under its size (or leaves one document)."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, document in enumerate(documents):
        if number % stride:
            continue
        kept.append(document)
        size += len(document)
        while size > sample_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """What words are learnt from: runs without a line break, a tab or U+2581, cut where they are very long."""
    for document in documents:
        for line in NOT_IN_A_WORD.split(document):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _line_breaks(documents: Iterable[str]) -> list[str]:
    """Newline and tab, and of newlines with what blank follows them the commonest (at least one in a thousand)."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(LINE_BREAK.findall(document))
    common = [run for run, count in counts.items() if count * 1000 >= counts.total() and len(run) > 1]
    common.sort(key=lambda run: (-counts[run], run))
    return ["\n", "\t", *(run.replace(" ", SPACE) for run in common[:LINE_BREAKS])]


def _vocabulary_bound(error: str) -> str:
    """What SentencePiece's message says of the allowed size."""
    if least := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", error):
        return f"too small for this text; at least {least[1]} is needed"
    if most := re.search(r"to a value <= (\d+)", error):
        return f"too large for this text; at most {most[1]} is possible"
    if "sentences_.empty()" in error:
        return "there is no text to learn from; documents with words are wanted"
    return f"SentencePiece can't train on this text: {error}"
