"""The config of a training run: its sections, what must fit together, and what may change when it is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flax import linen as nn
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax import configs
from mixtral_jax.checkpoints.adapter import LoraConfig
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.config import (
    STRICT,
    Dispatch,
    Execution,
    ModelConfig,
    build,
    override,
    read_toml,
    require,
    require_positive,
    to_table,
)
from mixtral_jax.errors import InputError, together
from mixtral_jax.model.dispatch import group
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.mesh import MeshConfig
from mixtral_jax.sharding.partition import indivisible, storage_specs
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.data import DataConfig
from mixtral_jax.train.guard import GuardConfig
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.objective import DpoConfig, ObjectiveConfig, PretrainConfig
from mixtral_jax.train.optimizer import OptimizerConfig, learning_rate
from mixtral_jax.train.retention import Retention

MAY_CHANGE = (
    "steps",
    "validate_every",
    "save_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "log_every",
    "mesh",
    "execution",
    "guard",
    "losses.chunk",
    "optimizer.learning_rate",
    "optimizer.final_fraction",
    "data.cache_dir",
    "data.prefetch",
)
"""Keys that a resumed run may set anew. All others decide the model or the order of the data."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """A run: pretraining, or fine-tuning of weights that are there."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    mesh: MeshConfig = MeshConfig()
    execution: Execution = Execution()
    dispatch: Dispatch = Dispatch(capacity_factor=1.25)
    losses: LossConfig = LossConfig()
    guard: GuardConfig = GuardConfig()
    objective: ObjectiveConfig = PretrainConfig()
    init_from: str | None = None
    """A model of any kind that `load` takes, whose weights the run begins with; unset: fresh ones."""
    lora: LoraConfig | None = None
    """Unset: all weights are trained."""
    accumulation: int = 1
    """Micro-batches that a step's batch is taken in."""
    seed: int = 0
    """Decides the initial weights, and the router's jitter."""
    validate_every: int | None = None
    """Steps between two validations; unset: only at the end."""
    save_every: int = 500
    keep_checkpoints: int = 2
    """The last so many are kept; and besides:"""
    keep_every: int | None = None
    """Those of steps that are multiples of this; unset: none."""
    keep_best: int = 0
    """So many with the least validation loss, of those saved at a step that was validated."""
    log_every: int = 10
    """Steps between two lines on the terminal; metrics.jsonl has every step."""

    @model_validator(mode="after")
    def check(self) -> TrainConfig:
        counts = (
            "steps",
            "accumulation",
            "validate_every",
            "save_every",
            "keep_checkpoints",
            "keep_every",
            "log_every",
        )
        require_positive(self, counts)
        require(self.keep_best >= 0, "keep_best", self.keep_best, "0 or more")
        learning_rate(self.optimizer, self.steps)
        require(
            self.data.sequence_length <= self.model.max_position,
            "data.sequence_length",
            self.data.sequence_length,
            f"at most model.max_position = {self.model.max_position}",
        )
        moe = self.model.moe
        require(
            self.losses.bias_rate == 0 or (moe is not None and moe.selection_bias),
            "losses.bias_rate",
            self.losses.bias_rate,
            "needs model.moe.selection_bias = true",
        )
        require(
            self.data.batch_size % self.accumulation == 0,
            "accumulation",
            self.accumulation,
            f"must divide data.batch_size = {self.data.batch_size}",
        )
        self._check_objective()
        return self

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        return Retention(last=self.keep_checkpoints, every=self.keep_every, best=self.keep_best)

    def _check_objective(self) -> None:
        if self.lora is not None:
            self.lora.check_model(self.model)
            require(self.losses.bias_rate == 0, "losses.bias_rate", self.losses.bias_rate, "0 with [lora]")
        for key in ("lora", "objective"):
            chosen = getattr(self, key)
            if self.init_from is None and isinstance(chosen, LoraConfig | DpoConfig):
                raise InputError("init_from", None, f"is missing: [{key}] needs weights to begin from")
        if self.data.weights is not None and not isinstance(self.objective, PretrainConfig):
            raise InputError("data.weights", list(self.data.weights), "of text alone, with objective.kind = 'pretrain'")
        if isinstance(self.objective, DpoConfig) and self.data.batch_size % (2 * self.accumulation):
            wanted = f"a pair is two rows, so a multiple of 2 x accumulation = {2 * self.accumulation}"
            raise InputError("data.batch_size", self.data.batch_size, wanted)

    def check_mesh(self, num_devices: int) -> MeshConfig:
        """The mesh for so many devices.

        Raises:
          InputError: the axes' product is not that number; or, all in one message, what the mesh does not divide of the
            batch, the sequence, a capacity group and the model.
        """
        mesh = self.mesh.resolve(num_devices)
        problems = [*self._indivisible_batch(mesh), *self._indivisible_model(mesh)]
        if problems:
            raise together(problems)
        return mesh

    def _indivisible_batch(self, mesh: MeshConfig) -> Iterator[InputError]:
        rows, shards = self.data.batch_size // self.accumulation, mesh.data * mesh.fsdp * mesh.expert
        if rows % shards:
            allowed = f"a micro-batch's {rows} rows must be a multiple of mesh data x fsdp x expert = {shards}"
            yield InputError("data.batch_size", self.data.batch_size, allowed)
        length = self.data.sequence_length
        if length % mesh.context:
            yield InputError("mesh.context", mesh.context, f"must divide data.sequence_length = {length}")
        elif self.dispatch.capacity_factor is not None and self.model.moe is not None:
            try:
                group(length, self.dispatch.group_size, mesh.context)
            except InputError as error:
                yield InputError("dispatch.group_size", self.dispatch.group_size, error.allowed)

    def _indivisible_model(self, mesh: MeshConfig) -> Iterator[InputError]:
        moe = self.model.moe
        if moe is not None and moe.num_experts % mesh.expert:
            yield InputError("mesh.expert", mesh.expert, f"must divide the model's {moe.num_experts} experts")
        params = abstract_params(self.model)
        sizes: dict[str, int] = {axis: mesh.size(axis) for axis in MESH_AXES}
        for phrase in indivisible(nn.unbox(params), storage_specs(params, TRAINING), sizes):
            yield InputError("mesh", ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1), phrase)


