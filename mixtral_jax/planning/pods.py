"""The shipped plans, configs/pods/: a file a topology, in it a section for each model and purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic.dataclasses import dataclass

from mixtral_jax import configs
from mixtral_jax.config import STRICT, Dispatch, ModelConfig, Remat, build, model_config, read_toml
from mixtral_jax.errors import InputError, nearest
from mixtral_jax.planning.job import EXECUTION, Job, check
from mixtral_jax.planning.search import Wanted, rows_of
from mixtral_jax.planning.topology import Topology, topology
from mixtral_jax.sharding.mesh import MeshConfig

PURPOSES = {"train-4k": (4096, False), "train-32k": (32768, False), "serve": (8192, True)}
"""Tokens of a text, and whether to serve."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Entry:
    """A plan of a pod file. One that cannot fit says on what it would."""

    mesh: MeshConfig | None = None
    batch_per_chip: float | None = None
    """Rows of a step over chips; to serve, texts that are decoded at once over chips."""
    remat: Remat = "full"
    attention_chunk: int = EXECUTION.attention_chunk
    capacity_factor: float | None = None
    """None: dropless."""
    fits_on: str | None = None
    """The smallest topology on which the model does fit, of this chip if there is one; there is then no mesh here."""


@dataclass(frozen=True)
class Pod:
    """A shipped plan by name."""

    name: str
    machine: Topology
    model: ModelConfig
    length: int
    serve: bool
    entry: Entry

    @property
    def wanted(self) -> Wanted:
        """What the search was asked."""
        return Wanted(self.model, self.length, self.serve)

    def job(self) -> Job:
        """What is planned.

        Raises:
          InputError: it cannot fit.
        """
        entry = self.entry
        if entry.mesh is None or entry.batch_per_chip is None:
            raise InputError("pod", self.name, f"does not fit on {self.machine.name}; it does on {entry.fits_on}")
        mesh = entry.mesh.resolve(self.machine.num_chips)
        chosen = replace(EXECUTION, remat=entry.remat, attention_chunk=entry.attention_chunk)
        execution = EXECUTION if self.serve else chosen
        dispatch = Dispatch(capacity_factor=entry.capacity_factor)
        job = Job(
            self.model, mesh, 1, self.length, execution, dispatch, serve=self.serve, platform=self.machine.platform
        )
        return check(replace(job, rows=rows_of(job, entry.batch_per_chip)))


def pods(name: str | None = None) -> list[Pod]:
    """The shipped plans; of one file such as `v5p-4x4x4`, or all."""
    return [pod for file in ([name] if name else configs.names("pods")) for pod in _of_file(file)]


def find(name: str) -> list[Pod]:
    """The plans of a name: `pods/v5p-4x4x4`, or one of them, `pods/v5p-4x4x4/mixtral-8x7b/train-4k`.

    Raises:
      InputError: there are none.
    """
    file, *rest = name.removeprefix("pods/").removesuffix(".toml").split("/")
    if file not in configs.names("pods"):
        files = configs.names("pods")
        raise InputError("pod", name, f"{nearest(file, files)}shipped: {', '.join(files)}")
    found = [pod for pod in _of_file(file) if pod.name.split("/")[2:][: len(rest)] == rest]
    if not found:
        known = [pod.name for pod in _of_file(file)]
        raise InputError("pod", name, f"{nearest(name, known)}shipped: {', '.join(known)}")
    return found


def _of_file(file: str) -> list[Pod]:
    table: dict[str, Any] = read_toml(f"pods/{file}")
    machine = topology(table.pop("topology"))
    found = []
    for model, purposes in table.items():
        for purpose, entry in purposes.items():
            if purpose not in PURPOSES:
                raise InputError(
                    f"{model}.{purpose}", None, f"{nearest(purpose, PURPOSES)}known: {', '.join(PURPOSES)}"
                )
            length, serve = PURPOSES[purpose]
            checked = build(Entry, entry, f"{model}.{purpose}")
            found.append(Pod(f"pods/{file}/{model}/{purpose}", machine, model_config(model), length, serve, checked))
    return found


def run_sections(job: Job) -> dict[str, Any]:
    """What a run's config takes from a plan: `mesh`, `execution`, `dispatch`, `accumulation`, the chunk of the losses,
    and two keys of `data`."""
    execution = job.execution
    sections: dict[str, Any] = {
        "accumulation": job.accumulation,
        "mesh": {axis: size for axis, size in vars(job.mesh).items() if size > 1 or axis == "data"},
        "execution": {
            "activation_dtype": execution.activation_dtype,
            "product_dtype": execution.product_dtype,
            "attention_chunk": execution.attention_chunk,
            "remat": execution.remat,
        },
        "dispatch": {},  # dropless; a run without the section has a capacity
        "losses": {"chunk": job.loss_chunk},
        "data": {"batch_size": job.rows, "sequence_length": job.length},
    }
    if job.dispatch.capacity_factor is not None:
        sections["dispatch"] = {"capacity_factor": job.dispatch.capacity_factor}
    return sections
