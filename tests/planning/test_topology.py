"""Machines by name, and the compiler's devices for them."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
from oracles.compiler import needs_compiler

from mixtral_jax.errors import InputError
from mixtral_jax.planning import topology as machines
from mixtral_jax.planning.topology import devices, topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("name", "chips", "island"),
    [
        ("v5p:4x4x4", 64, 64),
        ("v4:2x2x1", 4, 4),
        ("v5p:12x12x12", 1728, 1728),
        ("V6E:8x8", 64, 64),
        ("2xv5e:16x16", 512, 256),
        ("h100:8", 8, 8),
        ("h100:64", 64, 8),
        ("h100:2", 2, 2),
        ("cpu:8", 8, 8),
    ],
)
def test_names(name, chips, island):
    machine = topology(name)
    assert (machine.num_chips, machine.island, machine.name) == (chips, island, name.lower())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p:64", r"did you mean v5p:4x4x4\? v5p comes as 2x2x1, .*or sizes that 4 divides"),
        ("v6e:8x9", r"did you mean '8x8'\? v6e comes as 1x1"),
        ("v5q:4x4x4", r"did you mean 'v5p'\? known chips: a100, .*cpu"),
        ("v7x:4x4x4", "known chips: a100"),
        ("v5p-128", r"written as chip:shape, such as v5p:4x4x4"),
        ("", "written as chip:shape"),
        ("v5p:4x4x0", "at least one chip"),
        ("h100:12", "whole nodes of 8"),
        ("h100:2x4", "a number of devices, such as h100:8"),
        ("2xh100:8", "a number of devices, such as h100:16"),
    ],
)
def test_refused(name, message):
    with pytest.raises(InputError, match=f"--topology = .*{message}"):
        topology(name)


def test_the_next_larger():
    assert [topology(name).larger().name for name in ("v5p:4x4x4", "v6e:8x8", "h100:8")] == [
        "v5p:4x4x8",
        "v6e:8x16",
        "h100:16",
    ]
    assert topology("v5e:16x16").larger() is None
    assert topology("cpu:8").larger() is None


def test_devices_of_this_host():
    assert len(devices(topology("cpu:8"))) == 8
    with pytest.raises(InputError, match="jax shows 8 here; set XLA_FLAGS=--xla_force_host_platform_device_count=16"):
        devices(topology("cpu:16"))
    with pytest.raises(InputError, match="GPUs are planned from counts alone"):
        devices(topology("h100:8"))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "kind"),
    [("v4:4x4x4", "TPU v4"), ("v5e:1x1", "TPU v5 lite"), ("v5p:4x8x8", "TPU v5"), ("v6e:16x16", "TPU v6 lite")],
)
def test_devices_that_are_not_here(name, kind):
    found = devices(topology(name))
    assert (len(found), found[0].device_kind) == (topology(name).num_chips, kind)


@needs_compiler
def test_eight_by_eight_lies_on_the_torus():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, expert=8), devices(topology("v5p:4x4x4")))
    assert mesh.shape["expert"] == mesh.shape["fsdp"] == 8
    slices = make_mesh(MeshConfig(data=2, fsdp=64), devices(topology("2xv5p:4x4x4")))
    assert [{each.slice_index for each in part.flat} for part in slices.devices] == [{0}, {1}]


@needs_compiler
def test_the_compiler_says_nothing():
    """In a process of its own: what it prints, it prints once."""
    program = "import jax; jax.config.update('jax_platforms', 'cpu')\nfrom mixtral_jax.planning.topology import *\n"
    program += "print(len(devices(topology('v5p:4x4x4'))))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    run = [sys.executable, "-c", program]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert (ended.stdout, ended.stderr) == ("64\n", "")


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(machines, "has_compiler", lambda: False)
    with pytest.raises(InputError, match=r"libtpu: is not installed; .*pip install 'mixtral-jax\[plan\]'"):
        devices(topology("v5p:4x4x4"))


def test_with_a_compiler_that_is_not_matched(monkeypatch):
    monkeypatch.setattr(machines, "has_compiler", lambda: True)
    monkeypatch.setattr(metadata, "version", lambda name: {"libtpu": "0.0.50.1"}.get(name, "0.10.2"))
    monkeypatch.setattr(metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    with pytest.raises(InputError, match=r"libtpu = '0.0.50.1': this jax 0.10.2 wants 0.0.42; .*mixtral-jax\[plan\]"):
        machines.require_compiler()
