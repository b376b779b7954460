"""A profile of some steps, Weights & Biases where it is asked for, and a run followed from elsewhere."""

import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy_run import train

from mixtral_jax.errors import InputError
from mixtral_jax.train import config as configs
from mixtral_jax.train import loop, watch
from mixtral_jax.train.goodput import PARTS, read_goodput
from mixtral_jax.train.metrics import METRICS, read
from mixtral_jax.train.progress import Progress
from mixtral_jax.train.tracking import PROFILE, Tracking, profile_steps


@pytest.mark.parametrize("text", ["3", "0:2", "4:3", "a:b", "1:2:3", ""])
def test_refuses_a_profile_of_no_steps(text):
    with pytest.raises(InputError, match=r"--profile-steps = .*A:B is needed"):
        profile_steps(text)
    assert profile_steps("2:3") == range(2, 4)


def test_a_run_is_traced_and_sent(toy_config, tmp_path, monkeypatch):
    logged, ended = {}, []
    run = SimpleNamespace(
        log=lambda values, step: logged.update({step: values}), finish=lambda **how: ended.append(how)
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **asked: run))
    tracking = Tracking(profile_steps("2:2"), "toys")
    console = Console(record=True, width=200)
    loop.train(configs.load(toy_config, ["steps=3"]), tmp_path / "run", Progress(console), tracking=tracking)
    assert list((tmp_path / "run" / PROFILE).rglob("*.xplane.pb"))
    lines = read(tmp_path / "run" / METRICS)
    assert [logged[line["step"]]["loss"] for line in lines] == [line["loss"] for line in lines]
    assert ended == [{"exit_code": 0}]
    found = read_goodput(tmp_path / "run")
    assert min(found[part] for part in PARTS) > 0
    assert sum(found[part] for part in (*PARTS, "other")) == pytest.approx(found["total"], abs=0.01)
    assert "goodput" in console.export_text()


def test_refuses_wandb_where_it_is_not(toy_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--wandb = 'not installed'"):
        loop.train(configs.load(toy_config), tmp_path, Progress(Console(quiet=True)), tracking=Tracking(wandb="toys"))


def test_a_run_is_followed_until_it_ends(whole, tmp_path):
    """Half of its lines are there at the first look, a step less at the second, all at the third."""
    lines = read(whole[0] / METRICS)
    (tmp_path / "config.toml").write_text((whole[0] / "config.toml").read_text())
    counts = iter([3, 2, 6])

    def grow(_=None):
        text = "".join(json.dumps(line) + "\n" for line in lines[: next(counts)])
        (tmp_path / METRICS).write_text(text)

    grow()
    found = list(watch.follow(str(tmp_path), 0.1, sleep=grow))
    assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 4, 5]
    assert watch.describe(found[0]).startswith("step 1  loss ")
    with pytest.raises(InputError, match="--every = 0"):
        next(watch.follow(str(tmp_path), 0))


def test_the_toy_run_tells_its_goodput(toy_config, whole):
    assert train(toy_config, whole[0])[0].step == 6
    assert read_goodput(whole[0])["starts"] >= 2
