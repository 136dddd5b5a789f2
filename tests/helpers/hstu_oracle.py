"""HSTU written a second time, from the paper's formulas: loops over rows and columns in fp64 NumPy.

Shares no code with the packages. Weights come as {parameter name: array}; requests as grengines.api.Request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from grengines.api import Catalogue, Request
from grengines.models.hstu.config import HSTUConfig

Array = npt.NDArray[np.float64]


def visible(i: int, j: int, n: int, T: int, C: int, W: int) -> bool:
    """May row i see column j of a sequence of n tokens, T candidates at its end, C contextual tokens first?"""
    m = n
    if C > 0:
        i2, j2 = max(i - C + 1, 0), max(j - C + 1, 0)
        m = n - C + 1
    else:
        i2, j2 = i, j
    if T:
        m -= T
        i2, j2 = min(i2, m), min(j2, m)
    seen = i == j or i2 > j2
    if W:
        seen = seen and i2 - j2 <= W
    if C:
        seen = seen or (i2 == 0 and j2 < m)
    return seen


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def attend(q: Array, k: Array, v: Array, T: int, C: int, W: int, alpha: float, N: int) -> Array:
    """One sequence: q [rows, H, dqk] the last rows of it, k [n, H, dqk], v [n, H, dv] -> [rows, H, dv]."""
    rows, heads, _ = q.shape
    n = k.shape[0]
    out = np.zeros((rows, heads, v.shape[2]))
    for r in range(rows):
        i = n - rows + r
        for j in range(n):
            if visible(i, j, n, T, C, W):
                for h in range(heads):
                    out[r, h] += silu(alpha * np.dot(q[r, h], k[j, h])) / N * v[j, h]
    return out


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def bucket(gap: int, buckets: int) -> int:
    return min((max(gap, 0) + 1).bit_length() - 1, buckets - 1)


def embed(w: Mapping[str, Array], c: HSTUConfig, catalogue: Catalogue, r: Request) -> Array:
    """Tokens of one request, [contextual + history + candidates, E]."""
    items = min(catalogue.num_items, c.embedding_rows)
    users = min(catalogue.num_users * c.contextual_seq_len, c.embedding_rows)
    tokens = []
    for slot in range(c.contextual_seq_len):
        row = items + (r.user_id * c.contextual_seq_len + slot) % users
        tokens.append(w["token_table"][row] + w["position_table"][c.max_positions + slot] + w["time_table"][0])
    last = None
    for e, item in enumerate(r.history_items):
        x = w["token_table"][item % items] + r.history_weights[e] * w["weight_vector"]
        for bit in range(catalogue.num_actions):
            if int(r.history_actions[e]) & (1 << bit):
                x = x + w["action_table"][bit]
        when = int(r.history_timestamps[e])
        gap = 0 if last is None else when - last
        last = when
        x = x + w["position_table"][min(e, c.max_positions - 1)] + w["time_table"][bucket(gap, c.time_buckets)]
        tokens.append(x)
    for item in r.candidates:
        x = w["token_table"][item % items] + w["position_table"][min(len(r.history_items), c.max_positions - 1)]
        gap = 0 if last is None else r.timestamp - last
        tokens.append(x + w["time_table"][bucket(gap, c.time_buckets)])
    return np.array(tokens).reshape(-1, c.embedding_dim)


def scores(w: Mapping[str, Array], c: HSTUConfig, catalogue: Catalogue, r: Request) -> Array:
    """Logits [candidates, tasks] of one request."""
    x = embed(w, c, catalogue, r)
    H, T = c.heads, len(r.candidates)
    alpha = c.alpha or 1 / math.sqrt(c.qk_dim)
    for i in range(c.layers):
        at = f"layers.{i}."
        y = layer_norm(x, w[at + "norm.weight"], w[at + "norm.bias"])
        y = y @ w[at + "uvqk.weight"].T + w[at + "uvqk.bias"]
        u, v, q, k = np.split(y, np.cumsum([H * c.v_dim, H * c.v_dim, H * c.qk_dim]), axis=1)
        u = silu(u)
        q, k, v = q.reshape(-1, H, c.qk_dim), k.reshape(-1, H, c.qk_dim), v.reshape(-1, H, c.v_dim)
        a = attend(q, k, v, T, c.contextual_seq_len, c.max_attn_len, alpha, c.scaling_seqlen)
        a = a.reshape(-1, H * c.v_dim)
        normed = layer_norm(a, w[at + "attention_norm.weight"], w[at + "attention_norm.bias"])
        x = x + np.concatenate([u, a, u * normed], axis=1) @ w[at + "out.weight"].T
    x = layer_norm(x, w["norm.weight"], w["norm.bias"])[len(x) - T :]
    if c.interaction and T:
        items = min(catalogue.num_items, c.embedding_rows)
        gap = r.timestamp - int(r.history_timestamps[-1]) if len(r.history_items) else 0
        position = w["position_table"][min(len(r.history_items), c.max_positions - 1)]
        time = w["time_table"][bucket(gap, c.time_buckets)]
        vectors = [[x[t], w["token_table"][item % items], position, time] for t, item in enumerate(r.candidates)]
        dots = [[a[i] @ a[j] for i in range(4) for j in range(i + 1, 4)] for a in vectors]
        x = np.concatenate([x, np.array(dots)], axis=1)
    elif c.interaction:
        x = np.zeros((0, c.embedding_dim + 6))
    hidden = silu(x @ w["head_hidden.weight"].T + w["head_hidden.bias"])
    return hidden @ w["head_out.weight"].T + w["head_out.bias"]


def error_of_order_one(out: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """||out - expected|| / (1 + ||expected||): for values of order 1, of which a lone one may be next to 0."""
    a, b = np.asarray(out, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / (1 + np.linalg.norm(b)))


def make_requests(
    rng: np.random.Generator, catalogue: Catalogue, lengths: Sequence[int], targets: Sequence[int]
) -> list[Request]:
    """Random requests with these history lengths and candidate counts; clocks stand still now and then."""
    requests = []
    for i, (h, t) in enumerate(zip(lengths, targets, strict=True)):
        gaps = np.where(rng.random(h + 1) < 0.2, 0, (2.0 ** rng.uniform(0, 24, h + 1)).astype(np.int64))
        times = 10**9 + np.cumsum(gaps)
        requests.append(
            Request(
                request_id=100 + i,
                user_id=int(rng.integers(catalogue.num_users)),
                history_items=rng.integers(0, catalogue.num_items, h),
                history_actions=rng.integers(0, 1 << catalogue.num_actions, h),
                history_weights=rng.random(h, dtype=np.float32),
                history_timestamps=times[:h],
                num_seen=0,
                candidates=rng.integers(0, catalogue.num_items, t),
                timestamp=int(times[-1]),
                arrival_s=0.0,
                deadline_ms=80.0,
            )
        )
    return requests
