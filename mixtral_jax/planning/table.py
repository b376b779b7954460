"""Many plans as a table: of a pod file on the terminal, and of all of them in docs/pods.md."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mixtral_jax.planning.estimate import estimate_prefill
from mixtral_jax.planning.memory import memory
from mixtral_jax.planning.pods import Pod
from mixtral_jax.planning.report import GIB
from mixtral_jax.planning.search import estimated, flags

COLUMNS = ("topology", "model", "purpose", "plan", "GiB a chip", "estimate, s", "tokens/s/chip", "MFU", "bound by")


def rows(pods: list[Pod]) -> list[dict[str, Any]]:
    """Each plan by counts."""
    return [_row(pod) for pod in pods]


def _row(pod: Pod) -> dict[str, Any]:
    _, _, model, purpose = pod.name.split("/")
    row: dict[str, Any] = {"name": pod.name, "topology": pod.machine.name, "model": model, "purpose": purpose}
    if pod.entry.mesh is None:
        return {**row, "fits": False, "fits_on": pod.entry.fits_on}
    job = pod.job()
    found = estimated(job, pod.machine)
    row |= {
        "fits": True,
        "flags": flags(job),
        "memory_bytes": memory(job).total,
        "seconds": found.seconds,
        "tokens_per_second_per_chip": found.tokens_per_second / pod.machine.num_chips,
        "mfu": found.mfu,
        "bound": found.bound,
    }
    if job.serve:
        prefill = estimate_prefill(job, pod.machine)
        row["prefill_tokens_per_second_per_chip"] = prefill.tokens_per_second / pod.machine.num_chips
    return row


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    head = row["topology"], row["model"], row["purpose"]
    if not row["fits"]:
        return (*head, f"does not fit; {row['fits_on']} would do", "", "", "", "", "")
    return (
        *head,
        row["flags"],
        f"{row['memory_bytes'] / GIB:.1f}",
        f"{row['seconds']:.3g}",
        f"{row['tokens_per_second_per_chip']:,.0f}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        row["bound"],
    )


def show_table(table: list[dict[str, Any]], console: Console) -> None:
    """Prints the rows, two lines each: flags are longer than a column."""
    for row in table:
        topology, model, purpose, plan, *figures = cells(row)
        console.print(f"{model}, {purpose}, on {topology}: {plan}", soft_wrap=True, highlight=False)
        if row["fits"]:
            named = zip(COLUMNS[4:], figures, strict=True)
            told = ", ".join(f"{name} {figure}" for name, figure in named if figure)
            console.print(f"    {told}", soft_wrap=True, highlight=False)
    console.print("by counts and estimates; plan one of them by its name to compile it")


def markdown(table: list[dict[str, Any]]) -> str:
    """The rows as a table of markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in table)]) + "\n"
