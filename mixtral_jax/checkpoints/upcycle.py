"""Sparse upcycling (Komatsuzaki et al., 2022): a dense model as a mixture whose experts all begin as its feed-forward.

The chosen experts' gates sum to 1, so at the start the mixture computes what the dense model did, whatever the router.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.checkpoints.source import Source
from mixtral_jax.config import MoEConfig
from mixtral_jax.errors import InputError
from mixtral_jax.model.parameters import INIT_STD
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.text.tokenizer import Tokenizer


class Upcycled(Source):
    """A dense model read as a mixture: what `convert` takes, so that it's written in any format, a tensor at a time."""

    def __init__(self, dense: Source, experts: int, experts_per_token: int, noise: float = 0.0, seed: int = 0):
        """Makes the mixture.

        Args:
          noise: standard deviation of what is added to an expert's matrix, relative to the matrix's own; it tells
            the experts apart from the start, which then are the dense feed-forward only nearly.
          seed: decides the routers and the noise.

        Raises:
          InputError: the model is a mixture already, or a number is out of bounds.
        """
        if dense.config.moe is not None:
            why = (
                "is a mixture already: its experts differ, and neither one of them nor their mean computes what they do"
            )
            raise InputError("DENSE", str(dense.path), f"{why}; a dense model is wanted")
        if experts < 2:
            raise InputError("--experts", experts, "two or more")
        if not 1 <= experts_per_token <= experts:
            raise InputError("--top-k", experts_per_token, f"from 1 to the {experts} experts")
        if not 0 <= noise < 1:
            raise InputError("--noise", noise, "from 0 to under 1")
        moe = MoEConfig(num_experts=experts, experts_per_token=experts_per_token)
        super().__init__(dense.path, f"{dense.form}, upcycled", replace(dense.config, moe=moe), dense.notes)
        self._dense, self._noise, self._seed = dense, noise, seed
        self._last: tuple[Tensor, np.ndarray] | None = None

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self._dense.tensors}

    def problems(self) -> list[str]:
        """See Source."""
        return self._dense.problems()

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return self._dense.dtype(self._origin(tensor))

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self._dense.stored_as(self._origin(tensor))

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        if tensor.kind == "moe.router":
            return (INIT_STD * self._normal(tensor)).astype(self.dtype(tensor))
        array = self._read(self._origin(tensor))
        if tensor.expert is None or not self._noise:
            return array
        spread = self._noise * float(array.astype(np.float32).std())
        return (array.astype(np.float32) + spread * self._normal(tensor)).astype(array.dtype)

    def files(self) -> Iterable[Path]:
        """See Source."""
        return self._dense.files()

    def identity(self) -> dict[str, Any]:
        """See Source."""
        return {**super().identity(), "noise": self._noise, "seed": self._seed}

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return self._dense.tokenizer()

    def _origin(self, tensor: Tensor) -> Tensor:
        """The dense model's tensor that this one is made of; for a router the norm before it."""
        if tensor.kind == "moe.router":
            return self._tensors[f"layers.{tensor.layer}.feed_forward_norm.scale"]
        if tensor.expert is None:
            return self._tensors[tensor.name]
        return self._tensors[f"layers.{tensor.layer}.feed_forward.{tensor.path[-1]}"]

    def _read(self, origin: Tensor) -> np.ndarray:
        """Experts follow each other, so that a feed-forward is read once for all of them."""
        if self._last is None or self._last[0] != origin:
            self._last = None
            self._last = (origin, self._dense.read(origin))
        return self._last[1]

    def _normal(self, tensor: Tensor) -> np.ndarray:
        """Standard normal values that the seed and the tensor's name decide, whatever was drawn before."""
        rng = np.random.default_rng([self._seed, zlib.crc32(tensor.name.encode())])
        return rng.standard_normal(tensor.shape, np.float32)
