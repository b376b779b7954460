"""Chips by the device kinds that jax reports."""

import os
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mixtral_jax.errors import InputError
from mixtral_jax.sharding import chips
from mixtral_jax.sharding.chips import Switched, Torus, chip, chip_by_name, names


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


def test_by_name():
    assert chip_by_name("v5p") == chip(SimpleNamespace(device_kind="TPU v5"))
    assert chip_by_name("H100").name == "H100"
    assert names() == ["a100", "h100", "h200", "v4", "v5e", "v5p", "v6e", "v7x"]
    with pytest.raises(InputError, match=r"chip = 'v5pe': did you mean 'v5[pe]'\? known: a100"):
        chip_by_name("v5pe")


@pytest.mark.parametrize(
    ("name", "both_ways"), [("v4", 600), ("v5e", 400), ("v5p", 1200), ("v6e", 800), ("h100", 900), ("a100", 600)]
)
def test_wiring_is_that_of_the_data_sheet(name, both_ways):
    """GB/s a chip, of all links, there and back."""
    wiring = chip_by_name(name).wiring
    match wiring:
        case Torus():
            assert wiring.link_bandwidth * wiring.dimensions * 2 * 2 == both_ways * 1e9
        case Switched():
            assert wiring.bandwidth * 2 == both_ways * 1e9
    assert chip_by_name(name).network_bandwidth < both_ways * 1e9 / 8


@pytest.mark.parametrize("attached", [False, True])
def test_a_host_with_a_tpu_is_told_nothing_of_it(monkeypatch, attached):
    monkeypatch.setattr(chips, "has_tpu", lambda: attached)
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    chips.quiet_compiler()
    assert ("TPU_ACCELERATOR_TYPE" in os.environ) == (not attached)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


@pytest.mark.parametrize(
    ("platform", "capability", "is_old"),
    [("gpu", "7.5", True), ("gpu", "8.0", False), ("gpu", "12.0", False), ("gpu", "gfx90a", False), ("tpu", "", False)],
)
def test_old_gpus(monkeypatch, platform, capability, is_old):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert chips.computes_on_old_gpu() == is_old
    assert chips.multiplies_bfloat16(platform) == (not is_old)


@pytest.mark.parametrize(
    ("told", "flags"),
    [
        (None, set()),
        ("flags : sse", {"sse"}),
        ("model : x\nflags\t\t: fpu avx2 avx512_bf16 vaes\nbugs : amx_bf16\n", {"fpu", "avx2", "avx512_bf16", "vaes"}),
        ("Features : fp asimd\n", set()),
    ],
)
def test_what_the_cpu_says(monkeypatch, told, flags):
    def read(path, encoding):
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(Path, "read_text", read)
    assert chips.cpu_flags.__wrapped__() == flags


@pytest.mark.parametrize(
    ("platform", "flags", "bfloat16", "amx", "wide"),
    [
        ("tpu", "", True, False, False),
        ("gpu", "sse", True, False, False),
        ("cpu", "avx2", False, False, False),
        ("cpu", "avx2 avx512f avx512_bf16", True, False, True),
        ("cpu", "avx512f avx512_bf16x", False, False, True),
        ("cpu", "amx_bf16", True, True, False),
    ],
)
def test_what_a_platform_has(monkeypatch, platform, flags, bfloat16, amx, wide):
    monkeypatch.setattr(chips, "cpu_flags", lambda: frozenset(flags.split()))
    assert (chips.multiplies_bfloat16(platform), chips.has_amx(), chips.has_avx512()) == (bfloat16, amx, wide)
