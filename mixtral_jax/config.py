"""What the weights are (ModelConfig), how they are run (Execution, Dispatch), and strict TOML loading for every config.

A config is a frozen dataclass that checks itself. Whatever a user wrote is validated strictly: an unknown key, a string
where an integer belongs or a head count that does not divide is an InputError that names the key.
"""

from __future__ import annotations

import copy
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax import configs
from mixtral_jax.errors import InputError, nearest, together

STRICT = ConfigDict(extra="forbid", strict=True)
ConfigType = TypeVar("ConfigType")


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises InputError(key, value, allowed) unless ok."""
    if not ok:
        raise InputError(key, value, allowed)


def require_positive(config: object, names: Iterable[str]) -> None:
    """Raises InputError for the first of the named fields that is not above zero (None is left alone)."""
    for name in names:
        value = getattr(config, name)
        require(value is None or (math.isfinite(value) and value > 0), name, value, "a number above zero is needed")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoEConfig:
    """A mixture of experts in place of each feed-forward (Mixtral paper, section 2.1)."""

    num_experts: int
    experts_per_token: int
    selection_bias: bool = False
    """Whether each expert has a number that is added to its probability for choosing, not for the gates."""

    @model_validator(mode="after")
    def check(self) -> MoEConfig:
        require_positive(self, ("num_experts", "experts_per_token"))
        require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            f"at most num_experts = {self.num_experts}",
        )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """What the weights are: shapes, positions and the window. A Mistral has no `moe`, a Mixtral has."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    """Width of a feed-forward, or of one expert."""
    vocab_size: int
    sliding_window: int | None = None
    """W: a query sees W keys, its own among them. None: all before it."""
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    max_position: int = 32768
    tie_embeddings: bool = False
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def check(self) -> ModelConfig:
        require_positive(self, [f.name for f in fields(self) if f.name not in ("tie_embeddings", "moe")])
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads = {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even: rope rotates pairs")
        return self

    @property
    def queries_per_kv_head(self) -> int:
        """G = N / K of grouped-query attention."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dispatch:
    """How tokens reach their experts: a choice of the run, not of the weights."""

    capacity_factor: float | None = None
    """Places an expert has, as a multiple of a balanced share; None: dropless, every token is served."""
    group_size: int = 2048
    """Tokens that share a capacity: a run within one sequence, so that drops don't depend on the mesh."""
    priority: Literal["position", "choice", "probability"] = "position"
    """Who keeps a place when an expert is full. `position`: earlier tokens, which keeps the model causal;
    `choice`: all first choices before any second (GShard); `probability`: the choices with the largest gates (V-MoE).
    With these two a later token may displace an earlier one."""

    exchange_rows: int = 8192
    """Dropless, where experts are spread over a mesh or `execution.remat` repeats layers: how many tokens' choices a
    device serves at a time. More than these take another round, and no memory."""

    @model_validator(mode="after")
    def check(self) -> Dispatch:
        require_positive(self, ("capacity_factor", "group_size", "exchange_rows"))
        return self


