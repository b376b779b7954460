"""Tokens through their experts, of which a shard holds some, with a backward pass that keeps next to nothing.

Left to autodiff, the backward pass holds what lies between an expert's products for all of a shard's tokens, and the
whole weights and their whole gradients of all its experts. Here it holds them for a round of rows or for one expert:
tokens are sent again, with their cotangents, and what lies between the products is computed again. So a layer whose
forward pass is repeated anyway (`remat = "full"`, "offload") does not repeat the experts': nothing needs their results.

Three forms say which rows are served together: Places, by capacity; Rows and Queue, dropless, on one shard of experts
and over several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution
from mixtral_jax.model.backends.ragged import grouped_swiglu
from mixtral_jax.model.dispatch import Slots, collect, combine, spread
from mixtral_jax.model.exchange import Round, plan_round, rounds, transfer
from mixtral_jax.model.expert_gradients import pull_grouped, pull_one
from mixtral_jax.model.feed_forward import SwiGLU, swiglu
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.partition import gather_weight, scatter_gradient, token_axes
from mixtral_jax.sharding.rules import Rules

EXPERT_AXIS = "expert"

ENTER_AXES: Names = ("experts", "expert_embed", "hidden")
LEAVE_AXES: Names = ("experts", "hidden", "expert_embed")
AXES: Any = SwiGLU._make((ENTER_AXES, ENTER_AXES, LEAVE_AXES))
"""The axes of the experts' stacked weights."""


def gather(parts: SwiGLU, rules: Rules, execution: Execution) -> SwiGLU:
    """A shard's experts' weights, from its parts of them, in the product dtype."""
    return jax.tree.map(lambda part, names: gather_weight(part, names, rules, execution.product_dtype), parts, AXES)


def scatter(gradients: SwiGLU, rules: Rules) -> SwiGLU:
    """A shard's parts of the gradients, from its share in the whole ones."""
    return jax.tree.map(lambda whole, names: scatter_gradient(whole, names, rules), gradients, AXES)


@dataclass(frozen=True)
class Places:
    """By capacity: each expert has as many slots of each shard, [E, C, D], and one expert is served after another."""

    execution: Execution
    rules: Rules
    num_experts: int
    shards: int
    """Of experts."""

    def at_once(self, x_MD: jax.Array, parts: SwiGLU, sizes_E: None) -> jax.Array:
        """All slots through their experts, [M, D], for autodiff."""
        return self._back(swiglu(self._there(x_MD), gather(parts, self.rules, self.execution), self.execution))

    def forward(self, x_MD: jax.Array, parts: SwiGLU, sizes_E: None) -> jax.Array:
        """All slots through their experts, [M, D]."""

        def one(inputs: tuple[jax.Array, SwiGLU]) -> jax.Array:
            x_CD, part = inputs
            return swiglu(x_CD[None], gather(_stack(part), self.rules, self.execution), self.execution)[0]

        return self._back(jax.lax.map(one, (self._there(x_MD), parts)))

    def backward(
        self, x_MD: jax.Array, dy_MD: jax.Array, gate_M1: jax.Array, parts: SwiGLU, sizes_E: None
    ) -> tuple[jax.Array, jax.Array, SwiGLU]:
        """The cotangents of the slots, of their gates and of the parts; dy is of the gated results."""

        def one(inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array, SwiGLU]:
            x_CD, dy_CD, gate_C1, part = inputs
            weights = _unstack(gather(_stack(part), self.rules, self.execution))
            dx_CD, dgate_C1, dweights = pull_one(self.execution, x_CD, dy_CD, gate_C1, weights)
            return dx_CD, dgate_C1, _unstack(scatter(_stack(dweights), self.rules))

        slots = tuple(self._there(each) for each in (x_MD, dy_MD, gate_M1))
        dx_ECD, dgate_EC1, dparts = jax.lax.map(one, (*slots, parts))
        return self._back(dx_ECD), self._back(dgate_EC1), dparts

    def _there(self, x_MD: jax.Array) -> jax.Array:
        """Slots to the shards that hold their experts: [E / S, S * C, D]."""
        x_ECD = x_MD.reshape(self.num_experts, -1, x_MD.shape[-1])
        if self.shards == 1:
            return x_ECD
        return jax.lax.all_to_all(x_ECD, EXPERT_AXIS, split_axis=0, concat_axis=1, tiled=True)

    def _back(self, y_ECD: jax.Array) -> jax.Array:
        """What they became to where they came from: [M, D]."""
        if self.shards > 1:
            y_ECD = jax.lax.all_to_all(y_ECD, EXPERT_AXIS, split_axis=1, concat_axis=0, tiled=True)
        return y_ECD.reshape(-1, y_ECD.shape[-1])


