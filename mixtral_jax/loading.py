"""`mixtral_jax.load`: weights, tokenizer and config read from files and made a Model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import Source, bits_for
from mixtral_jax.config import CacheDtype, Execution
from mixtral_jax.errors import InputError
from mixtral_jax.inference.weights import assemble, lies_by_output
from mixtral_jax.language_model import Model
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.quantization import Bits, is_quantized
from mixtral_jax.sharding.chips import multiplies_bfloat16
from mixtral_jax.sharding.mesh import completed

Dtype = Literal["bfloat16", "float32", "auto"]


def load(
    path: str | Path,
    dtype: Dtype = "bfloat16",
    quantize: Bits | None = None,
    mesh: jax.sharding.Mesh | None = None,
    cache_dtype: CacheDtype | None = None,
) -> Model:
    """Loads a model.

    Args:
      path: a Hugging Face folder, one of Mistral's with params.json, a GGUF file, a checkpoint that `convert` wrote,
        the folder of a training run, whose newest checkpoint is taken, or the id of a model on the Hugging Face hub.
      dtype: of the matrices and of products' operands; products accumulate in float32. auto: bfloat16, but on a CPU
        or old GPU that has no units for products of bfloat16 float32 for the operands, and on a mesh of such for the
        matrices.
      quantize: the layers' matrices and the unembedding as int8 or fp8, a scale a channel, or as int4, a scale a group;
        each tensor as it is read. None: as they are stored, where `convert --quantize` wrote them.
      mesh: the devices to spread the weights over, with any of the axes `fsdp`, `expert` and `tensor`: heads lie over
        `tensor`, feed-forwards, experts and the vocabulary over all three. A tensor goes to its shards as it is read, a
        GPU's experts a layer at a time.
      cache_dtype: of the keys and values that are kept; None: `dtype`. int8 has a scale for each token and head.

    Warns of what the files left unsaid, such as a GGUF of its window.

    Raises:
      InputError: nothing loadable is there, it is damaged, or an argument is not supported.
    """
    if dtype not in get_args(Dtype):
        raise InputError("dtype", dtype, "'bfloat16', 'float32' or 'auto'")
    source = open_source(path)
    for note in source.notes:
        warnings.warn(note, stacklevel=2)
    return from_source(source, dtype, mesh, quantize, cache_dtype)


def from_source(
    source: Source,
    dtype: Dtype = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    quantize: Bits | None = None,
    cache_dtype: CacheDtype | None = None,
) -> Model:
    """The model of a source.

    Raises:
      InputError: the tensors don't fit the config or are damaged, or the tokenizer has ids that the embedding has not.
    """
    if quantize not in (None, *get_args(Bits)):
        raise InputError("quantize", quantize, f"{', '.join(get_args(Bits))}, or nothing")
    if cache_dtype not in (None, *get_args(CacheDtype)):
        raise InputError("cache_dtype", cache_dtype, f"{', '.join(get_args(CacheDtype))}, or nothing")
    source.check()
    tokenizer, rows = source.tokenizer(), source.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        why = f"ids, and the embedding has {rows} rows: this tokenizer is another model's"
        raise InputError(f"{source.path}: tokenizer", tokenizer.vocab_size, why)
    # On a mesh of CPUs nothing multiplies a bfloat16 matrix in float32 without writing it out first.
    weight_dtype: Literal["bfloat16"] | None = "bfloat16" if dtype == "auto" and mesh is None else None
    execution = Execution(product_dtype=_product_dtype(dtype, mesh), weight_dtype=weight_dtype, cache_dtype=cache_dtype)
    mesh = None if mesh is None else completed(mesh)
    bits = bits_for(source, quantize)

    # What is to lie as files have it need not be copied into our layout first.
    read_one = source.read_view if lies_by_output(mesh) else source.read

    def read(tensor: Tensor) -> Any:
        return read_one(tensor) if bits is None or not is_quantized(tensor) else source.read_quantized(tensor, bits)

    weights = assemble(read, source.config, execution, mesh, bits)
    return Model(source.config, weights, execution, tokenizer, mesh)


def _product_dtype(dtype: Dtype, mesh: jax.sharding.Mesh | None) -> Literal["bfloat16", "float32"]:
    if dtype != "auto":
        return dtype
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "bfloat16" if multiplies_bfloat16(platform) else "float32"
