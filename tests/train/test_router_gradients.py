"""The gradients of the balance loss and of the z-loss alone: one, however the batch and the layers are cut up."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from oracles import mixture, tiny
from oracles.forward import router_logits

from mixtral_jax.config import Dispatch, Execution, MoEConfig
from mixtral_jax.model.attention import Context
from mixtral_jax.model.balance import RouterTraining
from mixtral_jax.model.rope import rotation
from mixtral_jax.model.transformer import Block, Transformer, init_params
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.partition import named_shardings
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.dpo import PairBatch, preference, preference_terms
from mixtral_jax.train.losses import LossConfig, auxiliary
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.step import compute_losses, gradients, pretraining, totals

CONFIG = tiny.config(
    "mixtral",
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    moe=MoEConfig(num_experts=8, experts_per_token=2),
)
ROWS, LENGTH = 64, 16
TIGHT, DROPLESS = Dispatch(capacity_factor=1.0, group_size=4), Dispatch()
EXECUTION = Execution(attention_chunk=8)
LOSSES = LossConfig(balance=0.0, z=0.0)
BALANCE, Z = (1.0, 0.0), (0.0, 1.0)


def _batch(config=CONFIG, rows=ROWS, length=LENGTH):
    """Two documents a row; rows that are cut short by more and more, and one of padding alone."""
    tokens, targets = (tiny.tokens(config, rows, length, seed) for seed in (1, 2))
    segment = np.ones((rows, length), np.int32)
    segment[:, length // 2 + 1 :] = 2
    for row in range(1, rows):
        segment[row, length - row % (length // 2) :] = 0
    segment[2] = 0
    position = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(tokens, targets, segment, position, (segment > 0).astype(np.float32))


def _padded(batch):
    """Eight more places in each row, and eight more rows, of arbitrary tokens."""
    fill = {"tokens": 5, "targets": 3, "position": 9}
    padding = [(0, 8), (0, 8)]
    return Batch(*(np.pad(x, padding, constant_values=fill.get(n, 0)) for n, x in batch._asdict().items()))


def _alone(objective, coefficients):
    """The objective's routing losses by these coefficients, and no other loss."""
    balance, z = coefficients

    def losses(params, micro, total, key):
        sums = objective.losses(params, micro, total, key)
        return sums._replace(loss=balance * sums.balance_loss + z * sums.z_loss)

    return objective._replace(losses=losses)


def _gradients(accumulation=1, mesh_config=None, batch=None, dispatch=TIGHT, config=CONFIG, jitter=0.0):
    """Of the balance loss, and of the z-loss."""
    batch = _batch(config) if batch is None else batch
    model = Transformer(config, EXECUTION, dispatch, router=RouterTraining(jitter=jitter))
    key = jax.random.key(7) if jitter else None
    if isinstance(batch, PairBatch):
        objective = preference(model, LossConfig(), preference_terms)
    else:
        objective = pretraining(model, LossConfig())

    def of(params, batch, coefficients):
        return gradients(model, LOSSES, params, batch, accumulation, _alone(objective, coefficients), key=key)[0]

    if mesh_config is None:
        of = jax.jit(of)
        return [jax.device_get(of(tiny.params(config), batch, each)) for each in (BALANCE, Z)]
    mesh = make_mesh(mesh_config)
    boxed = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    params = jax.device_put(tiny.params(config), named_shardings(mesh, boxed, TRAINING))
    batch = jax.device_put(batch, NamedSharding(mesh, TRAINING.use(("batch", "length"))))
    with jax.set_mesh(mesh):
        of = jax.jit(of)
        return [jax.device_get(of(params, batch, each)) for each in (BALANCE, Z)]


@cache
def _plain():
    found = _gradients()
    for gradient in found:
        assert np.linalg.norm(gradient["layers"]["moe"]["router"]) > 1e-2
        assert np.linalg.norm(gradient["embedding"]) > 1e-2
    return found


