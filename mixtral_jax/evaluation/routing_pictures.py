"""The routing of a text as a table and as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure


def table(found: dict[str, Any]) -> Iterator[str]:
    """What `summarise` found, line by line."""
    again, either = found["repetition"], _either(found["choices"])
    yield f"{found['tokens']:,} tokens, {found['experts']} experts"
    yield "the next token goes the same way:"
    yield f"  {'layer':<8}{'first choice':>14}{either:>26}"
    yield f"  {'chance':<8}{again['chance_first']:>14.1%}{again['chance_any']:>26.1%}"
    for layer, (first, some) in enumerate(zip(again["first"], again["any"], strict=True)):
        yield f"  {layer:<8}{_percent(first):>14}{_percent(some):>26}"
    yield from _by_group(found)
    yield "how concentrated each kind is, by layer (0: even, 1: one expert), and its busiest expert:"
    for name, group in found["groups"].items():
        cells = "".join(
            f"  {value:.3f} e{int(np.argmax(share))}"
            for value, share in zip(group["concentration"], group["share"], strict=True)
        )
        yield f"  {name:<20}{group['tokens']:>10,}{cells}"


def _by_group(found: dict[str, Any]) -> Iterator[str]:
    """As the Mixtral paper's table 5 has it: the first layer, the middle one and the last, for each group of tokens."""
    again, last = found["repetition"], len(found["repetition"]["first"]) - 1
    layers = sorted({0, last // 2, last})
    width = 10 * len(layers)
    yield "by the kind of the earlier token:"
    yield f"  {'':<20}{'first choice':>{width}}{_either(found['choices']):>{max(width, 26)}}"
    cells = "".join(f"{f'layer {layer}':>10}" for layer in layers)
    yield f"  {'':<20}{cells}{cells:>{max(width, 26)}}"
    first, some = (f"{again[f'chance_{key}']:>10.1%}" * len(layers) for key in ("first", "any"))
    yield f"  {'chance':<20}{first}{some:>{max(width, 26)}}"
    for name, group in found["groups"].items():
        first, some = (
            "".join(f"{_percent(group['repetition'][key][layer]):>10}" for layer in layers) for key in ("first", "any")
        )
        yield f"  {name:<20}{first}{some:>{max(width, 26)}}"


def _either(choices: int) -> str:
    return "first or second choice" if choices == 2 else f"any of {choices} choices"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes routing_share.png and routing_repetition.png."""
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("share", _share(found)), ("repetition", _repetition(found))):
        paths.append(folder / f"routing_{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def _share(found: dict[str, Any]) -> Figure:
    groups = found["groups"]
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3 * columns, 0.8 + 2.6 * rows), layout="constrained")
    axes_N = figure.subplots(rows, columns, squeeze=False).ravel()
    most = max(np.max(group["share"]) for group in groups.values())
    for axes, (name, group) in zip(axes_N, groups.items(), strict=False):
        image = axes.imshow(group["share"], aspect="auto", vmin=0, vmax=most, cmap="viridis", interpolation="nearest")
        axes.set_title(f"{name} ({group['tokens']:,})", fontsize=9)
        axes.set(xlabel="expert", ylabel="layer")
    for axes in axes_N[len(groups) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(axes_N), label="share of choices")
    return figure


def _repetition(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, again = figure.subplots(), found["repetition"]
    for key, color, label in (("first", "#4c72b0", "first choice"), ("any", "#c44e52", "first or second choice")):
        axes.plot(again[key], "o-", color=color, label=label)
        axes.axhline(again[f"chance_{key}"], color=color, linestyle="--", linewidth=0.8, label=f"{label}, by chance")
    axes.set(xlabel="layer", ylabel="share of neighbours that go the same way", ylim=(0, 1))
    axes.legend()
    return figure
