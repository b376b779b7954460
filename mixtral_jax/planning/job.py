"""What is planned: a step of training, or serving, of a model on a mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mixtral_jax.config import Dispatch, Execution, ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.model.context_parallel import kernels_for
from mixtral_jax.model.dispatch import capacity, group
from mixtral_jax.quantization import Bits, groups
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.mesh import MeshConfig

EXECUTION = Execution(activation_dtype="bfloat16", product_dtype="bfloat16", attention_chunk=512, remat="full")
"""How a pod trains unless told otherwise."""

DROPLESS = Dispatch()

Platform: TypeAlias = Literal["tpu", "cuda", "cpu"]
"""As jax names them."""

AttentionKernel: TypeAlias = Literal["xla", "splash", "flash", "ideal"]
"""`xla`: the chunked backend, whose scores go through memory. `splash` and `flash`: TPU's and GPU's kernels, which also
compute what a block's mask hides. `ideal`: one that keeps scores on the chip and computes what is visible and no more,
for comparison with others' numbers."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Job:
    """One step of training; or, to serve, a batch of texts that is prefilled and decoded."""

    model: ModelConfig
    mesh: MeshConfig
    """With every size given."""
    rows: int
    """Texts of a step, over the whole mesh; to serve, those of one copy of the weights."""
    length: int
    """Tokens of each; to serve, the most that a text grows to."""
    execution: Execution = EXECUTION
    dispatch: Dispatch = DROPLESS
    loss_chunk: int = 1024
    accumulation: int = 1
    serve: bool = False
    quantize: Bits | None = None
    """To serve, the bits of the layers' matrices and of the unembedding; None: the dtype of products."""
    platform: Platform = "tpu"
    """What it is compiled for."""

    @property
    def num_chips(self) -> int:
        return math.prod(self.mesh.shape)

    @property
    def copies(self) -> int:
        """Devices that the batch is split over in training; to serve, copies of the weights."""
        return self.mesh.data if self.serve else self.mesh.data * self.mesh.fsdp * self.mesh.expert

    @property
    def local_rows(self) -> int:
        """Rows of a micro-batch on a device; to serve, all of a copy's, which every device of it sees."""
        return self.rows if self.serve else self.rows // self.accumulation // self.copies

    @property
    def local_length(self) -> int:
        return self.length if self.serve else self.length // self.mesh.context

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch on a device."""
        return self.local_rows * self.local_length

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.rows * self.length

    @property
    def batch_per_chip(self) -> float:
        """Rows of a step over chips, which context and tensor parallelism make less than one."""
        return self.rows * (self.copies if self.serve else 1) / self.num_chips

    @property
    def expert_rows(self) -> int:
        """Rows that a device's experts compute for a micro-batch: by capacity the slots, full or not; dropless what a
        balanced routing sends."""
        moe = self.model.moe
        if moe is None:
            return 0
        if self.dispatch.capacity_factor is None:
            return self.local_tokens * moe.experts_per_token
        size = group(self.local_length, self.dispatch.group_size)
        places = capacity(self.dispatch, size, moe.experts_per_token, moe.num_experts)
        return moe.num_experts * places * (self.local_tokens // size)

    @property
    def kernel(self) -> AttentionKernel:
        """What attends in training."""
        known = self.mesh.context == 1 or self.model.sliding_window is not None
        found = kernels_for(self.execution, self.local_length, self.model.head_dim, known)
        names: dict[Platform, AttentionKernel] = {"tpu": "splash", "cuda": "flash"}
        return names[self.platform] if self.platform in found else "xla"

    @property
    def repeats_no_experts(self) -> bool:
        """Whether the experts' own backward pass is at work, which computes again only what lies between products."""
        dropless = self.dispatch.capacity_factor is None
        return self.execution.repeats_layers or (dropless and self.mesh.expert > 1)


def check(job: Job) -> Job:
    """The job, if its sizes divide.

    Raises:
      InputError: the first that does not.
    """
    problem = next(iter(problems(job)), None)
    if problem is not None:
        raise problem
    return job


def problems(job: Job) -> list[InputError]:
    """What does not divide."""
    model, mesh = job.model, job.mesh
    found: list[InputError] = []

    def divides(key: str, parts: int, size: int, what: str) -> None:
        if size % parts:
            found.append(InputError(key, parts, f"must divide {what} = {size}"))

    if job.length > model.max_position:
        found.append(InputError("--sequence", job.length, f"at most model.max_position = {model.max_position}"))
    if not job.serve:
        shards = job.copies * job.accumulation
        if job.rows < 1 or job.rows % shards:
            allowed = f"rows of a step must be a multiple of data x fsdp x expert x accumulation = {shards}"
            found.append(InputError("--batch-per-chip", job.batch_per_chip, f"that is {job.rows} rows; {allowed}"))
        divides("mesh.context", mesh.context, job.length, "the sequence length")
        for name in ("fsdp", "expert"):
            divides(f"mesh.{name}", getattr(mesh, name), model.dim, "model.dim")
        divides("mesh.fsdp x expert", mesh.fsdp * mesh.expert, model.dim, "model.dim")
    elif mesh.context > 1:
        found.append(InputError("mesh.context", mesh.context, "decoding splits no sequences; 1 is needed"))
    else:
        parts = mesh.fsdp * mesh.expert * mesh.tensor
        divides("mesh.fsdp x expert x tensor", parts, model.hidden_dim, "hidden_dim")
        if job.quantize == "int4":
            divides("mesh.fsdp x expert x tensor", parts, groups(model.hidden_dim), "groups of hidden_dim in int4")
    divides("mesh.tensor", mesh.tensor, model.num_kv_heads, "model.num_kv_heads")
    divides("mesh.tensor", mesh.tensor, model.vocab_size, "model.vocab_size")
    if model.moe is None:
        if mesh.expert > 1:
            found.append(InputError("mesh.expert", mesh.expert, "the model has no experts; 1 is needed"))
    elif not job.serve:
        divides("mesh.expert", mesh.expert, model.moe.num_experts, "the number of experts")
        if job.dispatch.capacity_factor is not None and not found:
            found += _group_problem(job)
    return found


def _group_problem(job: Job) -> list[InputError]:
    try:
        group(job.local_length, job.dispatch.group_size)
    except InputError as error:
        return [error]
    return []


def mesh_text(mesh: MeshConfig) -> str:
    """`expert=8,fsdp=8`; `data=1` where every axis is 1."""
    return ",".join(f"{axis}={mesh.size(axis)}" for axis in MESH_AXES if mesh.size(axis) > 1) or "data=1"
