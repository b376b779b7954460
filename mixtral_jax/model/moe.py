"""The mixture of experts: a router, and k of E feed-forwards a token.

On a mesh each shard finds slots for its own tokens, an all-to-all over `expert` takes the slots to the experts' shards,
and another brings the results back. Nothing else crosses shards: groups of tokens lie within a sequence's shard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from mixtral_jax.config import Dispatch, Execution, ModelConfig, MoEConfig
from mixtral_jax.model import dispatch as moves
from mixtral_jax.model.backends.by_need import by_need
from mixtral_jax.model.backends.products import einsum
from mixtral_jax.model.balance import RouterTraining
from mixtral_jax.model.experts import (
    AXES,
    ENTER_AXES,
    LEAVE_AXES,
    Form,
    Places,
    Queue,
    Rows,
    differentiable_mixture,
    mixture,
)
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.model.parameters import stored_weight, weight
from mixtral_jax.model.routing import Routing, Statistics, route, statistics
from mixtral_jax.sharding.mesh import current_mesh
from mixtral_jax.sharding.partition import num_parts, over_parts, over_tokens, split_axes
from mixtral_jax.sharding.rules import TRAINING, Rules


def apply_experts(
    x_BTD: jax.Array,
    expert_BTA: jax.Array,
    gate_BTA: jax.Array,
    mask_BT: jax.Array,
    parts: SwiGLU,
    *,
    num_experts: int,
    dispatch: Dispatch,
    execution: Execution,
    rules: Rules = TRAINING,
    group_size: int | None = None,
    shards: int = 1,
    parts_of_hidden: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Each token through its chosen experts: the gates' sum of their results.

    Args:
      parts: of all experts' weights, or, of one of `shards` equal groups of them on the mesh axis `expert`, what this
        shard stores.
      parts_of_hidden: the mesh axes over which the parts have the hidden width split, to sum over.
      group_size: tokens that share a capacity; divides T. None: a sequence's.

    Returns:
      float32 [B, T, D], and bool [B, T, A]: whether the choice was served.
    """
    batch, length, dim = x_BTD.shape
    choices = expert_BTA.shape[-1]
    x_ND = x_BTD.reshape(-1, dim).astype(execution.product_dtype)
    gate_NA = gate_BTA.reshape(-1, choices)
    form: Form
    sizes_E = None
    if dispatch.capacity_factor is None:
        slots, sizes_E = moves.sorted_slots(expert_BTA.reshape(-1, choices), mask_BT.reshape(-1), num_experts)
        rows = min(dispatch.exchange_rows, shards * gate_NA.size)
        form = Rows(execution, rules, rows) if shards == 1 else Queue(execution, rules, rows)
    else:
        group_size = group_size or length
        groups = expert_BTA.reshape(-1, group_size, choices), mask_BT.reshape(-1, group_size)
        slots = moves.capacity_slots(*groups, num_experts, dispatch, gate_BTA.reshape(-1, group_size, choices))
        form = Places(execution, rules, num_experts, shards)
    if execution.repeats_layers or isinstance(form, Queue):
        y_ND = mixture(form, x_ND, gate_NA, parts, slots, sizes_E)
    else:
        y_ND = differentiable_mixture(form, x_ND, gate_NA, parts, slots, sizes_E)
    if parts_of_hidden:
        y_ND = jax.lax.psum(y_ND, parts_of_hidden)
    kept_NA = slots.slot_NA < slots.assignment_M.size
    return y_ND.reshape(x_BTD.shape), kept_NA.reshape(batch, length, choices)