def _assert_equal(actual, expected, tolerance=1e-5):
    """Each leaf to a part of its norm; those that no router reads have none at all."""

    def check(path, x, y):
        name = jax.tree_util.keystr(path)
        if name in ("['unembedding']", "['norm']['scale']"):
            assert not x.any(), name
            assert not y.any(), name
        else:
            assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(y), name

    for own, other in zip(actual, expected, strict=True):
        jax.tree_util.tree_map_with_path(check, own, other)


def test_the_default_is_a_sequences():
    assert LossConfig().balance_loss == "per_sequence"


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_equal_for_any_accumulation(accumulation):
    _assert_equal(_gradients(accumulation), _plain())


MESHES = [
    (MeshConfig(data=8), 8),
    (MeshConfig(data=1, fsdp=2, expert=4), 1),
    (MeshConfig(data=1, expert=8), 4),
    (MeshConfig(data=2, expert=2, context=2), 2),
    (MeshConfig(data=1, expert=2, context=2, tensor=2), 1),
]


@pytest.mark.parametrize(("mesh", "accumulation"), MESHES)
def test_equal_on_any_mesh(mesh, accumulation):
    _assert_equal(_gradients(accumulation, mesh), _plain())


def test_equal_with_padding():
    _assert_equal(_gradients(8, batch=_padded(_batch())), _plain())


def test_equal_in_preferences():
    """Of the same rows, as pairs: chosen and rejected answers, and their prompts, all count."""
    reference = np.zeros((ROWS, LENGTH), np.float32)
    _assert_equal(_gradients(4, batch=PairBatch(*_batch(), reference)), _plain())


def test_equal_on_a_mesh_with_jitter():
    """The noise is a token's, wherever it lies."""
    mesh = MeshConfig(data=2, expert=2, tensor=2)
    noisy = _gradients(jitter=0.2)
    _assert_equal(_gradients(mesh_config=mesh, jitter=0.2), noisy)
    assert np.linalg.norm(noisy[0]["embedding"] - _plain()[0]["embedding"]) > 1e-2 * np.linalg.norm(
        noisy[0]["embedding"]
    )


def test_megatrons_on_a_mesh_in_float64():
    """The mean over data shards of each one's own rows, by real tokens, over k, and summed over layers: with eight
    shards it is not what one gives."""
    losses = LossConfig(balance_loss="megatron")
    model, batch = Transformer(CONFIG, EXECUTION, DROPLESS, router=losses.router), _batch()
    mask = batch.segment != 0

    def exact(shards):
        total = 0.0
        for logits in router_logits(CONFIG, jax.tree.map(np.float64, tiny.params(CONFIG)), batch):
            for own, real in zip(np.split(logits, shards), np.split(mask, shards), strict=True):
                flat = own.reshape(1, -1, own.shape[-1])
                total += mixture.balance_loss(flat, 2, real.reshape(1, -1))[0] * real.sum() / 2
        return total / mask.sum()

    assert abs(exact(8) - exact(1)) > 1e-3
    found = jax.jit(lambda params, batch: compute_losses(model, losses, params, batch, totals(batch)).balance_loss)
    np.testing.assert_allclose(found(tiny.params(CONFIG), batch), exact(1), rtol=1e-5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, TRAINING.use(("batch", "length"))))
        on_mesh = jax.jit(
            lambda params, batch: compute_losses(model, losses, params, batch, totals(batch)).balance_loss
        )
        np.testing.assert_allclose(on_mesh(tiny.params(CONFIG), placed), exact(8), rtol=1e-5)


