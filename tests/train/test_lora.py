"""Low-rank factors: what they add, alone trained, merged when they are read, and in peft's form."""

import shutil

import jax
import numpy as np
import pytest
from oracles import tiny
from toy_run import train
from toy_tuning import model_config

import mixtral_jax as mj
from mixtral_jax.checkpoints.adapter import INPUTS, OUTPUTS, LoraConfig
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.peft import write_adapter
from mixtral_jax.errors import InputError
from mixtral_jax.train import config as configs
from mixtral_jax.train.lora import init_factors, merge
from mixtral_jax.train.metrics import METRICS, read

LORA = '\n[lora]\nrank = 4\nalpha = 8.0\nbase = "{base}"\ntargets = {targets}\n'


@pytest.fixture(scope="module")
def run(tuning_config, tmp_path_factory):
    """A finished run of factors on every matrix of the toy Mixtral that may have them; its folder."""
    targets = '["attention", "experts", "router"]'
    file = tuning_config("sft", "mixtral", more=LORA.format(base="float32", targets=targets))
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(file, folder)
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_factors_add_their_product(family):
    config = model_config(family)
    lora = LoraConfig(rank=2, alpha=6.0, targets=("attention", "experts" if config.moe else "feed_forward"))
    params = tiny.params(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_factors(config, lora, jax.random.key(0)))
    factors = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    unboxed = jax.tree.map(lambda leaf: leaf.value, factors, is_leaf=lambda leaf: hasattr(leaf, "value"))
    merged = merge(config, lora)(unboxed, jax.tree.map(jax.numpy.asarray, params))
    ab = unboxed["layers"]["attention"]["output"]
    a_XR = ab[INPUTS][1].reshape(-1, 2)  # heads and their dimensions are the inputs
    expected = params["layers"]["attention"]["output"][1].reshape(-1, config.dim) + 3.0 * a_XR @ ab[OUTPUTS][1]
    found = np.asarray(merged["layers"]["attention"]["output"][1]).reshape(-1, config.dim)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged["embedding"], params["embedding"])


def test_only_factors_are_trained_and_saved(run):
    metrics = read(run / METRICS)
    assert min(each["loss"] for each in metrics[-3:]) < metrics[0]["loss"]
    source = open_source(run)
    factors = source._factors["layers"]
    assert set(factors) == {"attention", "moe"}
    assert factors["attention"]["query"][INPUTS].shape == (2, 16, 4)
    assert factors["moe"]["gate"][OUTPUTS].shape == (2, 4, 4, 24)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(factors))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, tmp_path):
    """From its eighth step."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    train(run / "config.toml", tmp_path / "run")
    (mine, theirs) = (read(each / METRICS) for each in (tmp_path / "run", run))
    assert [each["loss"] for each in mine] == [each["loss"] for each in theirs]
    factors = (open_source(each)._factors for each in (tmp_path / "run", run))
    jax.tree.map(np.testing.assert_array_equal, *factors)


def test_a_run_is_loaded_merged(run, bases):
    model, base = mj.load(run, dtype="float32"), mj.load(bases["mixtral"], dtype="float32")
    factors, lora = open_source(run)._factors, LoraConfig(rank=4, alpha=8.0, targets=("attention", "experts", "router"))
    expected = merge(model.config, lora)(factors, base.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), model.params, expected)
    tokens = tiny.tokens(model.config, 2, 12)
    assert np.abs(model.logits(tokens) - base.logits(tokens)).max() > 0.01
    assert model.tokenizer is not None


def test_the_model_has_to_have_what_is_trained(tuning_config):
    file = tuning_config("sft", "mistral", more=LORA.format(base="float32", targets='["experts"]'))
    with pytest.raises(InputError, match=r"lora.targets = 'experts': this model has attention, feed_forward"):
        configs.load(file)


def test_a_base_in_int8_trains(tuning_config, tmp_path):
    file = tuning_config("dpo", "mistral", more=LORA.format(base="int8", targets='["attention", "feed_forward"]'))
    train(file, tmp_path / "run", steps=3)
    first, *_, last = read(tmp_path / "run" / METRICS)
    assert abs(first["reward_margin"]) < 1e-4  # the reference is the rounded base
    assert last["loss"] < first["loss"]
    tensor = next(each for each in open_source(tmp_path / "run").tensors if each.kind == "feed_forward.gate")
    assert np.isfinite(open_source(tmp_path / "run").read(tensor)).all()


@pytest.mark.filterwarnings("ignore")
def test_peft_computes_what_the_merged_model_does(tuning_config, bases, tmp_path):
    """Exported twice: the factors, read by peft, and merged, read by transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    file = tuning_config("sft", "mistral", more=LORA.format(base="float32", targets='["attention", "feed_forward"]'))
    train(file, tmp_path / "run", steps=3)
    source = open_source(tmp_path / "run")
    write_adapter(source, tmp_path / "adapter")
    convert(source, tmp_path / "merged", "huggingface")
    tokens = tiny.tokens(source.config, 2, 12)
    base = AutoModelForCausalLM.from_pretrained(bases["mistral"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = [model(torch.from_numpy(tokens).long()).logits.numpy() for model in (adapted, merged)]
        plain = adapted.unload()(torch.from_numpy(tokens).long()).logits.numpy()
    mine = np.asarray(mj.load(tmp_path / "run", dtype="float32").logits(tokens))
    for each in theirs:
        np.testing.assert_allclose(each, mine, rtol=1e-4, atol=1e-4)
    assert np.abs(plain - mine).max() > 0.01


def test_factors_of_experts_have_no_place_in_peft(run, bases, tmp_path):
    with pytest.raises(InputError, match=r"lora.targets .experts.; merge by huggingface"):
        write_adapter(open_source(run), tmp_path / "adapter")
    with pytest.raises(InputError, match="has no factors of its own"):
        write_adapter(open_source(bases["mistral"]), tmp_path / "adapter")
