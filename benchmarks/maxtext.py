"""MaxText on a model of the same sizes: a training step, in a process of MaxText's own environment.

Its weights and tokens are its own, drawn at random. The settings are its fastest on CPU: experts take tokens up to 1.25
of a balanced share, and the backward pass computes nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.turns import told
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError

DTYPES = ("float32", "bfloat16")
PEER = Path(__file__).with_name("maxtext_peer.py")
# On CPU, and with what `reuse_memory` sets for the others: a process has to be started with it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.arena_max=1",
}


def python_of(environment: Path) -> Path:
    """The interpreter that has MaxText.

    Raises:
      InputError: there is none.
    """
    python = environment / "bin" / "python"
    if not python.exists():
        raise InputError("--maxtext", str(environment), "no environment is there; `make maxtext` makes .venv-maxtext")
    return python.absolute()


@contextmanager
def train(python: Path, config: ModelConfig, batch: int, length: int, dtype: str) -> Iterator[Callable[[], object]]:
    """A call that does a training step with AdamW: float32 masters, products in dtype; it is compiled by now."""
    settings: dict[str, Any] = {
        "weight_dtype": "float32",
        "max_target_length": length,
        "steps": 1000,
        "load_balance_loss_weight": 0.02,
    }
    settings |= _settings(config, batch, dtype)
    # Isolated, so that neither this folder nor PYTHONPATH hides a package of that environment.
    command = [str(python), "-I", str(PEER), *(f"{key}={value}" for key, value in settings.items())]
    with told(command, "MaxText", ENVIRONMENT) as tell:
        tell("compile")
        yield lambda: tell("step")


def _settings(config: ModelConfig, batch: int, dtype: str) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "decoder_block": "mixtral",
        "mlp_activations": '["silu","linear"]',
        "base_emb_dim": config.dim,
        "base_num_decoder_layers": config.num_layers,
        "base_num_query_heads": config.num_heads,
        "base_num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "base_mlp_dim": config.hidden_dim,
        "base_moe_mlp_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "rope_max_timescale": int(config.rope_theta),
        "normalization_layer_epsilon": config.norm_eps,
        "dtype": dtype,
        "per_device_batch_size": batch,
        "capacity_factor": 1.25,
        "sparse_matmul": False,  # which has no capacity
        "attention": "dot_product",
        "remat_policy": "none",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "log_config": False,
        "run_name": "benchmark",
        "jax_cache_dir": "",
    }
