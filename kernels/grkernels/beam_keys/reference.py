"""Reference of beam_keys: one token after another."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from grkernels.beam_rows.reference import beam_rows


def beam_keys(
    ids: Tensor,
    places: Tensor,
    starts: Tensor,
    block_table: Tensor,
    *,
    sizes: tuple[int, ...],
    max_rows: int,
    page: int,
    first: int,
    terms: int,
) -> tuple[Tensor, Tensor]:
    """Return limits int32 [n] and slots int64 [n, terms] of the tokens of a step. The family's signature.

    limits: the number of its sequence's first tokens that a token sees; of a beam's row the prompt, of the prompt's own
    up to itself. slots: where the rows of the same beam lie, `first`, first + 1, ... rows back; -1 for none.

    ids, places, sizes, max_rows: as for beam_rows. starts int32 [B + 1]: the first token of each request in the step.
    block_table int32 [B, most]: its pages of `page` tokens. Tokens from starts[B] on, a captured graph's padding, get
    any values.
    """
    _, rows, levels, _ = (x.tolist() for x in beam_rows(ids, places, sizes=sizes, max_rows=max_rows))
    limits, slots = [], torch.full((len(ids), terms), -1)
    ends, table = starts.tolist(), block_table.tolist()
    for b, (begin, end) in enumerate(pairwise(ends)):
        for i in range(begin, end):
            place = int(places[i])
            limits.append(place - rows[i] if rows[i] >= 0 else place + 1)
            for j in range(terms):
                if rows[i] >= 0 and levels[i] >= first + j:
                    there = place - first - j
                    slots[i, j] = table[b][there // page] * page + there % page
    limits += [1] * (len(ids) - len(limits))
    return torch.tensor(limits, dtype=torch.int32, device=ids.device), slots.to(ids.device)
