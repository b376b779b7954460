"""Models in llama.cpp's files: which files they are, and what the metadata say of the weights.

What a key that is missing means is what llama.cpp takes it for (facts by reading its loader and its converter).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoints.archive import Archive, Entry, Union
from mixtral_jax.checkpoints.config_files import build_config
from mixtral_jax.checkpoints.gguf_file import GGUFFile
from mixtral_jax.checkpoints.source import ArchiveSource
from mixtral_jax.config import ModelConfig, model_config
from mixtral_jax.errors import InputError
from mixtral_jax.text.gguf_vocabulary import tokenizer_from_gguf
from mixtral_jax.text.tokenizer import Tokenizer

_KEYS: Mapping[str, str] = {
    "dim": "llama.embedding_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "num_kv_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "hidden_dim": "llama.feed_forward_length",
    "vocab_size": "token_embd.weight",
    "sliding_window": "llama.attention.sliding_window",
    "rope_theta": "llama.rope.freq_base",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_position": "llama.context_length",
    "moe.num_experts": "llama.expert_count",
    "moe.experts_per_token": "llama.expert_used_count",
}
"""What the metadata call the fields of a ModelConfig."""
_UNSUPPORTED = ("attention.scale", "attention.clamp_kqv", "logit_scale", "residual_scale", "embedding_scale")
"""Keys, after `llama.`, that change what is computed, in ways no Mistral uses."""
_SCALING = "rope.scaling.type"
_FACTORS = ("rope.scaling.factor", "rope.scale_linear")


def open_gguf(path: Path) -> ArchiveSource:
    """The model of a file, or of the files of a split model by the first of them.

    Raises:
      InputError: the file is damaged, or a model that can't be computed here.
    """
    fields, archive = open_files(path)
    config = read_config(fields, archive.entries)
    files = len({entry.file for entry in archive.entries.values()})
    return ArchiveSource(
        path,
        f"GGUF, {files} file{'s' * (files != 1)}",
        config,
        archive,
        "gguf",
        tokenizer=lambda: _tokenizer(fields, path),
        ignored=lambda name: name.endswith("attn_rot_embd.weight"),  # in files of 2023, and never used
        notes=notes(fields, config),
    )


def _tokenizer(fields: Mapping[str, Any], path: Path) -> Tokenizer | None:
    if fields.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        return None
    try:
        return tokenizer_from_gguf(fields)
    except InputError as error:
        raise InputError(f"{path}: {error.key}", error.value, error.allowed) from None


def open_files(path: Path) -> tuple[dict[str, Any], Archive]:
    """The metadata and the tensors of a file, or of all files of a model that was split, opened by the first of them.

    Raises:
      InputError: as GGUFFile does; or a file of a split model is missing, or is not what its name says.
    """
    first = GGUFFile(path)
    count = first.fields.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return first.fields, first
    files = [first, *(GGUFFile(other) for other in _others(path, count))]
    for index, file in enumerate(files):
        if (file.fields.get("split.no"), file.fields.get("split.count")) != (index, count):
            where = next(entry.file for entry in file.entries.values()) if file.entries else path
            raise InputError(str(where), None, f"split.no {index} and split.count {count} are wanted of it")
    found, wanted = sum(len(file.entries) for file in files), first.fields.get("split.tensors.count")
    if wanted not in (None, found):
        raise InputError(f"{path}: split.tensors.count", wanted, f"the {count} files have {found} tensors")
    return first.fields, Union(list(files))


def _others(path: Path, count: int) -> list[Path]:
    """The files that follow the first of a split model."""
    end = f"-of-{count:05d}.gguf"
    name = path.name.removesuffix(f"-00001{end}")
    if name == path.name:
        raise InputError(str(path), None, f"one of {count} files: give the first of them, named NAME-00001{end}")
    return [path.with_name(f"{name}-{index:05d}{end}") for index in range(2, count + 1)]


def read_config(fields: Mapping[str, Any], entries: Mapping[str, Entry]) -> ModelConfig:
    """What the weights are, by the metadata and the tensors of a model.

    Raises:
      InputError: naming the file and the key that is missing, of a wrong type, or asks for what can't be computed here.
    """
    path = next((entry.file for entry in entries.values()), Path("GGUF file without tensors"))
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: general.architecture", architecture, "only llama is supported: Mistral and Mixtral")
    keys = _Keys(fields, path)
    _check_supported(keys, entries)
    embedding = entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(
            str(path), None, "there is no matrix token_embd.weight: a vocabulary alone, or no language model"
        )
    values = {
        **_shapes(keys),
        **_mixture(keys),
        "vocab_size": embedding.shape[0],
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
        "rope_theta": keys.real("rope.freq_base", 1e4),
        "norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "max_position": keys.integer("context_length"),
        "tie_embeddings": "output.weight" not in entries,
    }
    _check_counts(values, entries, path)
    return build_config(values, _KEYS, path)


class _Keys:
    """Values of `llama.*`, checked when they are asked for; no default: they have to be there."""

    def __init__(self, fields: Mapping[str, Any], path: Path):
        self._fields = fields
        self.path = path

    def integer(self, name: str, default: int | None = None) -> int:
        return self._get(name, default, lambda value: type(value) is int, "a whole number is wanted")

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default, lambda value: type(value) in (int, float), "a number is wanted")
        # They are stored as float32, where 1e-5 is 9.99999974e-6: the shortest number that is the same float32.
        return float(str(np.float32(value)))

    def has(self, name: str) -> bool:
        return f"llama.{name}" in self._fields

    def text(self, name: str, default: str) -> str:
        return self._get(name, default, lambda value: type(value) is str, "a string is wanted")

    def refused(self, name: str, why: str) -> InputError:
        return InputError(f"{self.path}: llama.{name}", self._fields.get(f"llama.{name}"), why)

    def _get(self, name: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self._fields.get(f"llama.{name}", default)
        if value is None:
            raise self.refused(name, "the key is missing")
        if not fits(value):
            raise self.refused(name, wanted)
        return value


def _shapes(keys: _Keys) -> dict[str, int]:
    dim, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    rotated = keys.integer("rope.dimension_count", dim // max(heads, 1))
    head_dim = keys.integer("attention.key_length", rotated)
    for name in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(name, head_dim) != head_dim:
            raise keys.refused(name, f"only the size of a key, {head_dim}, is supported")
    return {
        "dim": dim,
        "num_layers": keys.integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_dim": keys.integer("feed_forward_length"),
    }


def _mixture(keys: _Keys) -> dict[str, int]:
    experts = keys.integer("expert_count", 0)
    if not experts:
        return {}
    return {"moe.num_experts": experts, "moe.experts_per_token": keys.integer("expert_used_count")}


def _check_supported(keys: _Keys, entries: Mapping[str, Entry]) -> None:
    if keys.text(_SCALING, "none") != "none":
        raise keys.refused(_SCALING, "only none is supported")
    for name in () if keys.has(_SCALING) else _FACTORS:  # without a type llama.cpp takes a factor as linear
        if keys.real(name, 1.0) not in (0.0, 1.0):
            raise keys.refused(name, "positions that are scaled are not supported")
    for name in _UNSUPPORTED:
        if keys.has(name):
            raise keys.refused(name, "what it asks for is not supported")
    for name in entries:
        if name.endswith(".bias") or "rope_f" in name:  # rope_freqs, rope_factors_long
            what = "biases" if name.endswith(".bias") else "positions that are scaled"
            raise InputError(str(keys.path), None, f"it has a tensor {name}: {what} are not supported")


def _check_counts(values: Mapping[str, Any], entries: Mapping[str, Entry], path: Path) -> None:
    """Layers and experts against the tensors: after a damaged count one would look for tensors without end."""
    last = f"blk.{values['num_layers'] - 1}.attn_norm.weight"
    if last not in entries:
        raise InputError(f"{path}: llama.block_count", values["num_layers"], f"there is no tensor {last}")
    experts, router = values.get("moe.num_experts"), entries.get("blk.0.ffn_gate_inp.weight")
    if experts and (router is None or router.shape[0] != experts):
        found = "missing" if router is None else list(router.shape)
        raise InputError(f"{path}: llama.expert_count", experts, f"the tensor blk.0.ffn_gate_inp.weight is {found}")


def notes(fields: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """What a user should know of how the metadata were read, a sentence each."""
    windowed = model_config("mistral-7b-v0.1")
    same = {name: getattr(windowed, name) for name in ("sliding_window", "vocab_size", "max_position", "norm_eps")}
    if "llama.attention.sliding_window" in fields or dataclasses.replace(config, **same) != windowed:
        return []
    window = windowed.sliding_window
    return [
        f"the file says nothing of a sliding window, as llama.cpp writes none for Mistral; by its shape and rope theta "
        f"it is a Mistral 7B v0.1, whose window is {window}: beyond {window} tokens it differs from the original"
    ]
