"""The trie of valid tuples: the codes that may follow a prefix, so that a beam search finds only existing items.

Nodes of a level are numbered in the order of their prefixes. Node i's children are the nodes child_offsets[i] to
child_offsets[i + 1] - 1 of the next level, so a child's number is its position among all children. The root is node 0
of level 0. Leaves are nodes of the level after the last. Node -1 is no node: it has no children and no item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grengines.api import Int32Array, Int64Array
from grengines.semantic.ids import SemanticIds


@dataclass(frozen=True, eq=False)
class Trie:
    """Valid tuples in CSR form, as numpy arrays. `on` returns them as tensors for searches.

    child_offsets: for each level int64 [nodes + 1]. child_codes: for each level int32 [nodes of the next level],
    ascending within a node. leaf_items: int32 [items], by leaf. sizes: codes of each level.

    Bytes: 4 for each item, 4 for each node except the root, 8 for each node except the leaves. 10 million items in 3
    levels of 512 codes take 80 MB, and at most 3 MB for the 262,144 inner nodes.
    """

    child_offsets: tuple[Int64Array, ...]
    child_codes: tuple[Int32Array, ...]
    leaf_items: Int32Array
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, ids: SemanticIds) -> Trie:
        """Build the trie of these items' tuples."""
        items, order = len(ids.codes), ids.order
        first = np.zeros(1, np.int64)  # first item of each node of a level, by place in `order`
        changed = np.zeros(items, np.bool_)  # True where a prefix differs from the one before
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
        """Return a copy on a device."""

        def put(x: Int32Array | Int64Array) -> Tensor:
            return torch.tensor(x, device=device)

        offsets, codes = tuple(map(put, self.child_offsets)), tuple(map(put, self.child_codes))
        widths = tuple(int(np.diff(x).max()) for x in self.child_offsets)
        return TensorTrie(offsets, codes, put(self.leaf_items), self.sizes, widths)


@dataclass(frozen=True, eq=False)
class TensorTrie:
    """A `Trie` as tensors on one device, for searches.

    Shapes never depend on values, so nothing waits for the device and CUDA graphs can hold these operations. widths:
    the most children of one node, for each level.
    """

    child_offsets: tuple[Tensor, ...]
    child_codes: tuple[Tensor, ...]
    leaf_items: Tensor
    sizes: tuple[int, ...]
    widths: tuple[int, ...]

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the children of nodes of the level, int64 [n], -1 allowed.

        They are first int64 [n], codes int64 [n, w] and there bool [n, w], with the level's width w. The j-th child of
        a node exists if there[:, j]. It has code codes[:, j], and is node first + j of the next level, or a leaf.
        Codes ascend. Codes of children that do not exist may be any of the level.
        """
        offsets, real = self.child_offsets[level], nodes.clamp(min=0)
        first, end = offsets[real], offsets[real + 1]
        place = first[:, None] + torch.arange(self.widths[level], device=nodes.device)
        there = (place < end[:, None]) & (nodes >= 0)[:, None]
        child_codes = self.child_codes[level]
        return first, child_codes[place.clamp_(max=len(child_codes) - 1)].long(), there

    def items(self, leaves: Tensor) -> Tensor:
        """Return the items int64 [n] of leaves [n], -1 for -1."""
        return self.leaf_items[leaves.clamp(min=0)].long().masked_fill(leaves < 0, -1)
