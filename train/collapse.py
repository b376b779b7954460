"""Sees a layer's router collapse: all but all of its choices on the same few experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

COLLAPSED = 0.9
"""The share of a layer's choices on its k busiest experts from which on it counts as collapsed; balanced is k / E."""
RECOVERED = 0.75
"""The share under which one that was collapsed no longer counts as such."""
PATIENCE = 10
"""Steps in a row until it is told."""


class Collapse(NamedTuple):
    """A layer that lives on as many experts as a token chooses."""

    layer: int
    experts: tuple[int, ...]
    share: float


class CollapseAlarm:
    """Watches the load of each layer, step after step.

    Args:
      experts_per_token: k.
    """

    def __init__(self, experts_per_token: int):
        self._k = experts_per_token
        self._steps: dict[int, int] = {}
        self._told: dict[int, tuple[int, ...]] = {}

    def see(self, step: int, load_LE: Any) -> tuple[list[Collapse], list[str]]:
        """Takes a step's load by layer and expert, over its mean.

        Returns:
          The layers that are collapsed, and what is to be told of a change: once for each, and again if it recovers.
        """
        found, told = [], []
        for layer, load_E in enumerate(np.asarray(load_LE, float)):
            busiest = np.sort(np.argsort(-load_E, kind="stable")[: self._k])
            experts, share = tuple(map(int, busiest)), float(load_E[busiest].sum() / max(load_E.sum(), 1e-9))
            if share >= (RECOVERED if layer in self._told else COLLAPSED) and len(load_E) > self._k:
                self._steps[layer] = self._steps.get(layer, 0) + 1
            else:
                self._steps.pop(layer, None)
                if self._told.pop(layer, None) is not None:
                    told.append(f"step {step + 1}: the router of layer {layer} has recovered")
            if self._steps.get(layer, 0) < PATIENCE:
                continue
            found.append(Collapse(layer, experts, round(share, 4)))
            if self._told.get(layer) != experts:
                names = " and ".join(map(str, experts))
                told.append(
                    f"warning: step {step + 1}: the router of layer {layer} has collapsed: experts {names} have"
                    f" {share:.0%} of its choices; see losses.balance"
                )
            self._told[layer] = experts
        return found, told
