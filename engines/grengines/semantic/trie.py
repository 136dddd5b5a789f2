"""The trie of valid tuples: what may follow a prefix, so that a beam search generates items that exist.

Nodes of a level are numbered in the order of their prefixes. Node i's children are the nodes child_offsets[i] to
child_offsets[i + 1] - 1 of the next level, so a child's number is its position among all children. The root is node 0
of level 0; leaves are nodes of the level after the last. Node -1 is no node: nothing follows it, and it is no item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grengines.semantic.ids import SemanticIds
from grengines.semantic.quantise import Int32Array, Int64Array


@dataclass(frozen=True, eq=False)
class Trie:
    """Valid tuples in CSR form, as numpy arrays; `on` gives the same as tensors.

    child_offsets: for each level int64 [nodes + 1]. child_codes: for each level int32 [nodes of the next level],
    ascending within a node. leaf_items: int32 [items], by leaf. sizes: codes of each level.

    Bytes: 4 an item for leaves, 4 for each node but the root, 8 for each node but the leaves. 10 million items in 3
    levels of 512 codes: 80 MB, and at most 3 MB for the 262,144 inner nodes.
    """

    child_offsets: tuple[Int64Array, ...]
    child_codes: tuple[Int32Array, ...]
    leaf_items: Int32Array
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, ids: SemanticIds) -> Trie:
        """The trie of these items' tuples."""
        items, order = len(ids.codes), ids.order
        first = np.zeros(1, np.int64)  # of each node of a level: its first item, by place in `order`
        changed = np.zeros(items, np.bool_)  # where a prefix differs from the one before
        changed[0] = True
        offsets, codes = [], []
        for level in range(ids.levels):
            column = ids.codes[order, level]
            changed[1:] |= column[1:] != column[:-1]
            below = np.flatnonzero(changed)
            offsets.append(np.append(np.searchsorted(below, first), len(below)))
            codes.append(column[below])
            first = below
        return cls(tuple(offsets), tuple(codes), order.astype(np.int32), ids.sizes)

    @property
    def nbytes(self) -> int:
        offsets, codes = (sum(x.nbytes for x in arrays) for arrays in (self.child_offsets, self.child_codes))
        return offsets + codes + self.leaf_items.nbytes

    def on(self, device: torch.device | str) -> TensorTrie:
        """A copy on a device."""

        def put(x: Int32Array | Int64Array) -> Tensor:
            return torch.tensor(x, device=device)

        offsets, codes = tuple(map(put, self.child_offsets)), tuple(map(put, self.child_codes))
        return TensorTrie(offsets, codes, put(self.leaf_items), self.sizes)

    def mask(self, level: int, nodes: Int64Array) -> npt.NDArray[np.bool_]:
        """bool [n, codes of the level]: what may follow these nodes of the level, int64 [n], -1 allowed."""
        begin, end = self._children(level, nodes)
        width = self.sizes[level]
        place = begin[:, None] + np.arange(width)
        child_codes = self.child_codes[level]
        # A node has up to `width` children; those it doesn't have go to a column that is cut off.
        codes = np.where(place < end[:, None], child_codes[np.minimum(place, len(child_codes) - 1)], width)
        mask = np.zeros((len(nodes), width + 1), np.bool_)
        np.put_along_axis(mask, codes.astype(np.int64), True, axis=1)
        return mask[:, :width]

    def step(self, level: int, nodes: Int64Array, codes: Int32Array | Int64Array) -> Int64Array:
        """int64 [n]: nodes of the next level (after the last: leaves), -1 where the code may not follow.

        nodes: int64 [n], of this level; codes: integers [n]. Nodes of -1 and codes outside the level lead to -1.
        """
        low, end = self._children(level, nodes)
        high, child_codes = end, self.child_codes[level]
        last = len(child_codes) - 1
        for _ in range(self.sizes[level].bit_length()):  # bisect all at once
            middle = (low + high) // 2
            right = (low < high) & (child_codes[np.minimum(middle, last)] < codes)
            low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
        return np.where((low < end) & (child_codes[np.minimum(low, last)] == codes), low, -1)

    def items(self, leaves: Int64Array) -> Int64Array:
        """int64 [n]: items of leaves [n], -1 for -1."""
        return np.where(leaves < 0, -1, self.leaf_items[np.maximum(leaves, 0)].astype(np.int64))

    def _children(self, level: int, nodes: Int64Array) -> tuple[Int64Array, Int64Array]:
        offsets, real = self.child_offsets[level], np.maximum(nodes, 0)
        begin = offsets[real]
        return begin, np.where(nodes < 0, begin, offsets[real + 1])


@dataclass(frozen=True, eq=False)
class TensorTrie:
    """`Trie` as tensors of one device. Shapes never depend on values: nothing waits for the device, and CUDA graphs can
    hold these operations. `mask` needs 9 bytes a row and code while it runs."""

    child_offsets: tuple[Tensor, ...]
    child_codes: tuple[Tensor, ...]
    leaf_items: Tensor
    sizes: tuple[int, ...]

    def mask(self, level: int, nodes: Tensor) -> Tensor:
        """bool [n, codes of the level]: what may follow these nodes of the level, int64 [n], -1 allowed."""
        begin, end = self._children(level, nodes)
        width = self.sizes[level]
        place = begin[:, None] + torch.arange(width, device=nodes.device)
        child_codes = self.child_codes[level]
        codes = child_codes[place.clamp(max=len(child_codes) - 1)].long()
        codes = codes.masked_fill_(place >= end[:, None], width)
        mask = torch.zeros(len(nodes), width + 1, dtype=torch.bool, device=nodes.device)
        return mask.scatter_(1, codes, True)[:, :width]

    def step(self, level: int, nodes: Tensor, codes: Tensor) -> Tensor:
        """int64 [n]: nodes of the next level (after the last: leaves), -1 where the code may not follow."""
        low, end = self._children(level, nodes)
        high, child_codes = end, self.child_codes[level]
        last = len(child_codes) - 1
        for _ in range(self.sizes[level].bit_length()):
            middle = (low + high) // 2
            right = (low < high) & (child_codes[middle.clamp(max=last)] < codes)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        return torch.where((low < end) & (child_codes[low.clamp(max=last)] == codes), low, -1)

    def items(self, leaves: Tensor) -> Tensor:
        """int64 [n]: items of leaves [n], -1 for -1."""
        return self.leaf_items[leaves.clamp(min=0)].long().masked_fill(leaves < 0, -1)

    def _children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        offsets, real = self.child_offsets[level], nodes.clamp(min=0)
        begin = offsets[real]
        return begin, torch.where(nodes < 0, begin, offsets[real + 1])
