"""One dense model trained on as it is, and as a mixture of eight copies of its feed-forwards, step for step.

python -m benchmarks.upcycling [--steps 400] [--picture docs/upcycling.png]

The dense run is `runs/toy-dense`; both go on from its last checkpoint with the data, the schedule and fresh moments of
`runs/toy-upcycled`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.upcycle import Upcycled
from mixtral_jax.train import config as configs
from mixtral_jax.train.loop import train
from mixtral_jax.train.metrics import METRICS, VALIDATION, read
from mixtral_jax.train.progress import Progress

INK = {"dense": "#4c72b0", "upcycled": "#c44e52"}


def run(config: str, settings: list[str], folder: Path) -> dict[str, Any]:
    """A run's first loss, its held-out losses by step, and its seconds."""
    start = time.perf_counter()
    train(configs.load(config, settings), folder, Progress(Console(quiet=True)))
    first = read(folder / METRICS)[0]["loss"]
    held_out = {line["step"]: line["loss"] for line in read(folder / VALIDATION)}
    return {"first": first, "held_out": held_out, "seconds": time.perf_counter() - start}


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """The held-out losses of both."""
    matplotlib.use("agg")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in runs.items():
        steps, losses = zip(*sorted(found["held_out"].items()), strict=True)
        axes.plot(steps, losses, "o-", color=INK[name], label=f"{name} ({losses[-1]:.3f})")
    axes.set(xlabel="steps since the dense checkpoint", ylabel="held-out loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Prints a line a run, and draws both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of the dense run, and of each after it")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        steps = f"steps={arguments.steps}"
        print(json.dumps({"run": "before", **run("runs/toy-dense", [steps], folder / "before")}), flush=True)
        convert(Upcycled(open_source(folder / "before"), 8, 2), folder / "mixture", "native")
        tokenizer = f'data.tokenizer="{folder / "before" / "tokenizer.model"}"'
        runs = {}
        for name, begun, more in (("dense", "before", ["model.moe=none"]), ("upcycled", "mixture", [])):
            settings = [steps, tokenizer, f'init_from="{folder / begun}"', *more]
            runs[name] = run("runs/toy-upcycled", settings, folder / name)
            print(json.dumps({"run": name, **runs[name]}), flush=True)
        if arguments.picture is not None:
            draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
