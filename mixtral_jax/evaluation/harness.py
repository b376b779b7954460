"""A loaded model as the evaluation harness (lm-eval) wants it, and a run of its tasks.

Importing this needs the extra `eval`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from mixtral_jax.errors import InputError, nearest
from mixtral_jax.inference.generate import bucket
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.language_model import Model

_MOST_NEW_TOKENS = 256
"""Of an answer, where the task does not say: the harness's own default."""

Request = tuple[Any, list[int], list[int]]
"""What a request is known by, its context, and the continuation to be scored."""


class HarnessModel(TemplateLM):
    """The harness's interface: log-likelihoods of continuations and of whole texts, and generation, in batches."""

    def __init__(self, model: Model, batch_size: int = 8, max_length: int | None = None):
        """Wraps a model.

        Args:
          max_length: tokens read at a time; None: the model's positions.

        Raises:
          InputError: the model has no tokenizer, or max_length is out of bounds.
        """
        super().__init__()
        if model.tokenizer is None:
            raise InputError("MODEL", None, "it came without a tokenizer, which the tasks' texts need")
        self._model, self._tokenizer, self._batch_size = model, model.tokenizer, batch_size
        self.max_length = max_length or model.config.max_position
        if not 2 <= self.max_length <= model.config.max_position:
            raise InputError("--max-length", max_length, f"from 2 to the model's {model.config.max_position} positions")

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._tokenizer.bos_id if self._tokenizer.bos_id >= 0 else self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, with what the model wants in front unless told otherwise."""
        return self._tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # Longest first: rows of a batch are alike, and what doesn't fit in memory shows at once.
        order = sorted(range(len(requests)), key=lambda each: -len(requests[each][1]) - len(requests[each][2]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as progress:
            for chosen in _batches(order, self._batch_size):
                for index, result in zip(chosen, self._score([requests[each] for each in chosen]), strict=True):
                    found[index] = result
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                progress.update(len(chosen))
        return found

    def _score(self, requests: Sequence[Request]) -> Iterator[tuple[float, bool]]:
        """Scores a batch, in one of few shapes."""
        longest = max(len(continuation) for _, _, continuation in requests)
        if longest > self.max_length:
            raise InputError("--max-length", self.max_length, f"an answer to be scored has {longest} tokens")
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        # The last token is scored, not read, so that a row may be one longer than what the model reads.
        length = min(bucket(max(map(len, rows))), self.max_length + 1)
        tokens_BT = np.zeros((self._batch_size, length), np.int32)
        real_BT = np.zeros(tokens_BT.shape, bool)
        for index, row in enumerate(rows):
            tokens_BT[index, : len(row)] = row
            real_BT[index, : len(row)] = True
        scores = self._model.score(jnp.asarray(tokens_BT), jnp.asarray(real_BT))
        nats_BT, likeliest_BT = np.asarray(scores.nats_BT, np.float64), np.asarray(scores.likeliest_BT)
        for index, (row, (_, _, continuation)) in enumerate(zip(rows, requests, strict=True)):
            part = slice(max(1, len(row) - len(continuation)), len(row))
            yield -float(nats_BT[index, part].sum()), bool(likeliest_BT[index, part].all())

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, by windows that score every token once."""
        windows: list[Request] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for pair in map(utils.make_disjoint_window, rolling):
                windows.append((None, *pair))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to its stop strings."""
        settings = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda each: (settings[each], -len(contexts[each])))
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as progress:
            for _, group in groupby(order, key=lambda each: settings[each]):
                for chosen in _batches(list(group), self._batch_size):
                    arguments = requests[chosen[0]].args[1]
                    # A task that draws several answers asks the same several times: each batch draws anew.
                    texts = self._generate([contexts[each] for each in chosen], arguments, seed=chosen[0])
                    for index, text in zip(chosen, texts, strict=True):
                        found[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update(len(chosen))
        return found

    def _generate(self, contexts: list[list[int]], arguments: dict[str, Any], seed: int) -> list[str]:
        most = int(arguments.get("max_gen_toks", arguments.get("max_new_tokens", _MOST_NEW_TOKENS)))
        if most >= self.max_length:
            raise InputError("max_gen_toks", most, f"less than the {self.max_length} tokens that are read at a time")
        until = arguments.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        draws = arguments.get("do_sample", float(arguments.get("temperature") or 0) > 0)
        sampling = SamplingConfig(
            temperature=float(arguments.get("temperature") or 1.0) if draws else 0.0,
            top_p=float(arguments.get("top_p", 1.0)) if draws else 1.0,
            top_k=int(arguments.get("top_k", 0)) if draws else 0,
        )
        prompts = [context[-(self.max_length - most) :] for context in contexts]
        *_, texts = self._model.stream(prompts, most, sampling, seed, [each for each in stop if each])
        return texts


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def evaluate(
    model: HarnessModel,
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Runs tasks; the harness's results.

    Args:
      tasks: the harness's names, of tasks, groups or tags.
      num_fewshot: examples in front of each question; None: as each task says.
      limit: so many questions a task, to try it out.
      include: a folder with tasks of the user's own.
      allow_code: whether to run the programs that the model writes (HumanEval and its like).

    Raises:
      InputError: an unknown task, one that runs code without leave, or one whose data can't be had.
    """
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if name not in manager.all_tasks:
            close = nearest(name, manager.all_tasks)
            raise InputError("--tasks", name, f"no such task; {close}the harness has {len(manager.all_tasks):,}")
    try:
        results = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            confirm_run_unsafe_code=allow_code,
            log_samples=False,
        )
    except ValueError as error:
        if "unsafe" in str(error):
            raise InputError(
                "--tasks", ",".join(tasks), "runs what the model writes; --allow-code permits it"
            ) from None
        raise
    except ConnectionError as error:
        raise InputError("--tasks", ",".join(tasks), f"the data can't be had: {error}") from None
    assert results is not None
    return dict(results)
