"""`mixtral-jax plan`: does it fit on a machine that is not here, what does it move, how long might it take."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mixtral_jax.cli import platform
from mixtral_jax.cli.meshes import parse_mesh
from mixtral_jax.errors import InputError

if TYPE_CHECKING:
    from mixtral_jax.config import Remat
    from mixtral_jax.planning.job import Job
    from mixtral_jax.planning.search import Wanted
    from mixtral_jax.planning.topology import Topology

DOES_NOT_FIT = 2
_LENGTH = {False: 4096, True: 8192}


def plan(
    pod: Annotated[
        str | None, typer.Argument(help="A shipped plan: pods/v5p-4x4x4/mixtral-8x7b/train-4k, or a file of them.")
    ] = None,
    model: Annotated[str, typer.Option(help="A shipped model, or a TOML file.")] = "mixtral-8x7b",
    topology: Annotated[
        str | None, typer.Option(help="The machine: v5p:4x4x4, v6e:8x8, 2xv5e:16x16, h100:64, cpu:8.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="Axes and sizes, such as expert=8,fsdp=8. Default: what --search finds.")
    ] = None,
    batch_per_chip: Annotated[
        float | None, typer.Option(help="Rows of a step over chips; less than 1 with context or tensor parallelism.")
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a row. Default 4096, to serve 8192.")] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="Places an expert has, over a balanced share.")] = None,
    dropless: Annotated[bool, typer.Option("--dropless", help="Every token is served, whatever the routing.")] = False,
    remat: Annotated[
        Literal["none", "products", "full", "offload"] | None,  # config.Remat, whose module takes long to import
        typer.Option(help="What the backward pass computes again, and whether layers' inputs wait on the host."),
    ] = None,
    attention_chunk: Annotated[int | None, typer.Option(help="Queries that attention takes at a time.")] = None,
    window: Annotated[str | None, typer.Option(help="The sliding window, or none. Default: the model's.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Prefill and decode instead of a step of training.")] = False,
    quantize: platform.Quantize = None,
    cache_dtype: platform.CacheDtype = None,
    search: Annotated[bool, typer.Option("--search", help="Rank meshes, batches, remat and dispatch.")] = False,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile it. Default: for a TPU or GPU, without --search."),
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="A budget to price in chip-hours, such as 1e12.")] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print what a run's config takes from the plan.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a step of training, or serving, for a machine that is not here. Ends with status 2 if it does not fit."""
    _prepare(topology)
    from mixtral_jax.planning import topology as machines
    from mixtral_jax.planning.pods import find

    if pod is not None:
        given = [topology, mesh, batch_per_chip, sequence, capacity_factor, attention_chunk, remat, window]
        given += [serve, dropless, search, quantize, cache_dtype]
        if any(given):
            raise InputError("pod", pod, "says the machine and the plan itself; leave those flags out")
        found = find(pod)
        if len(found) > 1:
            return _list(found, json_)
        machine, job = found[0].machine, found[0].job()
        return _finish(job, machine, _wants_compile(compile_, machine), tokens, toml, json_)
    if topology is None:
        raise InputError("--topology", None, f"is needed, {machines.EXAMPLES}")
    _check(capacity_factor, dropless, attention_chunk, serve, {"--quantize": quantize, "--cache-dtype": cache_dtype})
    machine = machines.topology(topology)
    wanted = _wanted(model, machine, mesh, batch_per_chip, sequence, remat, window, serve)
    wanted = replace(wanted, dispatch=_dispatch(capacity_factor, dropless), attention_chunk=attention_chunk)
    wanted = replace(wanted, quantize=quantize, cache_dtype=cache_dtype)
    ranked = [] if machine.chip is None or not (search or _is_open(wanted)) else _search(wanted, machine)
    if search:
        compile_ = bool(compile_)
        _show_ranking(ranked, machine, json_)
    job = ranked[0].job if ranked else _asked(wanted, machine)
    if not (search and json_):
        _finish(job, machine, _wants_compile(compile_, machine), tokens, toml, json_)
    return None


def _check(
    capacity_factor: float | None,
    dropless: bool,
    attention_chunk: int | None,
    serve: bool,
    of_serving: dict[str, str | None],
) -> None:
    """Raises InputError for flags that don't go together, and for a chunk that is none."""
    if dropless and capacity_factor is not None:
        raise InputError("--dropless", True, "has no --capacity-factor")
    if attention_chunk is not None and attention_chunk < 1:
        raise InputError("--attention-chunk", attention_chunk, "a number of queries above zero")
    for flag, value in of_serving.items():
        if value is not None and not serve:
            raise InputError(flag, value, "is for --serve; training has float32 weights and no cache")


def _prepare(topology: str | None) -> None:
    """Plans touch no accelerator; of a CPU as many devices are shown as are planned."""
    if topology is not None and topology.lower().startswith("cpu:") and topology[4:].isdigit():
        flag = f"--xla_force_host_platform_device_count={topology[4:]}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import jax

    jax.config.update("jax_platforms", "cpu")


