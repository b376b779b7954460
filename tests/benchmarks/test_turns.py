"""Contenders that work in processes of their own."""

import io
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import commits, own_work
from benchmarks.turns import told

ECHO = "import os, sys; [print(os.environ['GREETING'], line.strip(), flush=True) for line in sys.stdin]"
ENDS = {
    "at once": "import sys; sys.exit('no such weights')",
    "when told": "import sys; sys.stdin.readline(); sys.exit('no such weights')",
}
WHERE = "import sys, mixtral_jax, benchmarks; sys.stdin.readline(); print(mixtral_jax.__file__, benchmarks.__file__)"


def test_each_line_is_answered():
    with told([sys.executable, "-c", ECHO], "echo", {"GREETING": "hello"}) as tell:
        assert [tell("one"), tell("two")] == ["hello one\n", "hello two\n"]


@pytest.mark.parametrize("when", ENDS)
def test_a_process_that_ends_says_why(when):
    message = "the peer ended with 1: no such weights"
    with told([sys.executable, "-c", ENDS[when]], "the peer", {}) as tell, pytest.raises(RuntimeError, match=message):
        tell("step")


def test_of_a_commit_the_package_alone_is_taken(tmp_path):
    package = tmp_path / "package"
    (package / "mixtral_jax").mkdir(parents=True)
    (package / "mixtral_jax" / "__init__.py").touch()
    (package / "benchmarks").mkdir()  # a folder that is no package does not hide one
    with told([sys.executable, "-c", WHERE], "a commit", commits.importing(package), tmp_path) as tell:
        found = tell("where").split()
    assert found == [str(package / "mixtral_jax" / "__init__.py"), str(commits.ROOT / "benchmarks" / "__init__.py")]


def test_a_commits_package(tmp_path):
    commits.extract("HEAD", tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == set(commits.PACKAGE)
    assert (tmp_path / "mixtral_jax" / "sharding" / "__init__.py").exists()  # by a link
    with pytest.raises(subprocess.CalledProcessError):
        commits.extract("no-such-commit", tmp_path)


def test_own_work_is_done_by_name():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in ("ours, float32 products", "64 at a time")}
    answers = io.StringIO()
    own_work.answer(calls, ["\n", "64 at a time\n"], answers)
    assert answers.getvalue() == "ours, float32 products\t64 at a time\n\n"
    assert called == ["64 at a time"]


def test_of_a_piece_own_work_leaves_peers_out():
    calls = {"ours, float32 products": lambda: 1, "torch, float32": lambda: 2}
    found = own_work.own(lambda: iter([("attention T8", 8, calls), ("attention T16", 16, calls)]))
    assert list(found) == ["attention T8, ours, float32 products", "attention T16, ours, float32 products"]
    assert [call() for call in found.values()] == [1, 1]
