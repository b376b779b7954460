"""Plans for pods: the shipped ones found anew, and all of them compiled.

python -m benchmarks.pods write            configs/pods/ and the table of docs/pods.md, by search
python -m benchmarks.pods nightly FOLDER   compiles the shipped plans that FOLDER has no result of yet
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.config import model_config
from mixtral_jax.planning.compile import compile_job
from mixtral_jax.planning.compilers import has_compiler
from mixtral_jax.planning.job import EXECUTION
from mixtral_jax.planning.pods import PURPOSES, Pod, pods
from mixtral_jax.planning.report import GIB, fit
from mixtral_jax.planning.search import Wanted, fits_on, flags, search
from mixtral_jax.planning.table import markdown, rows
from mixtral_jax.planning.topology import topology

ROOT = Path(__file__).parents[1]
TOPOLOGIES = ("v4:4x4x4", "v5e:16x16", "v5p:4x4x4", "v5p:4x8x8", "v6e:8x8", "v6e:16x16", "h100:8", "h100:64")
MODELS = ("mistral-7b-v0.1", "mixtral-8x7b", "mixtral-8x22b")
HEAD = "# Plans for {name}, each the best that `mixtral-jax plan --topology {name} --search` finds by counts.\n"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def nightly(folder: Path) -> None:
    """Compiles what has no result in the folder yet, one after another; then writes them all as one table."""
    folder.mkdir(parents=True, exist_ok=True)
    for pod in pods():
        file = folder / f"{pod.name.removeprefix('pods/').replace('/', '.')}.json"
        if has_compiler(pod.machine) and pod.entry.mesh is not None and not _is_done(file, pod):
            print(f"compiling {pod.name}", flush=True)
            file.write_text(json.dumps(_compile(pod), indent=1) + "\n")
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    (folder / "table.md").write_text(compiled_table(results))
    print(f"wrote {folder / 'table.md'}: {len(results)} plans")


def _is_done(file: Path, pod: Pod) -> bool:
    """Whether the file has a result of the plan as it is now."""
    return file.exists() and json.loads(file.read_text()).get("flags") == flags(pod.job())


def _compile(pod: Pod) -> dict[str, Any]:
    started, job = time.time(), pod.job()
    compiled = compile_job(job, pod.machine)
    return {
        "name": pod.name,
        "flags": flags(job),
        **fit(job, pod.machine, compiled),
        "programs": {each.name: {**each.memory, "missing": each.missing} for each in compiled},
        "seconds": time.time() - started,
    }


def compiled_table(results: list[dict[str, Any]]) -> str:
    """The compiler's memory of each plan and program, as markdown."""
    lines = [
        "| plan | program | arguments, GiB a chip | temporaries | spare | compile s |",
        "|---|---|---|---|---|---|",
    ]
    for each in results:
        for program, memory in each["programs"].items():
            given = sum(size for kind, size in memory.items() if kind not in ("temporaries", "missing"))
            cells = (given, memory.get("temporaries", 0), each["spare_bytes"])
            numbers = " | ".join(f"{size / GIB:.2f}" for size in cells)
            lines.append(f"| {each['name']} | {program} | {numbers} | {each['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Finds all plans and writes them where they are shipped and documented."""
    for name in TOPOLOGIES:
        print(name, flush=True)
        file = ROOT / "configs" / "pods" / f"{name.replace(':', '-')}.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(pod_file(name))
    page = ROOT / "docs" / "pods.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{markdown(rows(pods()))}\n{END}{after}")


def pod_file(name: str) -> str:
    """A topology's file: a section for each model and purpose."""
    sections = [HEAD.format(name=name), f'topology = "{name}"\n']
    for model in MODELS:
        for purpose, (length, serve) in PURPOSES.items():
            sections.append(f"\n[{model}.{purpose}]\n" + _entry(name, Wanted(model_config(model), length, serve)))
    return "".join(sections).replace("[mistral-7b-v0.1.", '["mistral-7b-v0.1".')


def _entry(name: str, wanted: Wanted) -> str:
    found = search(wanted, topology(name))
    if not found:
        larger = fits_on(wanted, topology(name))
        return f'fits_on = "{larger.machine.name if larger else "none"}"\n'
    job = found[0].job
    axes = ", ".join(f"{axis} = {size}" for axis, size in vars(job.mesh).items() if size > 1 or axis == "data")
    text = f"mesh = {{ {axes} }}\nbatch_per_chip = {job.batch_per_chip:g}\n"
    if not wanted.serve:
        text += f'remat = "{job.execution.remat}"\n'
        if job.execution.attention_chunk != EXECUTION.attention_chunk:
            text += f"attention_chunk = {job.execution.attention_chunk}\n"
        if job.dispatch.capacity_factor is not None:
            text += f"capacity_factor = {job.dispatch.capacity_factor}\n"
    return text


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    match sys.argv[1:]:
        case ["nightly", folder]:
            nightly(Path(folder))
        case ["write"]:
            write()
        case _:
            sys.exit(__doc__)
