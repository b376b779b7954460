"""Who sends what to whom, by simulating all shards; and the transfer itself against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from mixtral_jax.model.exchange import Transfer, plan_round, rounds, transfer
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh


def ragged_all_to_all(operands, outputs, transfers):
    """As jax documents it, on the host: one array, and one transfer, a shard."""
    shards, pieces = len(operands), len(transfers[0].from_K) // len(operands)
    outputs = [output.copy() for output in outputs]
    for sender, moves in enumerate(transfers):
        for k in range(len(moves.from_K)):
            receiver, own = k // pieces, k % pieces
            start, count, to = int(moves.from_K[k]), int(moves.send_K[k]), int(moves.to_K[k])
            assert count == transfers[receiver].receive_K[sender * pieces + own]
            assert 0 <= start <= start + count <= len(operands[sender]) or not count
            outputs[receiver][to : to + count] = operands[sender][start : start + count]
    assert shards == len(outputs)
    return outputs


@st.composite
def sizes(draw):
    shards, each = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 7), min_size=shards * each, max_size=shards * each)
    return np.array(draw(st.lists(row, min_size=shards, max_size=shards)), np.int32)


@settings(max_examples=60, deadline=None)
@given(sizes_SE=sizes(), rows=st.integers(1, 30))
def test_every_row_is_served_by_its_expert_once_and_comes_home(sizes_SE, rows):
    """A row says where it is from and which expert it is for: (shard, place, expert)."""
    shards, num_experts = sizes_SE.shape
    most = int(sizes_SE.sum(1).max())
    home = []
    for shard, counts in enumerate(sizes_SE):
        own = [(shard, place, expert) for place, expert in enumerate(np.repeat(np.arange(num_experts), counts))]
        home.append(np.array(own + [(-1, -1, -1)] * (most - len(own)), np.int32).reshape(-1, 3))
    back = [np.full_like(own, -7) for own in home]
    plan = jax.jit(plan_round, static_argnums=3)
    served = 0
    for number in range(int(rounds(jnp.asarray(sizes_SE), rows))):
        plans = [jax.device_get(plan(sizes_SE, shard, number, rows)) for shard in range(shards)]
        buffers = [np.full((rows, 3), -9, np.int32)] * shards
        buffers = ragged_all_to_all(home, buffers, [each.there for each in plans])
        for shard, (buffer, each) in enumerate(zip(buffers, plans, strict=True)):
            first = shard * (num_experts // shards)
            wanted = np.repeat(first + np.arange(len(each.sizes_E)), each.sizes_E)
            np.testing.assert_array_equal(buffer[: len(wanted), 2], wanted)
            served += len(wanted)
        back = ragged_all_to_all(buffers, back, [each.back for each in plans])
    assert served == sizes_SE.sum()
    for own, came, counts in zip(home, back, sizes_SE, strict=True):
        np.testing.assert_array_equal(came[: counts.sum()], own[: counts.sum()])
        assert (came[counts.sum() :] == -7).all()


def test_the_example_of_the_docstring():
    sizes_SE = jnp.array([[2, 1], [3, 0]])
    assert rounds(sizes_SE, 4) == 2
    received = [
        [plan_round(sizes_SE, shard, number, 4).there.receive_K.tolist() for shard in (0, 1)] for number in (0, 1)
    ]
    assert received == [[[2, 2], [1, 0]], [[0, 1], [0, 0]]]


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_the_transfer_is_what_jax_documents(shards):
    mesh = make_mesh(MeshConfig(data=8 // shards, expert=shards))
    rng = np.random.default_rng(shards)
    sizes_SE = rng.integers(0, 5, (shards, 2 * shards)).astype(np.int32)
    sizes_SE[-1, -1] = 9
    rows, most = 11, int(sizes_SE.sum(1).max())
    x = rng.standard_normal((shards, most, 3)).astype(np.float32)

    def on_shard(x_1MD, into_1RD, number):
        plan = plan_round(jnp.asarray(sizes_SE), jax.lax.axis_index("expert"), number, rows)
        there = transfer(x_1MD[0], plan.there, into_1RD[0], "expert")
        return there[None], transfer(there, plan.back, jnp.full_like(x_1MD[0], -1), "expert")[None]

    specs = {"in_specs": (P("expert"), P("expert"), P()), "out_specs": P("expert")}
    mapped = jax.jit(jax.shard_map(on_shard, mesh=mesh, check_vma=False, **specs))
    into = np.full((shards, rows, 3), 5, np.float32)
    for number in range(int(rounds(jnp.asarray(sizes_SE), rows))):
        plans = [jax.device_get(plan_round(jnp.asarray(sizes_SE), s, number, rows)) for s in range(shards)]
        there = ragged_all_to_all(x, into, [each.there for each in plans])
        back = ragged_all_to_all(there, np.full_like(x, -1), [each.back for each in plans])
        for actual, expected in zip(mapped(x, into, number), (there, back), strict=True):
            np.testing.assert_array_equal(actual, np.stack(expected))


def test_transfer_names_all_that_ragged_all_to_all_takes():
    assert Transfer._fields == ("from_K", "send_K", "to_K", "receive_K")
