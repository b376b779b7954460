"""The search, and the shipped plans that it found."""

from dataclasses import replace

import pytest

from mixtral_jax import configs
from mixtral_jax.config import Dispatch, build, model_config, read_toml
from mixtral_jax.errors import InputError
from mixtral_jax.planning.job import Job, check, problems
from mixtral_jax.planning.memory import memory
from mixtral_jax.planning.pods import PURPOSES, find, pods, run_sections
from mixtral_jax.planning.search import Wanted, budget, fits_on, flags, remedies, search
from mixtral_jax.planning.table import COLUMNS, cells, markdown, rows
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig
from mixtral_jax.train.config import TrainConfig

PODS = pods()


def test_all_are_shipped():
    names = {pod.name for pod in PODS}
    machines = ("v4-4x4x4", "v5e-16x16", "v5p-4x4x4", "v5p-4x8x8", "v6e-8x8", "v6e-16x16", "h100-8", "h100-64")
    models = ("mistral-7b-v0.1", "mixtral-8x7b", "mixtral-8x22b")
    assert names == {f"pods/{m}/{model}/{purpose}" for m in machines for model in models for purpose in PURPOSES}
    assert {pod.name.split("/")[1] for pod in PODS} == set(configs.names("pods"))


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.name)
def test_a_plan_fits_or_says_what_would(pod):
    if pod.entry.mesh is not None:
        job = pod.job()
        assert not problems(job)
        assert memory(job).total <= budget(pod.machine)
        return
    with pytest.raises(InputError, match=rf"does not fit on {pod.machine.name}; it does on {pod.entry.fits_on}"):
        pod.job()
    assert pod.entry.fits_on is not None
    there = topology(pod.entry.fits_on)
    assert any(search(replace(pod.wanted, remat=remat), there) for remat in ("full", "offload"))


# The others take seconds each: `python -m benchmarks.pods write` finds them all anew, and leaves the files as they are.
QUICK = [pod for pod in PODS if pod.serve or pod.machine.num_chips == 8 or pod.model.moe is None]


@pytest.mark.parametrize("pod", QUICK, ids=lambda pod: pod.name)
def test_a_plan_is_what_the_search_finds(pod):
    found = search(pod.wanted, pod.machine)
    if pod.entry.mesh is None:
        assert not found
        assert fits_on(pod.wanted, pod.machine).machine.name == pod.entry.fits_on
    else:
        assert found[0].job == pod.job()


def test_a_plan_is_near_the_fastest_and_no_other_is_faster_by_much():
    found = search(find("pods/v5p-4x4x4/mixtral-8x7b/train-4k")[0].wanted, topology("v5p:4x4x4"))
    fastest = min(each.cost for each in found)
    assert fastest <= found[0].cost <= 1.02 * fastest
    assert all(memory(each.job).total <= budget(topology("v5p:4x4x4")) for each in found)
    assert len({each.job for each in found}) == len(found)


@pytest.mark.parametrize(
    ("machine", "batch", "is_offloaded"), [("v6e:8x8", None, True), ("v5p:4x4x4", None, False), ("v5p:4x4x4", 8, True)]
)
def test_layers_inputs_go_to_the_host_where_that_is_faster_by_enough(machine, batch, is_offloaded):
    """By the estimate, or where nothing else fits."""
    mesh = MeshConfig(data=1, fsdp=64)
    found = search(Wanted(model_config("mixtral-8x7b"), 32768, mesh=mesh, batch_per_chip=batch), topology(machine))
    offloaded, others = (
        [each.estimate.tokens_per_second for each in found if (each.job.execution.remat == "offload") == is_so]
        for is_so in (True, False)
    )
    assert offloaded
    assert (found[0].job.execution.remat == "offload") == is_offloaded
    assert is_offloaded == (not others or max(offloaded) > 1.1 * max(others))


def test_a_search_keeps_to_what_is_given():
    wanted = Wanted(model_config("mixtral-8x7b"), 4096, batch_per_chip=2, remat="full")
    found = search(wanted, topology("v5p:4x4x4"))
    assert {(each.job.batch_per_chip, each.job.execution.remat) for each in found} == {(2, "full")}


def _job(machine, rows, **mesh):
    return check(Job(model_config("mixtral-8x7b"), MeshConfig(**{"data": 1, **mesh}), rows, 4096))


def test_a_smaller_batch_is_told():
    machine = topology("v5p:4x4x4")
    (first, *_) = remedies(_job(machine, 64 * 64, fsdp=64), machine)
    assert first.change.startswith("a smaller batch: --mesh fsdp=64 --batch-per-chip")
    assert memory(first.candidate.job).total <= budget(machine)


def test_the_hosts_memory_is_told():
    machine, mesh = topology("v6e:8x8"), MeshConfig(data=1, fsdp=64)
    job = check(Job(model_config("mixtral-8x7b"), mesh, 64, 32768, dispatch=Dispatch(capacity_factor=1.25)))
    (first, *_) = remedies(job, machine)
    assert first.change == f"--remat offload: {flags(first.candidate.job)}"
    assert first.candidate.job.execution.remat == "offload"


def test_another_mesh_is_told():
    machine = topology("v5p:4x4x4")
    changes = [each.change.split(":")[0] for each in remedies(_job(machine, 64, data=64), machine)]
    assert changes[0] == "another mesh"


def test_more_chips_are_told():
    machine = topology("h100:8")
    (last,) = remedies(_job(machine, 8, fsdp=8), machine)
    assert last.change.startswith("more chips: --topology h100:32 --mesh ")


def test_find():
    assert len(find("pods/v5p-4x4x4")) == 9
    assert [pod.name for pod in find("pods/v5p-4x4x4/mixtral-8x7b/serve")] == ["pods/v5p-4x4x4/mixtral-8x7b/serve"]
    with pytest.raises(InputError, match=r"did you mean 'v5p-4x4x4'\? shipped: "):
        find("pods/v5p-4x4x")
    with pytest.raises(InputError, match=r"shipped: pods/v5p-4x4x4/mistral-7b-v0.1/train-4k"):
        find("pods/v5p-4x4x4/mixtral-9x7b")


def test_a_run_takes_its_sections_from_a_plan():
    job = find("pods/v5p-4x4x4/mixtral-8x7b/train-4k")[0].job()
    sections = run_sections(job)
    data = {"sources": ["text.txt"], **sections.pop("data")}
    table = {**sections, "model": read_toml("models/mixtral-8x7b"), "data": data, "steps": 10}
    config = build(TrainConfig, {**table, "optimizer": {"learning_rate": 1e-4}})
    assert config.check_mesh(64) == job.mesh
    assert (config.execution, config.dispatch, config.losses.chunk) == (job.execution, job.dispatch, job.loss_chunk)


def test_the_page_has_the_shipped_plans(request):
    page = (request.config.rootpath / "docs" / "pods.md").read_text()
    assert markdown(rows(PODS)) in page


def test_a_refusal_in_the_table():
    (row,) = rows(find("pods/h100-8/mixtral-8x7b/train-4k"))
    assert cells(row)[3] == "does not fit; h100:32 would do"
    assert len(cells(row)) == len(COLUMNS)
