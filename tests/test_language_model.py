"""A loaded model scored and made to speak, in ids and in text."""

import itertools

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.inference.sampling import SamplingConfig

PROMPTS = ["def f", "    return x + 12"]


@pytest.fixture(scope="module")
def model(whole):
    return mj.load(whole[0], dtype="float32")


def test_logits_are_the_transformers(model):
    tokens = np.arange(3, 63).reshape(2, 30)
    expected = mj.Transformer(model.config).apply({"params": model.params}, tokens).logits_BTV
    assert model.logits(tokens).dtype == np.float32
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-5)


def test_strings_and_ids_say_the_same(model):
    ids = [model.tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    texts = model.generate(PROMPTS, max_new_tokens=20)
    for text, row, prompt in zip(texts, model.generate(ids, max_new_tokens=20), ids, strict=True):
        row = row[:-1] if row[-1] == model.tokenizer.eos_id else row
        assert model.tokenizer.decode(prompt + row) == model.tokenizer.decode(prompt) + text
    assert model.generate([]) == []


def test_generation_repeats_with_its_seed(model):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    first = model.generate(PROMPTS, seed=1, **settings)
    assert model.generate(PROMPTS, seed=1, **settings) == first
    assert model.generate(PROMPTS, seed=2, **settings) != first


def test_a_stream_grows_to_the_whole_text(model):
    pieces = [texts[0] for texts in model.stream(PROMPTS[:1], 20, SamplingConfig())]
    assert pieces[-1] == model.generate(PROMPTS[:1], max_new_tokens=20)[0]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    assert len(set(pieces)) > 1


def test_a_stop_string_and_what_follows_are_cut_off(model):
    (free,) = model.generate(PROMPTS[:1], max_new_tokens=24, stop_at_eos=False)
    stop = free[4:7]
    (stopped,) = model.generate(PROMPTS[:1], max_new_tokens=24, stop_at_eos=False, stop=[stop, "never said"])
    assert stopped == free[: free.index(stop)]
    for (shown,) in model.stream(PROMPTS[:1], 24, SamplingConfig(), stop=[stop], stop_at_eos=False):
        assert stopped.startswith(shown)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate("text"), "prompts = 'text': a list is needed"),
        (lambda model: model.generate(["a", [1]]), "prompts = 'strings and ids': all of one kind"),
        (lambda model: model.generate([[1]], stop=["x"]), r"stop = \['x'\]: needs prompts that are strings"),
        (lambda model: model.generate(["a"], stop=[""]), r"stop = \[''\]: an empty string"),
        (lambda model: model.generate([[300]]), r"prompts\[0\] = 300: token ids go from 0 to 299"),
        (lambda model: model.generate([[1]], temperature=-1.0), "temperature = -1.0"),
        (lambda model: model.generate([[1]], max_new_tokens=64), r"with max_new_tokens that is 65, over 64"),
        (lambda model: model.logits([1, 2]), r"tokens_BT = 'int64\[2\]': integers \[B, T\]"),
        (lambda model: model.logits([[0.5]]), "integers"),
        (lambda model: model.logits([[-1]]), "tokens_BT = -1: token ids go from 0"),
    ],
)
def test_refuses(model, call, message):
    with pytest.raises(mj.InputError, match=message):
        call(model)
