"""Beams as rows of one vLLM request: token ids that say of themselves what they are.

A search is a few requests, one a level: the prompt, then the codes of all beams so far, a beam's own codes adjacent.
With V real tokens, the r-th row after the prompt has the id V * (1 + r) + token. So from an id and its place in the
sequence alone follow the token, the level, the length of the prompt, the position, and the rows of the same beam before
it: prefills may be cut into chunks anywhere, and vLLM's scheduler needs to know nothing.

vLLM keeps rows of beams in its prefix cache like any others. They must never be hit: a row that isn't computed gives no
hidden state. So the first row's id also holds the number of the request: V * (1 + max_rows + number) + token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grkernels.operators import Operators

_IDS = 2**31  # vLLM's token ids are int32


@dataclass(frozen=True)
class BeamRows:
    """sizes: codes of each level. max_rows: most rows that follow a prompt."""

    sizes: tuple[int, ...]
    max_rows: int

    @property
    def vocabulary(self) -> int:
        """V: the tokens of all levels, and the one that begins an empty prompt."""
        return sum(self.sizes) + 1

    @property
    def numbers(self) -> int:
        """How many requests have different ids; then they repeat."""
        return _IDS // self.vocabulary - 1 - self.max_rows

    def ids(self, tokens: np.ndarray, number: int) -> np.ndarray:
        """int64 [rows]: ids of the rows of these tokens, int64 [rows], in the request of this number."""
        rows = np.arange(len(tokens))
        rows[:1] += self.max_rows + number % self.numbers
        return self.vocabulary * (1 + rows) + tokens


@dataclass
class Step:
    """What ids [n] and their places in their sequences say of the tokens of one step."""

    tokens: Tensor  # int64 [n]
    rows: Tensor  # int64 [n]: number of the row after the prompt, -1 for the prompt's own
    levels: Tensor  # int64 [n]: of rows; 0 for the prompt's own
    positions: Tensor  # int64 [n]: of the position table

    @classmethod
    def of(cls, beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor) -> Step:
        """ids and places: integers [n]. Nothing waits for the device."""
        return cls(*kernels.beam_rows(ids, places, sizes=beams.sizes, max_rows=beams.max_rows))


@dataclass
class Reach:
    """Which keys the rows of one step see under SiLU: the arguments of paged attention, and of the beams' own terms."""

    offsets: Tensor  # int64 [B + 1]
    num_targets: Tensor | None  # int64 [B]: rows of beams among each request's; None: there are none
    paged_lengths: Tensor  # int64 [B]: of the prompt, in pages
    own_slots: Tensor  # int64 [n, levels - 2 at most]: where the earlier codes of each row's beam lie, -1: none

    @classmethod
    def of(
        cls,
        beams: BeamRows,
        kernels: Operators,
        ids: Tensor,
        places: Tensor,
        starts: Tensor,
        block_table: Tensor,
        block_size: int,
        prompts_only: bool = False,
    ) -> Reach:
        """ids and places: integers [n], of requests that begin at starts, int32 [B + 1]. block_table: int32 [B, most].
        prompts_only: there are no rows of beams. Nothing waits for the device."""
        starts, places = starts.long(), places.long()
        last = starts[1:] - 1
        if prompts_only:
            before = places[last] + 1 - starts.diff()
            return cls(starts, None, before, places.new_full((len(ids), 0), -1))
        earlier = range(1, len(beams.sizes) - 1)  # rows are of levels 0 to levels - 2
        limits, slots = sight(beams, kernels, ids, places, starts, block_table, block_size, earlier)
        ends = places[last] + 1  # of each sequence, with this step
        prompts = limits[last]  # where a prompt's end isn't reached: as far as it is read
        lengths = starts.diff()
        return cls(starts, torch.minimum(ends - prompts, lengths), torch.minimum(ends - lengths, prompts), slots)


@dataclass
class Sight:
    """Which keys the rows of one step see under a softmax, all of them in pages: the arguments of beam_attention."""

    starts: Tensor  # int32 [B + 1]
    limits: Tensor  # int32 [n]
    own_slots: Tensor  # int64 [n, levels - 1 at most]: where its beam's codes lie, itself first and back; -1: none

    @classmethod
    def of(
        cls,
        beams: BeamRows,
        kernels: Operators,
        ids: Tensor,
        places: Tensor,
        starts: Tensor,
        block_table: Tensor,
        block_size: int,
    ) -> Sight:
        """As `Reach.of`."""
        back = range(len(beams.sizes) - 1)
        return cls(starts, *sight(beams, kernels, ids, places, starts, block_table, block_size, back))


def sight(
    beams: BeamRows,
    kernels: Operators,
    ids: Tensor,
    places: Tensor,
    starts: Tensor,
    block_table: Tensor,
    block_size: int,
    back: range,
) -> tuple[Tensor, Tensor]:
    """limits int32 [n] and slots int64 [n, len(back)] of grkernels.beam_keys. Arguments as of `Reach.of`."""
    made: tuple[Tensor, Tensor] = kernels.beam_keys(
        ids,
        places,
        starts,
        block_table,
        sizes=beams.sizes,
        max_rows=beams.max_rows,
        page=block_size,
        first=back.start,
        terms=len(back),
    )
    return made
