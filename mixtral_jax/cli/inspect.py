"""`mixtral-jax inspect`: what a model is and the memory that it takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mixtral_jax.cli.platform import Bits
from mixtral_jax.cli.progress import bar

if TYPE_CHECKING:
    from mixtral_jax.config import ModelConfig

_BYTES = {"float32": 4, "bfloat16": 2}


def inspect(
    model: Annotated[
        str, typer.Argument(help="A model in any format, a training run, a shipped model's name, or a TOML file.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time, for the cache.")] = 1,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens a text, for the cache. Default: all.")] = None,
    scan: Annotated[bool, typer.Option(help="Read every weight, to find damage and what is no number.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show which release a model is, its parameters and memory, and everything that is off."""
    from mixtral_jax.checkpoints import doctor
    from mixtral_jax.config import model_config

    report: dict[str, Any] = {}
    if not Path(model).is_dir() and _is_config(model):
        config = model_config(model)
    else:
        from mixtral_jax.checkpoints.opening import open_source

        source = open_source(model)
        config = source.config
        found = doctor.findings(source)
        if scan and not source.problems():
            with bar("reading every weight") as progress:
                found += doctor.scan(source, progress)
        stored = {} if source.problems() else doctor.stored_dtypes(source)
        report = {"format": source.form, "stored": stored, "notes": source.notes, "findings": found}
    report = {"release": doctor.release(config), **report, **describe(config, batch, length or config.max_position)}
    if as_json:
        typer.echo(json.dumps(report))
        return
    _print(report)


def _is_config(model: str) -> bool:
    """Whether this names a config rather than weights: a shipped model, a TOML file, or what is like neither."""
    return model.endswith(".toml") or ("/" not in model and not Path(model).exists())


def describe(config: ModelConfig, batch: int, length: int) -> dict:
    """The numbers as a table for JSON; sizes in bytes."""
    from mixtral_jax.config import to_table
    from mixtral_jax.model.cache import num_slots
    from mixtral_jax.model.transformer import count_parameters

    total, active = count_parameters(config)
    slots = num_slots(config, length)
    heads = 2 * config.num_layers * config.num_kv_heads
    # In int8 with a float32 scale for each token and head.
    a_token = {dtype: heads * config.head_dim * size for dtype, size in _BYTES.items()}
    a_token["int8"] = heads * (config.head_dim + 4)
    return {
        "config": to_table(config),
        "parameters": total,
        "active_parameters": active,
        "weight_bytes": {dtype: total * size for dtype, size in _BYTES.items()}
        | {bits: _quantized_bytes(config, bits) for bits in get_args(Bits)},
        "cache": {
            "batch": batch,
            "length": length,
            "slots": slots,
            "bytes_a_token": a_token,
            "bytes": {dtype: batch * slots * size for dtype, size in a_token.items()},
        },
    }


def _quantized_bytes(config: ModelConfig, bits: Bits) -> int:
    """The matrices with their scales, and what is not quantised in bfloat16."""
    from mixtral_jax.model.tensors import tensors
    from mixtral_jax.quantization import is_quantized, nbytes

    return sum(nbytes(each, bits) if is_quantized(each) else 2 * math.prod(each.shape) for each in tensors(config))


def _print(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    config = Table("key", "value", box=None)
    for key, value in report["config"].items():
        config.add_row(key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
    console.print(f"release: {report['release'] or 'none that is shipped'}")
    if "format" in report:
        stored = ", ".join(f"{count:,} in {code}" for code, count in report["stored"].items())
        console.print(f"format: {report['format']}" + (f"; stored: {stored}" if stored else ""))
    console.print(config)
    console.print(f"\n{report['parameters']:,} parameters, {report['active_parameters']:,} active a token\n")
    cache = report["cache"]
    texts = f"{cache['batch']} x {cache['length']}"
    columns = "weights GB", f"cache GB, {texts} tokens", "together GB", "with an int8 cache"
    memory = Table("dtype", *columns, box=None)
    for dtype, size in report["weight_bytes"].items():
        of_cache = cache["bytes"]["float32" if dtype == "float32" else "bfloat16"]
        sums = size, of_cache, size + of_cache, size + cache["bytes"]["int8"]
        memory.add_row(dtype, *(f"{value / 1e9:.3f}" for value in sums))
    console.print(memory)
    console.print(f"the cache holds {cache['slots']} tokens a text, {cache['bytes_a_token']['bfloat16']:,} bytes each")
    for note in report.get("notes", []):
        console.print(f"note: {note}", soft_wrap=True)
    if "findings" in report:
        console.print("nothing is off" if not report["findings"] else "\nfindings:")
        for finding in report["findings"]:
            console.print(f"  {finding}", soft_wrap=True)
