"""Whole runs with a selection bias, jitter and drops by probability."""

import shutil

import jax
import numpy as np
import pytest
from oracles import tiny
from toy_run import train

import mixtral_jax as mj
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.run import read_params
from mixtral_jax.errors import InputError
from mixtral_jax.train.metrics import METRICS, ROUTING, read

CHANGES = {
    "model.moe.selection_bias": "true",
    "losses.balance": "0.0",
    "losses.bias_rate": "0.01",
    "losses.jitter": "0.1",
    "dispatch.priority": "probability",
    "optimizer.schedule": "constant",
}


@pytest.fixture(scope="module")
def biased(toy_config, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("biased") / "run"
    train(toy_config, folder, steps=4, **CHANGES)
    return folder


def test_the_bias_follows_the_load_and_is_kept(biased):
    """Of four steps each moves it by 0.01 up or down, or not at all."""
    bias_LE = open_source(biased).read_all()["layers"]["moe"]["bias"]
    load_SLE = np.array([each["load"] for each in read(biased / ROUTING)])
    np.testing.assert_allclose(bias_LE, 0.01 * np.sign(1 - load_SLE).sum(axis=0), atol=1e-6)
    assert np.abs(bias_LE).max() > 0.015


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(biased, toy_config, tmp_path):
    """From its second step; the noise is a function of the seed and the step."""
    shutil.copytree(biased, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(toy_config, tmp_path / "run", steps=4, **CHANGES)
    mine, theirs = (read(each / METRICS) for each in (tmp_path / "run", biased))
    for key in ("loss", "grad_norm", "dropped_fraction"):
        assert [each[key] for each in mine] == [each[key] for each in theirs]
    trees = (open_source(each).read_all() for each in (tmp_path / "run", biased))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_inference_chooses_by_the_bias_and_has_no_noise(biased):
    model = mj.load(biased, dtype="float32")
    params, _ = read_params(biased, model.config)
    tokens = tiny.tokens(model.config, 2, 16)
    logits = jax.jit(mj.Transformer(model.config).apply)
    np.testing.assert_allclose(model.logits(tokens), logits({"params": params}, tokens).logits_BTV, atol=1e-5)
    moe = params["layers"]["moe"]
    unbiased = params | {"layers": params["layers"] | {"moe": moe | {"bias": 0 * moe["bias"]}}}
    assert np.abs(model.logits(tokens) - logits({"params": unbiased}, tokens).logits_BTV).max() > 1e-4


@pytest.mark.parametrize("format", ["huggingface", "consolidated"])
def test_published_formats_have_no_place_for_it(biased, tmp_path, format):
    with pytest.raises(InputError, match=r"model.moe.selection_bias = True: no published format has a place for it"):
        convert(open_source(biased), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_our_own_format_keeps_it(biased, tmp_path):
    convert(open_source(biased), tmp_path / "out", "native")
    tokens = tiny.tokens(open_source(biased).config, 1, 8)
    again, before = (mj.load(each, dtype="float32").logits(tokens) for each in (tmp_path / "out", biased))
    np.testing.assert_array_equal(again, before)
