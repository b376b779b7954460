"""A published model from its GGUF file, 135 million weights in Q4_1 and Q8_0, against transformers' reading of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import smollm
from quick_compiler import optimised
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import mixtral_jax as mj
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.upcycle import Upcycled
from mixtral_jax.inference.perplexity import windows
from mixtral_jax.loading import from_source

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4,",
)


@pytest.fixture(scope="module")
def ours() -> mj.Model:
    return mj.load(smollm.PATH, dtype="float32")


@pytest.fixture(scope="module")
def theirs() -> Iterator[PreTrainedModel]:
    """In float32, with its own reading of GGUF; by `from_pretrained` it would want accelerate installed."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    folder, name = str(smollm.PATH.parent), smollm.PATH.name
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=name), dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(smollm.PATH), return_tensors=True, model_to_load=model)["tensors"]
    problems = model.load_state_dict(tensors, strict=False)
    assert problems.missing_keys in ([], ["lm_head.weight"])  # tied to the embedding
    assert not problems.unexpected_keys
    yield model.eval()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(ours: mj.Model) -> list[list[int]]:
    return [ours.tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def answers(ours: mj.Model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy, of up to 64 tokens."""
    with optimised():
        return ours.generate(prompts, max_new_tokens=64)


def test_logits_are_those_of_transformers(ours: mj.Model, theirs: PreTrainedModel, prompts: list[list[int]]):
    """Of the five prompts in a row; all that differs is the order of sums (2e-5 measured)."""
    tokens_BT = np.array([list(itertools.chain(*prompts))])
    with torch.no_grad():
        expected_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
    difference = np.abs(np.asarray(ours.logits(tokens_BT)) - expected_BTV).max()
    assert difference < 2e-4 * expected_BTV.std()


def test_greedy_tokens_are_those_of_transformers(
    ours: mj.Model, theirs: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]
):
    """Each is the likeliest after those before it: then it is what transformers would have written."""
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 64 or answer[-1] == ours.tokenizer.eos_id
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([prompt + answer])).logits[0]
        assert logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_perplexity_of_a_file_is_that_of_transformers(ours: mj.Model, theirs: PreTrainedModel):
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:3000]
    ids = ours.tokenizer.encode(text, bos=True)
    nats = 0.0
    for begin, scored, end in windows(len(ids), 256, 128):
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([ids[begin:end]])).logits[0].double()
        cost = -torch.log_softmax(logits_TV, -1)[range(end - begin - 1), ids[begin + 1 : end]]
        nats += float(cost[scored - begin - 1 :].sum())
    found = ours.perplexity(text, window=256, stride=128)
    assert found.tokens == len(ids) - 1 > 500
    assert found.value == pytest.approx(np.exp(nats / found.tokens), rel=1e-4)


def test_upcycled_to_8_experts_it_says_the_same(prompts: list[list[int]], answers: list[list[int]]):
    mixture = from_source(Upcycled(open_source(smollm.PATH), experts=8, experts_per_token=2), dtype="float32")
    said = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    for ids, prompt in zip(said, prompts, strict=True):
        likeliest = np.asarray(mixture.logits([ids + [0] * (128 - len(ids))])).argmax(-1)[0]
        assert likeliest[len(prompt) - 1 : len(ids) - 1].tolist() == ids[len(prompt) :]
