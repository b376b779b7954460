"""Mistral 7B and Mixtral 8x7B in JAX and Flax.

Names are imported when they are first used: importing jax alone takes a second, and `mixtral-jax --help` needs none.
"""

from __future__ import annotations

import importlib
from typing import Any

from mixtral_jax.version import __version__

_HOMES = {
    "Dispatch": "mixtral_jax.config",
    "Engine": "mixtral_jax.inference.engine",
    "EngineConfig": "mixtral_jax.inference.requests",
    "Execution": "mixtral_jax.config",
    "InputError": "mixtral_jax.errors",
    "MoEConfig": "mixtral_jax.config",
    "ModelConfig": "mixtral_jax.config",
    "Output": "mixtral_jax.model.transformer",
    "Request": "mixtral_jax.inference.requests",
    "SamplingConfig": "mixtral_jax.inference.sampling",
    "Transformer": "mixtral_jax.model.transformer",
    "load": "mixtral_jax.loading",
    "model_config": "mixtral_jax.config",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixtral_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
