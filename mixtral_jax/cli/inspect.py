"""`mixtral-jax inspect`: what a model is and the memory that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.config import ModelConfig, model_config, to_table

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


def inspect(
    model: Annotated[str, typer.Argument(help="The folder of a training run, a shipped model, or a TOML file.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time, for the cache.")] = 1,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens a text, for the cache. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show a model's parameters, total and active, and the memory of its weights and cache."""
    from mixtral_jax.checkpoints import native

    folder = Path(model)
    config = native.read_run_config(folder) if native.is_run(folder) else model_config(model)
    report = describe(config, batch, length or config.max_position)
    if as_json:
        typer.echo(json.dumps(report))
        return
    _print(report)


def describe(config: ModelConfig, batch: int, length: int) -> dict:
    """The numbers as a table for JSON; sizes in bytes."""
    from mixtral_jax.model.cache import num_slots
    from mixtral_jax.model.transformer import count_parameters

    total, active = count_parameters(config)
    slots = num_slots(config, length)
    values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return {
        "config": to_table(config),
        "parameters": total,
        "active_parameters": active,
        "weight_bytes": {dtype: int(total * size) for dtype, size in _BYTES.items()},
        "cache": {
            "batch": batch,
            "length": length,
            "slots": slots,
            "bytes_a_token": {dtype: int(values * _BYTES[dtype]) for dtype in ("float32", "bfloat16")},
            "bytes": {dtype: int(batch * slots * values * _BYTES[dtype]) for dtype in ("float32", "bfloat16")},
        },
    }


def _print(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    config = Table("key", "value", box=None)
    for key, value in report["config"].items():
        config.add_row(key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
    console.print(config)
    console.print(f"\n{report['parameters']:,} parameters, {report['active_parameters']:,} active a token\n")
    cache = report["cache"]
    memory = Table("dtype", "weights GB", f"cache GB, {cache['batch']} x {cache['length']} tokens", box=None)
    for dtype, size in report["weight_bytes"].items():
        of_cache = f"{cache['bytes'][dtype] / 1e9:.3f}" if dtype in cache["bytes"] else ""
        memory.add_row(dtype, f"{size / 1e9:.3f}", of_cache)
    console.print(memory)
    console.print(f"the cache holds {cache['slots']} tokens a text, {cache['bytes_a_token']['bfloat16']:,} bytes each")
