"""Masks of other HSTU models' attention that grbench's own lacks, and biases of the scores.

spec.py describes the mask that these options change. docs/design/model.md says whose each of them is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOG_STEP = 0.301  # the width of a time bucket, in the natural logarithm of seconds


@dataclass(frozen=True)
class Extras:
    """Further arguments of an attention call. The defaults change nothing.

    The bias of a score is the sum of both tables' rows. The row of `position_bias` is the distance of the two tokens'
    positions in the mask, and that of `time_bias` floor(ln(max(|row time - column time|, 1)) / LOG_STEP). Larger ones
    share the last row. SiLU is of alpha q k^T plus the bias.
    """

    target_group_size: int = 1  # candidates that follow each other and see those before them in their group
    min_full_attn_seq_len: int = 0  # the candidates and this many last positions of the history have no window
    num_contextuals: Tensor | None = None  # int64 [B], of each sequence; contextual_seq_len is then their upper bound
    position_bias: Tensor | None = None  # [positions]
    time_bias: Tensor | None = None  # [buckets]
    row_times: Tensor | None = None  # int64 [Lq], seconds: with time_bias
    column_times: Tensor | None = None  # int64 [Lkv], seconds, of keys outside pages: with time_bias


NONE = Extras()
