"""The mixture against a loop over tokens and against one-hot einsums: no drops, drops, padding, empty experts."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from oracles import mixture, tiny

from mixtral_jax.config import Dispatch, Execution, MoEConfig
from mixtral_jax.model.balance import RouterTraining
from mixtral_jax.model.feed_forward import SwiGLU, swiglu
from mixtral_jax.model.moe import MoE, apply_experts
from mixtral_jax.model.routing import route
from mixtral_jax.sharding.rules import TRAINING

CONFIG = tiny.config("mixtral")
EXPERTS, BATCH, LENGTH = 4, 3, 12
DROPLESS = Dispatch()
AMPLE = Dispatch(capacity_factor=2.0)  # k / E = 1 / 2: every token of a group could choose the same experts
TIGHT = Dispatch(capacity_factor=0.75)
DISPATCHES = {
    "dropless": DROPLESS,
    "ample": AMPLE,
    "tight": TIGHT,
    "tight, groups of 4": Dispatch(capacity_factor=0.75, group_size=4),
    "tight, by choice": Dispatch(capacity_factor=0.75, priority="choice"),
    "tight, by probability": Dispatch(capacity_factor=0.75, priority="probability"),
}


def _params(seed=0):
    """One layer's."""
    return jax.tree.map(lambda x: jnp.asarray(x[0]), tiny.params(CONFIG, seed)["layers"]["moe"])


def _x(length=LENGTH, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, length, CONFIG.dim)), jnp.float32)


def _mask():
    """Padding at the end, in the middle, and none."""
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, 9:], mask[1, 2:4] = False, False
    return jnp.asarray(mask)


@partial(jax.jit, static_argnums=(3, 4))
def _apply(params, x_BTD, mask_BT, dispatch=DROPLESS, config=CONFIG):
    return MoE(config, Execution(), dispatch, TRAINING).apply({"params": params}, x_BTD, mask_BT)


def _routing(params, x_BTD, choices=2):
    return route(jnp.einsum("btd,de->bte", x_BTD, params["router"], precision="highest"), choices)


def _experts(params):
    return params["gate"], params["up"], params["down"]


def _leaning(params, experts, x_BTD):
    """Parameters and inputs by which the router sends every token to these experts, the first first."""
    router_DE = np.zeros((CONFIG.dim, EXPERTS), np.float32)
    router_DE[0, experts] = 40.0 - np.arange(len(experts))
    return params | {"router": jnp.asarray(router_DE)}, x_BTD.at[..., 0].set(1.0)


@pytest.mark.parametrize("name", DISPATCHES)
def test_equals_a_loop_over_tokens(name):
    params, x, mask, dispatch = _params(), _x(), _mask(), DISPATCHES[name]
    y, stats = _apply(params, x, mask, dispatch)
    expert, gate = mixture.route(np.einsum("btd,de->bte", np.float64(x), np.float64(params["router"])), 2)
    kept = mixture.served(expert, np.asarray(mask), EXPERTS, dispatch, gate)
    np.testing.assert_allclose(y, mixture.mixture(x, expert, gate, kept, _experts(params)), atol=1e-5)
    np.testing.assert_array_equal(y[~mask], 0)
    dropped = (~kept & np.asarray(mask)[..., None]).sum()
    assert stats.dropped == dropped
    assert (dropped > 0) == name.startswith("tight")


@pytest.mark.parametrize("dispatch", [DROPLESS, AMPLE], ids=["dropless", "ample"])
def test_equal_experts_are_a_dense_layer(dispatch):
    params = _params()
    weights = SwiGLU(*(w[:1] for w in _experts(params)))
    equal = params | {name: jnp.repeat(w, EXPERTS, 0) for name, w in weights._asdict().items()}
    y, _ = _apply(equal, _x(), jnp.ones((BATCH, LENGTH), bool), dispatch)
    np.testing.assert_allclose(y, swiglu(_x(), SwiGLU(*(w[0] for w in weights)), Execution()), atol=1e-5)


