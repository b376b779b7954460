"""Tokenizers of Hugging Face's `tokenizer.json`: byte-level ones, and SentencePiece's in that form."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_jax.text.tokenizer import Hints, Layout, Tokenizer, write_beside, write_whole

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
UNKNOWN_DECODER = "its decoder is neither byte-level nor SentencePiece's; one of a byte-pair model is wanted"


@dataclass(frozen=True)
class Names:
    """Which tokens play the parts, by their text; None where none does."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


class FastTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the library `tokenizers`.

    Special tokens, and those in `names`, are controls: text never becomes one. Added tokens that are not special are
    text like any other. What the file says of truncation, padding and tokens put around a text is not heeded, except
    that `adds_bos` is what it says.
    """

    def __init__(
        self,
        content: str,
        names: Names | None = None,
        hints: Hints | None = None,
        adds_bos: bool | None = None,
    ):
        """Raises ValueError saying what is wrong when `content` is no tokenizer.json that can be used."""
        self._content = content
        names = names or Names()
        self._names = names
        self._definition = parse(content)
        self.hints = hints or Hints()
        _make_special(self._definition, names)
        self._tokenizer = _build(self._definition)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        ids = (vocabulary.get(name, -1) if name else -1 for name in (names.bos, names.eos, names.pad, names.unk))
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = ids
        decoders = _parts(self._definition.get("decoder"), "decoders")
        self._is_byte_level = "ByteLevel" in decoders
        self.strays_apart = not self._is_byte_level
        self.drops_first_space = "Strip" in decoders or _prepends(decoders.get("Metaspace"))
        if not (self._is_byte_level or {"Replace", "Metaspace", "ByteFallback"} & decoders.keys()):
            raise ValueError(UNKNOWN_DECODER)
        self.adds_bos = self._tokenizer.encode("a").ids[:1] == [self.bos_id] if adds_bos is None else adds_bos

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file and of what the tokens beside it are."""
        return hashlib.sha256(f"{self._names} {self.adds_bos} {self._content}".encode()).hexdigest()

    @cached_property
    def controls(self) -> Mapping[str, int]:
        """The special tokens by name."""
        return {each["content"]: each["id"] for each in self._definition["added_tokens"] if each["special"]}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on several threads; the same as `encode` of each."""
        return [each.ids for each in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """The ids of texts with control ids between them, as the library splits such a text.

        A space may be put before the first text only, and controls may swallow the blanks beside them.
        """
        ids: list[int] = []
        listed = list(parts)
        for place, part in enumerate(listed):
            if isinstance(part, int):
                ids.append(part)
                continue
            if place and listed[place - 1] in self._swallow_right:
                part = part.lstrip()
            if listed[place + 1 : place + 2] and listed[place + 1] in self._swallow_left:
                part = part.rstrip()
            ids += (self._inside if place else self._tokenizer).encode(part, add_special_tokens=False).ids
        return ids

    @cached_property
    def _swallow_left(self) -> frozenset[int]:
        return frozenset(each["id"] for each in self._definition["added_tokens"] if each.get("lstrip"))

    @cached_property
    def _swallow_right(self) -> frozenset[int]:
        return frozenset(each["id"] for each in self._definition["added_tokens"] if each.get("rstrip"))

    @cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The tokenizer for a text that follows a control."""
        pre = json.dumps(self._definition.get("pre_tokenizer"))
        inside = pre.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        return self._tokenizer if inside == pre else _build({**self._definition, "pre_tokenizer": json.loads(inside)})

    def piece(self, token: int) -> str | bytes:
        """The text of one id, or its bytes where they may be a part of a character; nothing of an id without token."""
        name = self._tokenizer.id_to_token(token)
        if name is None or self.is_control(token):
            return b"" if self._is_byte_level else ""  # the library joins bytes over a control
        if self._is_byte_level:
            return _bytes_of(name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace(SPACE, " ")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the `tokenizer.json`, whole or not at all; makes the folder."""
        write_whole(path, self._content.encode())

    def save_into(self, folder: str | os.PathLike[str], layout: Layout = "huggingface") -> None:
        """Writes `tokenizer.json` and a `tokenizer_config.json`, in every layout."""
        self.save(Path(folder, "tokenizer.json"))
        unknown = {"unk_token": self._names.unk} if self._names.unk else {}
        write_beside(self, folder, {"tokenizer_class": "PreTrainedTokenizerFast", **unknown})


def parse(content: str | bytes) -> dict[str, Any]:
    """The parts of a tokenizer.json. Raises ValueError if it is none."""
    try:
        definition = json.loads(content)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); a tokenizer.json is wanted") from None
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise ValueError("no tokenizer is in it; a tokenizer.json is wanted")
    return {**definition, "added_tokens": [_added(each) for each in definition.get("added_tokens") or ()]}


def _added(entry: Any) -> dict[str, Any]:
    """One added token, as text where the file does not call it special."""
    if isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("content"), str):
        return {"special": False, **entry}
    raise ValueError(f"{entry!r} is no added token; one has an id and a content")


def _make_special(definition: dict[str, Any], names: Names) -> None:
    """Marks the named tokens as special, and drops the merges that would make a special token of plain text."""
    named = {name for name in (names.bos, names.eos, names.pad) if name}
    definition["added_tokens"] = [
        {**each, "special": each["special"] or each["content"] in named} for each in definition["added_tokens"]
    ]
    vocabulary = definition["model"].get("vocab", {})
    special = {each["content"] for each in definition["added_tokens"] if each["special"]}
    for name in sorted(named - special):
        if isinstance(vocabulary, dict) and name in vocabulary:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            definition["added_tokens"].append({"id": vocabulary[name], "content": name, **flags, "special": True})
            special.add(name)
    merges = definition["model"].get("merges", [])
    kept = [merge for merge in merges if _product(merge) not in special]
    if len(kept) < len(merges):
        definition["model"] = {**definition["model"], "merges": kept}


def _product(merge: str | list[str]) -> str:
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"not a whole tokenizer.json ({error})") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(component: dict[str, Any] | None, key: str) -> dict[str, dict[str, Any]]:
    """The components that one consists of, itself if it is none of several, by type."""
    if component is None:
        return {}
    found = {component["type"]: component}
    for each in component.get(key, ()):
        found |= _parts(each, key)
    return found


def _prepends(metaspace: dict[str, Any] | None) -> bool:
    if metaspace is None:
        return False
    return bool(metaspace.get("add_prefix_space", True)) and metaspace.get("prepend_scheme") != "never"


def _letters_of_bytes() -> dict[str, int]:
    """How byte-level models write bytes as letters: printable Latin-1 as itself, the other 68 from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTES = _letters_of_bytes()


def _bytes_of(name: str) -> bytes:
    """The bytes of a byte-level token; an added token may be written with other letters, plainly."""
    if all(letter in BYTES for letter in name):
        return bytes(BYTES[letter] for letter in name)
    return name.encode()
