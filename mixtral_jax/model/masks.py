"""Who sees whom: the one definition of causality and of the window.

Window W: a query sees W keys, its own among them. For W = 3 and six tokens, queries down, keys across:

      0 1 2 3 4 5
    0 x . . . . .
    1 x x . . . .
    2 x x x . . .
    3 . x x x . .
    4 . . x x x .
    5 . . . x x x

Each kernel spells this in its own way; each is tested against this function.
"""

from __future__ import annotations

import jax


def visible(
    query_position: jax.Array,
    key_position: jax.Array,
    window: int | None,
    query_segment: jax.Array | None = None,
    key_segment: jax.Array | None = None,
) -> jax.Array:
    """Whether key j is visible to query i: `0 <= i - j < W`, and both of one segment.

    Args:
      query_position: integers [..., T].
      key_position: integers [..., S]; a negative one marks an empty cache slot, visible to nobody.
      window: W, or None for all keys before the query.
      query_segment, key_segment: integers of the positions' shapes, or None where there is one segment.

    Returns:
      bool [..., T, S].
    """
    distance = query_position[..., :, None] - key_position[..., None, :]
    seen = (distance >= 0) & (key_position >= 0)[..., None, :]
    if window is not None:
        seen &= distance < window
    if query_segment is not None and key_segment is not None:
        seen &= query_segment[..., :, None] == key_segment[..., None, :]
    return seen
