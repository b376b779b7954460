"""The mixture of experts token by token, the queues in front of the experts, and the auxiliary losses."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import Dispatch


def route(logits_BTE: np.ndarray, choices: int) -> tuple[np.ndarray, np.ndarray]:
    """The chosen experts, the likeliest first, and the softmax over just their logits."""
    logits_BTE = np.asarray(logits_BTE, np.float64)
    expert_BTA = np.argsort(-logits_BTE, axis=-1, kind="stable")[..., :choices]
    chosen_BTA = np.take_along_axis(logits_BTE, expert_BTA, -1)
    gate_BTA = np.exp(chosen_BTA - chosen_BTA.max(-1, keepdims=True))
    return expert_BTA, gate_BTA / gate_BTA.sum(-1, keepdims=True)


def places(dispatch: Dispatch, tokens: int, choices: int, num_experts: int) -> int:
    """ceil(factor * k * tokens / E) in exact arithmetic, the factor as it is written."""
    if dispatch.capacity_factor is None:
        return tokens
    return math.ceil(Fraction(str(dispatch.capacity_factor)) * choices * tokens / num_experts)


def served(
    expert_BTA: np.ndarray,
    mask_BT: np.ndarray,
    num_experts: int,
    dispatch: Dispatch,
    gate_BTA: np.ndarray | None = None,
) -> np.ndarray:
    """bool [B, T, A]: one after the other, each choice takes a place of its expert in its group if one is left.

    The gates are needed where the priority is by probability: the largest first, of like ones the earlier token's.
    """
    batch, length, choices = expert_BTA.shape
    size = length if dispatch.capacity_factor is None else min(dispatch.group_size, length)
    kept_BTA = np.zeros(expert_BTA.shape, bool)
    for row in range(batch):
        for start in range(0, length, size):
            real = [t for t in range(start, start + size) if mask_BT[row, t]]
            queue = [(t, a) for t in real for a in range(choices)]
            if dispatch.priority == "choice":
                queue = [(t, a) for a in range(choices) for t in real]
            elif dispatch.priority == "probability":
                assert gate_BTA is not None
                queue.sort(key=lambda place: -gate_BTA[row][place])
            left = [places(dispatch, len(real), choices, num_experts)] * num_experts
            for t, a in queue:
                expert = expert_BTA[row, t, a]
                kept_BTA[row, t, a] = left[expert] > 0
                left[expert] -= 1
    return kept_BTA


def feed_forward(x_D: np.ndarray, gate_DF: np.ndarray, up_DF: np.ndarray, down_FD: np.ndarray) -> np.ndarray:
    """SwiGLU."""
    gate_F = x_D @ gate_DF
    return (gate_F / (1 + np.exp(-gate_F)) * (x_D @ up_DF)) @ down_FD


def mixture(
    x_BTD: np.ndarray, expert_BTA: np.ndarray, gate_BTA: np.ndarray, kept_BTA: np.ndarray, weights: tuple
) -> np.ndarray:
    """The sum of each token's served choices; weights are gate, up and down, [E, ...]."""
    x_BTD, *weights = (np.asarray(x, np.float64) for x in (x_BTD, *weights))
    y_BTD = np.zeros_like(x_BTD)
    for row, t, a in np.argwhere(kept_BTA):
        expert = expert_BTA[row, t, a]
        y_BTD[row, t] += gate_BTA[row, t, a] * feed_forward(x_BTD[row, t], *(w[expert] for w in weights))
    return y_BTD


def einsum_mixture(
    x_BTD: jax.Array, expert_BTA: jax.Array, gate_BTA: jax.Array, kept_BTA: np.ndarray, weights: tuple, most: int
) -> jax.Array:
    """The same in GShard's form, differentiable: one-hot tensors [token, expert, place] move the tokens there and back.

    Args:
      most: places an expert has for all tokens together.
    """
    gate_EDF, up_EDF, down_EFD = weights
    choices, num_experts = expert_BTA.shape[-1], gate_EDF.shape[0]
    x_ND, kept_NA = x_BTD.reshape(-1, x_BTD.shape[-1]), kept_BTA.reshape(-1, choices)
    chosen_NAE = jax.nn.one_hot(expert_BTA.reshape(-1, choices), num_experts) * kept_NA[..., None]
    place_NE = jnp.cumsum(chosen_NAE.sum(1), 0) - chosen_NAE.sum(1)
    place_NEC = jax.nn.one_hot(place_NE.astype(int), most)
    dispatch_NAEC = chosen_NAE[..., None] * place_NEC[:, None]
    x_ECD = jnp.einsum("naec,nd->ecd", dispatch_NAEC, x_ND)
    hidden_ECF = jax.nn.silu(jnp.einsum("ecd,edf->ecf", x_ECD, gate_EDF)) * jnp.einsum("ecd,edf->ecf", x_ECD, up_EDF)
    y_ECD = jnp.einsum("ecf,efd->ecd", hidden_ECF, down_EFD)
    combine_NAEC = dispatch_NAEC * gate_BTA.reshape(-1, choices)[..., None, None]
    return jnp.einsum("naec,ecd->nd", combine_NAEC, y_ECD).reshape(x_BTD.shape)


def balance_loss(logits_BTE: np.ndarray, choices: int, mask_BT: np.ndarray) -> np.ndarray:
    """Per sequence, E * sum over experts of share * mean probability; [B]."""
    num_experts = logits_BTE.shape[-1]
    losses = np.zeros(len(logits_BTE))
    for row, (logits_TE, mask_T) in enumerate(zip(np.asarray(logits_BTE, np.float64), mask_BT, strict=True)):
        if not mask_T.any():
            continue
        real_XE = logits_TE[mask_T]
        probability_XE = np.exp(real_XE) / np.exp(real_XE).sum(-1, keepdims=True)
        expert_1XA, _ = route(real_XE[None], choices)
        share_E = np.bincount(expert_1XA.ravel(), minlength=num_experts) / len(real_XE)
        losses[row] = num_experts * share_E @ probability_XE.mean(0)
    return losses


def z_loss(logits_BTE: np.ndarray, mask_BT: np.ndarray) -> float:
    """Mean over real tokens of the squared log of the partition function."""
    log_z_X = np.log(np.exp(np.asarray(logits_BTE, np.float64)[mask_BT]).sum(-1))
    return float(np.mean(log_z_X**2))
