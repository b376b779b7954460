"""JSON files beside weights, and the ModelConfig that they come to; messages speak of the file's own keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.config import ModelConfig, build
from mixtral_jax.errors import InputError, nearest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError naming it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise InputError(str(path), None, f"can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), None, f"not JSON: {error}") from None
    if not isinstance(table, dict):
        raise InputError(str(path), None, "a JSON object is wanted")
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"{twice!r} stands twice")
    return table


def take(table: Mapping[str, Any], key: str, where: object) -> Any:
    """A value that has to be there. Raises InputError."""
    if table.get(key) is None:
        raise InputError(f"{where}: {key}", None, f"is missing; {nearest(key, table)}".rstrip("; "))
    return table[key]


def build_config(values: Mapping[str, Any], keys: Mapping[str, str], where: object) -> ModelConfig:
    """A checked ModelConfig.

    Args:
      values: by our names, dotted for those of `moe`; None is left out.
      keys: what the file calls each.
      where: the file.

    Raises:
      InputError: naming the file and its key.
    """
    table: dict[str, Any] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        if value is not None:
            (table.setdefault(section, {}) if section else table)[last] = value
    try:
        return build(ModelConfig, table)
    except InputError as error:
        raise InputError(f"{where}: {keys.get(error.key, error.key)}", error.value, error.allowed) from None
