"""What a training step may move over which mesh axes, judged on the compiled program."""

import math
import re

from mixtral_jax.planning.memory import leaves
from mixtral_jax.sharding.rules import TRAINING

EXCHANGES = {"all-to-all", "ragged-all-to-all"}


def assert_tokens_travel_and_experts_stay(found, model, mesh, length):
    """On `expert`, tokens and experts meet by exchanges alone, there and back, forward and backward; and with a window
    nothing is gathered on `context`.

    Else only weights that every token uses, their gradients, and numbers of a layer cross `expert`: those weights are
    stored over it, which a test would not have to allow if they were copies there.

    Args:
      found: from `planning.hlo.collectives`.
      model: no side of its experts is one of any other weight.
      mesh: a MeshConfig.
      length: tokens of a row.
    """
    exchanges = [each for each in found if each.kind in EXCHANGES]
    assert all(each.axes == ("expert",) for each in exchanges)
    assert (len(exchanges) >= 4) == (mesh.expert > 1)
    experts = {_in_use(leaf, mesh) for leaf in leaves(model) if leaf.kind == "experts"}
    dense = {_in_use(leaf, mesh) for leaf in leaves(model) if leaf.kind != "experts"}
    counts = (mesh.expert, model.moe.num_experts)
    own_length = length // mesh.context
    for each in found:
        shapes = _shapes(each.shape)
        if each.kind == "all-gather":
            assert not ("context" in each.axes and model.sliding_window), each
            if "expert" in each.axes:
                assert shapes <= dense | {counts}, each
            elif "fsdp" in each.axes:
                assert shapes <= dense | experts, each
        elif "expert" in each.axes and each.kind not in EXCHANGES:
            of_weights = dense | {_part(shape, mesh) for shape in dense}
            tokens = {shape for shape in shapes - of_weights if len(shape) >= 2 and shape[1] == own_length}
            assert not tokens, each
    gathered = {shape for each in found if each.kind == "all-gather" for shape in _shapes(each.shape)}
    assert bool(gathered & experts) == (mesh.fsdp > 1)
    assert bool(gathered & dense) == (mesh.fsdp * mesh.expert > 1)


def _in_use(leaf, mesh):
    """The shape of a weight's part that a shard computes with, of one layer; without sides of 1."""
    shape = []
    for side, name in zip(leaf.shape, leaf.names, strict=True):
        axes = () if name in TRAINING.only_stored else TRAINING.mesh_axes(name)
        shape.append(1 if name == "layers" else side // math.prod(mesh.size(axis) for axis in axes))
    return tuple(side for side in shape if side > 1)


def _part(shape, mesh):
    """One more way that a gradient of that shape is cut: by its first side, over where it is stored."""
    return (shape[0] // (mesh.fsdp * mesh.expert), *shape[1:]) if shape else shape


def _shapes(types):
    """The shapes of the arrays that a collective gives, without sides of 1."""
    return {
        tuple(side for side in map(int, filter(None, dims.split(","))) if side > 1)
        for dims in re.findall(r"\[([\d,]*)\]", types)
    }
