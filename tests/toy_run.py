"""A run small enough for a test: a toy Mixtral on a few of Python's own files."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.toy import MODEL, TEXT
from mixtral_jax.train import config as configs
from mixtral_jax.train import loop
from mixtral_jax.train.progress import Progress


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for part in range(12):
        (folder / f"part{part}.py").write_text(f"# part {part}\n" + TEXT[part * 900 : part * 900 + 4000])
    return folder


@pytest.fixture(scope="session")
def toy_config(corpus, tmp_path_factory) -> Path:
    """A TOML file that trains in seconds."""
    path = tmp_path_factory.mktemp("config") / "toy.toml"
    path.write_text(
        f"""
steps = 6
save_every = 2
log_every = 2
validate_every = 3
{MODEL}
[data]
sources = [{json.dumps(str(corpus))}]
vocab_size = 300
sequence_length = 32
batch_size = 8
validation_fraction = 0.1
cache_dir = {json.dumps(str(path.parent / "cache"))}

[optimizer]
learning_rate = 1e-2

[mesh]
data = 2
expert = 4

[dispatch]
capacity_factor = 1.25
group_size = 16
"""
    )
    return path


def train(config, folder, **changes):
    """Runs the loop: (how it ended, what it said)."""
    settings = [f"{key}={value}" for key, value in changes.items()]
    console = Console(record=True, width=200)
    ending = loop.train(configs.load(config, settings), folder, Progress(console))
    return ending, console.export_text()


@pytest.fixture(scope="session")
def whole(toy_config, tmp_path_factory):
    """A run from its first step to its last: its folder, how it ended, what it said."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, *train(toy_config, folder)
