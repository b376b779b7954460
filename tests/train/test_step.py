"""The training step: the same on every mesh, for any accumulation, padded or packed; and what it does with a NaN."""

import dataclasses
import itertools
import math
from functools import cache
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles import mixture, tiny
from oracles.communication import assert_tokens_travel_and_experts_stay

from mixtral_jax.config import Dispatch, Execution, MoEConfig
from mixtral_jax.model.routing import Statistics
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.planning.hlo import collectives
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mixtral_jax.train.packing import Batch, empty_row, stack_rows
from mixtral_jax.train.state import TrainState, abstract_state, init_state
from mixtral_jax.train.step import compute_losses, gradients, make_step, routing_metrics, totals

# Adam's first step divides a gradient by its own size: with a small epsilon, rounding noise by rounding noise.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, epsilon=1e-5)
STEPS = 100
CONFIG = tiny.config(
    "mixtral",
    dim=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    vocab_size=56,
    sliding_window=12,
    moe=MoEConfig(num_experts=8, experts_per_token=2),
)
BATCH, LENGTH = 32, 32
# Few enough rows a round that shards of experts take several.
DROPLESS = Dispatch(exchange_rows=48)
TIGHT = Dispatch(capacity_factor=1.0, group_size=4)
EXECUTION = Execution(attention_chunk=16)
LOSSES = LossConfig(balance=0.1, z=0.01, chunk=8)


def _batch(config=CONFIG, batch=BATCH, length=LENGTH):
    """Two documents a row; of several, one row is cut short and one is padding alone."""
    tokens, targets = (tiny.tokens(config, batch, length, seed) for seed in (1, 2))
    segment = np.ones((batch, length), np.int32)
    segment[:, length // 2 + 3 :] = 2
    segment[1:2, length - 7 :] = 0
    segment[2:3] = 0
    weight = (segment > 0).astype(np.float32)
    weight[:, length // 2 + 2] = 0
    position = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return Batch(tokens, targets, segment, position, weight)


class Run(NamedTuple):
    """What a step did, on the host, and the program that did it."""

    params: dict
    metrics: dict
    gradient: dict
    program: str


# An optimizer that keeps the gradient as its state and passes it on.
KEEP = optax.GradientTransformation(init=lambda params: params, update=lambda gradient, *_: (gradient, gradient))
KEPT = optax.chain(KEEP, make_optimizer(OPTIMIZER, STEPS))


class Case(NamedTuple):
    """What is run besides the mesh."""

    dispatch: Dispatch
    window: int | None = 12
    collapsed: bool = False
    """Whether all tokens choose experts 0 and 1, and none the others."""

    @property
    def config(self):
        return dataclasses.replace(CONFIG, sliding_window=self.window)

    def params(self):
        params = tiny.params(self.config)
        if self.collapsed:
            params = jax.tree.map(np.copy, params)
            params["layers"]["moe"]["router"][:] = 0  # a tie, which goes to the lowest
        return params


@cache
def _first_state(case):
    """On one device: a program that makes it on a mesh takes as long to compile as the step."""
    params = case.params()
    return TrainState(jnp.zeros((), jnp.int32), params, KEPT.init(params))


def _run(mesh_config, case, accumulation=1, remat="none"):
    devices = math.prod(mesh_config.shape) if -1 not in mesh_config.shape else 1
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    execution = dataclasses.replace(EXECUTION, remat=remat)
    model = Transformer(case.config, execution, case.dispatch)
    _, shardings = abstract_state(case.config, KEPT, mesh, TRAINING)
    state = jax.device_put(_first_state(case), shardings)
    layout = NamedSharding(mesh, TRAINING.use(("batch", "length")))
    batch = jax.tree.map(lambda x: jax.device_put(x, layout), _batch())
    step = make_step(model, LOSSES, KEPT, learning_rate(OPTIMIZER, STEPS), accumulation)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))
        compiled = jitted.lower(state, batch).compile()
        after, metrics = compiled(state, batch)
    return Run(*jax.device_get((after.params, metrics, after.optimizer[0])), compiled.as_text())


