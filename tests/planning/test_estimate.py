"""The estimate: its parts by hand, what bounds it, and what was published of runs like those it is asked about."""

from dataclasses import replace

import pytest

from mixtral_jax.config import Dispatch, model_config
from mixtral_jax.errors import InputError
from mixtral_jax.planning.estimate import (
    COMPUTE_EFFICIENCY,
    chip_hours,
    estimate,
    estimate_decode,
    estimate_prefill,
)
from mixtral_jax.planning.interconnect import members_of_node, seconds
from mixtral_jax.planning.job import EXECUTION, Job, check
from mixtral_jax.planning.topology import topology
from mixtral_jax.planning.traffic import Transfer
from mixtral_jax.sharding.mesh import MeshConfig


def _job(name, mesh, batch, length, machine, **execution):
    mesh = MeshConfig(**{"data": 1, **mesh})
    rows = batch * topology(machine).num_chips
    return check(Job(model_config(name), mesh, rows, length, replace(EXECUTION, **execution)))


# What others measured (peers' own kernels and settings), as utilisation in the count named; and how far the estimate,
# with attention as their kernels do it, is from it.
PUBLISHED = [
    ("mixtral-8x7b", "v5p:4x8x8", {"fsdp": 256}, 36, 4096, "full", "mfu", 0.505, 0.9, 1.1),
    ("mixtral-8x7b", "v6e:16x16", {"fsdp": 256}, 8, 4096, "full", "mfu", 0.339, 1.3, 1.5),
    ("mistral-7b-v0.1", "v6e:2x4", {"fsdp": 8}, 3, 8192, "full", "mfu", 0.403, 1.05, 1.25),
    ("mixtral-8x7b", "h100:64", {"fsdp": 8, "expert": 8}, 4, 4096, "none", "mfu_full", 0.473, 0.95, 1.2),
]


@pytest.mark.parametrize(
    ("model", "machine", "mesh", "batch", "length", "remat", "count", "measured", "least", "most"), PUBLISHED
)
def test_published_rows(model, machine, mesh, batch, length, remat, count, measured, least, most):
    job = _job(model, mesh, batch, length, machine, remat=remat)
    found = getattr(estimate(job, topology(machine), kernel="ideal"), count)
    assert least < found / measured < most, found


def test_a_step_is_its_parts():
    machine = topology("v5p:4x4x4")
    job = _job("mixtral-8x7b", {"fsdp": 8, "expert": 8}, 4, 4096, "v5p:4x4x4")
    found = estimate(job, machine)
    assert found.seconds == pytest.approx(found.compute_seconds + found.memory_seconds + found.exposed_seconds)
    assert found.tokens_per_second == pytest.approx(4 * 64 * 4096 / found.seconds)
    assert found.bound == "compute"
    assert found.mfu < found.mfu_full < COMPUTE_EFFICIENCY
    assert {link.transfer.axes for link in found.links} == {("fsdp",), ("expert",), ("fsdp", "expert")}


def test_small_batches_are_bound_by_the_interconnect():
    machine = topology("v6e:8x8")
    job = _job("mixtral-8x7b", {"fsdp": 64}, 1, 512, "v6e:8x8")
    found = estimate(job, machine)
    assert found.bound == "interconnect over fsdp"
    assert found.seconds == pytest.approx(found.hidden_seconds + found.exposed_seconds)


def test_offloading_goes_on_beside_the_work_as_far_as_there_is_time():
    """Of each layer a stream of two bytes a number; there at 32 GB/s by a quarter of the work, and back by the rest."""
    machine = topology("v6e:8x8")
    full, offload = (
        _job("mixtral-8x7b", {"fsdp": 64}, 1, 32768, "v6e:8x8", remat=each) for each in ("full", "offload")
    )
    found = estimate(offload, machine)
    assert found.host_seconds == pytest.approx(2 * 32 * 32768 * 4096 * 2 / 32e9 / 0.8)
    assert replace(found, host_seconds=0) == estimate(full, machine)
    slow = replace(machine, chip=replace(machine.chip, host_bandwidth=32e8))
    found = estimate(offload, slow)
    assert found.bound == "link to the host"
    assert found.seconds == pytest.approx(2 * found.host_seconds)