def test_equal_for_layers_in_a_loop():
    """The scan's layers called one after another, each with its own weights."""
    batch = _batch()

    @jax.jit
    def looped(params, coefficients):
        def loss(params):
            x_BTD = params["embedding"][batch.tokens]
            turned = rotation(batch.position, CONFIG.head_dim, CONFIG.rope_theta)
            context = Context(turned, jnp.asarray(batch.segment != 0), jnp.asarray(batch.segment))
            block, found = Block(CONFIG, EXECUTION, TIGHT), []
            for layer in range(CONFIG.num_layers):
                own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
                x_BTD, (routing, _) = block.apply({"params": own}, x_BTD, context)
                found.append(routing)
            stacked = jax.tree.map(lambda *each: jnp.stack(each), *found)
            return jnp.dot(jnp.stack(auxiliary(stacked, totals(batch).tokens)), coefficients)

        return jax.grad(loss)(params)

    params = jax.tree.map(jnp.asarray, tiny.params(CONFIG))
    _assert_equal([jax.device_get(looped(params, jnp.array(each))) for each in (BALANCE, Z)], _plain())


SMALL = tiny.config("mixtral")
STEP = 1e-6


def _float64(params, batch):
    """Both losses, and who was chosen, by the whole model in float64."""
    mask = batch.segment != 0
    layers = router_logits(SMALL, params, batch)
    tokens = mask.sum(1)
    balance = np.mean([mixture.balance_loss(each, 2, mask) @ tokens / tokens.sum() for each in layers])
    z = np.mean([mixture.z_loss(each, mask) for each in layers])
    return np.array([balance, z]), np.stack([mixture.route(each, 2)[0] for each in layers])[:, mask]


@pytest.fixture(scope="module")
def small():
    """A batch, weights in float64, both gradients of the model's, and the experts that are chosen."""
    batch = _batch(SMALL, rows=4, length=12)
    params = jax.tree.map(np.float64, tiny.params(SMALL))
    model = Transformer(SMALL, EXECUTION)
    sums = jax.jit(partial(compute_losses, model, LossConfig()))(tiny.params(SMALL), batch, totals(batch))
    losses, chosen = _float64(params, batch)
    np.testing.assert_allclose((sums.balance_loss, sums.z_loss), losses, rtol=1e-5)
    return batch, params, _gradients(batch=batch, dispatch=DROPLESS, config=SMALL), chosen


def _slope(params, direction, batch, chosen):
    """Both losses' central differences along a direction, a tree like the parameters."""
    sides = []
    for step in (STEP, -STEP):
        losses, experts = _float64(jax.tree.map(lambda x, d, step=step: x + step * d, params, direction), batch)
        np.testing.assert_array_equal(experts, chosen)  # between choices there is no slope
        sides.append(losses)
    return (sides[0] - sides[1]) / (2 * STEP)


def test_each_router_weight_by_differences_in_float64(small):
    batch, params, found, chosen = small
    zeros = jax.tree.map(np.zeros_like, params)
    router = params["layers"]["moe"]["router"]
    slopes = np.zeros((2, *router.shape))
    for index in np.ndindex(*router.shape):
        zeros["layers"]["moe"]["router"][index] = 1
        slopes[(slice(None), *index)] = _slope(params, zeros, batch, chosen)
        zeros["layers"]["moe"]["router"][index] = 0
    for slope, gradient in zip(slopes, found, strict=True):
        error = np.linalg.norm(gradient["layers"]["moe"]["router"] - slope)
        assert error < 1e-5 * np.linalg.norm(slope)


def test_each_array_by_differences_in_float64(small):
    """Along a random direction in each array, the others held."""
    batch, params, found, chosen = small
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for place, leaf in enumerate(leaves):
        direction = [np.zeros_like(each) for each in leaves]
        direction[place] = rng.standard_normal(leaf.shape) / np.sqrt(leaf.size)
        slopes = _slope(params, structure.unflatten(direction), batch, chosen)
        for slope, gradient in zip(slopes, found, strict=True):
            own = np.float64(jax.tree.leaves(gradient)[place])
            size = np.linalg.norm(own) / np.sqrt(leaf.size)
            np.testing.assert_allclose(
                np.vdot(own, direction[place]), slope, atol=1e-4 * size + 1e-9, err_msg=names[place]
            )
