"""`mixtral-jax eval`: the benchmarks of the papers, through EleutherAI's evaluation harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_jax.cli import meshes, platform
from mixtral_jax.cli.progress import print_notes
from mixtral_jax.errors import InputError


def evaluate(
    model: Annotated[str, typer.Argument(help="A model in any format, a training run, or a hub id.")],
    tasks: Annotated[str, typer.Option(help="The harness's names, with commas between them.")],
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in front. Default: as the task says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many questions a task, to try it out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens read at a time. Default: 4096, or the model's.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    allow_code: Annotated[bool, typer.Option(help="Run what the model writes, as HumanEval does.")] = False,
    output: Annotated[Path | None, typer.Option(help="A file for all that the harness reports, as JSON.")] = None,
    dtype: platform.Dtype = "auto",
    quantize: platform.Quantize = None,
    cache_dtype: platform.CacheDtype = None,
    mesh: meshes.Mesh = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    device: platform.Device = None,
) -> None:
    """Run benchmarks such as mmlu, hellaswag, winogrande, arc_challenge, gsm8k_cot, minerva_math and humaneval."""
    platform.start(device)
    try:
        from mixtral_jax.evaluation import harness
    except ImportError as error:
        wanted = f"needs the evaluation harness ({error}): pip install 'mixtral-jax[eval]'"
        raise InputError("eval", None, wanted) from None
    from mixtral_jax.checkpoints.opening import open_source
    from mixtral_jax.loading import from_source

    source = open_source(model)
    print_notes(source.notes)
    length = max_length or min(4096, source.config.max_position)
    wrapped = harness.HarnessModel(
        from_source(source, dtype, meshes.decoding_mesh(mesh), quantize, cache_dtype), batch_size, length
    )
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    results = harness.evaluate(wrapped, names, num_fewshot, limit, include, allow_code)
    if output is not None:
        output.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(results["results"], default=str))
    else:
        _print(results)


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "shots", "metric", "value", "+-", box=None)
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            shots = str(results.get("n-shot", {}).get(task, ""))
            table.add_row(task, shots, f"{metric} ({kind})" if kind != "none" else metric, f"{value:.4f}", spread)
    Console(highlight=False).print(table)
