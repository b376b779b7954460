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