CacheDtype = Literal["float32", "bfloat16", "int8"]
Remat = Literal["none", "products", "full", "offload"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Execution:
    """How the model is computed: changes speed, memory and rounding, never the function."""

    activation_dtype: Literal["float32", "bfloat16"] = "float32"
    """The residual stream and what lies between products."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """Operands of matrix products; they accumulate in float32."""
    weight_dtype: Literal["float32", "bfloat16"] | None = None
    """Matrices that inference holds; None: the dtype of products."""
    cache_dtype: CacheDtype | None = None
    """Keys and values that decoding keeps; None: the dtype of products. `int8` has a scale for each token and head."""
    attention: Literal["kernel", "xla"] = "kernel"
    """What computes attention. `kernel`: of a sequence to itself on TPU and on NVIDIA GPUs (A100 and newer), and to a
    cache on such GPUs, where it takes the shapes, one that keeps scores on the chip; elsewhere, and by `xla`
    everywhere, XLA, a chunk of queries at a time."""
    attention_chunk: int = 128
    """Queries that XLA's attention takes at a time."""
    remat: Remat = "none"
    """What the backward pass computes again, a layer at a time, besides attention scores, which it always does.
    `products`: all but the results of matrix products; `full`: everything, of the layer's input; `offload`: the same,
    and the inputs of all layers wait in the host's memory, where the device has another."""

    @model_validator(mode="after")
    def check(self) -> Execution:
        require_positive(self, ("attention_chunk",))
        return self

    @property
    def repeats_layers(self) -> bool:
        """Whether the backward pass has of a layer its input alone."""
        return self.remat in ("full", "offload")

    @property
    def held_dtype(self) -> str:
        """Of inference's matrices."""
        return self.weight_dtype or self.product_dtype

    @property
    def kept_dtype(self) -> str:
        """Of the cache."""
        return self.cache_dtype or self.product_dtype


def build(cls: type[ConfigType], table: Mapping[str, Any], prefix: str = "") -> ConfigType:
    """A checked config from a table as TOML gives it.

    Raises:
      InputError: naming each key that is unknown, missing, of a wrong type or out of bounds.
    """
    try:
        # JSON, since strict mode takes a list for a tuple only there. TOML's dates become strings: no field is one.
        return TypeAdapter(cls).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise _explain(cls, error, prefix) from None


def _explain(cls: type, error: ValidationError, prefix: str) -> InputError:
    details = sorted(error.errors(include_url=False), key=lambda each: "missing" in each["type"])
    return together([_problem(cls, each, prefix) for each in details])


def _problem(cls: type, details: Any, prefix: str) -> InputError:
    path, _ = _located(cls, details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return InputError(".".join([prefix, *path, cause.key]).strip("."), cause.value, cause.allowed)
    key = ".".join([prefix, *path]).strip(".")
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = sorted(_located(cls, details["loc"][:-1])[1].get("properties", {}))
        return InputError(key, details["input"], f"unknown key; {nearest(path[-1], known)}known: {', '.join(known)}")
    if details["type"] in ("missing", "missing_argument"):
        return InputError(key, None, "is missing and has no default")
    return InputError(key, details["input"], details["msg"][0].lower() + details["msg"][1:])


def _located(cls: Any, location: Iterable[Any]) -> tuple[list[str], dict[str, Any]]:
    """Where pydantic says that an error is, as the user's keys (without the kinds of sections that have several), and
    the schema of what is there."""
    schema = TypeAdapter(cls).json_schema()
    definitions, node = schema.get("$defs", {}), schema
    path: list[str] = []
    for part in map(str, location):
        kinds = node.get("discriminator", {}).get("mapping", {})
        if part in kinds:
            node = definitions[kinds[part].rsplit("/", 1)[-1]]
            continue
        path.append(part)
        node = node.get("properties", {}).get(part, {})
        for option in [node, *node.get("anyOf", []), *node.get("allOf", [])]:
            if "$ref" in option:
                node = definitions[option["$ref"].rsplit("/", 1)[-1]]
    return path, node


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table of a TOML file, or of a shipped one such as `models/mixtral-8x7b`.

    Raises:
      InputError: no such file, not UTF-8, or not TOML.
    """
    file = configs.find(str(path))
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(path), None, f"not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), None, f"not UTF-8 at byte {error.start}") from None


def override(table: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """The table with each `a.b=value` of settings applied; a value is TOML, or else a string; `none` unsets."""
    table = copy.deepcopy(table)
    for setting in settings:
        key, separator, text = setting.partition("=")
        require(bool(separator and key.strip()), "--set", setting, "written as key=value, such as train.steps=100")
        *parents, last = key.strip().split(".")
        node = table
        for parent in parents:
            node = node.setdefault(parent, {})
            require(isinstance(node, dict), "--set", setting, f"{parent} holds a value, not a section")
        if text.strip() == "none":
            node.pop(last, None)
        else:
            node[last] = _toml_value(text.strip())
    return table


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_table(config: Any) -> dict[str, Any]:
    """The config as a table that TOML can hold; fields that are None are left out (None is their default)."""
    table: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None:
            table[field.name] = to_table(value) if is_dataclass(value) else value
    return table


def model_config(name: str | Path) -> ModelConfig:
    """The ModelConfig of a TOML file or of a shipped model such as `mixtral-8x7b`."""
    shipped = f"models/{name}" if str(name) in configs.names("models") else name
    return build(ModelConfig, read_toml(shipped))
