"""The config of a run."""

import math
import tomllib

import pytest
import tomli_w

from mixtral_jax import configs as shipped
from mixtral_jax.config import MoEConfig, model_config
from mixtral_jax.errors import InputError
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.train import config


@pytest.mark.parametrize("name", shipped.names("runs"))
def test_shipped_runs_load(name):
    """Each on as many devices as its mesh has."""
    loaded = config.load(f"runs/{name}")
    devices = math.prod(max(1, loaded.mesh.size(axis)) for axis in MESH_AXES)
    assert math.prod(loaded.check_mesh(devices).shape) == devices


def test_model_may_be_a_name(toy_config):
    loaded = config.load(toy_config, ["model=tiny-mistral"])
    assert loaded.model == model_config("tiny-mistral")


def test_model_may_be_named_and_then_changed(toy_config):
    loaded = config.load(toy_config, ["model.num_layers=1", "model=tiny-mixtral"])
    assert loaded.model.num_layers == 1
    assert loaded.model.moe == MoEConfig(num_experts=8, experts_per_token=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.warmup=3"], "optimizer.warmup = 3: unknown key; did you mean 'warmup_steps'"),
        (["optimiser.warmup_steps=3"], "optimiser = .*unknown key; did you mean 'optimizer'"),
        (["steps=many"], "steps = 'many': input should be a valid integer"),
        (["objective.kind=dpo", "objective.bta=1"], "objective.bta = 1: unknown key; did you mean 'beta'"),
        (["objective.kind=dpo", "objective.beta=0.0"], "objective.beta = 0.0: a number above zero"),
        (["objective.kind=ppo"], "objective = .*'pretrain', 'sft', 'dpo'"),
        (["objective.kind=dpo"], r"init_from: is missing: \[objective\] needs weights"),
        (["steps=0"], "steps = 0: a number above zero"),
        (["model.num_heads=3", "model.num_kv_heads=2"], "model.num_kv_heads = 2: must divide num_heads = 3"),
        (["model.moe.experts_per_token=5"], "model.moe.experts_per_token = 5: at most num_experts = 4"),
        (["model=mistral-8b"], "config = 'mistral-8b': no such file; did you mean"),
        (["accumulation=3"], "accumulation = 3: must divide data.batch_size = 8"),
        (["data.sequence_length=128"], "data.sequence_length = 128: at most model.max_position = 64"),
        (["optimizer.warmup_steps=6"], "optimizer.warmup_steps = 6: fewer than steps = 6"),
        (["optimizer.schedule=cosin"], "optimizer.schedule = 'cosin'.*'cosine', 'wsd' or 'constant'"),
        (["mesh.data=0"], "mesh.data = 0: a number of devices above zero"),
        (["mesh.model=2"], "mesh.model = 2: unknown key"),
        (["losses.balance=-1"], "losses.balance = -1.0: zero or more"),
        (["losses.balance_loss=megatrn"], "losses.balance_loss = 'megatrn': .*'switch', 'hf_global' or 'megatron'"),
        (["losses.jitter=1.0"], "losses.jitter = 1.0: zero or more and below 1"),
        (["losses.bias_rate=-0.1"], "losses.bias_rate = -0.1: zero or more"),
        (["losses.bias_rate=0.1"], "losses.bias_rate = 0.1: needs model.moe.selection_bias = true"),
        (["losses.bias_rate=0.1", "model=tiny-mistral"], "losses.bias_rate = 0.1: needs model.moe.selection_bias"),
        (
            ["losses.bias_rate=0.1", "model.moe.selection_bias=true", "init_from=nowhere", "lora.rank=2"],
            r"losses.bias_rate = 0.1: 0 with \[lora\]",
        ),
        (["data.sequence_length=true"], "data.sequence_length = True: input should be a valid integer"),
        (["steps"], "--set = 'steps': written as key=value"),
    ],
)
def test_refuses(toy_config, settings, message):
    with pytest.raises(InputError, match=message):
        config.load(toy_config, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mesh.data=3"], "mesh = 'data=3, expert=4': the axes' product must be exactly the 8 devices"),
        (["data.batch_size=4"], "data.batch_size = 4: .*multiple of mesh data x fsdp x expert = 8"),
        (["accumulation=2"], "data.batch_size = 8: a micro-batch's 4 rows"),
        (["mesh.data=1", "mesh.expert=8"], "mesh.expert = 8: must divide the model's 4 experts"),
        (["mesh.data=1", "mesh.tensor=4", "mesh.expert=2"], r"mesh = '.*': dimension 2 of layers.attention.key is 1"),
        (
            ["mesh.data=1", "mesh.expert=2", "mesh.context=4", "dispatch.group_size=16"],
            "divide the 8 tokens.*on one shard",
        ),
        (["mesh.data=1", "mesh.context=2", "data.sequence_length=31"], "mesh.context = 2: must divide"),
        (["dispatch.group_size=12"], "dispatch.group_size = 12: .*must divide the 32 tokens"),
    ],
)
def test_refuses_what_does_not_divide(toy_config, settings, message):
    with pytest.raises(InputError, match=message):
        config.load(toy_config, settings).check_mesh(8)


def test_all_that_does_not_divide_is_told_at_once(toy_config):
    settings = ["mesh.data=1", "mesh.expert=8", "mesh.context=3", "mesh.tensor=4"]
    with pytest.raises(InputError) as caught:
        config.load(toy_config, settings).check_mesh(96)
    lines = str(caught.value).splitlines()
    assert [each.split(" = ")[0] for each in lines[:2]] == ["mesh.context", "mesh.expert"]
    assert {each.split("'")[1] for each in lines[2:]} == {"expert=8, context=3, tensor=4"}
    assert len(lines) > 6


def test_only_some_keys_may_change_on_resume(toy_config):
    before = config.load(toy_config)
    config.check_resumable(before, config.load(toy_config, ["steps=9", "mesh.data=8", "optimizer.learning_rate=1e-3"]))
    config.check_resumable(before, config.load(toy_config, ["losses.chunk=64"]))
    with pytest.raises(InputError, match=r"losses.balance was 0.02, is 0.1; model.dim was 16, is 24"):
        config.check_resumable(before, config.load(toy_config, ["model.dim=24", "losses.balance=0.1"]))


@pytest.mark.parametrize("setting", ["optimizer.clip_norm=inf", "dispatch.capacity_factor=none", "validate_every=none"])
def test_what_is_written_to_a_run_is_what_is_read_again(toy_config, setting):
    """`none` means the key's absence, so only a key whose default is None may be None."""
    loaded = config.load(toy_config, [setting])
    assert config.build(config.TrainConfig, tomllib.loads(tomli_w.dumps(config.to_table(loaded)))) == loaded


def test_no_clipping_can_be_asked_for(toy_config):
    assert config.load(toy_config, ["optimizer.clip_norm=inf"]).optimizer.clip_norm == float("inf")
