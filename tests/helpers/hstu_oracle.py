"""HSTU written a second time, from the paper's formulas: loops over rows and columns in fp64 NumPy.

Shares no code with the packages. Weights come as {parameter name: array}; requests as grengines.api.Request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grengines.api import Catalogue, Request
from grengines.models.hstu.config import HSTUConfig

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Peculiar:
    """Attention of other HSTU models: groups of G candidates, F last positions without a window, biases of scores."""

    G: int = 1
    F: int = 0
    position_bias: Array | None = None  # [distances]
    time_bias: Array | None = None  # [buckets]
    row_times: Sequence[int] = ()  # of the queries
    column_times: Sequence[int] = ()

    def bias(self, r: int, i: int, j: int, n: int, T: int, C: int) -> float:
        """The bias of query r, which is row i of n, and column j."""
        total = 0.0
        if self.position_bias is not None:
            last = n - T - max(C - 1, 0)
            distance = min(max(i - max(C - 1, 0), 0), last) - min(max(j - max(C - 1, 0), 0), last)
            total += self.position_bias[min(max(distance, 0), len(self.position_bias) - 1)]
        if self.time_bias is not None:
            gap = max(abs(int(self.row_times[r]) - int(self.column_times[j])), 1)
            total += self.time_bias[min(int(math.log(gap) / 0.301), len(self.time_bias) - 1)]
        return float(total)


OURS = Peculiar()


def visible(i: int, j: int, n: int, T: int, C: int, W: int, p: Peculiar = OURS) -> bool:
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
    first = n - T
    if i >= j >= first:
        seen = (i - first) // p.G == (j - first) // p.G
    if W:
        seen = seen and (i2 - j2 <= W or (p.F > 0 and i2 >= m - p.F))
    if C:
        seen = seen or (i2 == 0 and j2 < m)
    return seen


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def attend(q: Array, k: Array, v: Array, T: int, C: int, W: int, alpha: float, N: int, p: Peculiar = OURS) -> Array:
    """One sequence: q [rows, H, dqk] the last rows of it, k [n, H, dqk], v [n, H, dv] -> [rows, H, dv]."""
    rows, heads, _ = q.shape
    n = k.shape[0]
    out = np.zeros((rows, heads, v.shape[2]))
    for r in range(rows):
        i = n - rows + r
        for j in range(n):
            if visible(i, j, n, T, C, W, p):
                bias = p.bias(r, i, j, n, T, C)
                for h in range(heads):
                    out[r, h] += silu(alpha * np.dot(q[r, h], k[j, h]) + bias) / N * v[j, h]
    return out


def layer_norm(x: Array, weight: Array | float, bias: Array | float, eps: float = 1e-6) -> Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * weight + bias


def swish_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return x / (1.0 + np.exp(-layer_norm(x, weight, bias, eps)))


def bucket(gap: int, buckets: int) -> int:
    return min((max(gap, 0) + 1).bit_length() - 1, buckets - 1)


def minutes_bucket(seconds: int, buckets: int) -> int:
    """The whole part of the square root of minutes, by integers."""
    return min(math.isqrt(max(seconds, 0) // 60), buckets - 1)


def contextual_tokens(c: HSTUConfig, r: Request) -> int:
    few = len(r.history_items) < c.choices.contextual_from
    return 0 if few and c.choices.contextual_missing == "none" else c.contextual_seq_len


def embed(w: Mapping[str, Array], c: HSTUConfig, catalogue: Catalogue, r: Request) -> Array:
    """Tokens of one request, [contextual + history + candidates, E]."""
    items = min(catalogue.num_items, c.embedding_rows)
    users = min(catalogue.num_users * c.contextual_seq_len, c.embedding_rows)
    o, A, n, tokens = c.choices, catalogue.num_actions, len(r.history_items), []
    for slot in range(contextual_tokens(c, r)):
        row = items + (r.user_id * c.contextual_seq_len + slot) % users
        if n + len(r.candidates) < o.contextual_from:
            row = items + users + slot
        time = w["time_table"][minutes_bucket(r.timestamp, c.time_buckets) if o.encoder == "end" else 0]
        tokens.append(w["token_table"][row] + w["position_table"][c.max_positions + slot] + time)
    last = None
    for e, item in enumerate(r.history_items):
        x = w["token_table"][item % items] + r.history_weights[e] * w["weight_vector"]
        mask = int(r.history_actions[e])
        if o.actions == "combinations":
            x = x + w["action_table"][mask % 2**A]
        for bit in range(A if o.actions == "bits" else 0):
            if mask & (1 << bit):
                x = x + w["action_table"][bit]
        when = int(r.history_timestamps[e])
        gap = 0 if last is None else when - last
        last = when
        position, time = min(e, c.max_positions - 1), bucket(gap, c.time_buckets)
        if o.encoder == "end":
            position = min(n - e, c.max_positions - 1)
            time = minutes_bucket(r.timestamp - when, c.time_buckets)
        tokens.append(x + w["position_table"][position] + w["time_table"][time])
    for item in r.candidates:
        gap = 0 if last is None else r.timestamp - last
        position, time = min(n, c.max_positions - 1), bucket(gap, c.time_buckets)
        if o.encoder == "end":
            position = time = 0
        x = w["token_table"][item % items] + w["position_table"][position] + w["time_table"][time]
        tokens.append(x + w["action_table"][-1] if o.target_action else x)
    return np.array(tokens).reshape(-1, c.embedding_dim)


def layers(
    w: Mapping[str, Array], c: HSTUConfig, x: Array, T: int, C: int, times: Sequence[int], until: Sequence[int]
) -> Array:
    """All layers over a sequence x [n, E] with C contextual tokens and T candidates. until: times of what follows."""
    H, o = c.heads, c.choices
    W, alpha = H * c.v_dim, o.alpha or 1 / math.sqrt(c.qk_dim)
    C = C if o.contextual_mask == "history" else 0
    for i in range(c.layers):
        at = f"layers.{i}."
        own = {name.removeprefix(at): value for name, value in w.items() if name.startswith(at)}
        y = layer_norm(x, own["norm.weight"], own["norm.bias"], o.eps) @ own["uvqk.weight"].T + own["uvqk.bias"]
        u, v, q, k = np.split(y, np.cumsum([W, W, H * c.qk_dim]), axis=1)
        u = silu(u)
        if o.silu == "uvqk":
            v, q, k = silu(v), silu(q), silu(k)
        q, k, v = q.reshape(-1, H, c.qk_dim), k.reshape(-1, H, c.qk_dim), v.reshape(-1, H, c.v_dim)
        p = Peculiar(
            o.target_group_size, o.min_full_attn_seq_len, own.get("position_bias"), own.get("time_bias"), until, times
        )
        a = attend(q, k, v, T, C, c.max_attn_len, alpha, c.scaling_seqlen, p)
        normed = layer_norm(a if o.group_norm else a.reshape(-1, W), 1.0, 0.0, o.eps).reshape(-1, W)
        gated = u * (normed * own["attention_norm.weight"] + own["attention_norm.bias"])
        out = np.concatenate([u, a.reshape(-1, W), gated], axis=1) if o.output == "concat" else gated
        x = x + out @ own["out.weight"].T + own.get("out.bias", 0.0)
    return x


def final_norm(w: Mapping[str, Array], c: HSTUConfig, x: Array) -> Array:
    kind, eps = c.choices.final_norm, c.choices.head_eps
    if kind == "none":
        return x
    if kind == "l2":
        return x / np.linalg.norm(x, axis=-1, keepdims=True) * w["norm.weight"] + w["norm.bias"]
    return layer_norm(x, w["norm.weight"], w["norm.bias"], eps)


def scores(w: Mapping[str, Array], c: HSTUConfig, catalogue: Catalogue, r: Request) -> Array:
    """Logits [candidates, tasks] of one request."""
    T, C, o = len(r.candidates), contextual_tokens(c, r), c.choices
    events = [int(t) for t in r.history_timestamps]
    times = [0] * C + events + [r.timestamp] * T
    until = [0] * C + [*events[1:], r.timestamp][: len(events)] + [r.timestamp] * T
    x = layers(w, c, embed(w, c, catalogue, r), T, C, times, until)
    x = x[len(x) - T :]
    if o.clock:
        turns = [r.timestamp // 3600 % 24 / 24, r.timestamp // 86400 % 7 / 7]
        circles = [f(2 * 3.14 * turn) for turn in turns for f in (math.cos, math.sin)]
        x = np.concatenate([x, np.tile(circles, (T, 1))], axis=1) @ w["clock.weight"].T + w["clock.bias"]
    x = final_norm(w, c, x)
    items = min(catalogue.num_items, c.embedding_rows)
    rows = [int(item) % items for item in r.candidates]
    if c.interaction and T:
        gap = r.timestamp - int(r.history_timestamps[-1]) if len(r.history_items) else 0
        position = w["position_table"][min(len(r.history_items), c.max_positions - 1)]
        time = w["time_table"][bucket(gap, c.time_buckets)]
        vectors = [[x[t], w["token_table"][row], position, time] for t, row in enumerate(rows)]
        dots = [[a[i] @ a[j] for i in range(4) for j in range(i + 1, 4)] for a in vectors]
        x = np.concatenate([x, np.array(dots)], axis=1)
    elif c.interaction:
        x = np.zeros((0, c.embedding_dim + 6))
    if o.item_tower == "table":
        x = x * w["tower_table"][rows]
    if o.item_tower == "mlp":
        hidden = w["token_table"][rows] @ w["tower.hidden.weight"].T + w["tower.hidden.bias"]
        hidden = swish_norm(hidden, w["tower.hidden_norm.weight"], w["tower.hidden_norm.bias"], o.head_eps)
        tower = hidden @ w["tower.last.weight"].T + w["tower.last.bias"]
        x = x * layer_norm(tower, w["tower.last_norm.weight"], w["tower.last_norm.bias"], o.head_eps)
    hidden = x @ w["head_hidden.weight"].T + w["head_hidden.bias"]
    if o.head == "swish_norm":
        hidden = swish_norm(hidden, w["head_norm.weight"], w["head_norm.bias"], o.head_eps)
    elif o.head == "relu":
        hidden = np.maximum(hidden, 0)
    elif o.head == "gelu":
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    else:
        hidden = silu(hidden)
    return hidden @ w["head_out.weight"].T + w["head_out.bias"]


def next_item_logits(w: Mapping[str, Array], c: HSTUConfig, items: int, r: Request) -> Array:
    """Logits [items] of the next item after a history, of a generator whose items are tokens."""
    kept = slice(max(len(r.history_items) - c.max_positions, 0), None)
    tokens = [int(i) for i in r.history_items[kept]]
    times = [int(t) for t in r.history_timestamps[kept]]
    x = w["token_table"][tokens] + w["position_table"][: len(tokens)]
    x = layers(w, c, x, 0, 0, times, [*times[1:], r.timestamp])
    table = w["token_table"][:items]
    if c.choices.item_norm:
        table = table / np.linalg.norm(table, axis=1, keepdims=True)
    return final_norm(w, c, x[-1]) @ table.T


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
