"""The transformer: Mistral, and with `config.moe` Mixtral, as one code path."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.config import Dispatch, Execution, ModelConfig
from mixtral_jax.model.attention import Attention, Context
from mixtral_jax.model.backends.products import PRODUCT, einsum
from mixtral_jax.model.balance import RouterTraining
from mixtral_jax.model.cache import LayerCache
from mixtral_jax.model.feed_forward import FeedForward
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.norm import RMSNorm
from mixtral_jax.model.parameters import stored_weight
from mixtral_jax.model.rope import rotation
from mixtral_jax.model.routing import Statistics
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.mesh import current_mesh, platform
from mixtral_jax.sharding.partition import (
    constrain,
    gather_weight,
    keep_all_but_gathered,
    over_tokens,
    split_axes,
    use_weight,
)
from mixtral_jax.sharding.rules import TRAINING, Rules

EMBEDDING_AXES: Names = ("vocab", "embed")
UNEMBEDDING_AXES: Names = ("embed", "vocab")

_MOST_UNROLLED = 4
"""Layers; they take as long to compile as so many times one."""
_INPUT = "layer input"
_REMAT_POLICIES = {
    # Kept, the gathered weights of all layers would be the whole model on each device.
    "none": keep_all_but_gathered,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Output(NamedTuple):
    """What a Transformer gives."""

    logits_BTV: jax.Array
    """float32."""
    routing: Statistics | None
    """Of each layer, stacked: [L, ...]; None for a Mistral."""


class Block(nn.Module):
    """One layer: attention and a feed-forward or mixture, each on a normalised copy of the residual stream."""

    config: ModelConfig
    execution: Execution = Execution()
    dispatch: Dispatch = Dispatch()
    rules: Rules = TRAINING
    router: RouterTraining = RouterTraining()

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[jax.Array, tuple[Statistics | None, LayerCache | None]]:
        config, execution, rules = self.config, self.execution, self.rules
        if execution.remat == "offload":
            x_BTD = checkpoint_name(x_BTD, _INPUT)
        normalised = RMSNorm(config.norm_eps, name="attention_norm")(x_BTD)
        mixed, cache = Attention(config, execution, rules, name="attention")(normalised, context, cache)
        x_BTD = constrain(x_BTD + mixed, ("batch", "length", "activation"), rules)
        normalised = RMSNorm(config.norm_eps, name="feed_forward_norm")(x_BTD)
        if config.moe is None:
            y_BTD, routing = FeedForward(config, execution, rules, name="feed_forward")(normalised), None
        else:
            moe = MoE(config, execution, self.dispatch, rules, self.router, name="moe")
            y_BTD, routing = moe(normalised, context.mask_BT)
        return constrain(x_BTD + y_BTD, ("batch", "length", "activation"), rules), (routing, cache)


class Transformer(nn.Module):
    """Tokens to logits. The layers' parameters are stacked, [L, ...], and scanned.

    Attributes:
      config: what the weights are.
      execution: dtypes, attention and remat.
      dispatch: how tokens reach experts; dropless unless given.
      rules: where axes lie on the current mesh, if there is one.
      router: what training adds to the routers.
    """

    config: ModelConfig
    execution: Execution = Execution()
    dispatch: Dispatch = Dispatch()
    rules: Rules = TRAINING
    router: RouterTraining = RouterTraining()

    def setup(self) -> None:
        config = self.config
        self.embedding_VD = stored_weight(self, "embedding", (config.vocab_size, config.dim), EMBEDDING_AXES)
        block: Any = Block
        if self.execution.remat != "none" or current_mesh() is not None:
            # The scan already keeps the compiler from sharing the repeated work with the first pass.
            block = nn.remat(Block, policy=_REMAT_POLICIES[self.execution.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "jitter": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            unroll=self._layers_at_once(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.execution, self.dispatch, self.rules, self.router)
        self.norm = RMSNorm(config.norm_eps)
        if not config.tie_embeddings:
            shape = (config.dim, config.vocab_size)
            self.unembedding_DV = stored_weight(self, "unembedding", shape, UNEMBEDDING_AXES)

    def _layers_at_once(self) -> int:
        """Layers of a turn of the scan: all, if few, in training on one CPU, where the copies that a loop makes of what
        its backward pass keeps are a tenth of a step. A layer that is repeated needs the loop: without it the compiler
        would share the work with the first pass."""
        count = self.config.num_layers
        if self.is_initializing() or self.execution.remat != "none" or current_mesh() is not None:
            return 1
        return count if count <= _MOST_UNROLLED and platform() == "cpu" else 1

    def __call__(
        self, tokens_BT: jax.Array, segment_BT: jax.Array | None = None, position_BT: jax.Array | None = None
    ) -> Output:
        """Next-token logits of every token.

        Args:
          tokens_BT: integers below the vocabulary's size.
          segment_BT: int32, the document of each token, 0 for padding; documents don't see each other. None: each row
            is one document without padding.
          position_BT: int32, each token's position in its document; None: its place in the row.
        """
        hidden_BTD, routing = self.hidden(tokens_BT, segment_BT, position_BT)
        execution = self.execution
        w_DV = use_weight(self.unembedding(), UNEMBEDDING_AXES, self.rules, execution.product_dtype)
        logits_BTV = einsum("BTD,DV->BTV", hidden_BTD, w_DV, dtype=execution.product_dtype)
        return Output(logits_BTV, routing)

    def hidden(
        self, tokens_BT: jax.Array, segment_BT: jax.Array | None = None, position_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Statistics | None]:
        """The last layer's normalised output [B, T, D] in the activation dtype, and the routing; see `__call__`."""
        batch, length = tokens_BT.shape
        if position_BT is None:
            position_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        mask_BT = jnp.ones((batch, length), bool) if segment_BT is None else segment_BT != 0
        context = Context(rotation(position_BT, self.config.head_dim, self.config.rope_theta), mask_BT, segment_BT)
        # Each shard looks up its own tokens: the gradient is then summed over the shards once, whole rows at a time.
        look_up = partial(_look_up, dtype=self.execution.activation_dtype, rules=self.rules)
        on_shards = over_tokens(look_up, EMBEDDING_AXES, self.rules, split=("vocab",))
        x_BTD = on_shards(tokens_BT, jnp.asarray(self.embedding_VD))
        x_BTD, (routing, _) = self.layers(x_BTD, context, None)
        return self.norm(x_BTD), routing

    def unembedding(self) -> jax.Array:
        """The matrix [D, V] from the last layer's output to logits, as it is stored."""
        return self.embedding_VD.T if self.config.tie_embeddings else self.unembedding_DV


