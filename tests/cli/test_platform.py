"""How the process is prepared for jax."""

import jax
import pytest

from mixtral_jax.cli import platform


@pytest.mark.parametrize(("devices", "kept"), [(1, True), (8, False)])
def test_programs_are_kept_but_for_several_devices_of_a_cpu(devices, kept, monkeypatch):
    monkeypatch.setattr(platform, "reuse_memory", lambda: None)  # for good, it would be
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        platform.start("cpu")
        assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_enable_compilation_cache", False)


@pytest.mark.parametrize("given", [None, "3"])
def test_small_programs_are_kept_too(given, monkeypatch):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.setattr(platform, "reuse_memory", lambda: None)
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        platform.start("cpu")
        kept_from = jax.config.jax_persistent_cache_min_compile_time_secs
        assert kept_from == (before if given else 0.1)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
        jax.config.update("jax_enable_compilation_cache", False)
