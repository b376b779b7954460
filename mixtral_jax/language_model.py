"""A model with its tokenizer, as one object that generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.inference import decode, generate
from mixtral_jax.inference.choices import choices
from mixtral_jax.inference.engine import Engine
from mixtral_jax.inference.perplexity import DEFAULT_WINDOW, Perplexity, perplexity
from mixtral_jax.inference.requests import EngineConfig
from mixtral_jax.inference.runner import Loaded
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.inference.scoring import Scores, score
from mixtral_jax.inference.weights import Prepared, restore
from mixtral_jax.text.growing import GrowingText
from mixtral_jax.text.tokenizer import Tokenizer

STEPS_A_CALL = 8
"""Tokens decoded between two looks of the host, where text is streamed or may end at a stop string."""


class Model:
    """A loaded model.

    Attributes:
      config: what the weights are.
      tokenizer: the one that came with them, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Prepared,
        execution: Execution,
        tokenizer: Tokenizer | None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self._weights = weights
        self._execution = execution
        self._mesh = mesh

    def _on_mesh(self) -> AbstractContextManager:
        """The context in which programs run."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    @property
    def params(self) -> Any:
        """The public parameter tree, layers stacked; made anew at each call, at the cost of a second copy."""
        with self._on_mesh():
            return restore(self._weights)

    def logits(self, tokens_BT: Any) -> jax.Array:
        """Next-token logits of every token, float32 [B, T, V].

        Args:
          tokens_BT: integers, numpy or jax, without padding.

        Raises:
          InputError: not two-dimensional, empty, not integers, or an id outside the vocabulary.
        """
        tokens = np.asarray(tokens_BT)
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError("tokens_BT", f"{tokens.dtype}{list(tokens.shape)}", "integers [B, T] are needed")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise InputError("tokens_BT", int(worst), f"token ids go from 0 to {self.config.vocab_size - 1}")
        real_BT = jnp.ones(tokens.shape, bool)
        tokens_BT = jnp.asarray(tokens, jnp.int32)
        with self._on_mesh():
            return decode.logits(self._weights, tokens_BT, real_BT, config=self.config, execution=self._execution)

    def score(self, tokens_BT: jax.Array, real_BT: jax.Array) -> Scores:
        """What each token costs given those before it in its row; `real_BT` is False for padding, at the rows' ends."""
        with self._on_mesh():
            return score(self._weights, tokens_BT, real_BT, config=self.config, execution=self._execution)

    def perplexity(
        self,
        text: str,
        window: int | None = None,
        stride: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Perplexity:
        """How well the model foretells a text: nats, tokens, and their exponential mean.

        Args:
          window: tokens read at a time; None: 2048, or the model's positions where there are fewer.
          stride: from one window's start to the next's; None: half a window.

        Raises:
          InputError: no tokenizer, a text under two tokens, or a number out of bounds.
        """
        if self.tokenizer is None:
            raise InputError("text", text[:20], "this model has no tokenizer")
        window = window or min(DEFAULT_WINDOW, self.config.max_position)
        ids = self.tokenizer.encode(text, bos=True)
        stride = stride or window // 2
        with self._on_mesh():
            return perplexity(self._weights, ids, self.config, self._execution, window, stride, progress)

    def routing(
        self, ids: Sequence[int], window: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The experts that each token chooses, int32 [L, N, A], and each token's window, int32 [N]; see `choices`."""
        with self._on_mesh():
            return choices(self._weights, ids, self.config, self._execution, window, progress)

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_at_eos: bool = True,
    ) -> Any:
        """Continues each prompt.

        Args:
          prompts: strings, or lists of token ids. A string gets the tokenizer's BOS in front; ids are taken as given.
          max_new_tokens: at most so many for each.
          temperature: 0 for the likeliest token always.
          top_p, top_k, min_p: leave out unlikely tokens; see SamplingConfig.
          repetition_penalty: above 1, makes tokens of the text so far less likely.
          seed: decides what is drawn; a row draws the same whatever the other rows are.
          stop: strings that end a text; they and what follows are cut off. Only with string prompts.
          stop_at_eos: whether EOS ends a text.

        Returns:
          For strings the new text alone; for ids the new ids, an EOS that ended them included.

        Raises:
          InputError: naming the argument.
        """
        sampling = SamplingConfig(
            repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        if isinstance(prompts, str):
            raise InputError("prompts", prompts, "a list is needed: [prompt]")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and len(texts) != len(prompts):
            raise InputError("prompts", "strings and ids", "all of one kind")
        if not len(prompts):
            return []
        if not texts:
            if stop:
                raise InputError("stop", list(stop), "needs prompts that are strings")
            ids = [[int(token) for token in prompt] for prompt in prompts]
            *_, state = self._states(ids, max_new_tokens, sampling, seed, stop_at_eos)
            return generate.outputs(state)
        *_, last = self.stream(texts, max_new_tokens, sampling, seed, stop, stop_at_eos)
        return last

    def engine(self, config: EngineConfig | None = None, draft: Model | None = None) -> Engine:
        """Continues many texts at a time, as they come; see Engine.

        Args:
          config: how many, how long, and what is guessed ahead; None: the defaults.
          draft: a smaller model with the same vocabulary, for `EngineConfig(speculation="draft")`.

        Raises:
          InputError: the model does not have so many positions, or the draft does not fit.
        """
        return Engine(self._loaded, config, None if draft is None else draft._loaded, self._mesh)

    @property
    def _loaded(self) -> Loaded:
        return Loaded(self._weights, self.config, self._execution)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_at_eos: bool = True,
    ) -> Iterator[list[str]]:
        """Like `generate`, from strings or ids to text; yields each as it grows, and last the finished ones."""
        if self.tokenizer is None:
            raise InputError("prompts", "strings", "this model has no tokenizer; give token ids")
        if any(not each for each in stop):
            raise InputError("stop", list(stop), "an empty string would stop at once")
        encode = self.tokenizer.encode
        ids = [encode(each, bos=True) if isinstance(each, str) else list(each) for each in prompts]
        texts = [GrowingText(self.tokenizer, prompt, stop) for prompt in ids]
        for state in self._states(ids, max_new_tokens, sampling, seed, stop_at_eos, STEPS_A_CALL):
            for text, row in zip(texts, generate.outputs(state), strict=True):
                text.grow(row)
            yield [text.shown for text in texts]
            if all(text.stopped for text in texts):
                break
        yield [text.finish() for text in texts]

    def _states(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        stop_at_eos: bool,
        steps_a_call: int | None = None,
    ) -> Iterator[decode.DecodeState]:
        eos = (self.tokenizer.eos_ids if self.tokenizer else (2,)) if stop_at_eos else ()
        states = generate.generate(
            self._weights,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            config=self.config,
            execution=self._execution,
            seed=seed,
            stop_ids=eos,
            steps_a_call=steps_a_call,
        )
        while True:
            # Entered for each step: a generator's context would reach its caller.
            with self._on_mesh():
                state = next(states, None)
            if state is None:
                return
            yield state
