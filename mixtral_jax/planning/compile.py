"""Compiles the real programs for a machine that is not there: the step of training, or prefill and decode.

Nothing is allocated: weights, batch and cache are shapes with shardings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.inference import decode
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.inference.weights import Prepared, arrange, axes, computed_dtype, stacks_experts
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.cache import Cache, empty_cache, num_slots
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.hlo import Collective, collectives
from mixtral_jax.planning.job import Job
from mixtral_jax.planning.memory import PREFILL_CHUNK
from mixtral_jax.planning.topology import Topology
from mixtral_jax.quantization import DTYPES, is_quantized, scale_shape
from mixtral_jax.sharding.mesh import make_mesh
from mixtral_jax.sharding.rules import DECODING, TRAINING
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.state import abstract_state
from mixtral_jax.train.step import make_step

_STEPS = 1000


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program."""

    name: str
    """`train`, `prefill` or `decode`."""
    seconds: float
    memory: dict[str, int]
    """Bytes a chip by kind: of what it is given (`weights`, `moments`, `batch`, `cache`), and `temporaries`."""
    collectives: list[Collective]
    missing: float = 0
    """Bytes a chip by which the compiler found the program too large; memory and collectives are then empty."""
    on_host: int = 0
    """Bytes in the host's memory for a chip."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())


class Abstract:
    """A program and the shapes that it is to be called with."""

    def __init__(self, name: str, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], given: dict):
        self.name, self.function, self.arguments, self.options = name, function, arguments, options
        self.given = given
        """The arguments by kind, for the sum of their bytes."""


def compile_job(job: Job, machine: Topology) -> list[Compiled]:
    """The job's programs, compiled for the machine.

    Raises:
      InputError: the machine has no compiler here, or something does not divide.
    """
    mesh = make_mesh(job.mesh, devices(machine))
    with jax.set_mesh(mesh):
        programs = serving_programs(job, mesh) if job.serve else [training_program(job, mesh)]
        return [_compile(program, mesh) for program in programs]


def lower(program: Abstract) -> Any:
    """The program, lowered; to be called within `jax.set_mesh`."""
    return program.function.lower(*program.arguments, **program.options)


def _compile(program: Abstract, mesh: Mesh) -> Compiled:
    started = time.perf_counter()
    try:
        compiled = compile_ahead(lower(program))
    except jax.errors.JaxRuntimeError as error:
        missing = too_large_by(str(error))
        if missing is None:
            raise
        return Compiled(program.name, time.perf_counter() - started, {}, [], missing)
    seconds = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    given = {kind: sum(local_bytes(leaf) for leaf in jax.tree.leaves(tree)) for kind, tree in program.given.items()}
    live = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    live += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {**given, "temporaries": live - sum(given.values())}
    found = collectives(compiled.as_text(), mesh)
    return Compiled(program.name, seconds, memory, found, on_host=analysis.host_temp_size_in_bytes)


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """A device's part of an array."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = 1
    for each in shape:
        size *= each
    if leaf.dtype == jnp.int4:
        return -(-size // 2)
    return size * (leaf.dtype.itemsize if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else 8)


_OVER = re.compile(r"Exceeded hbm capacity by ([\d.]+)([KMGT]?)")
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


def too_large_by(message: str) -> float | None:
    """Bytes over the memory, from the compiler's refusal; None if it refused for something else.

    `Used 120.05G of 95.74G hbm. Exceeded hbm capacity by 24.31G`, or
    `for HLO temporaries (54.28G) exceeds available HBM (15.75G)`.
    """
    if found := _OVER.search(message):
        return _size(found[1], found[2])
    if found := _TOO_LARGE.search(message):
        return _size(found[1], found[2]) - _size(found[3], found[4])
    return None


def _size(number: str, unit: str) -> float:
    return float(number) * 1024.0 ** " KMGT".index(unit or " ")


def training_program(job: Job, mesh: Mesh) -> Abstract:
    """The step that `mixtral-jax train` runs, with its state donated."""
    settings = OptimizerConfig(learning_rate=1e-4, warmup_steps=10)
    optimizer, schedule = make_optimizer(settings, _STEPS), learning_rate(settings, _STEPS)
    model = Transformer(job.model, job.execution, job.dispatch, TRAINING)
    abstract, shardings = abstract_state(job.model, optimizer, mesh, TRAINING)
    step = make_step(model, LossConfig(chunk=job.loss_chunk), optimizer, schedule, job.accumulation)
    layout = NamedSharding(mesh, TRAINING.use(("batch", "length")))
    shape = (job.rows, job.length)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)
    batch = Batch(**{name: floats if name == "loss_weight" else integers for name in Batch._fields})
    function = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    given = {"weights": abstract.params, "moments": abstract.optimizer, "batch": batch}
    return Abstract("train", function, (abstract, batch), {}, given)


