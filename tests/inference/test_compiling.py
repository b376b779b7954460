"""What the compiler is told of a program, by the devices that it is for."""

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.inference.compiling import program
from mixtral_jax.model.backends import few_rows
from mixtral_jax.planning.topology import compile_ahead, devices, has_compiler, topology


def test_cpus_have_options_and_others_none(monkeypatch):
    monkeypatch.setattr(few_rows, "OPTIONS", {"xla_no_such_option": True})

    @program(static_argnames=("times",))
    def repeated(x, times):
        """Some text."""
        return x * times

    x = jnp.ones(3)
    assert (repeated.__name__, repeated.__doc__) == ("repeated", "Some text.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        repeated(x, times=2)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))), pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        repeated(x, times=2)
    if has_compiler():
        with jax.set_mesh(jax.make_mesh((4,), ("data",), devices=devices(topology("v6e:2x2")))):
            assert compile_ahead(repeated.lower(jax.ShapeDtypeStruct((4,), jnp.float32), times=2))


def test_is_a_program(monkeypatch):
    @program(donate_argnames=("x",))
    def doubled(x):
        return x * 2

    x = jnp.ones(3)
    assert doubled(x).tolist() == [2, 2, 2]
    assert x.is_deleted()
