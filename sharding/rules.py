"""The table from logical axes to mesh axes: the only place that knows which dimension is split over what.

A parameter is stored by `storage` and used by `use`: a layer's weights are gathered over the axes that only store them
(fully sharded data parallelism) when the layer runs, and their gradients go back the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import PartitionSpec

from mixtral_jax.sharding.axes import LOGICAL_AXES, LogicalAxis, MeshAxis, Names

Table = tuple[tuple[LogicalAxis, tuple[MeshAxis, ...]], ...]


@dataclass(frozen=True)
class Rules:
    """Where each logical axis lies on the mesh; hashable, so that a module can carry it.

    Raises:
      ValueError: a logical axis without a rule.
    """

    table: Table
    only_stored: tuple[LogicalAxis, ...] = ()
    """Axes that are split in storage and whole in use."""

    def __post_init__(self) -> None:
        missing = set(LOGICAL_AXES) - {name for name, _ in self.table}
        if missing:
            raise ValueError(f"no rule for the logical axes {sorted(missing)}")

    def mesh_axes(self, name: LogicalAxis | None) -> tuple[MeshAxis, ...]:
        """The mesh axes that a logical axis is split over, outermost first; none for None."""
        return () if name is None else dict(self.table)[name]

    def storage(self, names: Names) -> PartitionSpec:
        """The layout of an array at rest."""
        return self._spec([self.mesh_axes(name) for name in names], names)

    def use(self, names: Names) -> PartitionSpec:
        """The layout of an array in a computation."""
        return self._spec([() if name in self.only_stored else self.mesh_axes(name) for name in names], names)

    @staticmethod
    def _spec(dimensions: list[tuple[MeshAxis, ...]], names: Names) -> PartitionSpec:
        used = [axis for axes in dimensions for axis in axes]
        if len(used) != len(set(used)):
            raise ValueError(f"an array with the axes {names} would use a mesh axis twice: {dimensions}")
        return PartitionSpec(*[axes or None for axes in dimensions])


TRAINING = Rules(
    table=(
        ("batch", ("data", "fsdp", "expert")),
        ("length", ("context",)),
        # Between layers, where each is kept for the backward pass: whole, `tensor` would have as many copies of it.
        ("activation", ("tensor",)),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("head_dim", ()),
        ("hidden", ("tensor",)),
        ("vocab", ("tensor",)),
        ("experts", ("expert",)),
        ("layers", ()),
        # Weights that every token uses are stored over `expert` too: there they'd be copies.
        ("embed", ("fsdp", "expert")),
        ("expert_embed", ("fsdp",)),
        ("norm", ()),
    ),
    only_stored=("embed", "expert_embed"),
)

DECODING = Rules(
    table=(
        # Every device sees all tokens: a batch may be one text.
        ("batch", ()),
        ("length", ()),
        ("activation", ()),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("head_dim", ()),
        # Every expert is split over all of a copy's devices, so that whichever are chosen, all of them read.
        ("hidden", ("fsdp", "expert", "tensor")),
        ("vocab", ("fsdp", "expert", "tensor")),
        ("experts", ()),
        ("layers", ()),
        ("embed", ()),
        ("expert_embed", ()),
        ("norm", ()),
    ),
)
