"""The devices that compilers describe, and programs for those of them that the tests' own processes have none for."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
from oracles.compiler import needs_compiler, needs_gpu_compiler, with_gpu_compiler

from mixtral_jax.errors import InputError
from mixtral_jax.planning import compilers
from mixtral_jax.planning.compilers import devices
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh


def test_devices_of_this_host():
    assert len(devices(topology("cpu:8"))) == 8
    with pytest.raises(InputError, match="jax shows 8 here; set XLA_FLAGS=--xla_force_host_platform_device_count=16"):
        devices(topology("cpu:16"))


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
    program = "import jax; jax.config.update('jax_platforms', 'cpu')\nfrom mixtral_jax.planning.compilers import *\n"
    program += "from mixtral_jax.planning.topology import topology\n"
    program += "print(len(devices(topology('v5p:4x4x4'))))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    run = [sys.executable, "-c", program]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert (ended.stdout, ended.stderr) == ("64\n", "")


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("v5p:4x4x4", "libtpu", "plan"), ("h100:8", "jax-cuda12-plugin", "plan-gpu")]
)
def test_without_a_compiler(monkeypatch, name, package, extra):
    monkeypatch.setattr(compilers, "has_compiler", lambda machine: False)
    with pytest.raises(InputError, match=rf"{package}: is not installed; .*pip install 'mixtral-jax\[{extra}\]'"):
        devices(topology(name))


def test_with_a_compiler_that_is_not_matched(monkeypatch):
    monkeypatch.setattr(compilers, "has_compiler", lambda machine: True)
    monkeypatch.setattr(metadata, "version", lambda name: {"libtpu": "0.0.50.1"}.get(name, "0.10.2"))
    monkeypatch.setattr(metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    with pytest.raises(InputError, match=r"libtpu = '0.0.50.1': this jax 0.10.2 wants 0.0.42; .*mixtral-jax\[plan\]"):
        compilers.require_compiler(topology("v5p:4x4x4"))


@pytest.mark.parametrize("cuda", [12, 13])
def test_with_a_plug_in_of_another_version(monkeypatch, cuda):
    package = f"jax-cuda{cuda}-plugin"
    monkeypatch.setattr(compilers, "_is_installed", lambda module: f"cuda{cuda}" in module)
    monkeypatch.setattr(metadata, "version", lambda name: "0.10.1" if name == package else "0.10.2")
    with pytest.raises(
        InputError, match=rf"{package} = '0.10.1': this jax 0.10.2 wants 0.10.2; .*mixtral-jax\[plan-gpu\]"
    ):
        compilers.require_compiler(topology("h100:8"))
    monkeypatch.setattr(metadata, "version", lambda name: "0.10.2.post1" if name == package else "0.10.2")
    compilers.require_compiler(topology("h100:8"))


_FOR_GPU = """
import re
from dataclasses import replace
import jax
from mixtral_jax.config import Execution, ModelConfig, MoEConfig
from mixtral_jax.planning.compile import compile_job, lower, serving_programs, training_program
from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.job import Job, check
from mixtral_jax.planning.memory import memory, on_host
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh

moe = MoEConfig(num_experts=4, experts_per_token=2)
shape = dict(dim=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, hidden_dim=256)
model = ModelConfig(**shape, vocab_size=512, moe=moe)
execution = Execution(activation_dtype="bfloat16", product_dtype="bfloat16")
job = check(Job(model, MeshConfig(data=1, fsdp=2), 4, 256, execution))
for name in ("a100:2", "h100:2", "h200:2"):
    found = devices(topology(name))
    print(name, len(found), found[0].device_kind)
(compiled,) = compile_job(job, topology("h100:2"))
print("weights", compiled.memory["weights"] == memory(job).weights, {each.kind for each in compiled.collectives})
for remat in ("none", "full", "offload"):
    mesh = make_mesh(job.mesh, devices(topology("h100:2")))
    again = replace(job, execution=replace(execution, remat=remat))
    with jax.set_mesh(mesh):
        program = compile_ahead(lower(training_program(again, mesh)))
    text = program.as_text()
    calls = "".join(line for line in text.splitlines() if "gpu.triton" in line)
    print(remat, *sorted(set(re.findall(r'name = .?"?([a-z_]+)', calls))))
# The last one's; and copies to it and from it go on beside what is computed.
copies = all(f"dynamic-{copy}-{end}" in text for copy in ("update-slice", "slice") for end in ("start", "done"))
print("on the host", program.memory_analysis().host_temp_size_in_bytes == on_host(again) > 0, copies)
for heads, mesh, kept in ((1, {}, None), (2, {}, "int8"), (2, {"tensor": 2}, None)):
    served, machine = [], topology(f"h100:{mesh.get('tensor', 1)}")
    for layers in (2, 4):
        config = replace(model, num_layers=layers, num_heads=4, num_kv_heads=heads)
        kept_so = replace(execution, cache_dtype=kept)
        texts = check(Job(config, MeshConfig(**{"data": 1, **mesh}), 8, 2048, kept_so, serve=True, platform="cuda"))
        served.append(compile_job(texts, machine))
    (few_prefill, few_decode), (prefill, decode) = served
    assert prefill.memory["weights"] == decode.memory["weights"] > 0
    mesh = make_mesh(texts.mesh, devices(machine))
    with jax.set_mesh(mesh):
        programs = [lower(each).as_text() for each in serving_programs(texts, mesh)]
    # No second cache, and but once what a layer makes.
    print("served", decode.memory["temporaries"] < few_decode.memory["cache"] / 2,
          prefill.memory["temporaries"] < 1.2 * few_prefill.memory["temporaries"],
          all(name in program for program in programs for name in ("cached_attention", "chosen_experts")))
"""


@needs_gpu_compiler
def test_programs_for_gpu(tmp_path):
    """Down to the machine code of its kernels, in a process of its own: the others would load the plug-in too."""
    run = [sys.executable, "-c", _FOR_GPU]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=300, env=with_gpu_compiler())
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    lines = ended.stdout.splitlines()
    assert lines[:3] == ["a100:2 2 NVIDIA A100-SXM4-80GB", "h100:2 2 NVIDIA H100 80GB HBM3", "h200:2 2 NVIDIA H200"]
    assert lines[3].startswith("weights True")
    kernels = {"attention", "attention_gradient_of_queries", "attention_gradient_of_keys"}
    kernels |= {"grouped_product", "grouped_weight_gradient"}
    assert [(line.split()[0], kernels <= set(line.split())) for line in lines[4:7]] == [
        (remat, True) for remat in ("none", "full", "offload")
    ]
    assert lines[7] == "on the host True True"
    assert lines[8:] == ["served True True True"] * 3
