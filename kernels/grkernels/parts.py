"""Rows of a table in parts: one gather reads them all, each from the memory that holds it.

A GPU reads the memory of another one over NVLink, and page-locked memory of the host over PCIe, by loads. So a
lookup sends no ids and waits for no other device: the kernel computes where a row lies, and loads it from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 16  # bytes, as parts_triton.py copies them


class Parts:
    """A table [rows, E] in parts: row r is row r % length of part r // length.

    parts: each [at most `length`, E], contiguous, of one dtype, in memory that `device` can read: its own, that of
    another GPU of this process (`let_read`), or page-locked memory of the host. They keep their addresses, so captured
    CUDA graphs can gather. Raises ValueError for a row or an address that is no multiple of 16 bytes.
    """

    def __init__(self, parts: Sequence[Tensor], length: int, device: torch.device) -> None:
        addresses, width = [part.data_ptr() for part in parts], parts[0].shape[1] * parts[0].itemsize
        if any(number % PIECE for number in (*addresses, width)):
            raise ValueError(f"rows of {width} bytes at {addresses}: allowed are multiples of {PIECE}")
        self.parts, self.length, self.device = list(parts), length, device
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the vectors [n, E] of rows int64 [n] on `device`, queued on its current stream."""
        first = self.parts[0]
        out = first.new_empty(len(rows), first.shape[1], device=self.device)
        if self.device.type == "cuda":
            from grkernels.parts_triton import gather  # a CPU needs no Triton

            gather(self.addresses, rows, self.length, out=out)
            return out
        for i, part in enumerate(self.parts):
            mine = rows // self.length == i
            out[mine] = part[rows[mine] - i * self.length]
        return out


def let_read(reader: torch.device, owner: torch.device) -> str | None:
    """Let a GPU read the memory that PyTorch has on another one. Return None, or that it can't."""
    if reader.type == "cpu" or reader == owner:
        return None
    if not torch.cuda.can_device_access_peer(reader, owner):
        return f"{reader} can't read the memory of {owner}: `nvidia-smi topo -p2p r` shows which GPUs can"
    torch.zeros(1, device=reader).to(owner).to(reader)  # PyTorch's first copy each way opens the memory
    return None
