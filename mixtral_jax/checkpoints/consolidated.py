"""Mistral's own folders: params.json, and consolidated files in the formats of safetensors or torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoints.archive import Archive, Union
from mixtral_jax.checkpoints.config_files import build_config, read_json
from mixtral_jax.checkpoints.safetensors import SafetensorsFile
from mixtral_jax.checkpoints.source import ArchiveSource
from mixtral_jax.checkpoints.torch_file import TorchFile
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError

CONFIG = "params.json"
SINGLE = "consolidated.safetensors"

_KEYS: Mapping[str, str] = {
    "dim": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "hidden_dim": "hidden_dim",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
    "max_position": "max_seq_len",
    "tie_embeddings": "tied_embeddings",
    "moe.num_experts": "moe.num_experts",
    "moe.experts_per_token": "moe.num_experts_per_tok",
}
_OF_THE_RUN = ("max_batch_size", "causal", "max_position_embeddings", "moe", "model_type")
"""Keys that are known to stand there and say nothing of the weights."""
_CHANGES_THE_MODEL = ("quantization", "yarn", "llama_4_scaling", "vision_encoder", "lora", "use_biases")


def is_consolidated(folder: Path) -> bool:
    """Whether a folder looks like one of Mistral's own."""
    return (folder / CONFIG).is_file() and bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    """The folder's weights; those in safetensors where both are there, since they are the same."""
    for suffix in ("safetensors", "pth", "pt"):
        found = sorted(folder.glob(f"consolidated*.{suffix}"))
        if found:
            return found
    return []


def open_consolidated(folder: Path) -> ArchiveSource:
    """The model of a folder.

    Raises:
      InputError: damaged files, or a params.json of another kind of model.
    """
    files = _files(folder)
    archive = Union([_open(file) for file in files])
    config, notes = read_params_json(folder / CONFIG, archive)
    return ArchiveSource(
        folder,
        f"consolidated, {len(files)} {files[0].suffix} file{'s' * (len(files) != 1)}",
        config,
        archive,
        "consolidated",
        ignored=lambda name: name == "rope.freqs",
        notes=notes,
    )


def _open(file: Path) -> Archive:
    return SafetensorsFile(file) if file.suffix == ".safetensors" else TorchFile(file)


def read_params_json(path: Path, archive: Archive) -> tuple[ModelConfig, list[str]]:
    """The ModelConfig of a params.json, and what it left unsaid, a sentence each.

    Raises:
      InputError: naming the file and the key.
    """
    table = read_json(path)
    for key in _CHANGES_THE_MODEL:
        if table.get(key):
            raise InputError(f"{path}: {key}", table[key], "a model with this is not supported")
    moe = table.get("moe") or {}
    if not isinstance(moe, dict) or (moe and not moe.keys() & {"num_experts", "num_experts_per_tok"}):
        raise InputError(f"{path}: moe", moe, "a table with num_experts and num_experts_per_tok is wanted")
    values = {name: table.get(key) for name, key in _KEYS.items() if not name.startswith("moe.")}
    values |= {f"moe.{name}": moe.get(_KEYS[f"moe.{name}"][4:]) for name in ("num_experts", "experts_per_token")}
    notes = []
    if unknown := sorted(table.keys() - set(_KEYS.values()) - set(_OF_THE_RUN)):
        notes.append(f"{path.name} has keys that are not read: {', '.join(unknown)}")
    values |= _assumed(values, table, archive, path, notes)
    return build_config(values, _KEYS, path), notes


def _assumed(
    values: Mapping[str, Any], table: Mapping[str, Any], archive: Archive, path: Path, notes: list[str]
) -> dict[str, Any]:
    """What the file leaves out, as the published models have it."""
    assumed: dict[str, Any] = {}
    if values["rope_theta"] is None:
        # Version 0.1 of the 7B, which alone has a window, was trained with 1e4, everything after it with 1e6.
        assumed["rope_theta"] = 1e4 if values["sliding_window"] else 1e6
        why = "a window is set" if values["sliding_window"] else "no window is set"
        notes.append(f"{path.name} has no rope_theta: {assumed['rope_theta']:g} is assumed, since {why}")
    if values["max_position"] is None and table.get("max_position_embeddings"):
        assumed["max_position"] = table["max_position_embeddings"]
    elif values["max_position"] is None:
        assumed["max_position"] = 65536 if values["dim"] == 6144 else 32768
        notes.append(f"{path.name} does not say how many positions there are: {assumed['max_position']} are assumed")
    embedding = archive.entries.get("tok_embeddings.weight")
    if values["vocab_size"] in (None, -1) and embedding is not None and embedding.shape:
        assumed["vocab_size"] = embedding.shape[0]
        notes.append(f"{path.name} has no vocab_size: {embedding.shape[0]}, as the embedding has")
    return assumed


def params_json(config: ModelConfig) -> dict[str, Any]:
    """The params.json of a model. It says rope_theta always, which version 0.1's did not."""
    table: dict[str, Any] = {
        key: value for name, key in _KEYS.items() if "." not in name and (value := getattr(config, name)) is not None
    }
    if not config.tie_embeddings:
        del table["tied_embeddings"]
    if config.moe is not None:
        moe = config.moe
        table["moe"] = {"num_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
    return table
