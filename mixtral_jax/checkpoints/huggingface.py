"""Folders as Hugging Face transformers writes them: config.json and safetensors files.

What a config leaves out means what transformers takes it for (facts by reading its configuration classes).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoints.archive import Archive, Union
from mixtral_jax.checkpoints.config_files import build_config, read_json, take
from mixtral_jax.checkpoints.safetensors import SafetensorsFile
from mixtral_jax.checkpoints.source import ArchiveSource
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_KEYS: Mapping[str, str] = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "max_position": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "moe.num_experts": "num_local_experts",
    "moe.experts_per_token": "num_experts_per_tok",
}
"""What config.json calls the fields of a ModelConfig."""
_COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 4096 * 32,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
}
_ABSENT: Mapping[str, dict[str, Any]] = {
    "mistral": _COMMON | {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096},
    "mixtral": _COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "llama": _COMMON
    | {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048, "num_key_value_heads": None},
}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
}
"""Keys that change the function, with the values that it has here."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Under which transformers 5 nests a rope for each kind of layer."""


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like one that transformers wrote."""
    return (folder / CONFIG).is_file() and (any(folder.glob("model*.safetensors")) or (folder / INDEX).is_file())


def open_huggingface(folder: Path) -> ArchiveSource:
    """The model of a folder.

    Raises:
      InputError: a config that is no Mistral's or Mixtral's, or damaged files.
    """
    config = read_config(folder / CONFIG)
    archive, count = _open_files(folder)
    return ArchiveSource(
        folder,
        f"Hugging Face, {count} safetensors file{'s' * (count != 1)}",
        config,
        archive,
        "huggingface",
        ignored=lambda name: (
            name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")
        ),
    )


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of a config.json, of transformers 4 or 5.

    Raises:
      InputError: naming the file and the key that is missing, wrong or not supported.
    """
    table = read_json(path)
    family = str(table.get("model_type"))
    if family not in _ABSENT:
        raise InputError(f"{path}: model_type", family, f"{', '.join(_ABSENT)} can be read")
    for key, allowed in _ONLY.items():
        if table.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key}", table[key], f"only {' or '.join(map(str, allowed))} is supported")
    values = {**_ABSENT[family], **table, "rope_theta": _rope(table, path) or _ABSENT[family]["rope_theta"]}
    heads, width = (_whole(values, key, path) for key in ("num_attention_heads", "hidden_size"))
    values |= {
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or width // heads,
    }
    return build_config({name: values.get(key) for name, key in _keys(family).items()}, _KEYS, path)


def _keys(family: str) -> dict[str, str]:
    return {name: key for name, key in _KEYS.items() if family == "mixtral" or not name.startswith("moe.")}


def _whole(table: Mapping[str, Any], key: str, path: Path) -> int:
    value = take(table, key, path)
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key}", value, "a whole number above zero is needed")
    return value


def _rope(table: Mapping[str, Any], path: Path) -> Any:
    """rope_theta, from where transformers 5 nests it or version 4 has it; a rope that is scaled is refused."""
    theta = None
    for key in ("rope_scaling", "rope_parameters"):
        nested = table.get(key) or {}
        if not isinstance(nested, dict) or nested.keys() & _LAYER_TYPES or nested.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"{path}: {key}", nested, "only one rope for all layers, of all of a head, is supported")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise InputError(f"{path}: {key}.rope_type", kind, "only 'default' is supported")
        theta = nested.get("rope_theta") or theta
    return theta or table.get("rope_theta")


def config_json(config: ModelConfig, dtype: str, tokenizer: Any = None) -> dict[str, Any]:
    """The config.json that transformers, from version 4.36 on, reads as this model."""
    moe = config.moe
    table: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if moe is None else "MixtralForCausalLM"],
        "model_type": "mistral" if moe is None else "mixtral",
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "sliding_window": config.sliding_window,
        # Both spellings: version 4 reads the one at the top, version 5 the nested one.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": 1 if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": 2 if tokenizer is None else tokenizer.eos_id,
    }
    if moe is not None:
        table |= {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
        table |= {"output_router_logits": False, "router_aux_loss_coef": 0.02}
    return table


def _open_files(folder: Path) -> tuple[Archive, int]:
    """The folder's tensors: those that the index lists where there is one, else of every safetensors file."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("model*.safetensors"))
        return Union([SafetensorsFile(file) for file in files]), len(files)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: weight_map", listed, "a table from tensor to file is wanted")
    files = [_inside(folder, name, index) for name in sorted(set(map(str, listed.values())))]
    archive = Union([SafetensorsFile(file) for file in files])
    for name, file in listed.items():
        found = archive.entries.get(name)
        if found is None or found.file.name != file:
            where = "in no file" if found is None else f"in {found.file.name}"
            raise InputError(f"{index}: weight_map.{name}", file, f"the tensor is {where}")
    return archive, len(files)


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A file that an index names, which has to lie in the folder itself.

    Raises:
      InputError: it is a path out of the folder, or there is no such file.
    """
    if name != Path(name).name or name in ("", ".", ".."):
        raise InputError(f"{index}: weight_map", name, "the plain name of a file beside it is wanted")
    path = folder / name
    if not path.is_file():
        raise InputError(f"{index}: weight_map", name, "there is no such file in the folder")
    return path
