"""Feature interaction in CuTe DSL: a warp takes a sample from global memory straight into tensor core operands.

The products X X^T have both operands from the same rows, so two things come free. The registers of operand A's
16 x 16 fragments are those of two of B's 8 x 16 fragments. And the order of columns is arbitrary as long as both
operands share it: a thread keeps the 8 neighbouring columns that one 16-byte load brings, where an MMA's fragment
has two pairs, 8 columns apart. So nothing passes through shared memory on the way in, and what a warp has
under way is up to 8 KiB. Blocks of products below the diagonal are never computed. The triangle is packed in
shared memory and leaves in 16-byte stores, while the next sample is being loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import warp
from cutlass.memory import SmemAllocator
from torch import Tensor

from grkernels import cute_common, tuning
from grkernels.cute_common import ELEMENTS, WARP, ElementPointer, ahead
from grkernels.cute_launch import Launcher
from grkernels.interaction.reference import interaction as reference
from grkernels.variant import KernelVariant

MAX_FEATURES = 64  # a warp holds a sample's products in registers
MAX_DIM = 4096  # a warp's result lies in shared memory
VECTOR = 8  # values of a load, and rows of a group: what the 8 quads of a warp take
CHUNK = 4 * VECTOR  # columns that a quad takes at once

# warps: of a CTA, each with samples of its own; ctas: an SM's.
CANDIDATES = [
    {"warps": warps, "ctas": ctas} for warps, ctas in ((1, 8), (1, 16), (2, 6), (2, 8), (4, 2), (4, 3), (4, 4), (8, 2))
]


class Arguments(NamedTuple):
    """Arguments of a launch, in order."""

    x: ElementPointer  # [B, features, dim]
    out: ElementPointer  # [B, width]
    B: Int32
    sample_stride: Int64
    feature_stride: Int64
    ctas: Int32


@dataclass(frozen=True)
class Interaction:
    """The kernel for one element type, size of samples and CTA."""

    dtype: Any
    features: int
    dim: int
    warps: int

    signature = Arguments

    @property
    def width(self) -> int:
        """Values of a sample's result."""
        return self.dim + self.features * (self.features - 1) // 2

    @property
    def staged(self) -> int:
        """Values of shared memory a warp: whole vectors. In them a result begins where it does in global memory's."""
        return -(-(self.width + (VECTOR - 1) * (self.width % VECTOR > 0)) // VECTOR) * VECTOR

    @property
    def groups(self) -> int:
        """Groups of 8 rows, an even number: an A fragment has two."""
        return 2 * -(-self.features // 16)

    @property
    def chunks(self) -> int:
        """Chunks of columns that are in registers at a time: at most 16 vectors a thread."""
        return min(16 // -(-self.features // 8), -(-self.dim // CHUNK))

    @property
    def steps(self) -> int:
        """Loads of `chunks` chunks that a sample takes."""
        return -(-self.dim // (CHUNK * self.chunks))

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(i, j): blocks of products, rows 16 i.. and columns 8 j.., that have some above the diagonal."""
        columns = -(-self.features // 8)
        return [(i, j) for i in range(self.groups // 2) for j in range(2 * i, columns)]

    @cute.jit
    def launch(self, args: Arguments, stream: cuda.CUstream) -> None:
        self._kernel(args).launch(grid=(args.ctas, 1, 1), block=(WARP, self.warps, 1), stream=stream)

    @cute.kernel
    def _kernel(self, args: Arguments) -> None:
        lane, own, _ = cute.arch.thread_idx()
        own = cute.arch.make_warp_uniform(own)
        sample = cute.arch.block_idx()[0] * self.warps + own
        spread = cute.arch.grid_dim()[0] * self.warps
        place = cute.make_layout((self.warps, self.staged), stride=(self.staged, 1))
        staged = SmemAllocator().allocate_tensor(self.dtype, place, byte_alignment=16)[own, None].iterator
        layout = cute.make_layout((VECTOR, self.groups, self.chunks))
        part = cute.make_rmem_tensor(layout, self.dtype)
        part.fill(self.dtype(0))
        products = cute.make_rmem_tensor(cute.make_layout((4, len(self.blocks))), Float32)
        products.fill(0.0)

        step = Int32(0)
        if sample < args.B:
            self._load(part, ahead(args.x, sample * args.sample_stride, VECTOR), args.feature_stride, lane, step)
        while sample < args.B:
            shift = Int64(sample) * self.width % VECTOR
            to = ahead(staged, Int32(shift), gcd(self.width, VECTOR))
            self._stage_dense(part, to, lane, step)
            self._multiply(part, products)
            now, last = sample, step == self.steps - 1
            sample, step = (sample + spread, Int32(0)) if last else (sample, step + 1)
            if sample < args.B:
                self._load(part, ahead(args.x, sample * args.sample_stride, VECTOR), args.feature_stride, lane, step)
            if last:
                self._stage_products(products, to, lane)
                products.fill(0.0)
                cute.arch.sync_warp()
                self._store(staged, ahead(args.out, Int64(now) * self.width - shift, VECTOR), Int32(shift), lane)
                cute.arch.sync_warp()

    @cute.jit
    def _load(self, part: cute.Tensor, x: cute.Pointer, feature_stride: Int64, lane: Int32, step: Int32) -> None:
        """Chunks step * chunks.. of a sample: of row 8 g + lane / 4 the values from 8 (lane % 4) on, of each chunk."""
        for group in cutlass.range_constexpr(-(-self.features // 8)):
            row = 8 * group + lane // 4
            start = ahead(x, row * feature_stride, VECTOR)
            for chunk in cutlass.range_constexpr(self.chunks):
                column = (step * self.chunks + chunk) * CHUNK + lane % 4 * VECTOR
                there = cute.make_tensor(ahead(start, column, VECTOR), cute.make_layout(VECTOR))
                here = part[None, group, chunk]
                if cutlass.const_expr(self.features >= 8 * group + 8 and self.dim % (CHUNK * self.chunks) == 0):
                    cute.autovec_copy(there, here)
                else:
                    here.fill(self.dtype(0))
                    if row < self.features and column < self.dim:
                        cute.autovec_copy(there, here)

    @cute.jit
    def _multiply(self, part: cute.Tensor, products: cute.Tensor) -> None:
        """products += X X^T of the chunks in registers."""
        atom = cute.make_mma_atom(warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)))
        _, group, chunk = part.stride
        k, k_stride = (2, self.chunks), (VECTOR // 2, chunk)
        for i in cutlass.range_constexpr(self.groups // 2):
            n, first = -(-self.features // 8) - 2 * i, self.blocks.index((i, 2 * i))
            # Of a thread: a pair of columns, (A) the rows of either group, the other pair of columns.
            a_layout = cute.make_layout(((2, 2, 2), 1, k), stride=((1, group, 2), 0, k_stride))
            b_layout = cute.make_layout(((2, 2), n, k), stride=((1, 2), group, k_stride))
            a, b = (cute.make_tensor(part.iterator + 2 * i * group, layout) for layout in (a_layout, b_layout))
            c = cute.make_tensor(products.iterator + 4 * first, cute.make_layout((4, 1, n)))
            cute.gemm(atom, c, a, b, c)

    @cute.jit
    def _stage_dense(self, part: cute.Tensor, to: cute.Pointer, lane: Int32, step: Int32) -> None:
        """Row 0 of the chunks in registers into shared memory; the first quad has it."""
        for chunk in cutlass.range_constexpr(self.chunks):
            column = (step * self.chunks + chunk) * CHUNK + lane * VECTOR
            if lane < 4 and column < self.dim:
                there = ahead(to, column, VECTOR)
                cute.autovec_copy(part[None, 0, chunk], cute.make_tensor(there, cute.make_layout(VECTOR)))

    @cute.jit
    def _stage_products(self, products: cute.Tensor, to: cute.Pointer, lane: Int32) -> None:
        """The products above the diagonal into shared memory, packed."""
        for block in cutlass.range_constexpr(len(self.blocks)):
            i, j = self.blocks[block]
            for value in cutlass.range_constexpr(4):
                row = 16 * i + 8 * (value // 2) + lane // 4
                column = 8 * j + lane % 4 * 2 + value % 2
                # Row r of the triangle begins at r (2 F - 1 - r) / 2, with column r + 1.
                place = self.dim + row * (2 * self.features - 3 - row) // 2 - 1 + column
                if row < column and column < self.features:
                    (to + place).store(products[value, block].to(self.dtype))

    @cute.jit
    def _store(self, staged: cute.Pointer, to: cute.Pointer, shift: Int32, lane: Int32) -> None:
        """A sample's result to global memory: from `shift` on in vectors that begin at `to`."""
        for turn in cutlass.range_constexpr(-(-self.staged // (VECTOR * WARP))):
            begin = (turn * WARP + lane) * VECTOR
            here = cute.make_tensor(ahead(staged, begin, VECTOR), cute.make_layout(VECTOR))
            there = cute.make_tensor(ahead(to, begin, VECTOR), cute.make_layout(VECTOR))
            if begin >= shift and begin + VECTOR <= shift + self.width:
                cute.autovec_copy(here, there)
            else:
                if cutlass.const_expr(self.width % VECTOR > 0):
                    for i in cutlass.range_constexpr(VECTOR):
                        if begin + i >= shift and begin + i < shift + self.width:
                            there[i] = here[i]


def tuning_key(features: int, dim: int) -> str:
    """Samples are many in every use that matters; only the size of one decides."""
    return tuning.key(features=features, dim=dim)


def interaction(x: Tensor) -> Tensor:
    """Compute what reference.py defines. A CUDA graph can capture it."""
    B, F, D = x.shape
    out = x.new_empty(B, D + F * (F - 1) // 2)
    if B:
        if x.data_ptr() % 16 or x.stride(0) % VECTOR or x.stride(1) % VECTOR or x.stride(2) != 1:
            x = x.clone(memory_format=torch.contiguous_format)
        config = tuning.choose("interaction", "cutlass", tuning_key(F, D), {"warps": 4, "ctas": 4})
        warps = config["warps"]
        _launcher(x.dtype, F, D, warps)(
            x.data_ptr(),
            out.data_ptr(),
            B,
            x.stride(0),
            x.stride(1),
            min(config["ctas"] * cute_common.processors(x.device.index), -(-B // warps)),
            cute_common.stream(x.device),
        )
    return out


@cache
def _launcher(dtype: torch.dtype, features: int, dim: int, warps: int) -> Launcher:
    return cute_common.launcher(Interaction(ELEMENTS[dtype], features, dim, warps))


def supports(*, device: str, dtype: str, features: int, dim: int) -> str | None:
    """Return None for half precision with up to 64 features of up to 4096 values, in steps of 8; else the reason."""
    others = "torch, compile, triton"
    if dtype == "fp32":
        return f"dtype fp32: tensor cores would round it to TF32 (others: {others})"
    if features > MAX_FEATURES:
        return f"{features} features are over {MAX_FEATURES} (others: {others})"
    if dim > MAX_DIM:
        return f"dim {dim} is over {MAX_DIM} (others: {others})"
    return cute_common.supports(device=device, dtype=dtype, width=dim)


VARIANT = KernelVariant("interaction", "cutlass", interaction, reference, supports)
