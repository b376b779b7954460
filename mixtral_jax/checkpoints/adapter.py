"""Low-rank adapters (Hu et al., 2021): which matrices have factors, what they add to them, and a run of them merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax.checkpoints.buckets import Folder
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.config import STRICT, ModelConfig, require, require_positive
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.quantization import FLOAT32, is_quantized
from mixtral_jax.text.tokenizer import Tokenizer

Target = Literal["attention", "feed_forward", "experts", "router"]
INPUTS, OUTPUTS = "a", "b"
"""The factors of a matrix, as peft's lora_A and lora_B, but inputs first: a [inputs, r], b [r, outputs]."""
_KINDS: Mapping[Target, tuple[str, ...]] = {
    "attention": ("attention.query", "attention.key", "attention.value", "attention.output"),
    "feed_forward": ("feed_forward.gate", "feed_forward.up", "feed_forward.down"),
    "experts": ("moe.gate", "moe.up", "moe.down"),
    "router": ("moe.router",),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Only low-rank factors are trained; the weights that the run begins from stay as they are."""

    rank: int = 16
    alpha: float = 32.0
    """The factors' product is added times alpha / rank."""
    targets: tuple[Target, ...] = ("attention",)
    """Which matrices have factors."""
    base: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """How the frozen weights are held. int8: the matrices that inference quantises, a scale a channel."""

    @model_validator(mode="after")
    def check(self) -> LoraConfig:
        require_positive(self, ("rank", "alpha"))
        require(bool(self.targets), "targets", list(self.targets), f"some of {', '.join(get_args(Target))}")
        return self

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by."""
        return self.alpha / self.rank

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors that have factors."""
        return tuple(kind for target in get_args(Target) if target in self.targets for kind in _KINDS[target])

    def check_model(self, config: ModelConfig) -> None:
        """Raises InputError where the model has none of the matrices of a target."""
        absent = ("experts", "router") if config.moe is None else ("feed_forward",)
        for target in self.targets:
            if target in absent:
                has = [each for each in get_args(Target) if each not in absent]
                raise InputError("lora.targets", target, f"this model has {', '.join(has)}")


def inputs(kind: str) -> int:
    """How many of a matrix's dimensions it sums over: its first ones."""
    return 2 if kind == "attention.output" else 1


class Merged(Source):
    """A run that trained factors: the weights that it began from with the factors' product added.

    Attributes:
      base: what the run began from.
      lora: how it trained.

    Args:
      path: the run's folder.
      factors: for each leaf with factors, by the keys that lead to it, a tree of INPUTS and OUTPUTS, stacked as it is.
    """

    def __init__(self, path: Folder, base: Source, lora: LoraConfig, factors: Any):
        super().__init__(path, f"training run of factors on {base.form}", base.config, base.notes)
        self.base, self.lora, self._factors = base, lora, factors

    def factors(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[inputs..., r] and [r, outputs...], float32."""
        leaf = self._factors
        for key in tensor.path:
            leaf = leaf[key]
        return leaf[INPUTS][tensor.index], leaf[OUTPUTS][tensor.index]

    def problems(self) -> list[str]:
        """See Source."""
        return self.base.problems()

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return np.dtype(np.float32) if tensor.kind in self.lora.kinds else self.base.dtype(tensor)

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self.base.stored_as(tensor)

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source. The base as the run held it: what the factors learnt to correct is that."""
        array = self._held(tensor)
        if tensor.kind not in self.lora.kinds:
            return array
        a, b = self.factors(tensor)
        return np.asarray(array, np.float32) + np.float32(self.lora.scale) * np.tensordot(a, b, axes=1)

    def _held(self, tensor: Tensor) -> np.ndarray:
        held = self.lora.base
        if held == "int8" and is_quantized(tensor):
            return np.asarray(self.base.read_quantized(tensor, "int8").dequantized())
        array = self.base.read(tensor)
        if held == "bfloat16" and tensor.path[-1] not in FLOAT32:
            return array.astype(ml_dtypes.bfloat16).astype(array.dtype)
        return array

    def files(self) -> Iterable[Path]:
        """See Source."""
        return [*self.base.files(), self.path]

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return super().tokenizer() or self.base.tokenizer()