def serving_programs(job: Job, mesh: Mesh) -> list[Abstract]:
    """A chunk of prefill that other chunks came before, and the decode loop."""
    model, execution = job.model, job.execution
    whole = NamedSharding(mesh, PartitionSpec())

    def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    weights, cache, rows = abstract_weights(job, mesh), abstract_cache(job, mesh), job.rows
    chunk = min(PREFILL_CHUNK, job.length)
    last_BD = shaped((rows, model.dim), execution.activation_dtype)
    tokens, real = shaped((rows, chunk), jnp.int32), shaped((rows, chunk), jnp.bool_)
    sampling = SamplingConfig()
    state = decode.DecodeState(
        cache=cache,
        token_B=shaped((rows,), jnp.int32),
        output_BM=shaped((rows, job.length), jnp.int32),
        count_B=shaped((rows,), jnp.int32),
        finished_B=shaped((rows,), jnp.bool_),
        key_B=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
        seen_BV=None,
    )
    given = {"weights": weights, "cache": cache}
    static = {"config": model, "execution": execution}
    of_state = {"execution": execution, "config": model, "form": sampling.form, "stop_ids": (2,)}
    values = jax.eval_shape(lambda: sampling.values)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    return [
        Abstract("prefill", decode.prefill, (weights, cache, last_BD, tokens, real), {**static, "fresh": False}, given),
        Abstract("decode", decode.decode, (weights, state, steps, values), of_state, given),
    ]


def abstract_weights(job: Job, mesh: Mesh) -> Prepared:
    """The weights as `inference.weights.assemble` lays them out."""

    def shaped(tensor: Tensor, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, DECODING.storage(axes(tensor, shape))))

    def leaf_of(tensor: Tensor) -> Any:
        if job.quantize is None or not is_quantized(tensor):
            return shaped(tensor, tensor.shape, computed_dtype(tensor, job.execution))
        scale = shaped(tensor, scale_shape(tensor, job.quantize), jnp.float32)
        return Quantized(shaped(tensor, tensor.shape, DTYPES[job.quantize]), scale)

    def stack_of(each: Sequence[Tensor]) -> Any:
        def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            layout = NamedSharding(mesh, DECODING.storage(("experts", *axes(each[0], leaf.shape))))
            return jax.ShapeDtypeStruct((len(each), *leaf.shape), leaf.dtype, sharding=layout)

        return jax.tree.map(stacked, leaf_of(each[0]))

    stacks = stacks_experts(job.model, job.execution, mesh, job.quantize)
    return arrange(job.model, leaf_of, stack_of if stacks else None)


def abstract_cache(job: Job, mesh: Mesh) -> Cache:
    """The cache of a copy's texts, laid out as the programs leave it."""
    model, slots = job.model, num_slots(job.model, job.length)
    layout, whole = NamedSharding(mesh, DECODING.storage(decode.CACHE_AXES)), NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the platform that it is for
        cache = jax.eval_shape(lambda: empty_cache(model, job.rows, slots, job.execution.kept_dtype))

    def laid_out(leaves: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), leaves)

    return Cache(laid_out(cache.layers, layout), *laid_out((cache.position_BR, cache.length_B), whole))
