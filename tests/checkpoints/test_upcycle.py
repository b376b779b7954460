"""A dense model as a mixture: the same function, written in any format."""

import numpy as np
import pytest
from oracles import huggingface, tiny

import mixtral_jax as mj
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.upcycle import Upcycled
from mixtral_jax.errors import InputError


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    config = tiny.config("mistral")
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_computes_the_same_function_at_the_start(dense, tmp_path, to):
    convert(Upcycled(open_source(dense), experts=5, experts_per_token=2), tmp_path / "mixture", to)
    tokens = tiny.tokens(tiny.config("mistral"), 2, 20)
    mixture, before = mj.load(tmp_path / "mixture", dtype="float32"), mj.load(dense, dtype="float32")
    assert (mixture.config.moe.num_experts, mixture.config.moe.experts_per_token) == (5, 2)
    np.testing.assert_allclose(mixture.logits(tokens), before.logits(tokens), atol=2e-5)
    assert np.std(mixture.params["layers"]["moe"]["router"]) == pytest.approx(0.02, rel=0.2)


def test_noise_tells_experts_apart_and_a_seed_decides_it(dense):
    def expert(seed, number, noise=0.1):
        source = Upcycled(open_source(dense), 4, 2, noise, seed)
        return source.read(next(t for t in source.tensors if t.name == f"layers.1.moe.up.{number}"))

    plain = expert(0, 0, noise=0.0)
    assert np.std(expert(0, 1) - plain) == pytest.approx(0.1 * np.std(plain), rel=0.1)
    assert np.abs(expert(0, 1) - expert(0, 2)).max() > 0
    np.testing.assert_array_equal(expert(3, 1), expert(3, 1))
    assert np.abs(expert(0, 1) - expert(1, 1)).max() > 0


@pytest.mark.parametrize("other", [{"seed": 1}, {"noise": 0.2}])
def test_one_that_was_begun_otherwise_is_not_gone_on_with(dense, tmp_path, monkeypatch, other):
    """Or its experts would be of two kinds."""

    def failing(self, tensor):
        raise InputError("memory", None, "failed")

    first = {"noise": 0.1, "seed": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Upcycled, "read", failing)
        with pytest.raises(InputError, match="failed"):
            convert(Upcycled(open_source(dense), 4, 2, **first), tmp_path / "out", "native")
    with pytest.raises(InputError, match="an unfinished conversion of something else"):
        convert(Upcycled(open_source(dense), 4, 2, **(first | other)), tmp_path / "out", "native")
    convert(Upcycled(open_source(dense), 4, 2, **first), tmp_path / "out", "native")


def test_a_mixture_is_refused_with_a_reason(dense):
    mixture = Upcycled(open_source(dense), 4, 2)
    with pytest.raises(InputError, match="is a mixture already: its experts differ"):
        Upcycled(mixture, 8, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1), "--experts = 1: two or more"),
        ((4, 5), "--top-k = 5: from 1 to the 4 experts"),
        ((4, 0), "--top-k = 0"),
        ((4, 2, -0.1), "--noise = -0.1: from 0 to under 1"),
        ((4, 2, float("nan")), "--noise = nan"),
    ],
)
def test_refuses(dense, arguments, message):
    with pytest.raises(InputError, match=message):
        Upcycled(open_source(dense), *arguments)