@cache
def _one_device(case):
    return _run(MeshConfig(), case)


def _assert_close_in_norm(actual, expected, tolerance=1e-5):
    def check(path, x, y):
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < tolerance, (jax.tree_util.keystr(path), error)

    jax.tree_util.tree_map_with_path(check, actual, expected)


def _mesh(**axes):
    return MeshConfig(**({"data": 1} | axes))


DROPS, ALL, UNWINDOWED = Case(TIGHT), Case(DROPLESS), Case(DROPLESS, window=None)
# Each axis alone, in pairs, and in triples.
MESHES = [
    (_mesh(data=8), DROPS, 1, "none"),
    (_mesh(fsdp=8), DROPS, 1, "full"),
    (_mesh(fsdp=8), ALL, 4, "none"),
    (_mesh(expert=8), DROPS, 4, "none"),
    (_mesh(expert=8), ALL, 1, "full"),
    (_mesh(expert=8), Case(DROPLESS, collapsed=True), 1, "none"),
    (_mesh(context=8), DROPS, 1, "none"),
    (_mesh(context=8), UNWINDOWED, 4, "full"),
    (_mesh(tensor=4), DROPS, 1, "none"),
    (_mesh(tensor=4), ALL, 1, "full"),
    (_mesh(data=2, fsdp=4), ALL, 1, "none"),
    (_mesh(data=4, expert=2), ALL, 4, "none"),
    (_mesh(data=2, context=4), DROPS, 1, "products"),
    (_mesh(data=2, tensor=4), ALL, 1, "none"),
    (_mesh(fsdp=4, expert=2), DROPS, 4, "full"),
    (_mesh(fsdp=2, expert=4), ALL, 1, "products"),
    (_mesh(fsdp=4, context=2), ALL, 1, "full"),
    (_mesh(fsdp=2, tensor=4), DROPS, 1, "full"),
    (_mesh(fsdp=2, expert=4), ALL, 1, "offload"),
    (_mesh(expert=4, context=2), ALL, 1, "none"),
    (_mesh(expert=2, context=4), Case(TIGHT, collapsed=True), 1, "full"),
    (_mesh(expert=4, tensor=2), DROPS, 1, "none"),
    (_mesh(expert=4, tensor=2), Case(DROPLESS, window=None, collapsed=True), 1, "full"),
    (_mesh(context=4, tensor=2), ALL, 1, "none"),
    (_mesh(data=2, fsdp=2, expert=2), DROPS, 4, "none"),
    (_mesh(data=2, expert=2, context=2), UNWINDOWED, 1, "none"),
    (_mesh(data=2, context=2, tensor=2), DROPS, 1, "none"),
    (_mesh(fsdp=2, expert=2, context=2), ALL, 4, "full"),
    (_mesh(fsdp=2, expert=2, tensor=2), ALL, 1, "products"),
    (_mesh(expert=2, context=2, tensor=2), DROPS, 1, "full"),
]


def _name(mesh, case, accumulation, remat):
    axes = " ".join(f"{axis}={mesh.size(axis)}" for axis in MESH_AXES if mesh.size(axis) > 1)
    form = "drops" if case.dispatch is TIGHT else "dropless"
    more = "unwindowed" * (case.window is None) + "collapsed" * case.collapsed
    return f"{axes} {form} {more} accumulation={accumulation} remat={remat}"


def test_the_meshes_are_many():
    assert len({mesh for mesh, *_ in MESHES}) >= 20


