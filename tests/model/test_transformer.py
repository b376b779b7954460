"""The whole model: its reach, its layers' scan, its weights at the start, and its logits against transformers."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import linen as nn
from oracles import tiny

from mixtral_jax.config import Dispatch, Execution, MoEConfig
from mixtral_jax.model import transformer
from mixtral_jax.model.attention import Context
from mixtral_jax.model.norm import rms_normalize
from mixtral_jax.model.rope import rotation
from mixtral_jax.model.transformer import Block, Transformer, abstract_params, count_parameters, init_params

BATCH, LENGTH = 2, 14


@partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, params, *inputs, method=None):
    return model.apply({"params": params}, *inputs, method=method)


def _logits(config, params, tokens_BT, segment_BT=None, **model):
    return _apply(Transformer(config, **model), params, tokens_BT, segment_BT).logits_BTV


@pytest.mark.parametrize(
    ("family", "window"),
    [("mistral", 1), ("mistral", 2), ("mistral", 4), ("mistral", None), ("mixtral", 4), ("mixtral", None)],
)
def test_reach(family, window):
    """By gradient: the output at t depends on the inputs from t - L * (W - 1) to t, each of them, and on no other.

    Each place has a token of its own, so that an embedding's row is the input of one place.
    """
    length, layers = 14, 3
    config = tiny.config(family, num_layers=layers, sliding_window=window, vocab_size=length)
    params, tokens = tiny.params(config), jnp.arange(length)[None]
    direction_D = jnp.asarray(np.random.default_rng(3).standard_normal(config.dim), jnp.float32)

    @jax.jit
    @jax.grad
    def dependence(embedding_VD, place):
        variables = {"params": params | {"embedding": embedding_VD}}
        hidden, _ = Transformer(config).apply(variables, tokens, method="hidden")
        return hidden[0, place] @ direction_D

    gradient_TVD = np.array([dependence(params["embedding"], place) for place in range(length)])
    reached = np.any(gradient_TVD != 0, axis=-1)
    back = length if window is None else layers * (window - 1)
    expected = [[0 <= query - key <= back for key in range(length)] for query in range(length)]
    np.testing.assert_array_equal(reached, expected)


def test_reach_with_drops_is_causal():
    config, params = tiny.config("mixtral"), tiny.params(tiny.config("mixtral"))
    tight = Dispatch(capacity_factor=0.75)
    tokens = tiny.tokens(config, BATCH, LENGTH)
    logits = _logits(config, params, tokens, dispatch=tight)
    for at in range(1, LENGTH):
        other = tokens.copy()
        other[:, at:] = tiny.tokens(config, BATCH, LENGTH, seed=9)[:, at:]
        np.testing.assert_array_equal(_logits(config, params, other, dispatch=tight)[:, :at], logits[:, :at])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_row_does_not_depend_on_the_others(family):
    config = tiny.config(family)
    tokens, others = tiny.tokens(config, BATCH, LENGTH), tiny.tokens(config, BATCH, LENGTH, seed=1)
    others[0] = tokens[0]
    logits, other_logits = (_logits(config, tiny.params(config), each) for each in (tokens, others))
    np.testing.assert_array_equal(logits[0], other_logits[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_packed_row_equals_its_documents_apart(family):
    """Documents of 5, 1, 6 and two of padding; positions go on over the row or start again, all the same."""
    config = tiny.config(family)
    params, tokens = tiny.params(config), tiny.tokens(config, 1, LENGTH)
    segment = np.array([[1] * 5 + [2] + [3] * 6 + [0] * 2], np.int32)
    position = np.array([[*range(5), 0, *range(6), 0, 0]], np.int32)
    packed = _logits(config, params, tokens, segment)
    restarted = _apply(Transformer(config), params, tokens, segment, position).logits_BTV
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        alone = _logits(config, params, tokens[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=2e-5)
        np.testing.assert_allclose(restarted[:, start:stop], alone, atol=2e-5)


def _objective(config, params, tokens_BT, **model):
    """A loss that all outputs take part in."""
    output = _apply(Transformer(config, **model), params, tokens_BT)
    return _loss(output.logits_BTV, output.routing)


def _loss(logits_BTV, routing):
    weight_V = jnp.cos(jnp.arange(logits_BTV.shape[-1]))
    loss = jnp.mean(jax.nn.log_softmax(logits_BTV) @ weight_V)
    if routing is not None:
        loss += 0.1 * jnp.mean(routing.balance_loss) + 0.01 * jnp.mean(routing.z_loss)
    return loss


def _by_loop(config, params, tokens_BT, dispatch):
    """The layers one after the other, outside any scan."""
    position = jnp.arange(LENGTH)[None].repeat(BATCH, 0)
    context = Context(rotation(position, config.head_dim, config.rope_theta), jnp.ones((BATCH, LENGTH), bool))
    x_BTD, routings = params["embedding"][tokens_BT], []
    for layer in range(config.num_layers):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        x_BTD, (routing, _) = Block(config, dispatch=dispatch).apply({"params": own}, x_BTD, context)
        routings.append(routing)
    hidden_BTD = rms_normalize(x_BTD, config.norm_eps) * params["norm"]["scale"][None, None]
    stacked = None if config.moe is None else jax.tree.map(lambda *x: jnp.stack(x), *routings)
    return _loss(jnp.einsum("btd,dv->btv", hidden_BTD, params["unembedding"], precision="highest"), stacked)


@pytest.mark.parametrize(("family", "dispatch"), [("mistral", Dispatch()), ("mixtral", Dispatch(capacity_factor=0.75))])
def test_scan_equals_a_loop_over_layers(family, dispatch, monkeypatch):
    """Unrolled, as few layers are on a CPU, and not."""
    config = tiny.config(family, num_layers=3)
    params, tokens = jax.tree.map(jnp.asarray, tiny.params(config)), tiny.tokens(config, BATCH, LENGTH)
    looped = jax.jit(jax.value_and_grad(lambda p: _by_loop(config, p, tokens, dispatch)))(params)
    for most_unrolled in (3, 2):
        monkeypatch.setattr(transformer, "_MOST_UNROLLED", most_unrolled)
        _apply.clear_cache()
        objective = jax.value_and_grad(lambda p: _objective(config, p, tokens, dispatch=dispatch))
        assert ("while" in jax.jit(objective).lower(params).as_text()) == (most_unrolled < 3)
        chex.assert_trees_all_close(jax.jit(objective)(params), looped, rtol=1e-4, atol=1e-6)


def test_remat_changes_nothing():
    config, dispatch = tiny.config("mixtral"), Dispatch(capacity_factor=0.75)
    params, tokens = jax.tree.map(jnp.asarray, tiny.params(config)), tiny.tokens(config, BATCH, LENGTH)

    def run(remat):
        model = {"dispatch": dispatch, "execution": Execution(remat=remat)}
        return jax.jit(jax.value_and_grad(lambda p: _objective(config, p, tokens, **model)))(params)

    plain = run("none")
    for remat in ("products", "full", "offload"):
        chex.assert_trees_all_close(run(remat), plain, rtol=1e-5, atol=1e-6)


def test_remat_saves_memory():
    """Bytes that a gradient needs, of a model wide enough for activations to matter."""
    config = tiny.config("mistral", num_layers=6, hidden_dim=256)
    params, tokens = abstract_params(config), jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def temporary_bytes(remat):
        model = Transformer(config, Execution(remat=remat))
        gradient = jax.jit(jax.grad(lambda p, t: jnp.sum(model.apply({"params": p}, t, method="hidden")[0] ** 2)))
        return gradient.lower(nn.unbox(params), tokens).compile().memory_analysis().temp_size_in_bytes

    none, products, full = (temporary_bytes(remat) for remat in ("none", "products", "full"))
    assert full < products < none


@pytest.mark.parametrize(
    ("remat", "kept", "where"), [("products", 7, "device"), ("full", 1, "device"), ("offload", 1, "pinned_host")]
)
def test_what_remat_keeps(remat, kept, where):
    """Of each layer its input and, of its seven products, the six whose result is used again; in the stream's dtype."""
    config = tiny.config("mistral")
    model = Transformer(config, Execution(activation_dtype="bfloat16", product_dtype="bfloat16", remat=remat))
    params, tokens = tiny.params(config), tiny.tokens(config, BATCH, LENGTH)
    saved = jax.vjp(lambda p: model.apply({"params": p}, tokens, method="hidden")[0], params)[1]
    of_layers = [leaf for leaf in jax.tree.leaves(saved) if leaf.shape[:3] == (config.num_layers, BATCH, LENGTH)]
    assert [(leaf.dtype, leaf.sharding.memory_kind) for leaf in of_layers] == [(jnp.bfloat16, where)] * kept


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_bfloat16_is_close(family, dtypes):
    """A top-1 mixture would flip experts; the tokens compared are those whose routing is the same."""
    config = tiny.config(family, moe=MoEConfig(num_experts=4, experts_per_token=4) if family == "mixtral" else None)
    params, tokens = tiny.params(config), tiny.tokens(config, BATCH, LENGTH)
    exact = _logits(config, params, tokens)
    execution = Execution(activation_dtype=dtypes[0], product_dtype=dtypes[1])
    close = _logits(config, params, tokens, execution=execution)
    assert close.dtype == jnp.float32
    assert 1e-3 < np.linalg.norm(close - exact) / np.linalg.norm(exact) < 3e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_at_the_start(family):
    """Standard deviation 0.02 whatever the fan-in, experts too; norms one; layers and experts differ."""
    config = tiny.config(family, dim=64, hidden_dim=96, vocab_size=200)
    params = nn.unbox(jax.jit(lambda: init_params(config, jax.random.key(0)))())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            # The deviation of n draws is itself off by one part in sqrt(2 n): allow five of them.
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=5 / np.sqrt(2 * leaf.size))
            assert abs(np.mean(leaf)) < 5 * 0.02 / np.sqrt(leaf.size)
    gate = params["layers"]["feed_forward" if family == "mistral" else "moe"]["gate"]
    slices = np.asarray(gate).reshape(-1, *gate.shape[-2:])
    assert len({part.tobytes() for part in slices}) == len(slices)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_count_parameters(family):
    """D = 16, V = 40: embeddings 2 * 640, the last norm 16. A layer: attention 16 * 8 * (4 + 2 + 2 + 4), two norms,
    and 3 * 16 * 24 for each feed-forward, with a router of 16 * 4 for four experts of which two are active."""
    shared = 2 * 640 + 16 + 2 * (16 * 8 * 12 + 2 * 16)
    total, active = (1, 1) if family == "mistral" else (4, 2)
    router = 0 if family == "mistral" else 2 * 64
    counts = count_parameters(tiny.config(family))
    assert counts == (shared + router + 2 * 1152 * total, shared + router + 2 * 1152 * active)


