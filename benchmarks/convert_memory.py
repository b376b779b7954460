"""Resident memory while a model is converted, on Linux: python -m benchmarks.convert_memory SRC DST FORMAT."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def resident_peak() -> int:
    """MB, since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def main() -> None:
    """Prints the peak of the bare interpreter, after the imports, and after the conversion."""
    bare = resident_peak()
    from mixtral_jax.checkpoints.convert import convert
    from mixtral_jax.checkpoints.opening import open_source

    imported = resident_peak()
    source, target, to = sys.argv[1:]
    start = time.perf_counter()
    convert(open_source(source), Path(target), to)
    seconds = time.perf_counter() - start
    print(f"{to}: interpreter {bare} MB, with imports {imported} MB, peak {resident_peak()} MB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