@pytest.mark.parametrize(
    ("mesh_config", "case", "accumulation", "remat"), [pytest.param(*each, id=_name(*each)) for each in MESHES]
)
def test_equals_one_device(mesh_config, case, accumulation, remat):
    """And moves nothing that it need not."""
    run, one = _run(mesh_config, case, accumulation, remat), _one_device(case)
    for key in ("loss", "balance_loss", "grad_norm", "router_entropy"):
        np.testing.assert_allclose(run.metrics[key], one.metrics[key], rtol=1e-5)
    np.testing.assert_allclose(
        run.metrics["z_loss"], one.metrics["z_loss"], rtol=3e-5
    )  # a sum of a thousand like terms
    for key in ("dropped_fraction", "expert_load_max", "expert_load_min", "expert_load"):
        np.testing.assert_allclose(run.metrics[key], one.metrics[key], rtol=1e-6)
    assert (run.metrics["dropped_fraction"] > 0.05) == (case.dispatch is TIGHT)
    assert (run.metrics["expert_load_min"] == 0) == case.collapsed
    _assert_close_in_norm(run.gradient, one.gradient)
    _assert_close_in_norm(run.params, one.params)
    _assert_moved(run.params, case.params())
    if case.collapsed:
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(run.gradient["layers"]["moe"][name][:, 2:], 0)
    found = collectives(run.program, make_mesh(mesh_config, jax.devices()[: math.prod(mesh_config.shape)]))
    assert_tokens_travel_and_experts_stay(found, case.config, mesh_config, BATCH * LENGTH // 8 // accumulation)


def test_128k_tokens_over_eight_shards():
    """A step of training on a text of 131,072 tokens, W = 64: eight shards of it give what one device gives."""
    config = tiny.config("mixtral", num_layers=1, sliding_window=64)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    runs = []
    for axes in ({}, {"context": 8}):
        mesh = make_mesh(_mesh(**axes), jax.devices()[: axes.get("context", 1)])
        state = init_state(config, optimizer, mesh, TRAINING, seed=0)
        layout = NamedSharding(mesh, TRAINING.use(("batch", "length")))
        batch = jax.tree.map(lambda x, layout=layout: jax.device_put(x, layout), _batch(config, 1, 1 << 17))
        model = Transformer(config, Execution(attention_chunk=64, remat="full"), Dispatch(capacity_factor=1.25))
        step = make_step(model, LossConfig(chunk=512), optimizer, learning_rate(OPTIMIZER, STEPS))
        with jax.set_mesh(mesh):
            runs.append(jax.device_get(jax.jit(step)(state, batch)[1]))
    one, shards = runs
    for key in ("loss", "balance_loss", "grad_norm", "dropped_fraction"):
        np.testing.assert_allclose(shards[key], one[key], rtol=1e-5)
    assert one["dropped_fraction"] > 0


def _assert_moved(after, before):
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.linalg.norm(new - old) > 1e-4 * np.linalg.norm(old)


@cache
def _gradient_of(config, dispatch, losses, accumulation):
    model = Transformer(config, EXECUTION, dispatch)
    return jax.jit(lambda params, batch: gradients(model, losses, params, batch, accumulation))


SMALL = tiny.config("mixtral", sliding_window=12)


def _gradient(batch, dispatch=TIGHT, losses=LOSSES, accumulation=1):
    return jax.device_get(_gradient_of(SMALL, dispatch, losses, accumulation)(tiny.params(SMALL), batch))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation):
    """Balance loss and drops included."""
    plain, accumulated = _gradient(_batch(SMALL)), _gradient(_batch(SMALL), accumulation=accumulation)
    chex.assert_trees_all_close(accumulated[1], plain[1], rtol=1e-5)
    _assert_close_in_norm(accumulated[0], plain[0])


@pytest.mark.parametrize("dispatch", [TIGHT, DROPLESS], ids=["tight", "dropless"])
def test_padding_changes_nothing(dispatch):
    """Sixteen more places in each row, and two more rows, of arbitrary tokens."""
    batch = _batch(SMALL)
    padding = [(0, 2), (0, 16)]
    fill = {"tokens": 5, "targets": 3, "position": 9}
    padded = Batch(*(np.pad(x, padding, constant_values=fill.get(n, 0)) for n, x in batch._asdict().items()))
    chex.assert_shape(padded.tokens, (BATCH + 2, LENGTH + 16))
    plain, with_padding = (_gradient(each, dispatch) for each in (batch, padded))
    chex.assert_trees_all_close(with_padding[1], plain[1], rtol=1e-5)
    _assert_close_in_norm(with_padding[0], plain[0])


