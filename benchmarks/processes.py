"""What can be measured in a fresh process alone: the seconds to compile a program, and peak memory.

The process is `python -m benchmarks.processes`, with what it shall do; it prints a number.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.convert_memory import resident_peak
from benchmarks.timing import Row, amounts
from mixtral_jax.config import model_config

DTYPE = "bfloat16"
LAYERS = (4, 16)
COMPILED = {"train": (4, 512), "prefill": (8, 512), "decode": (8, 16)}
"""Rows and tokens a row."""
RESIDENT = {"train": (8, 512), "prefill": (8, 2048)}
NEW_TOKENS = 64
IMPORTS = {"ours": ("ours",), "transformers": ("huggingface",)}
CONTENDERS = {
    "ours, bfloat16 products": ("ours", "bfloat16"),
    "ours, float32 products": ("ours", "float32"),
    "transformers, float32": ("huggingface", "float32"),
    "transformers, bfloat16": ("huggingface", "bfloat16"),
}


def compiling(repeats: int) -> list[Row]:
    """Seconds until the tiny Mixtral's programs can run, by layers: with nothing compiled before, and once more."""
    rows = []
    for work in COMPILED:
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            for layers in LAYERS:
                with tempfile.TemporaryDirectory() as cache:
                    for name in (f"{layers} layers", f"{layers} layers, from the cache"):
                        found[name].append(_number("compiling", work, str(layers), JAX_COMPILATION_CACHE_DIR=cache))
        rows += amounts(f"compile {work}", "s", found, f"{LAYERS[0]} layers")
    return rows


def memory(repeats: int) -> list[Row]:
    """The most that a process ever held, from its start through two calls, each set up as its users do."""
    rows = []
    for work, contenders in {"imports": IMPORTS, **dict.fromkeys(RESIDENT, CONTENDERS)}.items():
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            for name, contender in contenders.items():
                found[name].append(_number("resident", work, *contender))
        rows += amounts(f"memory, {work}", "MB", found, next(iter(contenders)))
    return rows


def _number(*arguments: str, **environment: str) -> float:
    """What a fresh process prints."""
    command = [sys.executable, "-m", "benchmarks.processes", *arguments]
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def _compiling(work: str, layers: str) -> float:
    """The first call's seconds less the second's: tracing, and compiling or reading what was."""
    call = _call("ours", work, DTYPE, COMPILED[work], int(layers))
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times[0] - times[1]


def _resident(work: str, who: str, *dtype: str) -> float:
    """MB. The second of two training steps has AdamW's moments beside its activations."""
    if work == "imports":
        importlib.import_module(f"benchmarks.{who}")
    else:
        call = _call(who, work, *dtype, RESIDENT[work])
        call()
        call()
    return resident_peak()


def _call(who: str, work: str, dtype: str, shape: tuple[int, int], layers: int = LAYERS[0]) -> Callable[[], object]:
    """The work as ours or huggingface does it, with random weights of its own."""
    config = replace(model_config("tiny-mixtral"), num_layers=layers)
    params = None
    if who == "ours":
        import jax
        from flax import linen as nn

        from mixtral_jax.cli import platform
        from mixtral_jax.model.transformer import init_params

        platform.start("cpu")
        params = nn.unbox(init_params(config, jax.random.key(0)))
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    steps = (NEW_TOKENS,) if work == "decode" else ()
    make = getattr(importlib.import_module(f"benchmarks.{who}"), work)
    return make(config, params, tokens_BT, *steps, dtype)


if __name__ == "__main__":
    print({"compiling": _compiling, "resident": _resident}[sys.argv[1]](*sys.argv[2:]))
