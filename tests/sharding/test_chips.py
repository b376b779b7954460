"""Chips by the device kinds that jax reports."""

from types import SimpleNamespace

import jax
import pytest

from mixtral_jax.sharding.chips import chip


@pytest.mark.parametrize(
    ("kind", "name", "teraflops"),
    [
        ("TPU v4", "v4", 275),
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("TPU7x", "v7x", 2307),
        ("NVIDIA A100-SXM4-80GB", "A100", 312),
        ("NVIDIA H100 80GB HBM3", "H100", 989),
        ("NVIDIA H200", "H200", 989),
    ],
)
def test_known(kind, name, teraflops):
    found = chip(SimpleNamespace(device_kind=kind))
    assert (found.name, found.bf16_flops) == (name, teraflops * 1e12)
    assert 1e10 < found.memory_bytes < found.memory_bandwidth < found.bf16_flops


def test_unknown():
    assert chip(jax.devices("cpu")[0]) is None