def test_a_packed_row_equals_its_documents_apart():
    """Cross-entropy alone, since the balance loss is a row's; dropless, since packing changes groups."""
    batch = jax.tree.map(lambda x: x[:1], _batch(SMALL))
    ends = (0, LENGTH // 2 + 3, LENGTH)
    rows = []
    for start, stop in itertools.pairwise(ends):
        row = jax.tree.map(np.copy, empty_row(LENGTH))
        for whole, own in zip(batch, row, strict=True):
            own[: stop - start] = whole[0, start:stop]
        rows.append(row)
    losses = LossConfig(balance=0.0, z=0.0)
    packed, apart = (_gradient(each, DROPLESS, losses) for each in (batch, stack_rows(rows)))
    np.testing.assert_allclose(packed[1].loss, apart[1].loss, rtol=1e-6)
    _assert_close_in_norm(packed[0], apart[0])


def test_losses_equal_float64():
    """One layer whose attention adds nothing: the router reads the normalised embeddings."""
    config = tiny.config("mixtral", num_layers=1)
    params = jax.tree.map(np.copy, tiny.params(config))
    params["layers"]["attention"]["output"][:] = 0
    model, batch = Transformer(config), _batch(config, batch=4)
    mask = batch.segment != 0
    sums = jax.jit(lambda p: compute_losses(model, LOSSES, p, batch, totals(batch)))(params)

    logits = np.float64(_logits(model, params, batch))
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_probability, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.loss, (nats * batch.loss_weight).sum() / batch.loss_weight.sum(), rtol=1e-5)

    x = np.float64(params["embedding"][batch.tokens])
    x *= (np.mean(x**2, -1, keepdims=True) + config.norm_eps) ** -0.5
    router_logits = x * params["layers"]["feed_forward_norm"]["scale"][0] @ params["layers"]["moe"]["router"][0]
    per_row = mixture.balance_loss(router_logits, 2, mask)
    np.testing.assert_allclose(sums.balance_loss, per_row @ mask.sum(1) / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.z_loss, mixture.z_loss(router_logits, mask), rtol=1e-5)


def _logits(model, params, batch):
    return jax.jit(model.apply)({"params": params}, batch.tokens, batch.segment, batch.position).logits_BTV


def test_the_objective_is_the_losses_by_their_coefficients():
    model, batch = Transformer(SMALL, EXECUTION, TIGHT), _batch(SMALL)

    @jax.jit
    def weighted(params, coefficients):
        def parts(params):
            sums = compute_losses(model, LOSSES, params, batch, totals(batch))
            return sums.loss, sums.balance_loss, sums.z_loss

        return jax.vjp(parts, params)[1](coefficients)[0]

    params = jax.tree.map(jnp.asarray, tiny.params(SMALL))
    _assert_close_in_norm(_gradient(batch)[0], jax.device_get(weighted(params, (1.0, LOSSES.balance, LOSSES.z))))
    for only in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        assert np.linalg.norm(weighted(params, only)["layers"]["moe"]["router"]) > 1e-2


