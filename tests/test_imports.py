"""The house: who may import whom, which packages are shipped, and the links that stand for the mapped folders."""

import configparser
import os
import subprocess
import sys
import sysconfig
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("configs", "sharding", "train")


def tree_packages() -> set[str]:
    """The packages by their imported names: every folder of the four rooms that holds a module."""
    found = set()
    for room in ("mixtral_jax", *MAPPED):
        for module in (ROOT / room).rglob("*.py"):
            folder = module.parent.relative_to(ROOT)
            if folder.parts[:1] == ("mixtral_jax",) and folder.parts[1:2] and folder.parts[1] in MAPPED:
                continue  # seen through a link
            found.add(".".join(folder.parts if folder.parts[0] == "mixtral_jax" else ("mixtral_jax", *folder.parts)))
    return found


def test_imports_run_one_way():
    # A process of its own: import-linter configures the logging of the one it runs in.
    command = [Path(sysconfig.get_path("scripts"), "lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_imports_a_cycle():
    graph = grimp.build_graph("mixtral_jax", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle


def test_every_package_is_listed_in_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    assert listed == sorted(set(listed))
    assert set(listed) == tree_packages()
    mapped = {name.replace("mixtral_jax.", "") for name in listed} & set(MAPPED)
    assert {f"mixtral_jax.{name} = {name}" for name in mapped} == set(
        setup["options"]["package_dir"].strip().splitlines()
    )


def test_every_package_has_an_init():
    for package in tree_packages():
        folder = ROOT.joinpath(*package.split("."))
        assert (folder / "__init__.py").is_file(), f"{package} has modules but no __init__.py"


def test_the_command_line_imports_what_a_verb_needs_and_no_more():
    code = "import sys, mixtral_jax.cli.main; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"jax", "flax", "numpy", "pydantic", "fsspec", "sentencepiece"} & set(loaded.split())


@pytest.mark.parametrize("name", MAPPED)
def test_links_are_relative_and_resolve(name):
    link = ROOT / "mixtral_jax" / name
    assert os.readlink(link) == os.path.join("..", name)
    assert link.resolve() == (ROOT / name).resolve()
    assert (link / "__init__.py").is_file()
