"""What a load measured: a table, numbers for scripts, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.serving.load import PERCENTILES, Measured

TIMES = ("first_token", "between_tokens", "between_pieces", "request")
PANELS = {
    "first_token": "time to first token",
    "between_tokens": "time between tokens, mean of a request",
    "request": "whole request",
}


def summary(measured: Measured) -> dict[str, Any]:
    """Counts, rates a second, and percentiles of times in seconds; None where nothing was measured."""
    whole = [sample for sample in measured.samples if sample.error is None]
    times = {
        "first_token": [sample.first_token for sample in whole if sample.first_token is not None],
        "between_tokens": [each for each in (sample.between_tokens for sample in whole) if each is not None],
        "between_pieces": [gap for sample in whole for gap in sample.gaps],
        "request": [sample.seconds for sample in whole],
    }
    errors: dict[str, int] = {}
    for sample in measured.samples:
        if sample.error is not None:
            errors[sample.error] = errors.get(sample.error, 0) + 1
    return {
        "rate": measured.rate,
        "requests": len(measured.samples),
        "completed": len(whole),
        "errors": errors,
        "seconds": measured.seconds,
        "requests_per_second": len(whole) / max(measured.seconds, 1e-9),
        "tokens_per_second": sum(sample.tokens for sample in whole) / max(measured.seconds, 1e-9),
        **{name: _percentiles(values) for name, values in times.items()},
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(np.asarray(values, np.float64), PERCENTILES).tolist()
    return {f"p{each}": value for each, value in zip(PERCENTILES, found, strict=True)}


def table(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of text, the heading first; times in milliseconds."""
    heading = ["rate", "requests", "errors", "tokens/s"]
    heading += [f"{name.replace('_', ' ')} p{each}" for name in TIMES for each in PERCENTILES]
    rows = [heading]
    for each in summaries:
        row = [f"{each['rate']:g}", str(each["requests"]), str(sum(each["errors"].values()))]
        row.append(f"{each['tokens_per_second']:,.1f}")
        for name in TIMES:
            row += ["-" if each[name] is None else f"{each[name][f'p{n}'] * 1000:,.1f}" for n in PERCENTILES]
        rows.append(row)
    return rows


def plot(summaries: Sequence[dict[str, Any]], path: Path) -> None:
    """Percentiles and throughput over the rates, as a PNG or whatever the name ends with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    rates = [each["rate"] for each in summaries]
    for panel, (name, title) in zip(panels.flat, PANELS.items(), strict=False):
        for percentile in (f"p{each}" for each in PERCENTILES):
            values = [np.nan if each[name] is None else each[name][percentile] * 1000 for each in summaries]
            panel.plot(rates, values, marker="o", label=percentile)
        panel.set(title=title, xlabel="requests a second", ylabel="milliseconds", ylim=(0, None))
        panel.legend()
    panel = panels.flat[3]
    panel.plot(rates, [each["tokens_per_second"] for each in summaries], marker="o")
    panel.set(title="throughput", xlabel="requests a second", ylabel="tokens a second", ylim=(0, None))
    figure.savefig(path, dpi=120)
