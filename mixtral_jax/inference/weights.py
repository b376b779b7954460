"""Weights in the form that decodes fastest: each layer's, and each expert's, arrays of their own.

Slices of a stack are copied before a product reads them; arrays of their own are read in place, and an expert that no
token chose is not read at all. The kernel for GPUs finds an expert in a stack by itself: there a layer's are one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.model.backends import experts_gpu, few_rows
from mixtral_jax.model.backends.few_rows import ByOutput, by_output
from mixtral_jax.model.backends.half_bytes import HalfBytes, half_bytes
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.model.tensors import Tensor, assign, look_up, tensors
from mixtral_jax.quantization import DTYPES, FLOAT32, Bits, is_quantized, quantize, scale_shape
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.chips import computes_on_old_gpu
from mixtral_jax.sharding.partition import check_divisible, place
from mixtral_jax.sharding.rules import DECODING

_OTHER_FORMS = Quantized | ByOutput | HalfBytes
"""What a matrix may be instead of an array."""


class Prepared(NamedTuple):
    """The prepared tree."""

    embedding_VD: jax.Array
    layers: tuple[Any, ...]
    """For each layer the variables of a Block: its `params`, and `prepared` what has another form: the experts of a
    mixture, what is quantised, and what lies by output."""
    norm: Any
    unembedding_DV: jax.Array | Quantized | ByOutput | HalfBytes | None
    """Where the embeddings are tied: None, or the embedding, of which an output is a row."""


def prepare(params: Any, config: ModelConfig, execution: Execution) -> Prepared:
    """The prepared form of a public tree, matrices in the dtype that the execution holds them in."""
    return assemble(lambda tensor: look_up(params, tensor), config, execution)


def assemble(
    read: Callable[[Tensor], Any],
    config: ModelConfig,
    execution: Execution,
    mesh: Mesh | None = None,
    quantize_to: Bits | None = None,
) -> Prepared:
    """The prepared form from single tensors, read and put on the devices one after another.

    Args:
      read: gives a tensor in our layout, in any float dtype, or in the bits that are asked for.
      mesh: where to put them, as DECODING says; None: on the default device.
      quantize_to: the bits of the layers' matrices and of the unembedding; None: the dtype of products.

    Raises:
      InputError: the mesh does not divide the model; nothing is read then.
    """
    if mesh is not None:
        _check_divides(config, mesh, quantize_to)
    form = execution, mesh, quantize_to

    def stack_of(each: Sequence[Tensor]) -> Any:
        return _put_stack(map(read, each), each, *form)

    stacked = stack_of if stacks_experts(config, *form) else None
    prepared = arrange(config, lambda tensor: _put(read(tensor), tensor, *form), stacked)
    if config.tie_embeddings and lies_by_output(mesh):
        return prepared._replace(unembedding_DV=ByOutput(prepared.embedding_VD, inputs=1))
    return prepared


def stacks_experts(config: ModelConfig, execution: Execution, mesh: Mesh | None, quantize_to: Bits | None) -> bool:
    """Whether a layer's experts are one stack, as the kernel for GPUs takes them."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if config.moe is None or platform not in ("gpu", "cuda") or computes_on_old_gpu():
        return False
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in DECODING.mesh_axes("hidden"))
    widths = config.dim, config.hidden_dim // parts
    return experts_gpu.suits(
        execution.product_dtype, quantize_to or execution.held_dtype, config.moe.num_experts, widths
    )


def arrange(
    config: ModelConfig,
    leaf_of: Callable[[Tensor], Any],
    stack_of: Callable[[Sequence[Tensor]], Any] | None = None,
) -> Prepared:
    """The tree of a model's weights, each leaf as the functions give it.

    Args:
      stack_of: what is to be in the place of a layer's experts' tensors of one name; None: each is a leaf.
    """
    top: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{"params": {}} for _ in range(config.num_layers)]
    experts: dict[int, dict[str, Any]] = {}
    # A layer's tensors of one name follow each other, one expert's after another's.
    for (path, layer), run in itertools.groupby(tensors(config), lambda tensor: (tensor.path, tensor.layer)):
        each = list(run)
        if layer is None:
            assign(top, path, leaf_of(each[0]))
        elif each[0].expert is None:
            leaf = leaf_of(each[0])
            form = "prepared" if isinstance(leaf, _OTHER_FORMS) else "params"
            assign(layers[layer].setdefault(form, {}), path[1:], leaf)
        else:
            found = stack_of(each) if stack_of else [leaf_of(tensor) for tensor in each]
            experts.setdefault(layer, {})[path[-1]] = found
    for layer, named in experts.items():
        stack = SwiGLU(**named)
        prepared = stack if stack_of else tuple(map(SwiGLU, *stack))
        assign(layers[layer].setdefault("prepared", {}), ("moe", "experts"), prepared)
    return Prepared(top["embedding"], tuple(layers), top["norm"], top.get("unembedding"))


