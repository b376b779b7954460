"""Machines by name."""

import pytest

from mixtral_jax.errors import InputError
from mixtral_jax.planning.topology import topology


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
