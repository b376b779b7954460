"""The command line, called in this process."""

import sys

import pytest

from mixtral_jax.cli import main, platform
from mixtral_jax.sharding import distributed


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the command line in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(platform, "start", lambda device: None)
    monkeypatch.setattr(distributed, "join", lambda *cluster: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mixtral-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main.main()
        out, err = capsys.readouterr()
        return ending.value.code or 0, out, err

    return call
