"""The files of deploy/: what they run is a command that parses, and their numbers agree with each other."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from mixtral_jax.cli.main import app
from mixtral_jax.planning.topology import topology

DEPLOY = Path(__file__).parent.parent / "deploy"


def _parse(arguments):
    verb = typer.main.get_command(app).commands[arguments[0]]
    with verb.make_context(arguments[0], list(arguments[1:])) as context:
        return context.params


def test_the_job_of_slurm(tmp_path):
    """With an srun that says what it was to run."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%q " "$@"\n')
    srun.chmod(0o755)
    bash = shutil.which("bash")
    command = [bash, DEPLOY / "train.sbatch", "runs/demo", "/shared/run", "--set", "steps=3"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    flag, program, *arguments = shlex.split(said)
    assert (flag, program) == ("--kill-on-bad-exit=1", "mixtral-jax")
    params = _parse(arguments)
    assert (params["config"], params["run_dir"], params["set_"]) == ("runs/demo", "/shared/run", ["steps=3"])
    incomplete = subprocess.run(command[:3], capture_output=True, text=True, env=environment)
    assert incomplete.returncode == 1
    assert "a run folder is needed" in incomplete.stderr


def test_each_process_of_slurm_takes_one_gpu_and_sees_all():
    settings = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in (DEPLOY / "train.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & {*settings}


def test_the_jobset():
    document = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    (job,) = document["spec"]["replicatedJobs"]
    hosts, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    machine = topology(f"v5p:{pod['nodeSelector']['cloud.google.com/gke-tpu-topology']}")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert hosts["parallelism"] * chips == hosts["completions"] * chips == machine.num_chips
    params = _parse(container["args"])
    sizes = [int(each.partition("=")[2]) for each in params["set_"] if each.startswith("mesh.")]
    assert sizes[0] * sizes[1] * sizes[2] == machine.num_chips
    assert params["run_dir"].startswith("gs://")  # hosts of a slice share no disk
    page = (DEPLOY.parent / "docs" / "laptop-to-pod.md").read_text()
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    created = shlex.split(re.search("^kubectl create .*$", page, re.MULTILINE)[0])
    assert created[:4] == ["kubectl", "create", "configmap", volume["configMap"]["name"]]
    files = {f"{mount['mountPath']}/{each.removeprefix('--from-file=')}" for each in created[4:]}
    assert params["config"] in files
    assert re.search('^tokenizer = "(.*)"$', page, re.MULTILINE)[1] in files
    assert "kubectl apply -f deploy/jobset.yaml" in page
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


@pytest.mark.parametrize("instruction", ["FROM python:3.11", "ARG JAX=tpu", 'ENTRYPOINT ["mixtral-jax"]'])
def test_the_container_file(instruction):
    assert instruction in (DEPLOY / "Dockerfile").read_text()
