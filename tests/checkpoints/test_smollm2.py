"""A published model from its GGUF file, 135 million weights in Q4_1 and Q8_0, against transformers with the same file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from oracles import smollm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import mixtral_jax as mj

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


def test_logits_are_those_of_transformers(ours: mj.Model, theirs: PreTrainedModel, prompts: list[list[int]]):
    """Of the five prompts in a row, 60 tokens; all that differs is the order of sums."""
    tokens_BT = np.array([sum(prompts, [])])
    with torch.no_grad():
        expected_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
    difference = np.abs(np.asarray(ours.logits(tokens_BT)) - expected_BTV).max() / expected_BTV.std()
    print(difference, tokens_BT.shape)
    assert difference < 2e-4


def test_greedy_tokens_are_those_of_transformers(ours: mj.Model, theirs: PreTrainedModel, prompts: list[list[int]]):
    expected = []
    for prompt in prompts:
        tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert ours.generate(prompts, max_new_tokens=64) == expected
