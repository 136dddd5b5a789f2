"""HSTU written down a second time, in NumPy and fp64, from the paper and docs/ARCHITECTURE.md, with loops.

It shares no code with the package: what both agree on is not one mistake made once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from grengines.api import Request
from grengines.hstu.config import HSTUConfig


def sees(i: int, j: int, n: int, T: int, C: int, W: int) -> bool:
    """May row i of a sequence of n tokens see column j?"""
    if i == j:
        return True
    first_candidate = n - T
    if j >= first_candidate:
        return False  # a candidate is seen by nobody else
    if C and i < C:
        return True  # a contextual token sees everything that is no candidate

    def place(x: int) -> int:
        at = max(x - C + 1, 0) if C else x
        end = first_candidate - C + 1 if C else first_candidate
        return min(at, end)

    distance = place(i) - place(j)
    return distance > 0 and (not W or distance <= W)


def attention(q: Any, k: Any, v: Any, T: int, C: int, W: int, alpha: float, N: int) -> np.ndarray:
    """One sequence: q [D, H, dqk] are its last D rows, k [n, H, dqk] and v [n, H, dv] all of them."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, D = len(k), len(q)
    out = np.zeros((D, v.shape[1], v.shape[2]))
    for row in range(D):
        i = n - D + row
        for j in range(n):
            if sees(i, j, n, T, C, W):
                s = alpha * (q[row] * k[j]).sum(-1)  # [H]
                out[row] += (s / (1 + np.exp(-s)))[:, None] * v[j] / N
    return out


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * weight + bias


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rank(request: Request, c: HSTUConfig, weights: dict[str, Any]) -> np.ndarray:
    """Logits [candidates, tasks] of one request with the given state dict."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    C, h, T = c.contextual_seq_len, len(request.history_items), len(request.candidates)
    rows = []
    for p in range(C):
        rows.append(w["users.weight"][request.user_id % len(w["users.weight"])] + w["contexts.weight"][p + 1])

    def bucket(gap: float) -> int:
        return min(int(math.log2(1 + max(gap, 0)) * c.time_buckets / 32), c.time_buckets - 1)

    def token(item: int, position: int, gap: float) -> np.ndarray:
        x = w["items.weight"][item % len(w["items.weight"])].copy()
        x += w["positions.weight"][min(position, c.max_positions - 1)]
        return x + w["time_buckets.weight"][bucket(gap)]

    times = request.history_timestamps
    for p in range(h):
        x = token(request.history_items[p], p, times[p] - times[p - 1] if p else 0)
        for bit, vector in enumerate(w["actions.weight"]):
            if int(request.history_actions[p]) >> bit & 1:
                x += vector
        rows.append(x + float(request.history_weights[p]) * w["weight"])
    for item in request.candidates:
        rows.append(token(item, h, request.timestamp - times[-1] if h else 0))
    x = np.stack(rows)
    n, H, dv, dqk = len(x), c.heads, c.v_dim, c.qk_dim
    for layer in range(c.layers):
        p = {k.removeprefix(f"layers.{layer}."): value for k, value in w.items() if k.startswith(f"layers.{layer}.")}
        y = layer_norm(x, p["input_norm.weight"], p["input_norm.bias"]) @ p["uvqk.weight"].T + p["uvqk.bias"]
        u, v, q, k = np.split(y, np.cumsum([H * dv, H * dv, H * dqk]), axis=-1)
        u = silu(u)
        a = attention(
            q.reshape(n, H, dqk), k.reshape(n, H, dqk), v.reshape(n, H, dv),
            T, C, c.max_attn_len, c.alpha or 1 / math.sqrt(dqk), c.scaling_seqlen,
        ).reshape(n, H * dv)  # fmt: skip
        gated = u * layer_norm(a, p["attention_norm.weight"], p["attention_norm.bias"])
        x = x + np.concatenate([u, a, gated], -1) @ p["output.weight"].T
    x = layer_norm(x[C + h :], w["output_norm.weight"], w["output_norm.bias"])
    hidden = silu(x @ w["head.0.weight"].T + w["head.0.bias"])
    return hidden @ w["head.2.weight"].T + w["head.2.bias"]
