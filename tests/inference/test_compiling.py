"""What the compiler is told of a program, by where it runs."""

import os
import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.inference import compiling
from mixtral_jax.inference.compiling import compile_together, program
from mixtral_jax.model.backends import few_rows


@pytest.mark.parametrize(("for_this_host", "on_mesh"), [(True, False), (True, True), (False, False)])
def test_sums_may_be_reordered_where_few_rows_are_for(monkeypatch, for_this_host, on_mesh):
    monkeypatch.setattr(few_rows, "OPTIONS", {"xla_no_such_option": True})
    monkeypatch.setattr(few_rows, "are_for_this_host", lambda: for_this_host)

    @program(static_argnames=("times",))
    def repeated(x, times):
        """Some text."""
        return x * times

    assert (repeated.__name__, repeated.__doc__) == ("repeated", "Some text.")
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option")
    with jax.set_mesh(jax.make_mesh((2,), ("data",))) if on_mesh else nullcontext():
        for call in (repeated, lambda *args, **kwargs: repeated.lower(*args, **kwargs).compile()):
            with refused if for_this_host and not on_mesh else nullcontext():
                call(jnp.ones(3), times=2)


def test_is_a_program():
    @program(donate_argnames=("x",))
    def doubled(x):
        return x * 2

    x = jnp.ones(3)
    assert doubled(x).tolist() == [2, 2, 2]
    assert x.is_deleted()


@pytest.mark.parametrize(("name", "traced"), [("cpu", 0), ("cuda", 3)])
def test_what_is_compiled_together_is_called_as_it_was_compiled(monkeypatch, name, traced):
    monkeypatch.setattr(compiling, "platform", lambda: name)
    times = []

    @program(static_argnames=("power",), donate_argnames=("x",))
    def raised(x, *, power):
        times.append(power)
        return x**power

    calls = [partial(raised, jnp.full(3, 2.0), power=power) for power in (1, 2, 3)]
    compile_together(calls)
    assert len(times) == traced
    assert [call()[0] for call in calls] == [2, 4, 8]
    assert times == [1, 2, 3]


def test_what_the_compiler_refuses_is_told(monkeypatch):
    monkeypatch.setattr(compiling, "platform", lambda: "cuda")
    monkeypatch.setattr(few_rows, "OPTIONS", {"xla_no_such_option": True})
    monkeypatch.setattr(few_rows, "are_for_this_host", lambda: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_together([partial(program()(lambda x: x + 1), jnp.ones(3))])


def test_two_are_compiled_at_a_time(monkeypatch):
    monkeypatch.setattr(compiling, "platform", lambda: "tpu")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=30)

    class Waiting:
        """Is compiled when another is too."""

        def __call__(self):
            raise AssertionError

        def lower(self):
            return SimpleNamespace(compile=both.wait)

    compile_together([partial(Waiting()) for _ in range(4)])
