"""What the pages print works: commands parse, Python runs or compiles, configs load, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import quick_compiler
import typer
from oracles.compiler import needs_compiler

from mixtral_jax.cli.main import app
from mixtral_jax.train import config as configs
from mixtral_jax.train.metrics import METRICS, read

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
        assert words[0] in ("git", "python", "pip", "kubectl"), f"an unknown program: {command}"


def _benchmarks():
    """Those in running text too."""
    yield from (command for command in _commands() if command.startswith("python -m benchmarks"))
    for page in PAGES:
        yield from re.findall(r"(?<!`)`(python -m benchmarks[^`]*)`", page.read_text())


@pytest.mark.parametrize("command", sorted({" ".join(command.split()) for command in _benchmarks()}))
def test_benchmarks(command):
    """Too slow to run: the module is there, has the options, and as for the benchmarks by name, has those."""
    _, _, module, *words = shlex.split(command)
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    options = [word for word in words if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []
    names = [*takewhile(lambda word: not word.startswith("--"), words)]
    if module == "benchmarks.commits":
        names, source = names[1:], (ROOT / "benchmarks" / "own_work.py").read_text()
    if module in ("benchmarks", "benchmarks.commits"):
        assert [name for name in names if f'"{name}": ' not in source] == []


@needs_compiler
def test_flags_are_known():
    """XLA and libtpu end a process at one that isn't."""
    commands = "".join(_page_blocks(ROOT / "docs" / "flags.md", "sh")).splitlines()
    presets = [tuple(shlex.split(command)[0].split("=", 1)) for command in commands]
    assert [name for name, _ in presets] == ["XLA_FLAGS", "XLA_FLAGS", "LIBTPU_INIT_ARGS"]
    code = "import jax; from mixtral_jax.planning.compilers import devices; jax.devices(); "
    code += "from mixtral_jax.planning.topology import topology; devices(topology('v6e:2x2'))"
    for name, flags in [*presets, ("XLA_FLAGS", "--xla_no_such=1"), ("LIBTPU_INIT_ARGS", "--xla_no_such=1")]:
        environment = {**os.environ, name: flags}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == ("no_such" not in flags), done.stderr


WAY = ROOT / "docs" / "laptop-to-pod.md"


def _page_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@needs_compiler
def test_ten_commands_from_a_laptop_to_a_pod(tmp_path):
    """Run one after another as they stand, in a folder like a clone; the one that would compile for minutes, by counts,
    and those of a cluster left out: what they apply is read by test_deploy."""
    for name in ("README.md", "docs", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = "".join(_page_blocks(WAY, "sh")).splitlines()
    assert len(commands) == 10
    said = {command: _run(command, tmp_path) for command in commands if "kubectl" not in command}
    assert len(said) == 8
    for command, words in (
        ("inspect", "46,702,792,704"),
        ("--prompt", "The mesh"),
        ("--search", "fsdp=64"),
        ("tiny-mixtral", "temporaries"),
        ("--batch-per-chip 4", "fits with"),
    ):
        assert [words in out for line, out in said.items() if command in line] == [True], command
    one, mesh = ([line["loss"] for line in read(tmp_path / "runs" / name / METRICS)] for name in ("first", "mesh"))
    np.testing.assert_allclose(mesh[:5], one[:5], rtol=1e-5)
    # A token whose two choices tie goes another way for one rounding, and training carries that on.
    assert np.mean(mesh[-10:]) == pytest.approx(np.mean(one[-10:]), rel=2e-2)
    assert one[-1] < one[0] - 0.5


def _run(command, folder):
    """What a command prints."""
    words = shlex.split(command)
    settings = dict(words.pop(0).split("=", 1) for _ in takewhile(lambda word: "=" in word, [*words]))
    # A CPU's programs are run for seconds here: not worth the compiler's own efforts.
    flags = f"{settings.get('XLA_FLAGS', '')} {quick_compiler.FLAGS}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache"), "XLA_FLAGS": flags}
    if "--batch-per-chip 4" in command:
        words.append("--no-compile")
    code = "from mixtral_jax.cli.main import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pods_config_is_what_its_plan_prints():
    (text,) = _page_blocks(WAY, "toml")
    config = tomllib.loads(text)
    plan = next(line for line in "".join(_page_blocks(WAY, "sh")).splitlines() if "--batch-per-chip 4" in line)
    printed = tomllib.loads(_run(f"{plan} --toml", ROOT))
    for section, values in printed.items():
        if isinstance(values, dict):
            assert values.items() <= config.get(section, {}).items(), section


def test_the_pods_config_fits_its_mesh(tmp_path):
    (tmp_path / "config.toml").write_text(_page_blocks(WAY, "toml")[0])
    assert configs.load(tmp_path / "config.toml").check_mesh(64).expert == 8


@pytest.mark.parametrize("code", list(_blocks("python")))
def test_python(code, capsys):
    program = compile(code, "page", "exec")
    if "mj.load(" not in code and "base_url=" not in code:  # those need a trained run, or a server
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
