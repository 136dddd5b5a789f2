"""Beams as rows of one vLLM request, and the attention metadata that follows from token ids.

A search is one request for each level: the prompt, then the codes of all beams so far, those of a beam adjacent. With V
real tokens, the r-th row after the prompt has the id V * (1 + r) + token. An id and its place in the sequence determine
the token, the level, the length of the prompt, the position, and the earlier rows of the same beam. So chunks of a
prefill may end anywhere, and vLLM's scheduler needs no information about beams.

vLLM keeps rows of beams in its prefix cache like any others. They must never be hit: a row that is not computed gives
no hidden state. So the first row's id also holds the number of the request: V * (1 + max_rows + number) + token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grengines.api import Int64Array
from grkernels.operators import Operators

_IDS = 2**31  # vLLM's token ids are int32


@dataclass(frozen=True)
class BeamRows:
    """Numbering of the rows of beams. sizes: codes of each level. max_rows: most rows that follow a prompt."""

    sizes: tuple[int, ...]
    max_rows: int

    @property
    def vocabulary(self) -> int:
        """Return V: the tokens of all levels, and the one that begins an empty prompt."""
        return sum(self.sizes) + 1

    @property
    def numbers(self) -> int:
        """Return the number of requests with different ids; then ids repeat."""
        return _IDS // self.vocabulary - 1 - self.max_rows

    def ids(self, tokens: Int64Array, number: int) -> Int64Array:
        """Return ids int64 [rows] of the rows of these tokens, int64 [rows], in the request of this number."""
        rows = np.arange(len(tokens))
        rows[:1] += self.max_rows + number % self.numbers
        ids: np.ndarray = self.vocabulary * (1 + rows) + tokens
        return ids


@dataclass
class StepRows:
    """Tokens, rows, levels and positions of one step's ids [n]."""

    tokens: Tensor  # int64 [n]
    rows: Tensor  # int64 [n]: number of the row after the prompt, -1 for the prompt's own
    levels: Tensor  # int64 [n]: of rows; 0 for the prompt's own
    positions: Tensor  # int64 [n]: of the position table

    @classmethod
    def of(cls, beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor) -> StepRows:
        """Decode ids and their places in the sequences, integers [n]. Nothing waits for the device."""
        return cls(*kernels.beam_rows(ids, places, sizes=beams.sizes, max_rows=beams.max_rows))


@dataclass
class StepRequests:
    """The requests of one step: ids and places of their tokens, and the pages of their sequences."""

    ids: Tensor  # integers [n]
    places: Tensor  # integers [n], in the sequences
    starts: Tensor  # int32 [B + 1]: of each request among the n tokens
    block_table: Tensor  # int32 [B, most pages]
    block_size: int


@dataclass
class HSTUAttentionMetadata:
    """Keys that the rows of one step see under SiLU attention: arguments of hstu_attention and beam_terms."""

    offsets: Tensor  # int64 [B + 1]
    num_targets: Tensor | None  # int64 [B]: rows of beams of each request; None: no request has any
    paged_lengths: Tensor  # int64 [B]: tokens of the prompt in pages
    own_slots: Tensor  # int64 [n, levels - 2 at most]: slots of the earlier codes of each row's beam, -1: none

    @classmethod
    def of(
        cls, beams: BeamRows, kernels: Operators, requests: StepRequests, prompts_only: bool = False
    ) -> HSTUAttentionMetadata:
        """Make the metadata of a step. prompts_only: there are no rows of beams. Nothing waits for the device."""
        starts, places = requests.starts.long(), requests.places.long()
        last, lengths = starts[1:] - 1, starts.diff()
        ends = places[last] + 1  # of each sequence, with this step
        if prompts_only:
            return cls(starts, None, ends - lengths, places.new_full((len(places), 0), -1))
        earlier = range(1, len(beams.sizes) - 1)  # rows are of levels 0 to levels - 2
        limits, slots = visible_keys(beams, kernels, requests, earlier)
        prompts = limits[last]  # tokens of each prompt, as far as it is read
        return cls(starts, torch.minimum(ends - prompts, lengths), torch.minimum(ends - lengths, prompts), slots)


@dataclass
class BeamAttentionMetadata:
    """Keys that the rows of one step see under softmax attention, all in pages: arguments of beam_attention."""

    starts: Tensor  # int32 [B + 1]
    limits: Tensor  # int32 [n]
    own_slots: Tensor  # int64 [n, levels - 1 at most]: slots of the beam's codes, the row's own first; -1: none

    @classmethod
    def of(cls, beams: BeamRows, kernels: Operators, requests: StepRequests) -> BeamAttentionMetadata:
        """Make the metadata of a step. Nothing waits for the device."""
        return cls(requests.starts, *visible_keys(beams, kernels, requests, range(len(beams.sizes) - 1)))


def visible_keys(beams: BeamRows, kernels: Operators, requests: StepRequests, back: range) -> tuple[Tensor, Tensor]:
    """Return limits int32 [n] and slots int64 [n, len(back)] of the family beam_keys. back: rows back in the beam."""
    made: tuple[Tensor, Tensor] = kernels.beam_keys(
        requests.ids,
        requests.places,
        requests.starts,
        requests.block_table,
        sizes=beams.sizes,
        max_rows=beams.max_rows,
        page=requests.block_size,
        first=back.start,
        terms=len(back),
    )
    return made
