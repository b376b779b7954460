"""What the pages print works: commands parse, Python runs or compiles, configs load, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mixtral_jax.cli.main import app
from mixtral_jax.train import config as configs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = ("mixtral-jax inspect",)


def _blocks(language):
    for page in PAGES:
        for number, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(block, id=f"{page.name}-{number}")


def _commands():
    for block in _blocks("sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            if line.split("#")[0].strip():
                yield line.split("  #")[0].strip()
    for page in PAGES:
        yield from re.findall(r"^\|.*`(mixtral-jax [^`]+)`", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(_commands())))
def test_commands(command):
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)  # a variable for one command
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(target in targets for target in words[1:] if "=" not in target)
    elif words[0] == "mixtral-jax":
        group = typer.main.get_command(app)
        verb = group.commands[words[1]]
        with verb.make_context(words[1], words[2:]):
            pass
        if command.startswith(QUICK) and "path/to" not in command:
            code = "from mixtral_jax.cli.main import main; main()"
            subprocess.run([sys.executable, "-c", code, *words[1:]], check=True, capture_output=True)
    else:
        assert words[0] in ("git", "python", "pip"), f"an unknown program: {command}"


@pytest.mark.parametrize("code", list(_blocks("python")))
def test_python(code, capsys):
    program = compile(code, "page", "exec")
    if "mj.load(" not in code:  # that needs a trained run
        exec(program, {})
        assert capsys.readouterr().out


@pytest.mark.parametrize("text", list(_blocks("toml")))
def test_configs(text, tmp_path):
    (tmp_path / "page.toml").write_text(text)
    assert configs.load(tmp_path / "page.toml").steps


def test_every_key_of_a_run_is_on_the_page():
    page = (ROOT / "docs" / "config.md").read_text()
    for key in configs.TrainConfig.__dataclass_fields__:
        assert re.search(rf"^(\[{key}\]|{key} =)", page, re.MULTILINE), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
