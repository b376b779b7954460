"""How long a collective takes on the wires it has, at their full speed.

A torus: a mesh axis has, of a chip's links, the share that its logarithm is of the slice's, so that 8 of 4 x 4 x 4
chips have one and a half of three dimensions. What passes round a ring goes both ways at once, over a line one way. An
all-to-all crosses the middle of a ring of n in n / 8 times its data, n being the torus's mean side.

Switched nodes: what stays in a node goes at the switch's speed, what leaves it through each chip's own card; of a
gathering or a sum, the members of a node share what the node sends.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mixtral_jax.planning.hlo import sent_fraction
from mixtral_jax.planning.topology import Topology
from mixtral_jax.planning.traffic import Transfer
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.chips import Switched, Torus
from mixtral_jax.sharding.mesh import MeshConfig

_EXCHANGES = ("all-to-all", "ragged-all-to-all")


def seconds(transfer: Transfer, machine: Topology, mesh: MeshConfig) -> float:
    """The time that a transfer takes if nothing else is on its wires."""
    assert machine.chip is not None
    if transfer.kind == "ragged-all-to-all" and not machine.chip.exchanges_ragged(machine.num_chips):
        # `model.exchange` sends a whole buffer to each; with several rounds, its results more than once.
        transfer = replace(transfer, kind="all-to-all", bytes=transfer.bytes * transfer.group_size)
    wiring, network = machine.chip.wiring, machine.chip.network_bandwidth
    if isinstance(wiring, Switched):
        return _switched(transfer, wiring, network, members_of_node(transfer, mesh, machine.island))
    slices = machine.slices if "data" in transfer.axes else 1
    inside = transfer.group_size // slices
    across = transfer.bytes * sent_fraction(transfer.kind, slices) / network if slices > 1 else 0.0
    return across + (_torus(transfer, wiring, machine, inside) if inside > 1 else 0.0)


def _torus(transfer: Transfer, wiring: Torus, machine: Topology, group_size: int) -> float:
    chips = machine.island
    if transfer.kind == "collective-permute":
        return transfer.bytes / wiring.link_bandwidth
    if transfer.kind in _EXCHANGES:
        side = chips ** (1 / wiring.dimensions)
        return transfer.bytes * max(side / 8, 0.5) / wiring.link_bandwidth
    dimensions = wiring.dimensions * math.log(group_size) / math.log(chips)
    both_ways = 2 if min(machine.shape) >= wiring.ring_from else 1
    links = max(dimensions * both_ways, 1.0)
    return transfer.bytes * sent_fraction(transfer.kind, group_size) / (links * wiring.link_bandwidth)


def _switched(transfer: Transfer, wiring: Switched, network: float, members: int) -> float:
    group = transfer.group_size
    inside = transfer.bytes * sent_fraction(transfer.kind, group) / wiring.bandwidth
    if members >= group:
        return inside
    if transfer.kind in _EXCHANGES:
        return max(inside, transfer.bytes * (group - members) / group / network)
    across = transfer.bytes * sent_fraction(transfer.kind, group // members) / members
    return max(inside, across / network)


def members_of_node(transfer: Transfer, mesh: MeshConfig, node: int) -> int:
    """How many of a group are in one node: nodes hold runs of the mesh's places, the last axis innermost."""
    places = np.arange(math.prod(mesh.shape)).reshape(mesh.shape)
    group = places[tuple(slice(None) if axis in transfer.axes else 0 for axis in MESH_AXES)]
    return int(np.count_nonzero(group < node))