class MoE(nn.Module):
    """The mixture of experts in place of a feed-forward."""

    config: ModelConfig
    execution: Execution
    dispatch: Dispatch
    rules: Rules
    router: RouterTraining = RouterTraining()

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, Statistics]:
        """The mixture's output in x's dtype, and what the routing did.

        Args:
          mask_BT: bool, True for real tokens; the others get zeros.
        """
        moe = self.config.moe
        assert moe is not None
        routing = self._route(moe, x_BTD)
        chosen = routing.expert_BTA, routing.gate_BTA, mask_BT
        if self.has_variable("prepared", "experts"):
            y_BTD, kept_BTA = self._by_need(x_BTD, *chosen)
        else:
            y_BTD, kept_BTA = self._on_mesh(moe, x_BTD.shape[1])(x_BTD, *chosen, self._weights(moe))
        shards = num_parts("batch", self.rules) if self.router.balance == "megatron" else 1
        return y_BTD.astype(x_BTD.dtype), statistics(routing, kept_BTA, mask_BT, self.router.balance, shards)

    def _route(self, moe: MoEConfig, x_BTD: jax.Array) -> Routing:
        router_DE = weight(self, "router", (self.config.dim, moe.num_experts), ("embed", None), self.rules)
        biases = {}
        if moe.selection_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            biases["bias_E"] = self.param("bias", zeros, (moe.num_experts,), jnp.float32)
        if self.router.jitter and self.has_rng("jitter"):
            least, most = 1 - self.router.jitter, 1 + self.router.jitter
            x_BTD = x_BTD * jax.random.uniform(self.make_rng("jitter"), x_BTD.shape, jnp.float32, least, most)

        def choose(logits_BTE: jax.Array, biases: dict[str, jax.Array]) -> Routing:
            return route(logits_BTE, moe.experts_per_token, **biases)

        # Each shard its own: the compiler gathers what it is to sort.
        on_shards = over_tokens(choose, dict.fromkeys(biases, (None,)), self.rules)
        return on_shards(einsum("BTD,DE->BTE", x_BTD, router_DE, dtype="float32"), biases)

    def _by_need(
        self, x_BTD: jax.Array, expert_BTA: jax.Array, gate_BTA: jax.Array, mask_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What apply_experts does, with the experts that inference prepared, see `by_need`."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(self.execution.product_dtype)
        expert_NA, gate_NA = (each.reshape(x_ND.shape[0], -1) for each in (expert_BTA, gate_BTA))
        experts = self.get_variable("prepared", "experts")
        serve: Callable[..., jax.Array] = partial(by_need, execution=self.execution)
        if current_mesh() is not None:
            hidden = self.rules.mesh_axes("hidden")
            serve = over_parts(serve, _layouts(experts, hidden), hidden)
        y_ND = serve(x_ND, expert_NA, gate_NA, mask_BT.reshape(-1), experts)
        return y_ND.reshape(x_BTD.shape), jnp.broadcast_to(mask_BT[..., None], expert_BTA.shape)

    def _weights(self, moe: MoEConfig) -> SwiGLU:
        enter = (moe.num_experts, self.config.dim, self.config.hidden_dim)
        leave = (moe.num_experts, self.config.hidden_dim, self.config.dim)
        return SwiGLU(
            gate=stored_weight(self, "gate", enter, ENTER_AXES),
            up=stored_weight(self, "up", enter, ENTER_AXES),
            down=stored_weight(self, "down", leave, LEAVE_AXES),
        )

    def _on_mesh(self, moe: MoEConfig, length: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """apply_experts, on each shard's own tokens where there is a mesh."""
        mesh = current_mesh()
        context = 1 if mesh is None else mesh.shape["context"]
        capacity = self.dispatch.capacity_factor is not None
        size = moves.group(length, self.dispatch.group_size, context) if capacity else None
        serve = partial(
            apply_experts,
            num_experts=moe.num_experts,
            dispatch=self.dispatch,
            execution=self.execution,
            rules=self.rules,
            group_size=size,
            shards=1 if mesh is None else mesh.shape["expert"],
            parts_of_hidden=split_axes("hidden", self.rules),
        )
        return over_tokens(serve, AXES, self.rules, split=("hidden",))


def _layouts(experts: tuple[SwiGLU, ...] | SwiGLU, axes: tuple[str, ...]) -> Any:
    """The layout of each leaf of prepared experts, whose hidden width is split over the axes.

    Of a quantised matrix, scales that are the same for the whole width have nothing to split.
    """

    def layout(name: str, leaf: jax.Array) -> PartitionSpec:
        hidden = -2 if name == "down" else -1
        return PartitionSpec() if leaf.shape[hidden] == 1 else PartitionSpec(*[None] * (leaf.ndim + hidden), axes)

    def layouts(each: SwiGLU) -> SwiGLU:
        return SwiGLU(**{name: jax.tree.map(partial(layout, name), getattr(each, name)) for name in SwiGLU._fields})

    return layouts(experts) if isinstance(experts, SwiGLU) else tuple(map(layouts, experts))
