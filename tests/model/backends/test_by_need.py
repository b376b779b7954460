"""Experts by need: the dense oracle's function, and no expert read that nobody chose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Execution, MoEConfig
from mixtral_jax.inference.decode import forward
from mixtral_jax.inference.weights import prepare
from mixtral_jax.model.backends import few_rows
from mixtral_jax.model.backends.by_need import block_on_cpu, by_need
from mixtral_jax.model.backends.few_rows import OPTIONS, ByOutput, by_output
from mixtral_jax.model.backends.half_bytes import half_bytes
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.cache import empty_cache
from mixtral_jax.model.feed_forward import SwiGLU, swiglu
from mixtral_jax.sharding import chips

EXPERTS, DIM, HIDDEN = 4, 8, 12


def _experts(seed=0):
    """Their weights are those of int4 with a scale of a quarter."""
    rng = np.random.default_rng(seed)
    shapes = ((DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM))
    return tuple(
        SwiGLU(*(jnp.asarray(rng.integers(-8, 8, s) / 4, jnp.float32) for s in shapes)) for _ in range(EXPERTS)
    )


def _as_they_are(experts):
    return experts


def _by_output(experts):
    return tuple(SwiGLU(*(by_output(weight, 1) for weight in each)) for each in experts)


def _in_half_bytes(experts):
    def lying(weight):
        scale = np.where(np.isnan(weight[:2]), np.float32(np.nan), np.float32(0.25))  # of two groups
        values = (np.nan_to_num(weight) * 4).astype("int4")
        return jax.tree.map(jnp.asarray, half_bytes(Quantized(values, scale), 1))

    return jax.tree.map(lying, experts)


@pytest.fixture(params=[_as_they_are, _by_output, _in_half_bytes])
def lay(request):
    """How the experts' matrices lie."""
    return request.param


def _dense(x, expert, gate, mask, experts):
    y = np.zeros(x.shape)
    for n in np.flatnonzero(mask):
        for a, g in zip(expert[n], gate[n], strict=True):
            w = [np.asarray(each, np.float64) for each in experts[a]]
            enter = x[n] @ w[0]
            y[n] += g * ((enter / (1 + np.exp(-enter)) * (x[n] @ w[1])) @ w[2])
    return y


def _choices(tokens, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, DIM)).astype(np.float32)
    expert = np.array([rng.permutation(EXPERTS)[:2] for _ in range(tokens)], np.int32)
    gate = rng.dirichlet([1, 1], tokens).astype(np.float32)
    return x, expert, gate, rng.random(tokens) > 0.2


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 32, 33, 64, 65, 700])
def test_equals_the_dense_form(tokens, lay):
    x, expert, gate, mask = _choices(tokens)
    y = jax.jit(by_need, static_argnums=5)(x, expert, gate, mask, lay(_experts()), Execution())
    np.testing.assert_allclose(y, _dense(x, expert, gate, mask, _experts()), atol=2e-4)


@pytest.mark.parametrize("tokens", [6, 8, 32])
def test_all_choose_the_same_experts(tokens, lay):
    """More rows than an expert takes at a time, and none for the others."""
    x, expert, gate, mask = _choices(tokens)
    expert[:] = [2, 0]
    y = jax.jit(by_need, static_argnums=5)(x, expert, gate, mask, lay(_experts()), Execution())
    np.testing.assert_allclose(y, _dense(x, expert, gate, mask, _experts()), atol=2e-4)


@pytest.mark.parametrize("tokens", [3, 8])
def test_a_row_is_bitwise_the_same_whatever_the_others_choose(tokens, lay):
    x, expert, gate, _ = _choices(tokens)
    step = jax.jit(by_need, static_argnums=5, compiler_options=OPTIONS)
    others = np.random.default_rng(1).permuted(expert[1:])
    found = []
    for neighbours, mask in ((expert[1:], True), (others, True), (np.roll(expert[1:], 3, axis=0), False)):
        chosen = np.concatenate([expert[:1], neighbours])
        real = np.array([True] + (tokens - 1) * [mask])
        found.append(step(x, chosen, gate, real, lay(_experts()), Execution())[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("tokens", [1, 2, 8, 300])
def test_an_expert_that_no_real_token_chose_is_not_read(tokens, lay):
    """Its weights are NaN, and so would be whatever had touched them."""
    x, expert, gate, mask = _choices(tokens)
    mask[(expert == 3).any(axis=1)] = False
    experts = _experts()
    poisoned = (*experts[:3], jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), experts[3]))
    y = jax.jit(by_need, static_argnums=5)(x, expert, gate, mask, lay(poisoned), Execution())
    np.testing.assert_allclose(y, _dense(x, expert, gate, mask, experts), atol=2e-4)


