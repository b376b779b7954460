"""Generation for a batch of prompts: the host's side of prefill and the decode loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.inference.decode import DecodeState, decode, empty_state, first_token, prefill
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.inference.weights import Prepared
from mixtral_jax.model.cache import num_slots

PREFILL_CHUNK = 512
_SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """The length that arrays for so many tokens get, so that few programs are compiled: a power of two from 16 on."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig) -> None:
    """Raises InputError for prompts that the model can't take, naming which."""
    if max_new_tokens < 1:
        raise InputError("max_new_tokens", max_new_tokens, "one or more")
    for index, prompt in enumerate(prompts):
        key = f"prompts[{index}]"
        if not len(prompt):
            raise InputError(key, [], "at least one token is needed")
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise InputError(key, wrong, f"token ids go from 0 to {config.vocab_size - 1}")
        total = len(prompt) + max_new_tokens
        if total > config.max_position:
            raise InputError(key, len(prompt), f"with max_new_tokens that is {total}, over {config.max_position}")


def start(
    weights: Prepared,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
    stop_ids: tuple[int, ...],
    config: ModelConfig,
    execution: Execution,
    prefill_chunk: int = PREFILL_CHUNK,
) -> DecodeState:
    """Prefills the prompts and chooses the first new token of each; see `generate`."""
    check_prompts(prompts, max_new_tokens, config)
    longest = max(len(prompt) for prompt in prompts)
    slots = num_slots(config, bucket(longest + max_new_tokens))
    state, last_BD = empty_state(
        jax.random.key(seed),
        _seen(prompts, config.vocab_size) if sampling.form.penalised else None,
        batch=len(prompts),
        slots=slots,
        max_new_tokens=max_new_tokens,
        config=config,
        execution=execution,
    )
    cache = state.cache
    for begin in range(0, longest, prefill_chunk):
        size = min(prefill_chunk, bucket(longest - begin))
        tokens_BT, real_BT = _chunk(prompts, begin, size)
        cache, last_BD = prefill(
            weights, cache, last_BD, tokens_BT, real_BT, config=config, execution=execution, fresh=begin == 0
        )
    state = state._replace(cache=cache)
    return first_token(
        weights, state, last_BD, sampling.values, execution=execution, form=sampling.form, stop_ids=stop_ids
    )


def generate(
    weights: Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    config: ModelConfig,
    execution: Execution,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
    steps_a_call: int | None = None,
) -> Iterator[DecodeState]:
    """Continues each prompt; yields the state after the first token and after every call of the decode loop.

    Args:
      prompts: token ids, one or more each; of any lengths.
      stop_ids: tokens that end a text; they are part of the output.
      steps_a_call: tokens decoded between two looks of the host; None: all.

    Raises:
      InputError: an empty prompt, an id outside the vocabulary, or more tokens than the model has positions.
    """
    state = start(weights, prompts, max_new_tokens, sampling, seed, stop_ids, config, execution)
    steps = np.int32(steps_a_call or max_new_tokens)
    yield state
    while not jax.device_get(state.finished_B).all():
        state = decode(
            weights,
            state,
            steps,
            sampling.values,
            config=config,
            execution=execution,
            form=sampling.form,
            stop_ids=stop_ids,
        )
        yield state


def outputs(state: DecodeState) -> list[list[int]]:
    """The new tokens of each row."""
    output_BM, count_B = jax.device_get((state.output_BM, state.count_B))
    return [row[:count].tolist() for row, count in zip(output_BM, count_B, strict=True)]


def _chunk(prompts: Sequence[Sequence[int]], begin: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.zeros((len(prompts), size), np.int32)
    real_BT = np.zeros((len(prompts), size), bool)
    for row, prompt in enumerate(prompts):
        piece = prompt[begin : begin + size]
        tokens_BT[row, : len(piece)] = piece
        real_BT[row, : len(piece)] = True
    return tokens_BT, real_BT


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    seen_BV = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, list(prompt)] = True
    return seen_BV
