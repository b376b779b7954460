"""Prepares the process for jax: which devices, where compiled programs are kept, and how memory is reused."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from mixtral_jax.errors import InputError

Device: TypeAlias = Annotated[
    Literal["tpu", "gpu", "cpu"] | None,
    typer.Option(help="The devices to use; fails where there are none. By default the fastest kind that is there."),
]

Bits: TypeAlias = Literal["int8", "int4", "fp8"]
"""`quantization.Bits`, whose module takes long to import."""

Quantize: TypeAlias = Annotated[
    Bits | None,
    typer.Option(help="Round the layers' matrices to so many bits as they are read."),
]

Dtype: TypeAlias = Annotated[
    Literal["auto", "bfloat16", "float32"],
    typer.Option(help="Of the weights and products. auto: bfloat16, products in float32 on a CPU that is slow in it."),
]

CacheDtype: TypeAlias = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,
    typer.Option(help="Of the keys and values that are kept. Default: --dtype; int8 takes half of bfloat16."),
]

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def choose(device: str | None) -> None:
    """Sets what jax will look for; to be called before it looks for anything."""
    reuse_memory()
    platforms = {"cpu": "cpu", "gpu": "cuda,rocm", "tpu": "tpu"}.get(device or "")
    import jax

    from mixtral_jax.sharding.chips import quiet_compiler

    quiet_compiler()
    if platforms is not None:
        jax.config.update("jax_platforms", platforms)


def start(device: str | None) -> None:
    """To be called before jax computes anything.

    Raises:
      InputError: there is no such device.
    """
    choose(device)
    import jax

    # Several devices of one CPU share its threads: two programs in flight, each waiting for some, would wait forever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtral-jax" / "programs"
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Of a second, jax's own choice, the small programs around a first token are compiled at each start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError("--device", device, f"no such device here ({reason})") from None
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # A CPU's program that is loaded has lost the order between the collectives of a loop and those beside it, since
        # XLA reads each sequence of operations with a communicator of its own (thunk_proto_serdes.cc): one device waits
        # in the loop, another beside it, for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def reuse_memory() -> None:
    """Keeps freed memory in the process, on Linux's C library.

    XLA on CPU allocates its buffers anew in every step; handed back to the system in between, each page of them costs a
    fault: 1.2 to 2.3 times the time of a training step's parts.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)
