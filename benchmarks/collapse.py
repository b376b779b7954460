"""Three runs from one collapsed model: with the balance loss, with the selection bias, and with neither.

python -m benchmarks.collapse [--steps 200] [--pictures docs]

The model is fresh but for this: every token's embedding is large in one dimension, and in layer l the router sends what
is large there to experts 2l and 2l + 1. No gradient of the cross-entropy reaches the other experts' routers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.train import config as configs
from mixtral_jax.train.loop import train
from mixtral_jax.train.metrics import METRICS, ROUTING, read
from mixtral_jax.train.progress import Progress
from mixtral_jax.train.report import write_report

RUNS = {
    "loss": ("losses.balance=0.02",),
    "bias": ("losses.balance=0", "losses.bias_rate=0.003"),
    "neither": ("losses.balance=0",),
}
"""What each is trained with, by name."""
LARGE, STEEP = 0.1, 1.0
"""Of the embeddings in the one dimension, five times their deviation; of the routers there."""


class Collapsed(Source):
    """A fresh model of which each layer sends all tokens to a pair of experts of its own."""

    def __init__(self, source: Source):
        super().__init__(source.path, f"{source.form}, collapsed", source.config)
        self._source = source

    def problems(self) -> list[str]:
        """See Source."""
        return self._source.problems()

    def files(self) -> Iterable[Path]:
        """See Source."""
        return self._source.files()

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return self._source.dtype(tensor)

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self._source.stored_as(tensor)

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return self._source.tokenizer()

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        array = np.array(self._source.read(tensor))
        if tensor.kind == "embedding":
            array[:, 0] = LARGE
        elif tensor.kind == "moe.router":
            assert tensor.layer is not None
            first = 2 * tensor.layer % array.shape[1]
            array[0, first : first + 2] += STEEP
        return array


def collapsed(config: str | Path, settings: Iterable[str], folder: Path) -> Path:
    """Writes a collapsed model of a run's config, as our own format has it; needs model.moe.selection_bias = true."""
    silent = Progress(Console(quiet=True))
    fresh = [*settings, "steps=1", "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-12"]
    train(configs.load(config, fresh), folder / "fresh", silent)
    convert(Collapsed(open_source(folder / "fresh")), folder / "collapsed", "native")
    return folder / "collapsed"


def run(config: str | Path, settings: Iterable[str], begun: Path, name: str, folder: Path) -> dict[str, Any]:
    """One of RUNS from the collapsed model: what it was at its first and over its last ten steps."""
    more = [f'init_from="{begun}"', f'data.tokenizer="{begun / "tokenizer.model"}"', *RUNS[name]]
    train(configs.load(config, [*settings, *more]), folder, Progress(Console(quiet=True)))
    metrics, loads = read(folder / METRICS), read(folder / ROUTING)

    def describe(part: slice) -> dict[str, Any]:
        values = {key: float(np.mean([each[key] for each in metrics[part]])) for key in ("loss", "dropped_fraction")}
        load_LE = np.mean([each["load"] for each in loads[part]], axis=0)
        return {
            **{key: round(value, 3) for key, value in values.items()},
            "load": load_LE.max(axis=1).round(2).tolist(),
        }

    return {"with": name, "first step": describe(slice(1)), "last ten": describe(slice(-10, None))}


def main() -> None:
    """Prints a line a run, and writes its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    settings = ["model.moe.selection_bias=true", "model.num_layers=4", "optimizer.learning_rate=3e-3"]
    with tempfile.TemporaryDirectory() as scratch:
        begun = collapsed("runs/first", settings, Path(scratch))
        for name in RUNS:
            folder = Path(scratch) / name
            print(
                json.dumps(run("runs/first", [*settings, f"steps={arguments.steps}"], begun, name, folder)), flush=True
            )
            if arguments.pictures is not None:
                picture = next(path for path in write_report(folder) if path.stem == "expert_load")
                shutil.copy(picture, arguments.pictures / f"collapse-{name}.png")


if __name__ == "__main__":
    main()
