"""Host memory and marks of the batches under way. What a batch has is used again once its result was taken."""

from __future__ import annotations

import torch
from torch import Tensor

from grengines.runtime import staging
from grengines.runtime.staging import Buffer
from grengines.runtime.timing import Marks

MOST_SHAPES = 256  # of results for which a slot keeps a view: without graphs each batch may have another


class Slot:
    """Memory of one batch under way on the host, page-locked for a GPU: inputs and a copy of the result; and marks.

    The inputs are parts of one buffer, one after another, so that one copy moves all of them. free: the slots that no
    batch has.
    """

    def __init__(self, device: torch.device, free: list[Slot]) -> None:
        self.marks = Marks(device)
        self._free = free
        self._pin = device.type == "cuda"
        self._memory, self._result = staging.empty(0, False), torch.empty(0)
        self._parts: dict[tuple[int, int], Buffer] = {}  # of the memory, for the sizes that were asked for
        self._copies: dict[torch.Size, Tensor] = {}  # of the result, for its shapes so far
        self._length = self._taken = 0

    def reserve(self, n: int) -> None:
        """Start anew with room for the inputs of one batch."""
        if n > len(self._memory):
            self._memory = staging.empty(n, self._pin)
            self._parts.clear()
        self._length, self._taken = n, 0

    def take(self, n: int) -> Buffer:
        """Return the next n of the reserved numbers, int64 of any values."""
        begin, self._taken = self._taken, self._taken + n
        return self._part(begin, self._taken)

    @property
    def inputs(self) -> Tensor:
        """All that is reserved."""
        return self._part(0, self._length).tensor

    def result(self, like: Tensor) -> Tensor:
        """Return memory for a copy of this tensor."""
        if (copy := self._copies.get(like.shape)) is not None and copy.dtype == like.dtype:
            return copy
        n = like.numel()
        if n > len(self._result) or like.dtype != self._result.dtype:
            self._result = torch.empty(n, dtype=like.dtype, pin_memory=self._pin)
            self._copies.clear()
        elif len(self._copies) == MOST_SHAPES:
            self._copies.clear()
        copy = self._copies[like.shape] = self._result[:n].view(like.shape)
        return copy

    def give_back(self) -> None:
        """Let other batches take the slot. The last mark must be reached, and the result copied from its memory."""
        self._free.append(self)

    def _part(self, begin: int, end: int) -> Buffer:
        if (part := self._parts.get((begin, end))) is None:  # a slice and its view take PyTorch two microseconds
            part = self._parts[begin, end] = Buffer.of(self._memory[begin:end])
        return part


class Slots:
    """The slots of an engine: as many as it ever had batches under way at once.

    A slot that is not given back, because its batch failed, is freed like any other memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Slot] = []  # the last one used is taken first: its memory is in the caches

    def take(self) -> Slot:
        """Return a slot that no batch under way has."""
        return self._free.pop() if self._free else Slot(self._device, self._free)
