"""Low-rank factors in the format of the library peft: adapter_config.json and adapter_model.safetensors.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np

from mixtral_jax.checkpoints.adapter import LoraConfig, Merged
from mixtral_jax.checkpoints.safetensors import SafetensorsWriter
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.checkpoints.tensor_names import huggingface
from mixtral_jax.errors import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIX = ".weight"


def write_adapter(source: Source, target: Path) -> None:
    """Writes a run's factors as peft's folder, in float32, the tokenizer beside them.

    Raises:
      InputError: the source is no run that trained factors, it has some for which transformers has no linear layer, or
        the target is there.
    """
    if not isinstance(source, Merged):
        raise InputError("--to", "peft", f"{source.path} has no factors of its own; a run with [lora] is wanted")
    for name in ("experts", "router"):
        if name in source.lora.targets:
            why = "peft has factors of linear layers, which transformers has none of for a mixture's experts and router"
            raise InputError("--to", "peft", f"{why}, and the run trained lora.targets {name!r}; merge by huggingface")
    if target.exists() or target.is_symlink():
        raise InputError("DST", str(target), "is there already, and is not written over")
    arrays = _arrays(source)
    target.mkdir(parents=True)
    announced = [(name, array.shape, array.dtype) for name, array in arrays.items()]
    with closing(SafetensorsWriter(target / WEIGHTS, announced, {})) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.finish()
    modules = sorted({name.removeprefix(_PREFIX).split(".lora_")[0].rsplit(".", 1)[-1] for name in arrays})
    config = _config(source.lora, modules, str(source.base.path))
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save_into(target, "huggingface")


def _arrays(source: Merged) -> dict[str, np.ndarray]:
    """lora_A [r, inputs] and lora_B [outputs, r] by name: a linear layer has its outputs first."""
    arrays = {}
    for tensor, stored in huggingface(source.config).items():
        if tensor.kind in source.lora.kinds:
            a, b = (np.asarray(each, np.float32) for each in source.factors(tensor))
            name = f"{_PREFIX}{stored.name.removesuffix(_SUFFIX)}"
            arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)
            arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(len(b), -1).T)
    return arrays


def _config(lora: LoraConfig, modules: list[str], base: str) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