def test_tied_embeddings():
    config = tiny.config("mistral", tie_embeddings=True)
    params = tiny.params(config)
    assert "unembedding" not in params
    untied = params | {"unembedding": params["embedding"].T}
    tokens = tiny.tokens(config, BATCH, LENGTH)
    expected = _logits(tiny.config("mistral"), untied, tokens)
    np.testing.assert_allclose(_logits(config, params, tokens), expected, atol=1e-5)


@pytest.fixture(scope="module")
def huggingface():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from oracles import huggingface

    return huggingface


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
        ("mistral", {"tie_embeddings": True}),
        ("mixtral", {"sliding_window": None, "rope_theta": 1e6}),
        ("mixtral", {"sliding_window": 6, "num_layers": 4, "norm_eps": 1e-2}),
    ],
)
def test_logits_equal_transformers(huggingface, family, changes):
    """float32, longer than the window, to a ten-thousandth of the logits' deviation."""
    config = tiny.config(family, **changes)
    params, tokens = tiny.params(config), tiny.tokens(config, 3, 40)
    theirs = huggingface.logits(huggingface.to_huggingface(config, params), tokens)
    ours = _logits(config, params, tokens, execution=Execution(attention_chunk=16))
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(("mistral", "float32"), ("mixtral", "bfloat16"))
    def test_transformer(self, family, dtype):
        config = tiny.config(family)
        model = Transformer(config, Execution(activation_dtype=dtype, product_dtype=dtype))
        variables, tokens = {"params": tiny.params(config)}, tiny.tokens(config, BATCH, LENGTH)
        output = self.variant(model.apply)(variables, tokens, jnp.ones((BATCH, LENGTH), jnp.int32))
        chex.assert_shape(output.logits_BTV, (BATCH, LENGTH, config.vocab_size))
        chex.assert_type(output.logits_BTV, jnp.float32)
        hidden, routing = self.variant(partial(model.apply, method="hidden"))(variables, tokens)
        chex.assert_shape(hidden, (BATCH, LENGTH, config.dim))
        chex.assert_type(hidden, dtype)
        chex.assert_trees_all_equal_shapes(routing, output.routing)
        if family == "mistral":
            assert routing is None
        else:
            chex.assert_shape(routing.assigned_E, (config.num_layers, 4))
            chex.assert_shape(jax.tree.leaves(routing)[1:], (config.num_layers,))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*tiny.FAMILIES)
    def test_block(self, family):
        config = tiny.config(family)
        own = jax.tree.map(lambda leaf: leaf[0], tiny.params(config)["layers"])
        position = jnp.zeros((BATCH, LENGTH), jnp.int32)
        context = Context(rotation(position, config.head_dim, 1e4), jnp.ones((BATCH, LENGTH), bool))
        x_BTD = jnp.ones((BATCH, LENGTH, config.dim))
        y_BTD, (routing, cache) = self.variant(Block(config).apply)({"params": own}, x_BTD, context)
        chex.assert_equal_shape([x_BTD, y_BTD])
        assert cache is None
        assert (routing is None) == (family == "mistral")

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*tiny.FAMILIES)
    def test_init_params(self, family):
        config = tiny.config(family)
        params = self.variant(lambda key: init_params(config, key))(jax.random.key(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(config))
        chex.assert_trees_all_equal_structs(nn.unbox(params), tiny.params(config))
