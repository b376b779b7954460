"""Guesses of the tokens that come next, for the model to check several at once (Leviathan et al., 2022).

The model draws its own token at each place whatever was proposed, with the key that it would have used anyway; a
proposal is right where it is that very token. So texts are those without proposals, sampled ones too, and a draft that
draws with the same keys is right the more often, the closer its distribution is to the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from mixtral_jax.inference.decode import forward, unembed
from mixtral_jax.inference.sampling import choose
from mixtral_jax.inference.slots import Model, Slots, active_values, keys
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.cache import Cache

NOTHING = -1


class Proposer(Protocol):
    """Where proposals come from; hashable."""

    @property
    def tokens(self) -> int:
        """D, proposals a step."""
        ...

    def propose(
        self, weights: tuple[Prepared, ...], slots: Slots, models: tuple[Model, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Proposals int32 [B, D], NOTHING from where there are no more; and the caches of draft models, moved on by the
        slots' last token and all proposals."""
        ...


@dataclass(frozen=True)
class NoProposals:
    """One token a step."""

    tokens: int = 0

    def propose(
        self, weights: tuple[Prepared, ...], slots: Slots, models: tuple[Model, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """See Proposer."""
        return jnp.zeros((slots.token_B.shape[0], 0), jnp.int32), ()


@dataclass(frozen=True)
class Lookup:
    """What followed the text's last few tokens when they last stood in it (prompt lookup).

    Of a text a b c d a b, with an n-gram of two and two tokens: a b stood there before c d, so c d are proposed.
    """

    tokens: int
    longest: int = 3
    """Tokens of the longest n-gram that is looked for; shorter ones are tried after it, down to one of two."""

    def propose(
        self, weights: tuple[Prepared, ...], slots: Slots, models: tuple[Model, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """See Proposer."""
        length_B = slots.caches[0].length_B + 1  # the last token is not yet in the cache
        return jax.vmap(self._of_row)(slots.history_BN, length_B), ()

    def _of_row(self, history_N: jax.Array, length: jax.Array) -> jax.Array:
        place_N = jnp.arange(history_N.shape[0])
        found = jnp.int32(NOTHING)
        for size in range(self.longest, 1, -1):
            # Whether the n-gram that ends at a place is the text's last one; the one at its end does not count.
            same_N = (place_N >= size - 1) & (place_N < length - 1)
            for back in range(size):
                same_N &= jnp.roll(history_N, back) == history_N[length - 1 - back]
            last = jnp.max(jnp.where(same_N, place_N, NOTHING))
            found = jnp.where((found == NOTHING) & (length > size), last, found)
        place_D = found + 1 + jnp.arange(self.tokens)
        is_there_D = (found != NOTHING) & (place_D < length)
        return jnp.where(is_there_D, history_N[jnp.minimum(place_D, history_N.shape[0] - 1)], NOTHING)


@dataclass(frozen=True)
class Draft:
    """What a smaller model would say, drawn with the text's own keys."""

    tokens: int

    def propose(
        self, weights: tuple[Prepared, ...], slots: Slots, models: tuple[Model, ...]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """See Proposer."""
        small, cache = models[1], slots.caches[1]
        token_B, seen_BV, row_B = slots.token_B, slots.seen_BV, jnp.arange(slots.token_B.shape[0])
        values, proposals = active_values(slots), []
        # Once more than there are proposals, so that the last of them is in the cache too.
        for place in range(self.tokens + 1):
            hidden_B1D, moved = forward(
                weights[1], token_B[:, None], slots.active_B[:, None], cache, small.config, small.execution
            )
            assert moved is not None
            cache = moved
            if place < self.tokens:
                logits_BV = unembed(weights[1], hidden_B1D, small.execution)[:, 0]
                token_B = choose(logits_BV, keys(slots.settings.key, slots.count_B + place), seen_BV, values)
                seen_BV = seen_BV.at[row_B, token_B].set(True)
                proposals.append(token_B)
        return jnp.stack(proposals, axis=1), (cache,)