@dataclass(frozen=True)
class Rows:
    """Dropless where all experts are every shard's: rows in the order of their experts, one expert after another."""

    execution: Execution
    rules: Rules
    most_rows: int
    """Rows that are served at a time, at most."""

    def at_once(self, x_MD: jax.Array, parts: SwiGLU, sizes_E: jax.Array) -> jax.Array:
        """All rows through their experts, [M, D], for autodiff."""
        return grouped_swiglu(x_MD, gather(parts, self.rules, self.execution), sizes_E, self.execution)

    def forward(self, x_MD: jax.Array, parts: SwiGLU, sizes_E: jax.Array) -> jax.Array:
        """All rows through their experts, [M, D]. What stands beyond the sizes' sum means nothing."""

        def one(y_MD: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, None]:
            part, *span = inputs
            weights = gather(_stack(part), self.rules, self.execution)

            def step(row: jax.Array, size_1: jax.Array, y_MD: jax.Array) -> jax.Array:
                y_RD = grouped_swiglu(self._slice(x_MD, row), weights, size_1, self.execution)
                return jax.lax.dynamic_update_slice_in_dim(y_MD, y_RD, row, axis=0)

            return self._for_rows(span, x_MD, step, y_MD), None

        x_MD = self._pad(x_MD)
        y_MD = jnp.zeros(x_MD.shape, self.execution.activation_dtype)
        y_MD, _ = jax.lax.scan(one, y_MD, (parts, *_spans(sizes_E)))
        return self._unpad(y_MD)

    def backward(
        self, x_MD: jax.Array, dy_MD: jax.Array, gate_M1: jax.Array, parts: SwiGLU, sizes_E: jax.Array
    ) -> tuple[jax.Array, jax.Array, SwiGLU]:
        """The cotangents of the rows, of their gates and of the parts; dy is of the gated results."""

        def one(carry: Any, inputs: tuple[Any, ...]) -> tuple[Any, SwiGLU]:
            part, *span = inputs
            weights = gather(_stack(part), self.rules, self.execution)

            def step(row: jax.Array, size_1: jax.Array, carry: Any) -> Any:
                *pulled, so_far = carry
                x_RD, dy_RD, gate_R1 = (self._slice(each, row) for each in inputs_M)
                *more, dweights = pull_grouped(self.execution, x_RD, dy_RD, gate_R1, weights, size_1)
                # What it writes beyond the expert's rows, the next expert writes again.
                pulled = [jax.lax.dynamic_update_slice_in_dim(*pair, row, 0) for pair in zip(pulled, more, strict=True)]
                return *pulled, jax.tree.map(jnp.add, so_far, dweights)

            *pulled, dweights = self._for_rows(span, x_MD, step, (*carry, _zeros(weights)))
            return tuple(pulled), scatter(dweights, self.rules)

        inputs_M = tuple(self._pad(each) for each in (x_MD, dy_MD, gate_M1))
        zeros = jnp.zeros_like(inputs_M[0]), jnp.zeros_like(inputs_M[2])
        pulled, dparts = jax.lax.scan(one, zeros, (parts, *_spans(sizes_E)))
        dx_MD, dgate_M1 = (self._unpad(each) for each in pulled)
        return dx_MD, dgate_M1, jax.tree.map(lambda leaf: leaf[:, 0], dparts)

    def _for_rows(self, span: Any, x_MD: jax.Array, step: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """carry = step(first row, rows, carry) for each run of rows of an expert; none for an expert without."""
        start, size = span

        def run(number: jax.Array, carry: Any) -> Any:
            own = jnp.minimum(size - number * self.most_rows, self.most_rows)
            return step(start + number * self.most_rows, own[None], carry)

        return jax.lax.fori_loop(0, -(-size // self.most_rows), run, carry)

    def _slice(self, x_MD: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_MD, row, self.most_rows)

    def _pad(self, x_MD: jax.Array) -> jax.Array:
        return jnp.pad(x_MD, [(0, self.most_rows), (0, 0)])

    def _unpad(self, x_MD: jax.Array) -> jax.Array:
        return x_MD[: -self.most_rows]


@dataclass(frozen=True)
class Queue:
    """Dropless over several shards of experts: rows travel and are served in rounds, see `exchange`."""

    execution: Execution
    rules: Rules
    rows: int
    """R, of a round."""

    def forward(self, x_MD: jax.Array, parts: SwiGLU, sizes_E: jax.Array) -> jax.Array:
        """All rows through their experts, [M, D]."""
        weights = gather(parts, self.rules, self.execution)

        def serve(plan: Round, y_MD: jax.Array) -> jax.Array:
            y_RD = grouped_swiglu(self._there(x_MD, plan), weights, plan.sizes_E, self.execution)
            return transfer(y_RD, plan.back, y_MD, EXPERT_AXIS)

        return self._in_rounds(sizes_E, serve, jnp.zeros(x_MD.shape, self.execution.activation_dtype))

    def backward(
        self, x_MD: jax.Array, dy_MD: jax.Array, gate_M1: jax.Array, parts: SwiGLU, sizes_E: jax.Array
    ) -> tuple[jax.Array, jax.Array, SwiGLU]:
        """The cotangents of the rows, of their gates and of the parts; dy is of the gated results."""
        weights = gather(parts, self.rules, self.execution)

        def serve(plan: Round, carry: Any) -> Any:
            dx_MD, dgate_M1, so_far = carry
            x_RD, dy_RD, gate_R1 = (self._there(each, plan) for each in (x_MD, dy_MD, gate_M1))
            dx_RD, dgate_R1, dweights = pull_grouped(self.execution, x_RD, dy_RD, gate_R1, weights, plan.sizes_E)
            dx_MD = transfer(dx_RD, plan.back, dx_MD, EXPERT_AXIS)
            dgate_M1 = transfer(dgate_R1, plan.back, dgate_M1, EXPERT_AXIS)
            return dx_MD, dgate_M1, jax.tree.map(jnp.add, so_far, dweights)

        zeros = jnp.zeros_like(x_MD), jnp.zeros_like(gate_M1), _zeros(weights)
        dx_MD, dgate_M1, dweights = self._in_rounds(sizes_E, serve, zeros)
        return dx_MD, dgate_M1, scatter(dweights, self.rules)

    def _in_rounds(self, sizes_E: jax.Array, serve: Callable[[Round, Any], Any], carry: Any) -> Any:
        sizes_SE, shard = jax.lax.all_gather(sizes_E, EXPERT_AXIS), jax.lax.axis_index(EXPERT_AXIS)
        # All shards take as many: none runs through a loop of collectives that another has left.
        count = jax.lax.pmax(rounds(sizes_SE, self.rows), token_axes(self.rules))

        def step(number: jax.Array, carry: Any) -> Any:
            return serve(plan_round(sizes_SE, shard, number, self.rows), carry)

        return jax.lax.fori_loop(0, count, step, carry)

    def _there(self, x_MD: jax.Array, plan: Round) -> jax.Array:
        buffer = jnp.zeros((self.rows, x_MD.shape[1]), x_MD.dtype)
        return transfer(x_MD, plan.there, buffer, EXPERT_AXIS)


Form: TypeAlias = Places | Rows | Queue


def differentiable_mixture(
    form: Places | Rows, x_ND: jax.Array, gate_NA: jax.Array, parts: SwiGLU, slots: Slots, sizes_E: Any
) -> jax.Array:
    """What `mixture` gives, all at once and left to autodiff: nothing is computed twice."""
    return combine(form.at_once(spread(x_ND, slots), parts, sizes_E), gate_NA, slots)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixture(form: Form, x_ND: jax.Array, gate_NA: jax.Array, parts: SwiGLU, slots: Slots, sizes_E: Any) -> jax.Array:
    """Each token through its chosen experts, wherever they are: the gates' sum of their results, float32 [N, D].

    Args:
      x_ND: a shard's tokens, in the product dtype.
      gate_NA: float32.
      parts: a shard's parts of its experts' weights.
      slots: of the tokens' choices, as the form wants them.
      sizes_E: int32, how many slots are each expert's; None for Places.
    """
    return combine(form.forward(spread(x_ND, slots), parts, sizes_E), gate_NA, slots)


def _forward(
    form: Form, x_ND: jax.Array, gate_NA: jax.Array, parts: SwiGLU, slots: Slots, sizes_E: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    inputs = x_ND, gate_NA, parts, slots, sizes_E
    return mixture(form, *inputs), inputs


def _backward(form: Form, inputs: tuple[Any, ...], gradient_ND: jax.Array) -> tuple[Any, ...]:
    x_ND, gate_NA, parts, slots, sizes_E = inputs
    dy_MD = spread(gradient_ND.astype(x_ND.dtype), slots)
    gate_M1 = gate_NA.reshape(-1, 1).at[slots.assignment_M].get(mode="fill", fill_value=0)
    dx_MD, dgate_M1, dparts = form.backward(spread(x_ND, slots), dy_MD, gate_M1, parts, sizes_E)
    dx_ND = jnp.sum(collect(dx_MD, slots), axis=1, dtype=jnp.float32).astype(x_ND.dtype)
    dparts = jax.tree.map(lambda own, part: own.astype(part.dtype), dparts, parts)
    return dx_ND, collect(dgate_M1, slots)[..., 0], dparts, None, None


mixture.defvjp(_forward, _backward)


def _zeros(weights: SwiGLU) -> SwiGLU:
    """What their gradients add up from."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)


def _spans(sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first row of each expert, and how many it has."""
    return jnp.cumsum(sizes_E) - sizes_E, sizes_E


def _stack(part: SwiGLU) -> SwiGLU:
    """One expert's weights as a stack of one."""
    return jax.tree.map(lambda leaf: leaf[None], part)


def _unstack(stack: SwiGLU) -> SwiGLU:
    return jax.tree.map(lambda leaf: leaf[0], stack)
