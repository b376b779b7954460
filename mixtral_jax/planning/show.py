"""A plan as text for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mixtral_jax.planning.report import GIB, heading, verdict
from mixtral_jax.planning.search import OFFLOADED


def show(plan: dict[str, Any], console: Console) -> None:
    """Prints all of a plan."""
    console.print(heading(plan), soft_wrap=True)
    console.print()
    console.print(_memory(plan))
    if plan["host_bytes_by_counts"]:
        compiled = [each["host_bytes"] for each in plan["compiled"] if each["host_bytes"] is not None]
        sizes = [f"{plan['host_bytes_by_counts'] / GIB:.2f} GiB a chip by counts"]
        sizes += [f"{size / GIB:.2f} by the compiler" for size in compiled]
        console.print("in the host's memory: " + ", ".join(sizes))
    traffic = _traffic(plan)
    if traffic.row_count:
        console.print(traffic)
    if not all(each["traffic_is_complete"] for each in plan["compiled"]):
        console.print("the compiler's figure counts a loop whose length only running tells as one round")
    for name, found in plan.get("estimates", {}).items():
        _estimate(name, found, console)
    if "chip_hours" in plan:
        console.print(f"  {plan['token_budget']:.3g} tokens: {plan['chip_hours']:,.0f} chip-hours")
    if "assumptions" in plan:
        console.print("estimated, not measured; it assumes that " + "; ".join(plan["assumptions"]), soft_wrap=True)
    console.print(verdict(plan), soft_wrap=True)


def show_ranking(found: list[dict[str, Any]], console: Console) -> None:
    """Prints what a search found, the best first."""
    columns = ("mesh", "batch/chip", "remat", "capacity", "GiB/chip", "step s", "tokens/s/chip", "MFU", "bound by")
    table = Table(*columns, box=None)
    for each in found:
        mfu = "" if each["mfu"] is None else f"{each['mfu']:.1%}"
        rate = f"{each['tokens_per_second_per_chip']:,.0f}"
        size = f"{each['memory_bytes'] / GIB:.1f}"
        factor = "dropless" if each["capacity_factor"] is None else f"{each['capacity_factor']:g}"
        chosen = each["mesh"], f"{each['batch_per_chip']:g}", each["remat"] or "", factor
        table.add_row(*chosen, size, f"{each['seconds']:.3g}", rate, mfu, each["bound"])
    console.print(table)
    if any(each["remat"] == "offload" for each in found):
        console.print(f"what offloads is ranked as if it took {OFFLOADED:g} times as long", soft_wrap=True)
    console.print("by counts and the estimate; plan one of them without --search to compile it\n", soft_wrap=True)


def _memory(plan: dict[str, Any]) -> Table:
    """GiB a chip by kind; the compiler has one figure for all that a program makes."""
    table = Table("GiB a chip", "counts", *(each["program"] for each in plan["compiled"]), box=None)
    counted = plan["memory_by_counts"]
    compiled = [each["memory"] for each in plan["compiled"]]
    kinds = list(dict.fromkeys([*counted, *(kind for each in compiled for kind in each)]))
    for kind in kinds:
        table.add_row(kind, *(_gib(each.get(kind)) for each in [counted, *compiled]))
    totals = [sum(each.values()) if each else None for each in [counted, *compiled]]
    table.add_row("together", *(_gib(each) for each in totals))
    return table


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _traffic(plan: dict[str, Any]) -> Table:
    """GB that a chip sends by axes and kind."""
    table = Table("GB sent a chip and step", "over", "counts", *(e["program"] for e in plan["compiled"]), box=None)
    columns = [plan["traffic_by_counts"], *(each["traffic"] for each in plan["compiled"])]
    sums: list[dict[tuple[str, str], float]] = []
    for column in columns:
        total: dict[tuple[str, str], float] = {}
        for each in column:
            key = each["kind"], " x ".join(each["axes"])
            total[key] = total.get(key, 0) + each["sent_bytes"]
        sums.append(total)
    largest = max((size for each in sums for size in each.values()), default=0)
    for key in dict.fromkeys(key for each in sums for key in each):
        if max(each.get(key, 0) for each in sums) > largest / 1000:
            table.add_row(*key, *("" if key not in each else f"{each[key] / 1e9:.3f}" for each in sums))
    return table


def _estimate(name: str, found: dict[str, Any], console: Console) -> None:
    console.print(f"\n{name}, estimate: {found['seconds']:.3g} s, bound by {found['bound']}")
    apart = found["interconnect_seconds"]
    console.print(
        f"  {found['flops_per_chip'] / 1e12:,.4g} TFLOP and {found['memory_traffic_per_chip'] / 1e9:,.4g} GB a chip;"
        f" arithmetic {found['compute_seconds']:.3g} s, memory {found['memory_seconds']:.3g} s,"
        f" interconnect {apart['exposed']:.3g} s and {apart['hidden']:.3g} s meanwhile"
        + (f", to the host and back {found['host_seconds']:.3g} s meanwhile" if found["host_seconds"] else ""),
        soft_wrap=True,
    )
    console.print(f"  {found['tokens_per_second']:,.0f} tokens/s, {found['tokens_per_second_per_chip']:,.0f} a chip")
    if found["mfu"] is not None:
        console.print(f"  MFU {found['mfu']:.1%} (causal and windowed count), {found['mfu_full']:.1%} (full)")