@pytest.mark.parametrize("name", DISPATCHES)
def test_values_and_gradients_equal_one_hot_einsums(name):
    """Gradients of the router, through the gates, of the experts and of x."""
    dispatch, mask = DISPATCHES[name], _mask()
    cotangent = _x(seed=2)
    chosen = _routing(_params(), _x())
    kept = mixture.served(*map(np.asarray, (chosen.expert_BTA, mask)), EXPERTS, dispatch, np.asarray(chosen.gate_BTA))

    def gathered(params, x):
        return jnp.sum(_apply(params, x, mask, dispatch)[0] * cotangent)

    def einsums(params, x):
        routing = _routing(params, x)
        y = mixture.einsum_mixture(x, routing.expert_BTA, routing.gate_BTA, kept, _experts(params), BATCH * LENGTH)
        return jnp.sum(y * cotangent)

    actual, expected = (jax.jit(jax.value_and_grad(form, (0, 1)))(_params(), _x()) for form in (gathered, einsums))
    chex.assert_trees_all_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_an_expert_without_tokens_has_exactly_no_gradient():
    params, x = _leaning(_params(), [2, 0], _x())
    mask = jnp.ones((BATCH, LENGTH), bool)
    for dispatch in (DROPLESS, AMPLE, TIGHT):
        gradients = jax.jit(jax.grad(lambda p, d=dispatch: jnp.sum(_apply(p, x, mask, d)[0] ** 2)))(params)
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(gradients[name][np.array([1, 3])], 0)
            assert np.all(np.any(gradients[name][np.array([0, 2])] != 0, axis=(1, 2)))


@pytest.mark.parametrize(("dispatch", "served"), [(DROPLESS, 12), (AMPLE, 6), (Dispatch(capacity_factor=4.0), 12)])
def test_all_tokens_to_one_expert(dispatch, served):
    """k = 1 of 4, 12 tokens a sequence: a capacity factor of 2 gives an expert ceil(2 * 12 / 4) = 6 places."""
    config = tiny.config("mixtral", moe=MoEConfig(num_experts=EXPERTS, experts_per_token=1))
    params, x = _leaning(_params(), [3], _x())
    y, stats = _apply(params, x, jnp.ones((BATCH, LENGTH), bool), dispatch, config)
    dense = swiglu(x, SwiGLU(*(w[3] for w in _experts(params))), Execution())
    np.testing.assert_allclose(y[:, :served], dense[:, :served], atol=1e-5)
    np.testing.assert_array_equal(y[:, served:], 0)
    np.testing.assert_array_equal(stats.assigned_E, [0, 0, 0, BATCH * LENGTH])
    assert stats.dropped == BATCH * (LENGTH - served)


def test_drops_by_hand():
    """All 12 tokens want experts 2 and 0; C = ceil(0.75 * 2 * 12 / 4) = 5: tokens 0 to 4 get both either way."""
    params, x = _leaning(_params(), [2, 0], _x())
    mask = jnp.ones((BATCH, LENGTH), bool)
    exact, _ = _apply(params, x, mask)
    for dispatch in (TIGHT, DISPATCHES["tight, by choice"]):
        y, stats = _apply(params, x, mask, dispatch)
        np.testing.assert_allclose(y[:, :5], exact[:, :5], atol=1e-6)
        np.testing.assert_array_equal(y[:, 5:], 0)
        assert stats.dropped == BATCH * 2 * 7


@pytest.mark.parametrize("name", ["dropless", "tight"])
def test_padding_at_the_end_changes_nothing(name):
    """Ten tokens, and the same with two of padding."""
    dispatch, mask = DISPATCHES[name], jnp.arange(LENGTH)[None].repeat(BATCH, 0) < 10

    @jax.jit
    def run(params, x, mask):
        def loss(params, x):
            y, stats = _apply(params, x, mask, dispatch)
            return jnp.sum(y[:, :10] ** 2) + stats.balance_loss + stats.z_loss, (y[:, :10], stats)

        gradients, aux = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return aux, gradients[0], gradients[1][:, :10]

    padded = run(_params(), _x(), mask)
    chex.assert_trees_all_close(padded, run(_params(), _x()[:, :10], mask[:, :10]), rtol=1e-5, atol=1e-5)
    other_padding = run(_params(), jnp.where(mask[..., None], _x(), 100.0), mask)
    chex.assert_trees_all_close(padded, other_padding, rtol=1e-6, atol=1e-6)


def _changed_before(dispatch, at):
    """Whether changing tokens from `at` on changes an earlier token's output."""
    mask = jnp.ones((BATCH, LENGTH), bool)
    x, other = (np.array(_x(seed=seed)) for seed in (1, 7))
    other[:, :at] = x[:, :at]
    before, after = (np.asarray(_apply(_params(), each, mask, dispatch)[0]) for each in (x, other))
    assert np.any(before[:, at:] != after[:, at:])
    return bool(np.any(before[:, :at] != after[:, :at]))


@pytest.mark.parametrize("at", range(1, LENGTH))
def test_priority_by_position_is_causal_in_spite_of_drops(at):
    assert not _changed_before(TIGHT, at)


