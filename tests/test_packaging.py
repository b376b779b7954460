"""The distribution: what the wheel and the sdist hold, and an installed wheel at work beside a user's own train.py."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("configs", "sharding", "train")
BUILD = (sys.executable, "-m", "build", "--no-isolation")


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; its failure is the test's, with all of it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def tracked() -> list[str]:
    """Files of the tree as git would commit them."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


def place_in_wheel(name: str) -> str | None:
    """Where the wheel must hold a tracked file; None: nowhere. `train/step.py` is `mixtral_jax/train/step.py`."""
    room = PurePosixPath(name).parts[0]
    if room in MAPPED:
        return f"mixtral_jax/{name}"
    return name if room == "mixtral_jax" and not (ROOT / name).is_symlink() else None


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist of the tree, and its build.log."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    (folder / "build.log").write_text(run(*BUILD, "--sdist", "--wheel", "--outdir", folder, source, cwd=folder))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The python of an environment that holds the wheel, and sees the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "-q")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A folder that a .pth file adds has its own .pth files left unread: an editable install there stays unseen.
    packages.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def users_folder(tmp_path):
    """A folder whose modules are called like ours."""
    for name in MAPPED:
        (tmp_path / f"{name}.py").write_text("owner = 'user'\n")
    return tmp_path


def test_build_is_free_of_deprecation_warnings(built):
    assert "deprecat" not in (built / "build.log").read_text().lower()


def test_wheel_holds_each_tracked_file_once_at_its_place(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = {place: name for name in tracked() if (place := place_in_wheel(name))}
    assert sorted(shipped) == sorted(expected)
    files = contents(wheel)
    for place, name in expected.items():
        assert files[place] == (ROOT / name).read_bytes(), place
    assert "mixtral_jax/py.typed" in shipped
    assert sum(name.endswith(".toml") for name in shipped) == len(list((ROOT / "configs").rglob("*.toml"))) > 0


def test_wheel_claims_one_top_level_name_and_carries_the_license(wheel):
    files = contents(wheel)
    info = next(name for name in files if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    assert files[f"{info}/top_level.txt"].split() == [b"mixtral_jax"]
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"\nLicense-Expression: Apache-2.0\n" in files[f"{info}/METADATA"]


def test_sdist_builds_the_same_wheel(built, wheel, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    assert (unpacked / "CHANGELOG.md").is_file()
    run(*BUILD, "--wheel", "--outdir", tmp_path, unpacked, cwd=tmp_path)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)


def test_installed_wheel_is_imported_beside_the_users_own_modules(installed, users_folder):
    script = """
import configs, sharding, train
import mixtral_jax, mixtral_jax.configs, mixtral_jax.sharding, mixtral_jax.train

assert {configs.owner, sharding.owner, train.owner} == {"user"}
for module in (mixtral_jax, mixtral_jax.configs, mixtral_jax.sharding, mixtral_jax.train):
    print(module.__file__)
"""
    files = run(installed, "-c", script, cwd=users_folder).split()
    assert len(files) == 4
    assert all(Path(file).is_relative_to(installed.parent.parent) for file in files), files


def test_installed_wheel_finds_its_configs(installed, users_folder):
    script = "from mixtral_jax import configs; print(configs.find('models/mixtral-8x7b').read_text())"
    printed = run(installed, "-c", script, cwd=users_folder)
    assert printed.strip() == (ROOT / "configs/models/mixtral-8x7b.toml").read_text().strip()


def test_import_does_not_load_jax(installed, users_folder):
    run(installed, "-c", "import mixtral_jax, sys; assert 'jax' not in sys.modules", cwd=users_folder)


def test_console_script_shows_its_help(installed, users_folder):
    assert "train" in run(installed.parent / "mixtral-jax", "--help", cwd=users_folder)
