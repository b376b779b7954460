"""Trains a SentencePiece tokenizer in Mistral's layout that loses nothing of any text."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece

from mixtral_jax.errors import InputError
from mixtral_jax.text.sentencepiece import SPACE, SentencePieceTokenizer

SAMPLE_BYTES = 32 << 20
LINE_CHARACTERS = 16384
LINE_BREAKS = 16
QUIET = 2  # SentencePiece's log level for errors only
LINE_BREAK = re.compile(r"\n[\n\t ]*")
NOT_IN_A_WORD = re.compile(f"[\n\t{SPACE}]+")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    out: str | os.PathLike[str] | None = None,
    sample_bytes: int = SAMPLE_BYTES,
) -> SentencePieceTokenizer:
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
    tokenizer = SentencePieceTokenizer(model.getvalue())
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
