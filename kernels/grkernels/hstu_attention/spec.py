"""Mask of HSTU attention in closed form, and the cost of the operator, in Python integers.

A sequence of n tokens is C contextual tokens, then the history, then T candidates (targets):

    position 0           the C contextual tokens together (the first token of the history if C = 0)
    positions 1, 2, ...  the history's tokens, one each
    position m           the T candidates together, m = n - T - C + 1 (n - T if C = 0)

A token sees itself and every token at a smaller position, so never another candidate. A window W > 0
hides tokens more than W positions back. Contextual tokens see each other and the whole history, with
any window. Source: Zhai et al., "Actions Speak Louder than Words", ICML 2024.

Options of other HSTU models (extras.py) change it so. In groups of G candidates, a candidate also sees those of its
group that come before it. The candidates and the history's last F positions have no window. C may differ from sequence
to sequence.
"""

from __future__ import annotations

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def visible_pairs(
    n: int,
    num_targets: int = 0,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    delta: int | None = None,
    *,
    target_group_size: int = 1,
    min_full_attn_seq_len: int = 0,
) -> int:
    """Return the number of (row, column) pairs that the mask of one sequence admits: the exact work.

    With `delta`, only the last `delta` rows count: in an append the queries are the newest tokens.
    Takes constant time. Raises ValueError for num_targets or delta outside 0..n, or a negative option.
    """
    rows = n if delta is None else delta
    for name, value in (("num_targets", num_targets), ("delta", rows)):
        if not 0 <= value <= n:
            raise ValueError(f"{name}={value}: allowed is 0 to n={n}")
    if contextual_seq_len < 0 or max_attn_len < 0:
        raise ValueError(
            f"contextual_seq_len={contextual_seq_len}, max_attn_len={max_attn_len}: neither may be negative"
        )
    first = n - rows  # the first row that counts
    width = max(contextual_seq_len, 1)  # tokens at position 0
    m = n - num_targets - width + 1
    candidate_rows = min(num_targets, rows)
    G = target_group_size
    grouped = _before_in_group(num_targets, G) - _before_in_group(num_targets - candidate_rows, G)
    if m <= 0:  # no more tokens than contextual ones and candidates: each sees itself and its group only
        return rows + grouped
    prefix_sees = n - num_targets if contextual_seq_len else 1
    prefix_rows = max(width - first, 0)
    F = min_full_attn_seq_len if max_attn_len else 0
    full = max(m - F, 1)  # from this position on there is no window
    low = max(first - width + 1, 1)
    history = _sum_seen(low, min(full, m) - 1, width, max_attn_len)
    history += _sum_seen(max(low, full), m - 1, width, 0) if F else 0
    candidates = candidate_rows * _sum_seen(m, m, width, 0 if F else max_attn_len)
    return prefix_rows * prefix_sees + history + candidates + grouped


def _before_in_group(candidates: int, size: int) -> int:
    """Return the sum over the first candidates of those before each in its group."""
    groups, rest = divmod(candidates, size)
    return groups * size * (size - 1) // 2 + rest * (rest - 1) // 2


def _sum_seen(low: int, high: int, width: int, window: int) -> int:
    """Return the sum over positions low..high (low >= 1) of the tokens that one row there sees."""
    if high < low:
        return 0
    unlimited_to = min(high, window) if window else high  # up to there position 0 is within the window
    count = max(unlimited_to - low + 1, 0)
    whole = count * width + count * (low + low + count - 1) // 2  # each sees width + position
    return whole + (high - low + 1 - count) * (window + 1)


def flops(pairs: int, heads: int, qk_dim: int, v_dim: int) -> int:
    """Return the floating-point operations of `pairs` visible pairs: q k^T and the product with v.

    A multiply-add counts as 2.
    """
    return pairs * heads * 2 * (qk_dim + v_dim)


def bytes_moved(q_rows: int, kv_rows: int, heads: int, qk_dim: int, v_dim: int, dtype: str) -> int:
    """Return the least bytes between memory and chip: q, k and v read once, the result written once.

    dtype: as in BYTES.
    """
    values = q_rows * (qk_dim + v_dim) + kv_rows * (qk_dim + v_dim)
    return values * heads * BYTES[dtype]
