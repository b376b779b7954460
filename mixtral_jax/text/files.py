"""Finds and reads the tokenizer of a model's folder, with what the files beside it say of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mixtral_jax.errors import InputError
from mixtral_jax.text.fast import FastTokenizer, Names, parse
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer
from mixtral_jax.text.tokenizer import Hints, Tokenizer

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
WANTED = "a SentencePiece .model file, a tokenizer.json or a folder with one is wanted"
VERSIONS = ("v3", "v2", "v1")


def load_tokenizer(path: str | os.PathLike[str], key: str = "tokenizer") -> Tokenizer:
    """Reads a tokenizer: a SentencePiece `.model` (also `.model.v1`, `.v2`, `.v3`), a `tokenizer.json`, or a folder.

    In a folder the `.model` goes first, as Mistral's own do; but `tokenizer.json` where it has more tokens, as those
    of fine-tunes do. The chat template and further ids that end an answer come from the files beside it.

    Raises:
      InputError: under `key`, naming the path, if it can't be read or holds no tokenizer.
    """
    where = Path(path)
    if not where.is_dir():
        return _load_file(where, key)
    found = find_tokenizer(where)
    if found is None:
        note = "; tekken.json is not supported" if (where / "tekken.json").is_file() else ""
        raise InputError(key, str(where), f"no tokenizer is in this folder{note}; {WANTED}")
    tokenizer = _load_file(found, key)
    last = max(_added_ids(where, key), default=-1)
    if found.name == JSON or last < tokenizer.vocab_size:
        return tokenizer
    if not (where / JSON).is_file():
        raise InputError(
            key,
            str(where),
            f"tokens up to {last} are added to the {tokenizer.vocab_size} of {found.name}; {JSON} is wanted",
        )
    return _load_file(where / JSON, key)


def find_tokenizer(folder: str | os.PathLike[str]) -> Path | None:
    """The file with the folder's tokenizer, or None if it has none."""
    where = Path(folder)
    for pattern in (*(f"tokenizer.model.{version}" for version in VERSIONS), "tokenizer.model", "*.model.v[123]"):
        if found := sorted(where.glob(pattern)):
            return found[-1]
    return where / JSON if (where / JSON).is_file() else None


def _load_file(path: Path, key: str) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(key, str(path), f"{error.strerror}; {WANTED}") from None
    if not content:
        raise InputError(key, str(path), f"the file is empty; {WANTED}")
    if path.suffix == ".json":
        return _load_json(path, content, key)
    try:
        return SentencePieceTokenizer(content, _hints(path, key))
    except RuntimeError:
        wanted = f"the file ({len(content)} bytes) is not a whole SentencePiece model"
        raise InputError(key, str(path), wanted) from None


def _load_json(path: Path, content: bytes, key: str) -> FastTokenizer:
    config = _read(path.with_name(CONFIG), key)
    try:
        names = _names(path, config, content, key)
        return FastTokenizer(content.decode(), names, _hints(path, key), config.get("add_bos_token"))
    except ValueError as error:
        raise InputError(key, str(path), str(error)) from None


def _names(path: Path, config: dict[str, Any], content: bytes, key: str) -> Names:
    """The parts' tokens: of tokenizer_config.json, else of special_tokens_map.json, else of generation_config.json."""
    said = {**_read(path.with_name("special_tokens_map.json"), key), **config}
    generation = _read(path.with_name("generation_config.json"), key)
    found = {}
    for part in ("bos", "eos", "pad", "unk"):
        token = said.get(f"{part}_token")
        name = token.get("content") if isinstance(token, dict) else token
        number = (_ids(generation.get(f"{part}_token_id")) or (-1,))[0]
        found[part] = name if name is not None else _name_of(content, number)
    return Names(**found)


def _name_of(content: bytes, token: int) -> str | None:
    """The text of an added token; None of -1, or where the id is another's."""
    added = parse(content)["added_tokens"] if token >= 0 else ()
    return next((each["content"] for each in added if each["id"] == token), None)


def _hints(path: Path, key: str) -> Hints:
    version = path.suffix[1:]
    generation = _read(path.with_name("generation_config.json"), key)
    return Hints(
        _chat_template(path.parent, key),
        version if version in ("v1", "v2", "v3") else None,  # type: ignore[arg-type]
        _ids(generation.get("eos_token_id")),
    )


def _chat_template(folder: Path, key: str) -> str | None:
    """The folder's template; of several named ones, the one called "default"."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    said = _read(folder / CONFIG, key).get("chat_template")
    if isinstance(said, list):
        named = (each for each in said if isinstance(each, dict) and each.get("name") == "default")
        said = next(named, {}).get("template")
    if not isinstance(said, str | None):
        raise InputError(key, str(folder / CONFIG), "its chat_template is neither a text nor a list of named ones")
    return said


def _added_ids(folder: Path, key: str) -> list[int]:
    """The ids of the tokens that the files beside a model add to it, or have from it."""
    try:
        added = parse((folder / JSON).read_bytes())["added_tokens"] if (folder / JSON).is_file() else ()
    except ValueError as error:
        raise InputError(key, str(folder / JSON), str(error)) from None
    return [each["id"] for each in added] + list(_read(folder / "added_tokens.json", key).values())


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _read(path: Path, key: str) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(key, str(path), f"not JSON ({error}); an object is wanted") from None
    if not isinstance(value, dict):
        raise InputError(key, str(path), "no JSON object; one is wanted")
    return value