def _look_up(tokens_BT: jax.Array, table_VD: jax.Array, dtype: str, rules: Rules) -> jax.Array:
    """The embeddings [B, T, D], of a table of which a shard may have a part of the vocabulary."""
    table_VD = gather_weight(table_VD, EMBEDDING_AXES, rules, table_VD.dtype)
    parts = split_axes("vocab", rules)
    if not parts:
        return table_VD[tokens_BT].astype(dtype)
    own = len(table_VD)
    row_BT = tokens_BT - jax.lax.axis_index(parts) * own
    is_own_BT = (row_BT >= 0) & (row_BT < own)
    x_BTD = jnp.where(is_own_BT[..., None], table_VD[jnp.clip(row_BT, 0, own - 1)], 0).astype(dtype)
    return jax.lax.psum(x_BTD, parts)


@partial(jax.jit, static_argnames="config")  # so that the model is traced once for a config, however often it is asked
def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Fresh parameters: float32 arrays boxed with the names of their axes."""
    mesh = current_mesh()
    shards = 1 if mesh is None else mesh.size  # tokens of any layout; the compiler drops what is computed of them
    return Transformer(config).init(key, jnp.zeros((shards, shards), jnp.int32))["params"]


def abstract_params(config: ModelConfig) -> Any:
    """The shapes, dtypes and axis names of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """How many parameters there are, and how many a token uses: all but the experts that it did not choose."""
    params = nn.unbox(abstract_params(config))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if config.moe is None:
        return total, total
    experts = sum(params["layers"]["moe"][name].size for name in ("gate", "up", "down"))
    idle = experts * (config.moe.num_experts - config.moe.experts_per_token) // config.moe.num_experts
    return total, total - idle