def _wanted(
    model: str,
    machine: Topology,
    mesh: str | None,
    batch_per_chip: float | None,
    sequence: int | None,
    remat: Remat | None,
    window: str | None,
    serve: bool,
) -> Wanted:
    from mixtral_jax.config import model_config
    from mixtral_jax.planning.search import Wanted

    config = model_config(model)
    if window is not None:
        if window != "none" and not (window.isdigit() and int(window) > 0):
            raise InputError("--window", window, "a number of keys above zero, or none")
        config = replace(config, sliding_window=None if window == "none" else int(window))
    length = sequence if sequence is not None else _LENGTH[serve]
    if length < 1:
        raise InputError("--sequence", length, "a number of tokens above zero")
    if batch_per_chip is not None and batch_per_chip <= 0:
        raise InputError("--batch-per-chip", batch_per_chip, "a number above zero")
    axes = None if mesh is None else parse_mesh(mesh).resolve(machine.num_chips)
    return Wanted(config, length, serve, axes, batch_per_chip, remat)


def _dispatch(capacity_factor: float | None, dropless: bool) -> Any:
    from mixtral_jax.config import Dispatch

    if capacity_factor is None:
        return Dispatch() if dropless else None
    return Dispatch(capacity_factor=capacity_factor)


def _is_open(wanted: Wanted) -> bool:
    """Whether something is left to the search."""
    return wanted.mesh is None or wanted.batch_per_chip is None


def _search(wanted: Wanted, machine: Topology) -> list[Any]:
    from mixtral_jax.planning.search import search

    return search(wanted, machine)


def _asked(wanted: Wanted, machine: Topology) -> Job:
    """The job as it was asked for, in the smallest form of what is left open, with a mesh but for the host's memory:
    nothing that fits was found."""
    from mixtral_jax.config import Dispatch
    from mixtral_jax.planning.job import EXECUTION, Job, check
    from mixtral_jax.planning.search import rows_of, smallest

    if wanted.mesh is None:
        return smallest(wanted, machine)
    chunk = wanted.attention_chunk or EXECUTION.attention_chunk
    chosen = replace(EXECUTION, remat=wanted.remat or "full", attention_chunk=chunk)
    execution = replace(EXECUTION, cache_dtype=wanted.cache_dtype) if wanted.serve else chosen
    dispatch = wanted.dispatch or Dispatch()
    job = Job(wanted.model, wanted.mesh, 1, wanted.length, execution, dispatch, serve=wanted.serve)
    job = replace(job, quantize=wanted.quantize, platform=machine.platform)
    if wanted.batch_per_chip is None:
        return check(replace(job, rows=1 if wanted.serve else job.copies))
    return check(replace(job, rows=rows_of(job, wanted.batch_per_chip)))


def _wants_compile(asked: bool | None, machine: Topology) -> bool:
    from mixtral_jax.planning.compilers import advice, has_compiler, require_compiler

    if asked and machine.chip is not None:
        require_compiler(machine)
    if asked is None and not has_compiler(machine):
        print(f"note: nothing is compiled; {advice(machine)}", file=sys.stderr)
        return False
    return machine.chip is not None if asked is None else asked


def _finish(job: Job, machine: Topology, compiles: bool, tokens: float | None, toml: bool, json_: bool) -> None:
    from mixtral_jax.planning.report import describe, fit, verdict

    if toml:
        import tomli_w

        from mixtral_jax.planning.pods import run_sections

        print(tomli_w.dumps(run_sections(job)), end="")
        return
    compiled = []
    if compiles:
        from mixtral_jax.planning.compile import compile_job

        print("compiling", file=sys.stderr)
        compiled = compile_job(job, machine)
    remedies = []
    if fit(job, machine, compiled)["fits"] is False:
        from mixtral_jax.planning.search import remedies as find_remedies

        remedies = find_remedies(job, machine)
    described = describe(job, machine, compiled, tokens, remedies)
    if json_:
        print(json.dumps(described))
    else:
        from rich.console import Console

        from mixtral_jax.planning.show import show

        show(described, Console())
    if described["fits"] is False:
        print(f"error: {machine.name}: {verdict(described)}", file=sys.stderr)
        raise typer.Exit(DOES_NOT_FIT)


def _show_ranking(ranked: list[Any], machine: Topology, json_: bool) -> None:
    from mixtral_jax.planning.report import ranking

    found = ranking(ranked, machine)
    if json_:
        print(json.dumps(found))
        if not found:
            raise typer.Exit(DOES_NOT_FIT)
        return
    from rich.console import Console

    from mixtral_jax.planning.show import show_ranking

    if found:
        show_ranking(found, Console())


def _list(found: list[Any], json_: bool) -> None:
    """The plans of a file, each in a line, by counts."""
    from rich.console import Console

    from mixtral_jax.planning.table import rows, show_table

    table = rows(found)
    if json_:
        print(json.dumps(table))
    else:
        show_table(table, Console())