def _put(
    whole: Any, tensor: Tensor, execution: Execution, mesh: Mesh | None, quantize_to: Bits | None
) -> jax.Array | Quantized | ByOutput | HalfBytes:
    """A tensor on the devices, in the form that is computed with."""
    whole, dtype = _quantized(whole, tensor, quantize_to), computed_dtype(tensor, execution)
    if isinstance(whole, Quantized):
        form = _lying_by_output(whole, tensor.inputs) if lies_by_output(mesh) else whole
        return jax.tree.map(lambda leaf: _on_devices(leaf, tensor, mesh, leaf.dtype), form)
    if is_quantized(tensor) and lies_by_output(mesh):
        # One that came in bfloat16 is as exact in it, whatever it is multiplied in.
        dtype = jnp.dtype(jnp.bfloat16) if whole.dtype == jnp.bfloat16 else dtype
        return jax.tree.map(lambda leaf: _on_devices(leaf, tensor, mesh, dtype), by_output(whole, tensor.inputs))
    return _on_devices(whole, tensor, mesh, dtype)


def _put_stack(
    wholes: Iterable[Any], each: Sequence[Tensor], execution: Execution, mesh: Mesh | None, quantize_to: Bits | None
) -> jax.Array | Quantized:
    """A layer's experts' tensors of one name as one on the devices; the host holds that one, and of the others one."""

    def room(leaf: np.ndarray) -> np.ndarray:
        dtype = leaf.dtype if quantize_to else computed_dtype(each[0], execution)
        return np.empty((len(each), *leaf.shape), dtype)

    stack: Any = None
    for index, whole in enumerate(wholes):
        own = _quantized(whole, each[0], quantize_to)
        stack = jax.tree.map(room, own) if stack is None else stack
        for rows, leaf in zip(jax.tree.leaves(stack), jax.tree.leaves(own), strict=True):
            rows[index] = leaf
    return jax.tree.map(lambda rows: _on_devices(rows, each[0], mesh, rows.dtype), stack)


def _quantized(whole: Any, tensor: Tensor, quantize_to: Bits | None) -> np.ndarray | Quantized:
    """A tensor on the host, in the bits wanted, or as it comes."""
    if isinstance(whole, Quantized):
        return whole
    if quantize_to is not None and is_quantized(tensor):
        return quantize(whole, tensor, quantize_to)
    return np.asarray(whole)


def lies_by_output(mesh: Mesh | None) -> bool:
    """Whether matrices do, for `few_rows`, with their outputs first."""
    return mesh is None and few_rows.are_for_this_host()


def _lying_by_output(whole: Quantized, inputs: int) -> Quantized | ByOutput | HalfBytes:
    """But fp8 stays as it is: of it XLA would make floats in slow loops."""
    if whole.values.dtype == np.int8:
        return by_output(whole, inputs)
    if whole.values.dtype == DTYPES["int4"]:
        return half_bytes(whole, inputs) or whole
    return whole


def computed_dtype(tensor: Tensor, execution: Execution) -> jnp.dtype:
    """What a tensor that is not quantised is held in: float32 for norms and routers, else what the execution says."""
    return jnp.dtype(jnp.float32 if tensor.path[-1] in FLOAT32 else execution.held_dtype)


def _on_devices(array: np.ndarray, tensor: Tensor, mesh: Mesh | None, dtype: DTypeLike) -> jax.Array:
    """A tensor, or the experts' in a stack."""
    if mesh is None:
        return jnp.asarray(np.ascontiguousarray(array, dtype))
    names = axes(tensor, array.shape[-len(tensor.axes) :])
    return place(array, names if array.ndim == len(names) else ("experts", *names), DECODING, mesh, dtype)


def axes(tensor: Tensor, shape: tuple[int, ...]) -> Names:
    """The axes of a tensor, or of its scales, which have nothing to split where they have one value."""
    return tuple(None if size == 1 else name for name, size in zip(tensor.axes, shape, strict=True))


def _check_divides(config: ModelConfig, mesh: Mesh, quantize_to: Bits | None) -> None:
    shapes = {tensor.name: (tensor.axes, tensor.shape) for tensor in tensors(config)}
    if quantize_to is not None:
        for tensor in filter(is_quantized, tensors(config)):
            shape = scale_shape(tensor, quantize_to)
            shapes[f"{tensor.name} (scales)"] = axes(tensor, shape), shape
    wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (_, shape) in shapes.items()}
    specs = {name: DECODING.storage(names) for name, (names, _) in shapes.items()}
    check_divisible(wanted, specs, mesh.shape)


def restore(prepared: Prepared) -> Any:
    """The public tree again, layers and experts stacked, in the dtypes prepared; float32 where quantised."""
    last = prepared.unembedding_DV
    untied = last is not None and not (isinstance(last, ByOutput) and last.values is prepared.embedding_VD)
    prepared = jax.tree.map(_as_array, prepared, is_leaf=lambda leaf: isinstance(leaf, _OTHER_FORMS))
    layers = [_public_layer(layer) for layer in prepared.layers]
    params = {
        "embedding": prepared.embedding_VD,
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        "norm": prepared.norm,
    }
    return {**params, "unembedding": prepared.unembedding_DV} if untied else params


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, ByOutput | HalfBytes):
        return leaf.restored()
    return leaf.dequantized() if isinstance(leaf, Quantized) else leaf


def _public_layer(layer: dict[str, Any]) -> dict[str, Any]:
    public = {name: dict(leaves) for name, leaves in layer["params"].items()}
    for name, leaves in layer.get("prepared", {}).items():
        experts = leaves.get("experts")
        if experts is not None:
            stack = experts if isinstance(experts, SwiGLU) else jax.tree.map(lambda *each: jnp.stack(each), *experts)
            leaves = stack._asdict()
        public.setdefault(name, {}).update(leaves)
    return public
