"""From a fresh process to the first token of SmolLM2-135M, ours and transformers in turns.

python -m benchmarks.start --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import sys, time
start = time.perf_counter()
from mixtral_jax.cli import platform
platform.start("cpu")
import mixtral_jax as mj
model = mj.load(sys.argv[1], dtype="bfloat16")
import jax
jax.block_until_ready(model._weights)
loaded = time.perf_counter()
model.generate([list(range(100, 132))], max_new_tokens=2, stop_at_eos=False)
print(loaded - start, time.perf_counter() - start)
"""
THEIRS = """
import sys, time
start = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
loaded = time.perf_counter()
with torch.no_grad():
    model.generate(torch.arange(100, 132)[None], max_new_tokens=2, do_sample=False, eos_token_id=None)
print(loaded - start, time.perf_counter() - start)
"""


def main() -> None:
    """Prints the seconds of each, medians and extremes; the first start of ours compiles, the others find programs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from mixtral_jax.checkpoints.convert import convert
    from mixtral_jax.checkpoints.opening import open_source
    from tests.oracles import smollm

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        convert(open_source(smollm.PATH), folder, "huggingface", "bfloat16")
        environment = {"XDG_CACHE_HOME": str(Path(scratch) / "cache")}
        print("ours, nothing compiled before: loaded, first token", _seconds(OURS, folder, environment))
        found: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
        for _ in range(repeats):
            found["ours"].append(_seconds(OURS, folder, environment))
            found["transformers"].append(_seconds(THEIRS, folder, environment))
    for name, times in found.items():
        for what, values in zip(("loaded", "first token"), zip(*times, strict=True), strict=True):
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            print(json.dumps({"who": name, "what": what, **{key: round(value, 2) for key, value in spread.items()}}))


def _seconds(code: str, folder: Path, environment: dict[str, str]) -> list[float]:
    import os

    run = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(run, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    return [float(each) for each in done.stdout.split()[-2:]]


if __name__ == "__main__":
    main()
