"""One text decoded from a GGUF file, ours in several forms beside llama.cpp.

python -m benchmarks.llamacpp MODEL.gguf [--new-tokens 128] [--repeats 7]

llama.cpp comes with `pip install xllamacpp`. Both decode greedily, after the same prompt, on as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_jax.cli.platform import reuse_memory

reuse_memory()  # for both alike, before either allocates

import xllamacpp  # noqa: E402

from benchmarks.timing import interleave, rates, show  # noqa: E402
from mixtral_jax.loading import load  # noqa: E402

PROMPT = "The mesh of a pod has as many axes as"
FORMS: dict[str, dict[str, Any]] = {
    "ours, int4": {"dtype": "auto", "quantize": "int4"},
    "ours, int8": {"dtype": "auto", "quantize": "int8"},
    "ours, not quantised": {"dtype": "auto"},
    "ours, float32": {"dtype": "float32"},
}


def main() -> None:
    """Prints a line a contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    calls = {name: _ours(arguments.model, arguments.new_tokens, **form) for name, form in FORMS.items()}
    calls["llama.cpp, as the file is"] = _theirs(arguments.model, arguments.new_tokens)
    seconds = interleave(calls, arguments.repeats)
    show(rates("decode B1", "tokens/s", arguments.new_tokens, seconds, next(iter(FORMS))), arguments.json)


def _ours(path: Path, new_tokens: int, **form: Any) -> Callable[[], object]:
    model = load(path, **form)
    return lambda: model.generate([PROMPT], max_new_tokens=new_tokens, stop_at_eos=False)


def _theirs(path: Path, new_tokens: int) -> Callable[[], object]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)
    request = {"prompt": PROMPT, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def call() -> None:
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert answer["usage"]["completion_tokens"] == new_tokens

    return call


if __name__ == "__main__":
    main()
