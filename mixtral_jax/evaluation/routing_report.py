"""Where a text's tokens go: by layer and kind of token, and how often neighbours go the same way (Mixtral paper, 5)."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.errors import InputError
from mixtral_jax.text.tokenizer import Tokenizer

KINDS = ("identifier", "keyword", "word", "number", "punctuation", "whitespace")
_CODE = {".py": frozenset(keyword.kwlist)}
"""The keywords of files by their ending; in others, what is made of letters is a word."""
_PIECES = re.compile(r"(?P<whitespace>\s+)|(?P<number>\d[\w.]*)|(?P<word>\w+)|(?P<punctuation>[^\w\s]+)")


class Text(NamedTuple):
    """A file's tokens."""

    language: str
    """The ending of its name without the dot, or `text`."""
    ids: list[int]
    kinds: list[str]
    """One of KINDS for each."""


def read_text(path: Path, tokenizer: Tokenizer) -> Text:
    """A file in tokens, each with its kind.

    Raises:
      InputError: it can't be read or is not UTF-8.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("FILE", str(path), f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError("FILE", str(path), f"not UTF-8 at byte {error.start}") from None
    ids = tokenizer.encode(content)
    return Text(path.suffix[1:] or "text", ids, kinds([_shown(tokenizer, each) for each in ids], path.suffix))


def _shown(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.piece(token)
    return piece.decode("latin-1") if isinstance(piece, bytes) else piece.replace("▁", " ")


def kinds(pieces: Sequence[str], suffix: str) -> list[str]:
    """The kind of each token, by the whole word or number that its first character other than a space lies in.

    Of `[" re", "turn", " x", "1", "\\n"]` in a .py file the first two are a keyword's, the next two an identifier's.
    """
    text = "".join(pieces)
    kind_of = np.empty(len(text), object)
    for found in _PIECES.finditer(text):
        kind_of[found.start() : found.end()] = _kind(found, suffix)
    result, start = [], 0
    for piece in pieces:
        first = start + len(piece) - len(piece.lstrip())
        result.append(str(kind_of[first]) if first < start + len(piece) else "whitespace")
        start += len(piece)
    return result


def _kind(found: re.Match[str], suffix: str) -> str:
    if found.lastgroup != "word" or suffix not in _CODE:
        return str(found.lastgroup)
    return "keyword" if found[0] in _CODE[suffix] else "identifier"


class Repetition(NamedTuple):
    """How often a token and the next go the same way, by layer; as fractions."""

    first: list[float]
    """Their first choices are one."""
    any: list[float]
    """Some expert is among the choices of both."""


def chance(num_experts: int, choices: int) -> tuple[float, float]:
    """Both repetitions where routing is random: 1/8 and 1 - 6/8 * 5/7 = 46% for two of eight."""
    return 1 / num_experts, 1 - math.comb(num_experts - choices, choices) / math.comb(num_experts, choices)


def repetition(expert_LNA: np.ndarray, window_N: np.ndarray, chosen_N: np.ndarray | None = None) -> Repetition:
    """The repetitions over neighbours within a window, of those whose earlier is chosen; nan where there are none."""
    here, after = expert_LNA[:, :-1], expert_LNA[:, 1:]
    together = window_N[:-1] == window_N[1:]
    if chosen_N is not None:
        together &= chosen_N[:-1]
    first_LN = (here[..., 0] == after[..., 0])[:, together]
    any_LN = (here[..., :, None] == after[..., None, :]).any(axis=(-1, -2))[:, together]
    if not together.any():
        return Repetition([math.nan] * len(expert_LNA), [math.nan] * len(expert_LNA))
    return Repetition(first_LN.mean(axis=1).tolist(), any_LN.mean(axis=1).tolist())


def load(expert_LNA: np.ndarray, num_experts: int) -> np.ndarray:
    """The share of choices that each expert has, [L, E]."""
    layers = [np.bincount(each.ravel(), minlength=num_experts) for each in expert_LNA]
    return np.array(layers) / expert_LNA[0].size


def concentration(share_LE: np.ndarray) -> np.ndarray:
    """1 - entropy / log E of each layer: 0 where all experts have the same share, 1 where one has all."""
    safe_LE = np.where(share_LE > 0, share_LE, 1)
    return np.asarray(1 + (share_LE * np.log(safe_LE)).sum(axis=1) / math.log(share_LE.shape[1]))


def summarise(texts: Sequence[Text], expert_LNA: np.ndarray, window_N: np.ndarray, num_experts: int) -> dict[str, Any]:
    """All of it as plain numbers; the choices are of the texts' tokens, one text after the other."""
    kind_N = np.array([kind for text in texts for kind in text.kinds])
    language_N = np.array([text.language for text in texts for _ in text.ids])
    groups = {"all": np.ones(len(kind_N), bool)}
    groups |= {kind: kind_N == kind for kind in KINDS if (kind_N == kind).any()}
    languages = sorted(set(language_N))
    if len(languages) > 1:
        groups |= {f"language {each}": language_N == each for each in languages}
    found: dict[str, Any] = {
        "tokens": len(kind_N),
        "experts": num_experts,
        "choices": expert_LNA.shape[-1],
        "groups": {},
    }
    for name, chosen_N in groups.items():
        share_LE = load(expert_LNA[:, chosen_N], num_experts)
        found["groups"][name] = {
            "tokens": int(chosen_N.sum()),
            "share": share_LE.round(5).tolist(),
            "concentration": concentration(share_LE).round(5).tolist(),
            "repetition": _plain(repetition(expert_LNA, window_N, chosen_N)),
        }
    first, some = chance(num_experts, expert_LNA.shape[-1])
    found["repetition"] = {**found["groups"]["all"]["repetition"], "chance_first": first, "chance_any": some}
    return found


def _plain(found: Repetition) -> dict[str, list[float | None]]:
    """As JSON has it, where nan is no number."""
    rows = found._asdict().items()
    return {name: [None if math.isnan(share) else round(share, 5) for share in row] for name, row in rows}
