"""Which queries come after which, and to how many keys, by hand."""

import jax.numpy as jnp

from mixtral_jax.model.backends.runs import are_unrolled, over, plan


def test_runs_of_chunks():
    """Start, chunks, queries and keys of each."""
    assert plan(5, 5, 0, None, 2) == [(0, 1, 2, 2), (2, 1, 2, 4), (4, 1, 1, 5)]
    assert plan(5, 5, 0, 2, 2) == [(0, 1, 2, 2), (2, 1, 2, 4), (4, 1, 1, 3)]
    assert plan(4, 9, 5, 3, 2) == [(0, 1, 2, 5), (2, 1, 2, 5)]  # after five keys
    assert plan(4, 9, None, None, 2) == [(0, 1, 2, 9), (2, 1, 2, 9)]
    assert plan(37, 37, 0, 6, 2) == [(0, 18, 2, 8), (36, 1, 1, 7)]
    assert plan(37, 37, 0, None, 2) == [(0, 5, 2, 10), (10, 5, 2, 20), (20, 5, 2, 30), (30, 3, 2, 36), (36, 1, 1, 37)]
    assert plan(37, 37, 0, None, 2, spans=1) == [(0, 18, 2, 36), (36, 1, 1, 37)]
    assert plan(37, 40, None, None, 2) == [(0, 18, 2, 40), (36, 1, 1, 40)]
    assert [are_unrolled(length, 2) for length in (32, 33)] == [True, False]


def test_steps_come_in_order():
    """Those of a loop, and the one that is left."""
    order = over(plan(37, 37, 0, None, 2), lambda run, query, order: jnp.append(order[1:], query), jnp.zeros(19, int))
    assert order.tolist() == list(range(0, 37, 2))
