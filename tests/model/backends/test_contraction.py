"""Contractions against float64 NumPy, and what each platform is given to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.backends.contraction import contract, contract_forward, contract_gradient

SIZES = {"B": 2, "T": 6, "S": 10, "D": 16, "K": 2, "G": 3, "H": 8, "F": 12, "E": 4, "C": 7, "O": 1, "M": 40}
FORMS = (
    (contract, ("BTD", "DF", "BTF")),
    (contract, ("BTKGH", "BSKH", "BKGTS")),
    (contract_forward, ("OD", "DF", "OF")),
    (contract_forward, ("EOD", "EDF", "EOF")),
    (contract_forward, ("BTD", "DF", "BTF")),
    (contract_gradient, ("BTF", "DF", "BTD")),
    (contract_gradient, ("BTD", "BTF", "DF")),
    (contract_gradient, ("ECD", "ECF", "EDF")),
    (contract_gradient, ("MD", "MO", "DO")),
    (contract_gradient, ("TD", "TF", "FD")),
)


def _operands(x_dims: str, w_dims: str, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal([SIZES[d] for d in dims]) for dims in (x_dims, w_dims))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("form", "dims"), FORMS)
def test_equals_float64(form, dims, dtype):
    """Of the operands as they are: their products in bfloat16 are exact in float32, so only sums are rounded."""
    x, w = _operands(*dims[:2], dtype)
    y = jax.jit(lambda x, w: form(*dims, x, w))(x, w)
    assert y.dtype == jnp.float32
    exact = np.einsum(f"{dims[0]},{dims[1]}->{dims[2]}", np.asarray(x, np.float64), np.asarray(w, np.float64))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "dims", "trick", "counts"),
    [
        (contract_gradient, ("ECD", "ECF", "EDF"), "optimization_barrier", {"cpu": 1, "tpu": 0, "cuda": 0}),
        (contract_forward, ("OD", "DF", "OF"), "pad", {"cpu": 1, "tpu": 0, "cuda": 1}),
        (contract_forward, ("BTD", "DF", "BTF"), "pad", {"cpu": 0, "tpu": 0, "cuda": 0}),
    ],
)
def test_a_trick_stays_on_its_platforms(form, dims, trick, counts):
    x, w = _operands(*dims[:2], "bfloat16")
    for platform, count in counts.items():
        module = jax.export.export(jax.jit(lambda x, w: form(*dims, x, w)), platforms=[platform])(x, w).mlir_module()
        assert module.count(f"stablehlo.{trick} ") == count, platform