@pytest.mark.parametrize("tokens", [2, 8])
def test_a_row_is_what_it_is_though_an_expert_of_another_overflows(tokens, lay):
    x, expert, gate, _ = _choices(tokens)
    expert[0], expert[1:] = [0, 1], [3, 2]
    experts = _experts()
    overflowing = (*experts[:3], jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), experts[3]))
    y = jax.jit(by_need, static_argnums=5)(x, expert, gate, np.ones(tokens, bool), lay(overflowing), Execution())
    np.testing.assert_allclose(y[:1], _dense(x[:1], expert[:1], gate[:1], np.ones(1), experts), atol=2e-4)
    assert np.isnan(y[1:]).all()


@pytest.mark.parametrize(("lay", "room"), [(_by_output, 3), (_in_half_bytes, 4)])
def test_tokens_that_a_block_has_room_for_are_not_sorted(lay, room):
    for tokens in (room, room + 1):
        inputs = (*_choices(tokens), lay(_experts()), Execution())
        loops = "while" in str(jax.make_jaxpr(by_need, static_argnums=5)(*inputs))
        assert loops == (tokens > room)


@pytest.mark.parametrize(
    ("units", "held", "multiplied", "inputs", "choices", "block"),
    [
        (True, "bfloat16", "bfloat16", 512, 16, 2),
        (True, "bfloat16", "bfloat16", 1024, 16, 4),
        (True, "bfloat16", "bfloat16", 512, 17, 16),
        (True, "bfloat16", "bfloat16", 512, 2048, 288),
        (True, "int8", "bfloat16", 512, 128, 3),
        (True, "bfloat16", "float32", 512, 128, 3),
        (False, "bfloat16", "bfloat16", 2048, 128, 4),
        (False, "float32", "float32", 512, 128, 3),
        (False, "float32", "float32", 512, 129, 32),
        (False, "float32", "float32", (1 << 18) - 1, 33, 4),
        (False, "float32", "float32", 1 << 18, 32, 4),
        (False, "float32", "float32", 1 << 18, 33, 16),
    ],
)
def test_rows_that_an_expert_takes_at_a_time(monkeypatch, units, held, multiplied, inputs, choices, block):
    """On matrix units few at a time only up to two choices an expert, and of large matrices in float32 up to four."""
    monkeypatch.setattr(chips, "has_amx", lambda: units)
    gate = ByOutput(jnp.zeros((4, inputs), held), 1)
    experts = (SwiGLU(gate, gate, gate),) * 8
    assert block_on_cpu(choices, experts, Execution(product_dtype=multiplied)) == block


@pytest.mark.parametrize(("as_they_lie", "units"), [(True, False), (False, False), (False, True)])
def test_a_step_reads_the_weights_of_two_experts_a_layer(monkeypatch, as_they_lie, units):
    """Counted where a chosen expert's product runs, in the compiled step: for one text, two experts of eight a layer;
    for a few in float32 two each, one text after another; where matrices lie by output, those that any of them chose,
    for nine some twice, but on matrix units; for one that has ended, none."""
    monkeypatch.setattr(chips, "has_amx", lambda: units)
    # No other test has traced a layer of this one.
    norm_eps = 1.6e-5 if units else 1.5e-5
    config = tiny.config("mixtral", num_layers=3, norm_eps=norm_eps, moe=MoEConfig(num_experts=8, experts_per_token=2))
    execution = Execution(product_dtype="float32" if as_they_lie else "bfloat16")
    an_expert = 3 * config.dim * config.hidden_dim * (4 if as_they_lie else 2)
    monkeypatch.setattr(few_rows, "are_for_this_host", lambda: not as_they_lie)
    weights = prepare(tiny.params(config), config, execution)
    read = []

    def counted(x, expert, execution):
        jax.debug.callback(lambda: read.append(sum(leaf.nbytes for leaf in jax.tree.leaves(expert))))
        return swiglu(x, expert, execution)

    monkeypatch.setattr("mixtral_jax.model.backends.by_need.swiglu", counted)
    step = jax.jit(lambda *inputs: forward(weights, *inputs, config, execution))

    def bytes_of_a_step(finished):
        batch = len(finished)
        cache = empty_cache(config, batch, 16, "float32")
        read.clear()
        jax.block_until_ready(step(jnp.arange(batch)[:, None], ~jnp.array(finished)[:, None], cache))
        jax.effects_barrier()
        return sum(read)

    assert bytes_of_a_step([False]) == config.num_layers * 2 * an_expert
    assert bytes_of_a_step([True]) == 0
    for texts, most in ((4, 8), (9, 8 if units else 10)):
        several = bytes_of_a_step([False] * texts) / (config.num_layers * an_expert)
        assert several == 2 * texts if as_they_lie else 2 < several <= most
    assert bytes_of_a_step([False] + 8 * [True]) == config.num_layers * 2 * an_expert
    assert bytes_of_a_step([False, True, True, True]) == config.num_layers * 2 * an_expert
