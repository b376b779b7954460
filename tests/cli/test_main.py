"""The command line: what a mistake prints, and a run from the first step to its report."""

import json
import os
import signal
import subprocess
import sys

import pytest

from mixtral_jax.version import __version__


def test_version_and_help(run):
    assert run("--version") == (0, f"{__version__}\n", "")
    status, out, _ = run("--help")
    assert status == 0
    assert all(
        verb in out
        for verb in ("train", "generate", "chat", "convert", "upcycle", "perplexity", "inspect", "report", "tokenizer")
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.warmup=3"], "optimizer.warmup = 3: unknown key; did you mean 'warmup_steps'"),
        (["steps=many"], "steps = 'many': input should be a valid integer"),
        (["model.num_heads=3", "model.num_kv_heads=2"], "model.num_kv_heads = 2: must divide num_heads = 3"),
        (["mesh.data=3"], "mesh = 'data=3, expert=4': the axes' product must be exactly the 8 devices"),
        (["model.num_heads=3", "mesh.data=1", "mesh.tensor=2"], "dimension 2 of layers.attention.query is 3"),
        (['data.sources=["nowhere.txt"]'], "data.sources = 'nowhere.txt'"),
        (["data.tokenizer=nowhere.model"], "data.tokenizer = 'nowhere.model'"),
    ],
)
def test_a_mistake_in_a_config_is_two_and_a_message(run, toy_config, tmp_path, settings, message):
    sets = [each for setting in settings for each in ("--set", setting)]
    status, _, err = run("train", toy_config, "--run-dir", tmp_path / "run", *sets)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.sources"),
        (b"caf\xe9 au lait", "not UTF-8|byte 3"),
    ],
)
def test_a_mistake_in_the_data_is_two_and_a_message(run, toy_config, tmp_path, content, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    sources = f"data.sources={json.dumps([str(file)])}"
    status, _, err = run("train", toy_config, "--run-dir", tmp_path / "run", "--set", sources)
    assert status == 2
    assert any(part in err for part in message.split("|"))
    assert "text.txt" in err


def test_a_tokenizer_that_is_none(run, toy_config, tmp_path):
    (tmp_path / "fake.model").write_text("not a model")
    tokenizer = f"data.tokenizer={tmp_path / 'fake.model'}"
    status, _, err = run("train", toy_config, "--run-dir", tmp_path / "run", "--set", tokenizer)
    assert status == 2
    assert "fake.model" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "nowhere", "--prompt", "x"), "model = 'nowhere': no such file or folder"),
        (("generate", "nowhere", "--prompt", "x", "--temperature", "-1"), "temperature = -1.0: a finite number"),
        (("inspect", "mixtral-8x9b"), "config = 'mixtral-8x9b': no such file; did you mean"),
        (("report", "nowhere"), "run = 'nowhere': no metrics.jsonl"),
        (("train", "runs/dmo"), "config = 'runs/dmo': no such file; did you mean 'runs/demo'"),
        (("generate",), "Missing argument"),
        (("trane",), "No such command"),
    ],
)
def test_other_mistakes(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err


def test_inspect(run):
    status, out, _ = run("inspect", "mixtral-8x7b", "--batch", "2", "--length", "1000", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["parameters"] == 46_702_792_704
    assert report["active_parameters"] == 12_879_925_248
    assert report["weight_bytes"]["bfloat16"] == 2 * 46_702_792_704
    # A byte each but for the embedding, routers and norms with two; scales four bytes a channel.
    in_two = 32000 * 4096 + 32 * (4096 * 8 + 2 * 4096) + 4096
    channels = 32 * (4096 + 2 * 1024 + 4096 + 8 * (2 * 14336 + 4096)) + 32000
    assert report["weight_bytes"]["int8"] == 46_702_792_704 + in_two + 4 * channels
    assert report["weight_bytes"]["fp8"] == report["weight_bytes"]["int8"]
    assert report["cache"]["bytes"]["int8"] == 1000 * 131_072 * 132 // 128
    assert report["cache"]["bytes"]["bfloat16"] == 2 * 1000 * 131_072
    windowed = json.loads(run("inspect", "mistral-7b-v0.1", "--json")[1])
    assert windowed["cache"]["slots"] == 4096
    assert "46,702,792,704 parameters, 12,879,925,248 active" in run("inspect", "mixtral-8x7b")[1]


def test_a_run_is_interrupted_goes_on_and_speaks(toy_config, tmp_path):
    """As a person does it: start, Ctrl-C, start again, generate, report."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from mixtral_jax.cli.main import main; main()"]
    folder = tmp_path / "run"
    train = [*command, "train", str(toy_config), "--run-dir", str(folder), "--set", "log_every=1", "--device", "cpu"]

    process = subprocess.Popen([*train, "--set", "steps=500"], env=environment, stdout=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step 2/") for line in lines)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "SIGINT: stopping after step" in rest
    saved = int(rest.split("saved at step ")[1].split(";")[0])

    steps = ["--set", f"steps={saved + 2}"]
    again = subprocess.run([*train, *steps], env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert f"step {saved + 1}/{saved + 2}" in again.stdout
    assert f"step {saved}/" not in again.stdout
    assert (folder / "report" / "expert_load.png").is_file()

    prompt = [*command, "generate", str(folder), "--prompt", "def f", "--max-new-tokens", "5"]
    said = subprocess.run(prompt, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout
    assert said.startswith("def f")
