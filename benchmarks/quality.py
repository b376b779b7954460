"""What fewer bits cost: the loss of a model on a text in each form, and beside llama.cpp's rounding to four bits.

python -m benchmarks.quality MODEL TEXT... [--tokens 2048] [--dtype float32]

Q4_0 and Q8_0 are the gguf package's own rounding of the same matrices, multiplied out again: 32 inputs share a scale,
in float16 there, in float32 here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import Source
from mixtral_jax.checkpoints.tensor_names import LAYOUTS, from_file, to_file
from mixtral_jax.inference.perplexity import perplexity
from mixtral_jax.loading import from_source
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.quantization import is_quantized
from mixtral_jax.text.tokenizer import Tokenizer


class Rounded(Source):
    """A model whose matrices went through a type of GGUF; the same ones that we round."""

    def __init__(self, source: Source, kind: gguf.GGMLQuantizationType):
        super().__init__(source.path, f"{source.form} in {kind.name}", source.config)
        self._source, self._kind = source, kind
        self._layout = LAYOUTS["huggingface"][0](source.config)

    def problems(self) -> list[str]:
        """See Source."""
        return self._source.problems()

    def files(self) -> Iterable[Path]:
        """See Source."""
        return self._source.files()

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return np.dtype(np.float32)

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return self._kind.name

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        return self._source.tokenizer()

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        array = self._source.read(tensor)
        if not is_quantized(tensor):
            return array
        stored = self._layout[tensor]
        rows = np.ascontiguousarray(to_file(array.astype(np.float32), tensor, stored))
        rounded = gguf.quants.dequantize(gguf.quants.quantize(rows, self._kind), self._kind)
        return from_file(rounded.reshape(rows.shape), tensor, stored)


def main() -> None:
    """Prints a line a form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    ids = None
    kinds = gguf.GGMLQuantizationType
    forms: dict[str, Callable[[], Any]] = {
        arguments.dtype: lambda: from_source(source, arguments.dtype),
        "int8 cache": lambda: from_source(source, arguments.dtype, cache_dtype="int8"),
        "int8": lambda: from_source(source, arguments.dtype, quantize="int8"),
        "int8, int8 cache": lambda: from_source(source, arguments.dtype, quantize="int8", cache_dtype="int8"),
        "fp8": lambda: from_source(source, arguments.dtype, quantize="fp8"),
        "int4": lambda: from_source(source, arguments.dtype, quantize="int4"),
        "llama.cpp's Q8_0": lambda: from_source(Rounded(source, kinds.Q8_0), arguments.dtype),
        "llama.cpp's Q4_0": lambda: from_source(Rounded(source, kinds.Q4_0), arguments.dtype),
    }
    first = 0.0
    for name, load in forms.items():
        model = load()
        if ids is None:
            text = "\n".join(path.read_text(encoding="utf-8") for path in arguments.text)
            ids = model.tokenizer.encode(text, bos=True)[: arguments.tokens]
        window = min(arguments.window, model.config.max_position)
        found = perplexity(model._weights, ids, model.config, model._execution, window, window - 1)
        first = first or found.loss
        line = {"form": name, "loss": round(found.loss, 5), "perplexity": round(found.value, 3)}
        line |= {"loss_over_first": round(found.loss / first, 5), "tokens": found.tokens}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
