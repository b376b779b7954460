"""Dense attention and its gradients, all T x T scores at once."""

from __future__ import annotations

import numpy as np


def sees(query: int, key: int, window: int | None) -> bool:
    """Whether the key's position is visible to the query's."""
    return key <= query and (window is None or key > query - window)


def mask(segment_BT: np.ndarray, window: int | None) -> np.ndarray:
    """bool [B, T, T], queries down and keys across."""
    batch, length = segment_BT.shape
    seen = np.zeros((batch, length, length), bool)
    for row, query, key in np.ndindex(batch, length, length):
        seen[row, query, key] = sees(query, key, window) and segment_BT[row, query] == segment_BT[row, key]
    return seen


def attention(q_BTKGH: np.ndarray, k_BSKH: np.ndarray, v_BSKH: np.ndarray, seen_BTS: np.ndarray) -> np.ndarray:
    """float64 [B, T, K, G, H]; NaN for a query that sees nothing."""
    return np.einsum("BKGTS,BSKH->BTKGH", _weights(q_BTKGH, k_BSKH, seen_BTS), np.asarray(v_BSKH, np.float64))


def attention_gradients(
    q_BTKGH: np.ndarray, k_BSKH: np.ndarray, v_BSKH: np.ndarray, seen_BTS: np.ndarray, cotangent_BTKGH: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of sum(attention * cotangent) in q, k and v."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q_BTKGH, k_BSKH, v_BSKH, cotangent_BTKGH))
    weight_BKGTS = _weights(q, k, seen_BTS)
    d_weight_BKGTS = np.einsum("BTKGH,BSKH->BKGTS", dy, v)
    d_scores_BKGTS = weight_BKGTS * (d_weight_BKGTS - np.sum(d_weight_BKGTS * weight_BKGTS, -1, keepdims=True))
    d_scores_BKGTS *= q.shape[-1] ** -0.5
    return (
        np.einsum("BKGTS,BSKH->BTKGH", d_scores_BKGTS, k),
        np.einsum("BKGTS,BTKGH->BSKH", d_scores_BKGTS, q),
        np.einsum("BKGTS,BTKGH->BSKH", weight_BKGTS, dy),
    )


def _weights(q_BTKGH: np.ndarray, k_BSKH: np.ndarray, seen_BTS: np.ndarray) -> np.ndarray:
    scores_BKGTS = np.einsum("BTKGH,BSKH->BKGTS", np.asarray(q_BTKGH, np.float64), np.asarray(k_BSKH, np.float64))
    scores_BKGTS = np.where(seen_BTS[:, None, None], scores_BKGTS * q_BTKGH.shape[-1] ** -0.5, -np.inf)
    weight_BKGTS = np.exp(scores_BKGTS - scores_BKGTS.max(-1, keepdims=True))
    return weight_BKGTS / weight_BKGTS.sum(-1, keepdims=True)
