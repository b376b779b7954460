"""How cost grows: `python -m benchmarks.costs [--plot FILE] [--json FILE] [--repeats N]`.

Tokens a second against what should not matter to them, each measured beside its first point in turns:

- the length of a text, with a window of 1024: flat from there on
- the number of experts, of which a token uses two: flat where prompts are taken in; in training AdamW goes over all
- the number of devices of one CPU that share the same batch: flat, since they share its cores too
- and against the number of texts that are decoded at a time, where more should give more
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mixtral_jax.cli.platform import reuse_memory

reuse_memory()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import ours  # noqa: E402
from benchmarks.timing import Row, interleave, rates, show  # noqa: E402
from mixtral_jax.config import ModelConfig, MoEConfig  # noqa: E402
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh  # noqa: E402

SMALL = ModelConfig(
    dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_dim=256,
    vocab_size=512,
    max_position=1 << 17,
)
WINDOWED = replace(SMALL, sliding_window=1024)
LENGTHS = tuple(1024 << n for n in range(7))
TEXTS = (1, 2, 4, 8, 16, 32, 64)
EXPERTS = (2, 4, 8, 16, 32, 64)
DEVICES = (1, 2, 4, 8)
TRAINED = 8, 256  # rows and tokens a row
SERVED = 8, 1024
DECODED = 32  # tokens a text


def mixture(num_experts: int) -> ModelConfig:
    """The small model with so many experts, of which a token uses two."""
    return replace(SMALL, moe=MoEConfig(num_experts=num_experts, experts_per_token=2))


def _prefill(config: ModelConfig, batch: int, length: int) -> Callable[[], object]:
    return ours.prefill(config, *ours.draw(config, batch, length), "float32")


def _decode(config: ModelConfig, batch: int) -> Callable[[], object]:
    return ours.decode(config, *ours.draw(config, batch, 16), DECODED, "float32")


def _train(config: ModelConfig, devices: int = 1) -> Callable[[], object]:
    """A step on so many devices, among which the experts are divided."""
    mesh = make_mesh(MeshConfig(data=1, expert=devices), jax.devices()[:devices])
    return ours.train(config, *ours.draw(config, *TRAINED), "float32", mesh=mesh)


def costs(repeats: int) -> list[Row]:
    """All of them, a row a point."""
    lengths = {length: _prefill(WINDOWED, 1, length) for length in LENGTHS}
    texts = {batch: _decode(mixture(8), batch) for batch in TEXTS}
    experts = {count: _train(mixture(count)) for count in EXPERTS}
    served = {count: _prefill(mixture(count), *SERVED) for count in EXPERTS}
    devices = {count: _train(mixture(8), count) for count in DEVICES}
    trained = TRAINED[0] * TRAINED[1]
    return [
        *_points("prefill, tokens of a text", lengths, lambda length: length, repeats),
        *_points("decode, texts at a time", texts, lambda batch: batch * DECODED, repeats),
        *_points("train, experts", experts, lambda _: trained, repeats),
        *_points("prefill, experts", served, lambda _: SERVED[0] * SERVED[1], repeats),
        *_points("train, devices of one CPU", devices, lambda _: trained, repeats),
    ]


def _points(name: str, calls: dict[int, Callable[[], object]], tokens: Callable[[int], int], repeats: int) -> list[Row]:
    seconds = interleave({str(at): call for at, call in calls.items()}, repeats, warm_up=1)
    found = {at: rates(name, "tokens/s", tokens(int(at)), {at: times}, at)[0] for at, times in seconds.items()}
    first = next(iter(found.values()))
    return [replace(row, ratio=first.median / row.median) for row in found.values()]


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each: the median, and from the least to the most."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.benchmark for row in rows))
    figure = Figure(figsize=(4.0 * len(names), 3.2), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        points = [row for row in rows if row.benchmark == name]
        at = [int(row.contender) for row in points]
        axes.fill_between(at, [row.least for row in points], [row.most for row in points], alpha=0.25, linewidth=0)
        axes.plot(at, [row.median for row in points], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(title=name.partition(", ")[0], xlabel=name.partition(", ")[2], ylabel="tokens a second")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw them, as a PNG")
    parser.add_argument("--redraw", type=Path, help="draws the rows of this JSON file instead of measuring")
    arguments = parser.parse_args()
    # Before jax looks for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(DEVICES)}"
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if arguments.redraw is not None:
        rows = [Row(**row) for row in json.loads(arguments.redraw.read_text())]
    else:
        rows = costs(arguments.repeats)
    show(rows, arguments.json)
    if arguments.plot is not None:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