def test_decoding_a_text_reads_the_weights_it_uses():
    """Mistral 7B on one H100: 14.2 GB of weights without the embedding, at 80% of 3,350 GB/s."""
    machine = topology("h100:1")
    job = Job(model_config("mistral-7b-v0.1"), MeshConfig(data=1), 1, 128, serve=True)
    found = estimate_decode(job, machine)
    assert found.bound == "memory bandwidth"
    assert found.seconds == pytest.approx((7_241_732_096 - 32000 * 4096) * 2 / 3350e9 / 0.8, rel=0.01)
    more = estimate_decode(replace(job, rows=8), machine)
    assert more.tokens_per_second > 7 * found.tokens_per_second
    assert estimate_prefill(job, machine).tokens_per_second > 20 * found.tokens_per_second


def test_chip_hours():
    assert chip_hours(3600e6, 1e6, 64) == 64


def test_a_cpu_is_not_estimated():
    job = Job(model_config("tiny-mixtral"), MeshConfig(data=1), 1, 128, dispatch=Dispatch())
    with pytest.raises(InputError, match="nothing is estimated of it"):
        estimate(job, topology("cpu:1"))


GB = 1e9


def test_links_of_a_torus():
    """64 chips as 4 x 4 x 4 have 3 dimensions of two links of 100 GB/s; 8 of them half of those dimensions."""
    machine, mesh = topology("v5p:4x4x4"), MeshConfig(data=1, fsdp=8, expert=8)
    whole = Transfer("", "all-gather", ("fsdp", "expert"), 64, 64 * GB, True)
    assert seconds(whole, machine, mesh) == pytest.approx(63 / 600)
    half = Transfer("", "all-gather", ("fsdp",), 8, 8 * GB, True)
    assert seconds(half, machine, mesh) == pytest.approx(7 / 300)
    exchange = Transfer("", "all-to-all", ("expert",), 8, 8 * GB, False)
    assert seconds(exchange, machine, mesh) == pytest.approx(8 * 0.5 / 100)
    # No rings in a slice of 8 x 8.
    line = Transfer("", "all-gather", ("fsdp",), 64, 64 * GB, True)
    assert seconds(line, topology("v6e:8x8"), MeshConfig(data=1, fsdp=64)) == pytest.approx(63 / 200)


def test_an_exchange_of_whole_buffers():
    """What v5e sends beyond 16 chips, where it has no ragged all-to-all, is a buffer to each of the four."""
    small, large = topology("v5e:4x4"), topology("v5e:8x8")
    exchange = Transfer("", "ragged-all-to-all", ("expert",), 4, GB, False)
    assert seconds(exchange, small, MeshConfig(data=1, fsdp=4, expert=4)) == pytest.approx(0.5 / 50)
    assert seconds(exchange, large, MeshConfig(data=1, fsdp=16, expert=4)) == pytest.approx(4 * 1 / 50)


def test_links_between_slices():
    machine, mesh = topology("2xv5p:4x4x4"), MeshConfig(data=2, fsdp=64)
    across = Transfer("", "all-reduce", ("data",), 2, 6.25 * GB, True)
    assert seconds(across, machine, mesh) == pytest.approx(1.0)


def test_links_of_nodes():
    """Of 64 GPUs, the inner axis of 8 is a node's; across nodes each GPU has 50 GB/s."""
    machine, mesh = topology("h100:64"), MeshConfig(data=1, fsdp=8, expert=8)
    inner = Transfer("", "all-to-all", ("expert",), 8, 8 * GB, False)
    outer = replace(inner, axes=("fsdp",))
    assert (members_of_node(inner, mesh, 8), members_of_node(outer, mesh, 8)) == (8, 1)
    assert seconds(inner, machine, mesh) == pytest.approx(7 / 450)
    assert seconds(outer, machine, mesh) == pytest.approx(7 / 50)
    gather = Transfer("", "all-gather", ("fsdp", "expert"), 64, 64 * GB, True)
    assert seconds(gather, machine, mesh) == pytest.approx(max(63 / 450, 64 * 7 / 8 / 8 / 50))
