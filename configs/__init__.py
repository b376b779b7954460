"""The shipped configs: models/, pods/ and runs/, found by name such as `models/mixtral-8x7b`."""

from __future__ import annotations

from pathlib import Path

from mixtral_jax.errors import InputError, nearest

_ROOT = Path(__file__).parent.resolve()


def names(section: str) -> list[str]:
    """The names shipped in a section, such as `mixtral-8x7b` in `models`."""
    return sorted(file.stem for file in (_ROOT / section).glob("*.toml"))


def find(name: str) -> Path:
    """The file for a path of the user's, or for a shipped name such as `runs/demo`.

    Raises:
      InputError: neither a file nor a shipped name.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = _ROOT / f"{name}.toml"
    if shipped.is_file() and _ROOT in shipped.resolve().parents:
        return shipped
    known = [f"{section}/{each}" for section in ("models", "pods", "runs") for each in names(section)]
    raise InputError("config", name, f"no such file; {nearest(name, known)}shipped: {', '.join(known)}")