class Loop(NamedTuple):
    """A jitted step on one device, that counts its traces."""

    step: object
    state: object
    batch: Batch


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def loop(request):
    config = tiny.config(request.param)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), STEPS)
    schedule = learning_rate(OptimizerConfig(learning_rate=1e-2), STEPS)
    model = Transformer(config, EXECUTION, Dispatch(capacity_factor=1.25) if config.moe else DROPLESS)
    chex.clear_trace_counter()
    step = chex.assert_max_traces(make_step(model, LOSSES, optimizer, schedule), n=1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(config, optimizer, mesh, TRAINING, seed=0)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Loop(jax.jit(step, out_shardings=(places, None)), state, _batch(config, batch=4))


def test_learns_without_compiling_again(loop):
    state, losses = loop.state, []
    for _ in range(30):
        state, metrics = loop.step(state, loop.batch)
        losses.append(float(metrics["loss"]))
    assert state.step == 30
    assert loop.step._cache_size() == 1
    np.testing.assert_allclose(losses[0], math.log(40), rtol=0.02)
    assert losses[-1] < losses[0] - 1


def test_is_deterministic(loop):
    chex.assert_trees_all_equal(*(loop.step(loop.state, loop.batch) for _ in range(2)))


def test_metrics(loop):
    _, metrics = loop.step(loop.state, loop.batch)
    keys = {"loss", "balance_loss", "z_loss", "grad_norm", "learning_rate", "skipped"}
    routing = {"dropped_fraction", "expert_load_max", "expert_load_min", "router_entropy", "expert_load"}
    mixtral = "moe" in loop.state.params["layers"]
    assert set(metrics) == keys | (routing if mixtral else set())
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2, rtol=1e-6)
    assert not metrics["skipped"]
    assert metrics["grad_norm"] > 0
    # Fresh routers are all but indifferent: balanced is k = 2, and E = 4 give an entropy and a log of z of log 4.
    expected = (2, math.log(4) ** 2) if mixtral else (0, 0)
    np.testing.assert_allclose((metrics["balance_loss"], metrics["z_loss"]), expected, rtol=0.05)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_batch_leaves_all_but_the_step_as_it_was(loop, poison):
    state, _ = loop.step(loop.state, loop.batch)
    weight = loop.batch.loss_weight.copy()
    weight[0, 0] = poison
    after, metrics = loop.step(state, loop.batch._replace(loss_weight=weight))
    assert metrics["skipped"]
    assert after.step == state.step + 1
    chex.assert_trees_all_equal((after.params, after.optimizer), (state.params, state.optimizer))
    resumed, metrics = loop.step(after, loop.batch)
    assert not metrics["skipped"]
    schedule = learning_rate(OptimizerConfig(learning_rate=1e-2), STEPS)
    np.testing.assert_allclose(metrics["learning_rate"], schedule(1), rtol=1e-6)  # one update so far, of two steps
    chex.assert_tree_all_finite(resumed)


def test_a_batch_of_padding_alone(loop):
    after, metrics = loop.step(loop.state, stack_rows([empty_row(LENGTH)] * 4))
    assert metrics["loss"] == metrics["balance_loss"] == metrics["grad_norm"] == 0
    chex.assert_tree_all_finite((after, metrics))


def test_totals_by_hand():
    batch = Batch(
        tokens=jnp.zeros((1, 4)),
        targets=jnp.zeros((1, 4)),
        segment=jnp.array([[1, 1, 2, 0]]),
        position=jnp.zeros((1, 4)),
        loss_weight=jnp.array([[1.0, 0.0, 2.5, 0.0]]),
    )
    assert totals(batch) == (3.5, 3)
    assert totals(batch._replace(segment=jnp.zeros((1, 4)), loss_weight=jnp.zeros((1, 4)))) == (1, 1)


def test_routing_metrics_by_hand():
    """Two layers, two experts, ten tokens with one choice each."""
    sums = Statistics(
        assigned_E=jnp.array([[5.0, 5.0], [2.0, 8.0]]),
        dropped=jnp.array([0.0, 3.0]),
        entropy=jnp.array([6.0, 2.0]),
        z_loss=jnp.zeros(2),
        balance_loss=jnp.zeros(2),
        tokens=jnp.array([10.0, 10.0]),
    )
    metrics = routing_metrics(sums)
    np.testing.assert_allclose(metrics["dropped_fraction"], 3 / 20, rtol=1e-6)
    np.testing.assert_allclose(metrics["expert_load"], [[1, 1], [0.4, 1.6]], rtol=1e-6)
    np.testing.assert_allclose((metrics["expert_load_max"], metrics["expert_load_min"]), (1.6, 0.4), rtol=1e-6)
    np.testing.assert_allclose(metrics["router_entropy"], (0.6 + 0.2) / 2, rtol=1e-6)
    assert routing_metrics(None) == {}


def test_grad_norm_is_before_clipping():
    run = _one_device(DROPS)
    np.testing.assert_allclose(run.metrics["grad_norm"], optax.tree.norm(run.gradient), rtol=1e-5)