@pytest.mark.parametrize("name", ["tight, by choice", "tight, by probability"])
def test_other_priorities_are_not_causal(name):
    """Or the test above would show nothing: a later token takes the place of an earlier one's second choice."""
    assert any(_changed_before(DISPATCHES[name], at) for at in range(1, LENGTH))


@jax.jit
def _jittered(key, x_BTD):
    layer = MoE(CONFIG, Execution(), DROPLESS, TRAINING, RouterTraining(jitter=0.3))
    rngs = {} if key is None else {"jitter": key}
    return layer.apply({"params": _params()}, x_BTD, jnp.ones((BATCH, LENGTH), bool), rngs=rngs)


def test_jitter_is_of_the_routers_input_alone_and_its_keys():
    """Without a key, as in validation and inference, there is none. With one the router alone reads noisy tokens."""
    x, key = _x(), jax.random.key(3)
    (plain, _), (without, _) = _apply(_params(), x, jnp.ones((BATCH, LENGTH), bool)), _jittered(None, x)
    np.testing.assert_allclose(without, plain, atol=1e-6)
    (first, stats), (again, _), (other, _) = (_jittered(each, x) for each in (key, key, jax.random.key(4)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    own = MoE(CONFIG, Execution(), DROPLESS, TRAINING).bind({}, rngs={"jitter": key}).make_rng("jitter")
    routing = _routing(_params(), x * jax.random.uniform(own, x.shape, jnp.float32, 0.7, 1.3))
    kept = np.ones((BATCH, LENGTH, 2), bool)
    expected = mixture.mixture(x, *map(np.asarray, (routing.expert_BTA, routing.gate_BTA)), kept, _experts(_params()))
    np.testing.assert_allclose(first, expected, atol=1e-5)
    np.testing.assert_allclose(stats.z_loss, jnp.sum(jax.nn.logsumexp(routing.logits_BTE, axis=-1) ** 2), rtol=1e-5)


@pytest.mark.parametrize("dispatch", [DROPLESS, TIGHT], ids=["dropless", "tight"])
def test_a_row_does_not_depend_on_the_others(dispatch):
    mask = jnp.ones((BATCH, LENGTH), bool)
    others = _x(seed=5).at[0].set(_x()[0])
    np.testing.assert_array_equal(
        _apply(_params(), _x(), mask, dispatch)[0][0], _apply(_params(), others, mask, dispatch)[0][0]
    )


@pytest.mark.parametrize("dispatch", [DROPLESS, TIGHT], ids=["dropless", "tight"])
def test_bfloat16_is_close(dispatch):
    execution = Execution(activation_dtype="bfloat16", product_dtype="bfloat16")
    routing, mask = _routing(_params(), _x()), jnp.ones((BATCH, LENGTH), bool)
    inputs = _x(), routing.expert_BTA, routing.gate_BTA, mask, SwiGLU(*_experts(_params()))
    (exact, kept), (close, kept_too) = (
        jax.jit(partial(apply_experts, num_experts=EXPERTS, dispatch=dispatch, execution=e))(*inputs)
        for e in (Execution(), execution)
    )
    np.testing.assert_array_equal(kept, kept_too)
    assert 1e-4 < np.linalg.norm(close - exact) / np.linalg.norm(exact) < 2e-2


class ShapeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((DROPLESS, "float32"), (TIGHT, "bfloat16"))
    def test_mixture(self, dispatch, dtype):
        layer = MoE(CONFIG, Execution(activation_dtype=dtype), dispatch, TRAINING)
        x, mask = _x().astype(dtype), _mask()
        y, stats = self.variant(layer.apply)({"params": _params()}, x, mask)
        chex.assert_equal_shape([x, y])
        chex.assert_type(y, dtype)
        chex.assert_shape(stats.assigned_E, (EXPERTS,))
        variables = jax.eval_shape(layer.init, jax.random.key(0), x, mask)
        shapes = {name: leaf.value.shape for name, leaf in variables["params"].items()}
        assert shapes == {"router": (16, 4), "gate": (4, 16, 24), "up": (4, 16, 24), "down": (4, 24, 16)}

    @chex.variants(with_jit=True, without_jit=True)
    def test_apply_experts(self):
        routing = _routing(_params(), _x())
        serve = partial(apply_experts, num_experts=EXPERTS, dispatch=TIGHT, execution=Execution())
        y, kept = self.variant(serve)(_x(), routing.expert_BTA, routing.gate_BTA, _mask(), SwiGLU(*_experts(_params())))
        chex.assert_shape([y, kept], [(BATCH, LENGTH, 16), (BATCH, LENGTH, 2)])
        chex.assert_type([y, kept], [float, bool])
