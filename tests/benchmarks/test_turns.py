"""Contenders that work in processes of their own."""

import io
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import own_work
from benchmarks.turns import told

ECHO = "import os, sys; [print(os.environ['GREETING'], line.strip(), flush=True) for line in sys.stdin]"
ENDS = "import sys; sys.stdin.readline(); sys.exit('no such weights')"


def test_each_line_is_answered():
    with told([sys.executable, "-c", ECHO], "echo", {"GREETING": "hello"}) as tell:
        assert [tell("one"), tell("two")] == ["hello one\n", "hello two\n"]


def test_a_process_that_ends_says_why():
    message = "the peer ended: no such weights"
    with told([sys.executable, "-c", ENDS], "the peer", {}) as tell, pytest.raises(RuntimeError, match=message):
        tell("step")


def test_own_work_leaves_peers_out(monkeypatch, capsys):
    called = []
    names = ["ours, float32 products", "torch, float32", "training: transformers, bfloat16", "64 at a time"]
    calls = {name: lambda name=name: called.append(name) for name in names}
    monkeypatch.setitem(own_work.BENCHMARKS, "some", lambda: calls)
    monkeypatch.setattr(sys, "argv", ["own_work", "some"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n64 at a time\n"))
    own_work.main()
    assert capsys.readouterr().out == "ours, float32 products\t64 at a time\n\n"
    assert called == ["64 at a time"]