def load(name: str | Path, settings: Iterable[str] = ()) -> TrainConfig:
    """The TrainConfig of a TOML file, or of a shipped one such as `runs/demo`, with `a.b=value` settings applied.

    `model` may be a section, or name a model: a shipped one such as `tiny-mixtral`, or a TOML file beside the config;
    without it, it is that of `init_from`.

    Raises:
      InputError: naming the key.
    """
    settings = list(settings)
    table = override(read_toml(name), [each for each in settings if each.split("=")[0].strip() == "model"])
    if isinstance(table.get("model"), str):
        table["model"] = _model_table(table["model"], configs.find(str(name)).parent)
    table = override(table, [each for each in settings if each.split("=")[0].strip() != "model"])
    return build(TrainConfig, _from_base(table))


def _from_base(table: dict[str, Any]) -> dict[str, Any]:
    """The table with the model of `init_from`, if it says none, and with where that is however the run is gone on."""
    begun = table.get("init_from")
    if not isinstance(begun, str):
        return table
    if Path(begun).exists():
        begun = str(Path(begun).absolute())
    if "model" in table:
        return {**table, "init_from": begun}
    try:
        return {**table, "init_from": begun, "model": to_table(open_source(begun).config)}
    except InputError as error:
        raise InputError("init_from", error.value, error.allowed) from None


def _model_table(name: str, folder: Path) -> dict[str, Any]:
    if name in configs.names("models"):
        return read_toml(f"models/{name}")
    beside = folder / name
    return read_toml(beside if beside.is_file() else name)


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def check_resumable(before: TrainConfig, after: TrainConfig) -> None:
    """Raises InputError with every key that a run's folder and the config to resume it by may not differ in, but do."""
    old, new = flatten(to_table(before)), flatten(to_table(after))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)]
    if refused:
        differences = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in refused)
        raise InputError("--run-dir", differences, f"this run goes on with what it began with, but for {MAY_CHANGE}")
