"""What a training step may move over which mesh axes, judged on the compiled program."""

import math
import re

from mixtral_jax.planning.memory import leaves
from mixtral_jax.sharding.rules import TRAINING

EXCHANGES = {"all-to-all", "ragged-all-to-all"}


def assert_tokens_travel_and_experts_stay(found, model, mesh, tokens):
    """On `expert`, tokens and experts meet by exchanges alone, there and back, forward and backward; and with a window
    nothing is gathered on `context`.

    Else only weights that every token uses, their gradients, and numbers of a layer cross `expert`: those weights are
    stored over it, which a test would not have to allow if they were copies there.

    Args:
      found: from `planning.hlo.collectives`.
      model: no side of its experts is one of any other weight.
      mesh: a MeshConfig.
      tokens: of a shard, at a time.
    """
    exchanges = [each for each in found if each.kind in EXCHANGES]
    assert all(each.axes == ("expert",) for each in exchanges)
    assert (len(exchanges) >= 4) == (mesh.expert > 1)
    dense = {_in_use(leaf, mesh) for leaf in leaves(model) if leaf.kind != "experts"}
    experts = {_in_use(leaf, mesh) for leaf in leaves(model) if leaf.kind == "experts"}
    # All of a shard's, or one after another.
    experts |= {_sorted(side for side in shape if side != model.moe.num_experts // mesh.expert) for shape in experts}
    num_counts = mesh.expert * model.moe.num_experts
    gathered = set()
    for each in found:
        shapes = _shapes(each.shape)
        if each.kind == "all-gather":
            assert not ("context" in each.axes and model.sliding_window), each
            if "expert" in each.axes:
                assert shapes <= dense or all(math.prod(shape) == num_counts for shape in shapes), each
            gathered |= shapes if {"fsdp", "expert"} & {*each.axes} else set()
        elif "expert" in each.axes and each.kind not in EXCHANGES:
            cuts = {mesh.tensor, mesh.fsdp * mesh.expert if each.kind == "reduce-scatter" else 1}
            assert not {shape for shape in shapes if math.prod(shape) >= tokens and not _is_part(shape, cuts, dense)}, (
                each
            )
    assert bool(gathered & experts) == (mesh.fsdp > 1)
    assert bool(gathered & dense) == (mesh.fsdp * mesh.expert > 1)


def _is_part(shape, cuts, wholes):
    """Whether an array is one of these, or one of these that is cut on a side."""
    sides = [(place, cut) for place in range(len(shape)) for cut in cuts]
    uncut = {_sorted([*shape[:place], shape[place] * cut, *shape[place + 1 :]]) for place, cut in sides}
    return bool((uncut | {shape}) & wholes)


def _in_use(leaf, mesh):
    """The sides of a weight's part that a shard computes with, of one layer."""
    shape = []
    for side, name in zip(leaf.shape, leaf.names, strict=True):
        axes = () if name in TRAINING.only_stored else TRAINING.mesh_axes(name)
        shape.append(1 if name == "layers" else side // math.prod(mesh.size(axis) for axis in axes))
    return _sorted(shape)


def _shapes(types):
    """The sides of each array that a collective gives."""
    found = re.findall(r"\[([\d,]*)\]", types)
    return {_sorted(map(int, filter(None, sides.split(",")))) for sides in found}


def _sorted(sides):
    """Programs transpose, and add sides of 1."""
    return tuple(sorted(side for side in sides if side > 1))
