"""The host's side of an engine's programs: holds the arrays, and calls each program in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.inference import programs, requests
from mixtral_jax.inference.compiling import compile_together
from mixtral_jax.inference.prefixes import empty_pool, restore, save
from mixtral_jax.inference.proposals import Draft, Lookup, NoProposals, Proposer
from mixtral_jax.inference.requests import EngineConfig, Request
from mixtral_jax.inference.sampling import EVERY_TOKEN, WORD
from mixtral_jax.inference.slots import Chosen, Model, Slots, empty_settings, pinned
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.cache import empty_cache, num_slots

MOST_STEPS = 8
"""Steps of a decode call."""
_BEGUN_AT_ONCE = 8
"""Texts that one call begins; a call costs the host more than what it sends."""
_SMALLEST_CHUNK = 16


class Loaded(NamedTuple):
    """A model's weights and how to run them."""

    weights: Prepared
    config: ModelConfig
    execution: Execution


class Runner:
    """The slots, the blocks of prefixes, and the programs that change them.

    Attributes:
      max_length: tokens of a prompt and its continuation together, at most.
      vocab_size: V.
      ring: slots of the largest cache.
    """

    def __init__(
        self, model: Loaded, config: EngineConfig, draft: Loaded | None = None, mesh: jax.sharding.Mesh | None = None
    ):
        """Allocates the caches; see Engine."""
        self._config, self._mesh = config, mesh
        if (draft is not None) != (config.speculation == "draft"):
            raise InputError("speculation", config.speculation, "'draft' goes with a draft model, and only with one")
        if draft is not None and draft.config.vocab_size != model.config.vocab_size:
            size = draft.config.vocab_size
            raise InputError("draft", size, f"ids, and the model has {model.config.vocab_size}")
        loaded = [each for each in (model, draft) if each is not None]
        self._weights = tuple(each.weights for each in loaded)
        self._models = tuple(Model(each.config, each.execution) for each in loaded)
        self._proposer = _proposer(config)
        self.max_length = min(config.length(each.config) for each in loaded)
        self.vocab_size = model.config.vocab_size
        self.everything_BW = np.full((config.slots, -(-self.vocab_size // WORD)), EVERY_TOKEN)
        with self.on_mesh():
            self._slots = jax.jit(self._empty_slots)()
            self._pool = empty_pool(self._slots.caches, config.prefix_blocks, config.prefill_chunk)
        self.ring = max(cache.num_slots for cache in self._slots.caches)

    @property
    def model(self) -> ModelConfig:
        """What is continued with."""
        return self._models[0].config

    def on_mesh(self) -> AbstractContextManager:
        """The context in which programs are called."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def warm_up(self) -> None:
        """Runs every program, so that none is compiled later; what slots held is lost."""
        chunk = self._config.prefill_chunk
        forms = [(size, fresh) for size in sizes(chunk) for fresh in (True, False)]
        compile_together(
            [*(self._prefill({}, *form) for form in forms), self._decode([], 1, self.everything_BW)],
        )
        # Twice: on a mesh, what the first round leaves may be laid out otherwise than what it found.
        for _ in range(2):
            for size, fresh in forms:
                self.take_in({0: (0,) * size}, size, fresh)
            if self._config.prefix_blocks:
                self.save(0, 0, 0)
                self.restore(0, {0: 0})
            self.begin({0: Request(prompt=(0,), max_new_tokens=1)})
            self.decode([], 1, self.everything_BW)

    def rows(self, size: int) -> int:
        """How many pieces of this size one program takes in: together a chunk."""
        return min(self._config.prefill_chunk // size, self._config.slots)

    def take_in(self, pieces: Mapping[int, Sequence[int]], size: int, fresh: bool) -> None:
        """Takes in pieces of prompts, by their rows.

        Args:
          pieces: at most `rows(size)` of them, each of at most so many tokens.
          fresh: whether the texts begin here.
        """
        self._slots = self._prefill(pieces, size, fresh)()

    def _prefill(self, pieces: Mapping[int, Sequence[int]], size: int, fresh: bool) -> partial[Slots]:
        count = self.rows(size)
        row_P = np.full((count,), self._config.slots, np.int32)
        tokens_PT, real_PT = np.zeros((count, size), np.int32), np.zeros((count, size), bool)
        for place, (row, tokens) in enumerate(pieces.items()):
            row_P[place] = row
            tokens_PT[place, : len(tokens)] = tokens
            real_PT[place, : len(tokens)] = True
        arrays = self._weights, self._slots, row_P, tokens_PT, real_PT
        return partial(programs.prefill, *arrays, models=self._models, fresh=fresh)

    def begin(self, texts: Mapping[int, Request]) -> None:
        """Has rows decode that have taken in all of their prompts but the last token."""
        count, waiting = min(_BEGUN_AT_ONCE, self._config.slots), list(texts.items())
        for start in range(0, len(waiting), count):
            rows, begun = zip(*waiting[start : start + count], strict=True)
            # Where there are fewer, the last one's numbers stand for none.
            padded = [*begun, *[begun[-1]] * (count - len(begun))]
            row_P = np.full((count,), self._config.slots, np.int32)
            row_P[: len(rows)] = rows
            seen_PV = np.zeros((count, self.vocab_size), bool)
            history_PN = np.full((count, self.max_length), -1, np.int32)
            for place, request in enumerate(begun):
                seen_PV[place, list(request.prompt)] = True
                history_PN[place, : len(request.prompt)] = request.prompt
            self._slots = programs.begin(
                self._slots,
                row_P,
                np.array([request.prompt[-1] for request in padded], np.int32),
                np.array([len(request.prompt) - 1 for request in padded], np.int32),
                jax.tree.map(lambda *own: np.stack(own), *map(requests.settings, padded)),
                np.array([request.index for request in padded], np.uint32),
                seen_PV,
                history_PN,
            )

    def decode(self, rows: Sequence[int], steps: int, allowed_BW: np.ndarray) -> Chosen:
        """Continues the texts in these rows and ends all others; what it brought, on the host.

        Args:
          steps: at most MOST_STEPS.
          allowed_BW: uint32, a bit for each token that may come next.
        """
        self._slots, chosen = self._decode(rows, steps, allowed_BW)()
        return jax.device_get(chosen)

    def _decode(self, rows: Sequence[int], steps: int, allowed_BW: np.ndarray) -> partial[tuple[Slots, Chosen]]:
        goes_on_B = np.zeros((self._config.slots,), bool)
        goes_on_B[list(rows)] = True
        arrays = self._weights, self._slots, goes_on_B, np.int32(steps), allowed_BW
        return partial(programs.decode, *arrays, models=self._models, proposer=self._proposer, most_steps=MOST_STEPS)

    def save(self, row: int, start: int, block: int) -> None:
        """Copies what a row took in from position start on, a whole chunk, into a block."""
        self._pool = save(self._pool, self._slots, np.int32(row), np.int32(start), np.int32(block))

    def restore(self, row: int, blocks: dict[int, int]) -> None:
        """Gives a row the beginning of a text, from blocks by their place in it."""
        size = self._config.prefill_chunk
        block_X = np.zeros((-(-self.max_length // size),), np.int32)
        block_X[list(blocks)] = list(blocks.values())
        length = np.int32((max(blocks) + 1) * size)
        self._slots = restore(self._pool, self._slots, np.int32(row), block_X, length)

    def _empty_slots(self) -> Slots:
        """To be jitted: array by array, on a mesh each device would first hold the whole caches."""
        batch, guesses = self._config.slots, self._config.guesses
        caches = tuple(
            empty_cache(
                model.config,
                batch,
                num_slots(model.config, self.max_length + guesses, guesses + 1),
                model.execution.kept_dtype,
            )
            for model in self._models
        )
        slots = Slots(
            caches=caches,
            settings=empty_settings(batch),
            token_B=jnp.zeros((batch,), jnp.int32),
            count_B=jnp.zeros((batch,), jnp.int32),
            active_B=jnp.zeros((batch,), bool),
            seen_BV=jnp.zeros((batch, self.vocab_size), bool),
            history_BN=jnp.full((batch, self.max_length), -1, jnp.int32),
        )
        return pinned(slots)


def _proposer(config: EngineConfig) -> Proposer:
    if config.speculation == "lookup":
        return Lookup(config.guesses)
    return Draft(config.guesses) if config.speculation == "draft" else NoProposals()


def sizes(chunk: int) -> list[int]:
    """The sizes of pieces that prompts are taken in by, the largest first: for 256, 64 and 16 besides."""
    sizes = [chunk]
    while sizes[-1] // 4 >= _SMALLEST_CHUNK:
        sizes.append(sizes[-1] // 4)
    return sizes
