"""A run's pictures: loss, throughput, and the load of the experts by layer over time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixtral_jax.checkpoints.buckets import Folder, fetched, folder_at, is_remote, send, told_of_bucket
from mixtral_jax.errors import InputError
from mixtral_jax.train.metrics import METRICS, ROUTING, VALIDATION, read

REPORT = "report"

_INK = {"train": "#4c72b0", "validation": "#c44e52", "entropy": "#555555"}


@contextmanager
def readable(run: str | os.PathLike[str], also: str = "goodput.json") -> Iterator[Path]:
    """A run's folder on a disk; while the context lasts, a copy of its numbers and a file besides from a bucket."""
    folder = folder_at(run, "run")
    if not is_remote(folder):
        yield folder
        return
    with told_of_bucket(folder, "run"), fetched(folder, lambda name: name.endswith(".jsonl") or name == also) as copy:
        yield copy


def write_report(run: str | os.PathLike[str]) -> list[Folder]:
    """Draws what a run's folder has; returns the PNG files.

    Raises:
      InputError: the folder has no metrics.
    """
    folder = folder_at(run, "run")
    with readable(run) as copy:
        paths = _draw(copy, str(run))
        if is_remote(folder):
            send(copy, folder, paths)
        return [folder / path.relative_to(copy) for path in paths]


def _draw(folder: Path, name: str) -> list[Path]:
    matplotlib.use("agg")
    metrics = read(folder / METRICS)
    if not metrics:
        raise InputError("run", name, f"no {METRICS} with at least one step")
    (folder / REPORT).mkdir(exist_ok=True)
    figures = {"loss": _loss(metrics, read(folder / VALIDATION)), "throughput": _throughput(metrics)}
    routing = read(folder / ROUTING)
    if routing:
        figures["expert_load"] = _expert_load(routing)
    paths = []
    for name, figure in figures.items():
        path = folder / REPORT / f"{name}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths


def _loss(metrics: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("loss")
    axes.plot(*_series(metrics, "loss"), color=_INK["train"], linewidth=0.8, label="training")
    if validation:
        steps, losses = _series(validation, "loss")
        axes.plot(steps, losses, "o-", color=_INK["validation"], label=f"held out ({losses[-1]:.3f})")
        entropy = validation[-1].get("unigram_entropy")
        if entropy is not None:
            label = f"unigram entropy of the held-out text ({entropy:.3f})"
            axes.axhline(entropy, color=_INK["entropy"], linestyle="--", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    return figure


def _throughput(metrics: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("throughput")
    steps, rate = _series(metrics, "tokens_per_second")
    axes.plot(steps, rate, color=_INK["train"], linewidth=0.8)
    if len(rate):
        middle = float(np.median(rate))
        axes.axhline(middle, color=_INK["entropy"], linestyle="--", linewidth=0.8, label=f"median {middle:,.0f}")
        axes.legend()
    axes.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    return figure


def _expert_load(routing: list[dict[str, Any]]) -> Figure:
    """For each layer a band: experts down, steps across, the load over its mean as colour."""
    steps = [each["step"] for each in routing]
    load_LES = np.moveaxis(np.array([each["load"] for each in routing]), 0, -1)
    layers, experts, _ = load_LES.shape
    figure = Figure(figsize=(9, 1.2 + 1.1 * layers), layout="constrained")
    axes_L = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    for layer, axes in enumerate(axes_L):
        extent = (steps[0], max(steps[-1], steps[0] + 1), experts - 0.5, -0.5)
        # The colour's middle is a balanced load; the scale is that of the ratio.
        log_load = np.log2(np.maximum(load_LES[layer], 1e-3))
        image = axes.imshow(
            log_load, aspect="auto", extent=extent, cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest"
        )
        worst = float(load_LES[layer, :, -1].max())
        axes.set_ylabel(f"layer {layer}\nlast {worst:.2f}", rotation=0, ha="right", va="center", fontsize=8)
        axes.set_yticks([])
    axes_L[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(axes_L), label="load over the mean")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    figure.suptitle("expert load by layer: one row an expert; last: the busiest expert's at the end", fontsize=10)
    return figure


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], np.ndarray]:
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], np.array([value for _, value in found], float)
