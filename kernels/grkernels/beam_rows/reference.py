"""Reference of beam_rows: one token after another."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor


def beam_rows(
    ids: Tensor, places: Tensor, *, sizes: tuple[int, ...], max_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, rows, levels and positions of the tokens of a step, int64 [n] each. The family's signature.

    ids: integers [n]. With V = sum(sizes) + 1 real tokens, the r-th row after a prompt has the id V * (1 + r) + token;
    tokens of prompts are themselves. An r of max_rows or more is row 0, which also holds the number of its request.
    places: integers [n], in their sequences. sizes: codes of each level.

    rows: -1 for the prompt's own. levels: of the code; 0 for the prompt's own. positions: the place for the prompt's
    own; for a row the place of its code behind the prompt, as if its beam were alone.
    """
    vocabulary, ends = sum(sizes) + 1, list(accumulate(sizes))[:-1]
    made = []
    for number, place in zip(ids.tolist(), places.tolist(), strict=True):
        token, row = number % vocabulary, number // vocabulary - 1
        row = 0 if row >= max_rows else row
        level = bisect_right(ends, token) if row >= 0 else 0
        made.append((token, row, level, place - row + level if row >= 0 else place))
    tokens, rows, levels, positions = torch.tensor(made, dtype=torch.int64, device=ids.device).view(-1, 4).T
    return tokens, rows, levels, positions
