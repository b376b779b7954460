"""The window, as a literal picture."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model import masks


def _picture(seen_TS):
    return ["".join("x" if seen else "." for seen in row) for row in np.asarray(seen_TS)]


PICTURES = {
    1: ["x.....", ".x....", "..x...", "...x..", "....x.", ".....x"],
    2: ["x.....", "xx....", ".xx...", "..xx..", "...xx.", "....xx"],
    3: ["x.....", "xx....", "xxx...", ".xxx..", "..xxx.", "...xxx"],
    5: ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", ".xxxxx"],
    6: ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"],
    7: ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"],
    None: ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"],
}


@pytest.mark.parametrize("window", PICTURES)
def test_window(window):
    assert _picture(masks.visible(jnp.arange(6), jnp.arange(6), window)) == PICTURES[window]


def test_the_docstring_shows_a_window_of_3():
    rows = [line.split() for line in masks.__doc__.splitlines() if line.strip()[1:4] in (" x ", " . ")]
    assert ["".join(row[1:]) for row in rows] == PICTURES[3]


def test_segments_do_not_see_each_other():
    segment = jnp.array([1, 1, 2, 2, 0])
    assert _picture(masks.visible(jnp.arange(5), jnp.arange(5), None, segment, segment)) == [
        "x....",
        "xx...",
        "..x..",
        "..xx.",
        "....x",
    ]


def test_nobody_sees_an_empty_slot():
    """Keys of a ring of 4 that holds positions 4, 5 and 3: the token at 5 sees all of them with W = 3, but -1 never."""
    assert _picture(masks.visible(jnp.array([3, 5]), jnp.array([4, 5, -1, 3]), 3)) == ["...x", "xx.x"]
    assert _picture(masks.visible(jnp.array([3, 5]), jnp.array([4, 5, -1, 3]), None)) == ["...x", "xx.x"]


def test_padding_at_position_minus_one_sees_nothing():
    assert _picture(masks.visible(jnp.array([-1]), jnp.array([-1, 0, 1]), None)) == ["..."]


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_visible(self):
        seen = self.variant(lambda query, key: masks.visible(query, key, 3, query, key))(
            jnp.zeros((2, 3), int), jnp.zeros((2, 5), int)
        )
        chex.assert_shape(seen, (2, 3, 5))
        chex.assert_type(seen, bool)
