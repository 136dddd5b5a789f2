"""The kernel: launch arguments, TMA descriptors, roles of the warps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from grkernels.cute_common import WARP, ElementPointer, Float32Pointer, Int32Pointer
from grkernels.hstu_attention.sm90.consumer import consume
from grkernels.hstu_attention.sm90.eight_bits import Bytes, produce_converted
from grkernels.hstu_attention.sm90.epilogue import Output, Sharing
from grkernels.hstu_attention.sm90.fp8 import Scales
from grkernels.hstu_attention.sm90.mainloop import Mmas
from grkernels.hstu_attention.sm90.pipes import Layouts, allocate
from grkernels.hstu_attention.sm90.producer import Source, Sources, produce
from grkernels.hstu_attention.sm90.schedule import Batch, PageTable
from grkernels.hstu_attention.sm90.sizes import PRODUCER_THREADS, WARPGROUP, Sizes


class Rows(NamedTuple):
    """Rows of all sequences and heads. Strides are in elements: multiples of 8, in e4m3 multiples of 16."""

    data: ElementPointer  # of e4m3 numbers the address of their bytes
    stride: Int64
    head_stride: Int64


class PagedRows(NamedTuple):
    """Rows of all pages, slots and heads. Strides are in elements: multiples of 8, of 8-bit pages multiples of 16."""

    data: ElementPointer  # of 8-bit pages the address of their bytes
    page_stride: Int64
    slot_stride: Int64
    head_stride: Int64
    scales: Float32Pointer  # [pages, page, heads] of 8-bit pages, contiguous


class Arguments(NamedTuple):
    """Arguments of a launch. The launcher takes their values in this order, nested ones flattened."""

    q: Rows
    k: Rows
    v: Rows
    kv_rows: Int32
    output: Output
    batch: Batch
    k_pages: PagedRows
    v_pages: PagedRows
    pages: Int32  # in k_pages and v_pages
    page_table: PageTable
    counter: Int32Pointer  # zero at first. Only kernels with `Tiles.dynamic` use it.
    sharing: Sharing
    half_alpha: Float32
    ctas: Int32
    scales: Scales


@dataclass(frozen=True)
class Attention(Sizes):
    """HSTU attention on Hopper: O = scale SiLU(alpha Q K^T) V under a mask, over the batch's ragged sequences.

    Work. A work item is m query rows of one head of one sequence. CTAs are persistent, one on an SM, and each
    processes several items. With fixed shares a CTA's rounds run forwards and backwards alternately (`fixed_item`).
    With `Tiles.dynamic` a CTA takes its next item from a counter. With `Tiles.split` several CTAs share the tiles of
    an item, and the last one adds up their sums (`add_up`). Only tiles that some row of the item sees are loaded, and
    most of them need no mask (`ranges_of`).

    Warps. One producer warp loads by TMA. The three other warps of its warpgroup only give their registers away, for
    the consumers to take (REGISTERS). Each of the m / 64 consumer warpgroups owns 64 rows of the item and holds their
    fp32 sums.

    Pipes. Q has one stage. K and V have `Tiles.stages` each. The producer waits for a free stage, and TMA arrives at
    its barrier. Each consumer warp arrives when WGMMA has read the stage. K runs one tile ahead of V, and the producer
    runs ahead into the next item. With `Tiles.dynamic` a fourth pipe passes the next item to the consumers.

    Main loop. S = Q K^T of the next tile is started before P V of this one, where P = SiLU(alpha S). So the tensor
    cores work while SiLU is computed. Time runs to the right:

        producer      Q K0 | K1 V0 | K2 V1    | K3 V2    |    V3    | Q' K0' ...
        tensor cores       | S0    | S1, P0V0 | S2, P1V1 | S3, P2V2 | P3V3
        SiLU               |   P0  |    P1    |    P2    |    P3    |      store O

    SiLU(s) = t tanh(t) + t with t = s / 2 costs one multiply, one tanh and one fused multiply-add. It needs neither a
    row maximum nor a row sum. With `Tiles.take_turns` two warpgroups alternate at the tensor cores: one computes SiLU
    while the other multiplies. A warpgroup skips masked tiles that only the other warpgroups need.

    Shared memory, at most 227 KiB in all:

        Q           m x qk_dim elements
        K           stages x n x qk_dim
        V           stages x n x v_dim
        barriers    up to 1 KiB with alignment

    128 x 128 tiles, 2 stages and head size 128 take 32 + 64 + 64 = 160 KiB. 128 x 64 tiles, 2 stages and head size
    256 take 64 + 64 + 64 = 192 KiB.

    8-bit pages (eight_bits.py). All four producer warps work. They fetch the bytes and scales of the next tile of K and
    of V by cp.async while they convert this one into the stage that WGMMA reads, so that consumers see no difference.
    That takes n x (qk_dim + v_dim) bytes and n x 16 bytes of scales more. Tiles of the stream still come by TMA.

    Products in e4m3 (fp8.py). Q, K and V come in e4m3 with scales, V transposed. P V of each tile is a sum of its own,
    for `Tiles.chunk` columns of V at a time, which is then added to the sums of all tiles. Tiles begin at multiples of
    n, so that a tile has one scale.

    Constraints:

    - Compute capability 9.0 (TMA, WGMMA, setmaxnreg). bf16 or fp16, with fp32 scores and sums.
    - Products in e4m3 read no pages.
    - Head sizes are multiples of 16 from 16 to 256.
    - m is 64, 128 or 192. n is a multiple of 16, and it divides the page size or is a multiple of it.
    - Turns are for m = 128, since two warpgroups take them.
    - Rows and heads of Q, K, V and pages begin at multiples of 16 bytes. The result is contiguous.
    - Rows, pages and items times splits fit in 32 bits. Strides and addresses have 64 bits.
    - `Arguments.counter` and `Sharing.arrivals` are zero before each launch.
    """

    signature = Arguments

    @cute.jit
    def launch(self, args: Arguments, stream: cuda.CUstream) -> None:
        """Launch `args.ctas` CTAs."""
        t, heads = self.tiles, args.batch.heads
        layouts = Layouts(
            _shared_layout(self.operand, t.m, self.qk_dim, 1),
            _shared_layout(self.operand, t.n, self.qk_dim, t.stages),
            _shared_layout(self.operand, *self._v_tile(t.n), t.stages),
        )
        q = _stream(args.q, self.operand, args.batch.q_rows, self.qk_dim, heads)
        k = _stream(args.k, self.operand, args.kv_rows, self.qk_dim, heads)
        v = _stream(args.v, self.operand, *self._v_tile(args.kv_rows), heads)
        k_source, v_source = None, None
        if cutlass.const_expr(self.page > 0 and self.stored == ""):
            k_pages = _pages(args.k_pages, args.pages, self.page, self.qk_dim, heads)
            v_pages = _pages(args.v_pages, args.pages, self.page, self.v_dim, heads)
            k_source = _source(k_pages, layouts.k, self.page_rows)
            v_source = _source(v_pages, layouts.v, self.page_rows)
        sources = Sources(
            q=_source(q, layouts.q, t.m),
            k=_source(k, layouts.k, t.n),
            v=_source(v, layouts.v, self._v_tile(t.n)[0]),
            k_pages=k_source,
            v_pages=v_source,
        )
        self._kernel(
            sources,
            layouts,
            self._mmas(),
            args.output,
            args.batch,
            args.page_table,
            args.k_pages,
            args.v_pages,
            args.counter,
            args.sharing,
            args.half_alpha,
            args.scales,
        ).launch(
            grid=(args.ctas, 1, 1),
            block=(PRODUCER_THREADS + WARPGROUP * self.warpgroups, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    def _v_tile(self, tokens: Any) -> tuple[Any, Any]:
        """Return rows and columns of V with some tokens. Products in e4m3 read it transposed."""
        return (self.v_dim, tokens) if self.products else (tokens, self.v_dim)

    def _mmas(self) -> Mmas:
        """Return both products, 64 rows of a work item for each warpgroup."""
        k_major, mn_major, groups = OperandMajorMode.K, OperandMajorMode.MN, (self.warpgroups, 1, 1)
        make = partial(hopper_helpers.make_trivial_tiled_mma, self.operand, self.operand, k_major)
        registers = warpgroup.OperandSource.RMEM
        major, columns = (k_major, self.tiles.chunk) if self.products else (mn_major, self.v_dim)
        return Mmas(
            qk=make(k_major, Float32, groups, (64, self.tiles.n)),
            pv=make(major, Float32, groups, (64, columns), a_source=registers),
        )

    @cute.kernel
    def _kernel(
        self,
        sources: Sources,
        layouts: Layouts,
        mmas: Mmas,
        output: Output,
        batch: Batch,
        table: PageTable,
        k_pages: PagedRows,
        v_pages: PagedRows,
        counter: cute.Pointer,
        sharing: Sharing,
        half_alpha: Float32,
        scales: Scales,
    ) -> None:
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            cpasync.prefetch_descriptor(sources.q.atom)
            cpasync.prefetch_descriptor(sources.k.atom)
            cpasync.prefetch_descriptor(sources.v.atom)
        stages, handout, k_waiting, v_waiting = allocate(self, layouts, counter)
        splits = sharing.splits if cutlass.const_expr(self.tiles.split) else 1
        producer_registers, consumer_registers = self.registers
        if warp < PRODUCER_THREADS // WARP:
            cute.arch.setmaxregister_decrease(producer_registers)
            if cutlass.const_expr(self.stored != ""):
                k_bytes, v_bytes = (
                    Bytes(x.data.toint(), x.page_stride, x.slot_stride, x.head_stride, x.scales.toint())
                    for x in (k_pages, v_pages)
                )
                produce_converted(
                    self, sources, stages, (k_bytes, v_bytes), (k_waiting, v_waiting), batch, table, splits
                )
            else:
                if warp == 0:
                    produce(self, sources, stages, handout, batch, table, splits)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            consume(self, mmas, stages, handout, batch, table, sharing, splits, output, half_alpha, scales)


def _shared_layout(dtype: type[cutlass.Numeric], rows: int, width: int, stages: int) -> cute.ComposedLayout:
    """Return the layout of [rows, width, stages] in shared memory, rows swizzled as WGMMA and TMA expect."""
    kind = hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, width)
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), (rows, width, stages), order=(0, 1, 2))


def _stream(x: Rows, dtype: type[cutlass.Numeric], rows: Any, width: Any, heads: Int32) -> cute.Tensor:
    """Return [rows, width, heads] in global memory."""
    vector = 128 // dtype.width
    strides = (cute.assume(x.stride, divby=vector), 1, cute.assume(x.head_stride, divby=vector))
    data = x.data if x.data.dtype is dtype else cute.recast_ptr(x.data, dtype=dtype)
    return cute.make_tensor(data, cute.make_layout((rows, width, heads), stride=strides))


def _pages(x: PagedRows, pages: Int32, slots: int, width: int, heads: Int32) -> cute.Tensor:
    """Return [slots, width, heads, pages] in global memory."""
    slot, head, page = (cute.assume(stride, divby=8) for stride in (x.slot_stride, x.head_stride, x.page_stride))
    return cute.make_tensor(x.data, cute.make_layout((slots, width, heads, pages), stride=(slot, 1, head, page)))


def _source(x: cute.Tensor, layout: cute.ComposedLayout, rows: int) -> Source:
    """Return what loads `rows` rows of `x` at once into a stage of `layout`."""
    width = cute.size(layout, mode=[1])
    stage = cute.select(layout, mode=[0, 1])
    if rows != cute.size(stage, mode=[0]):
        stage = cute.composition(stage, (cute.make_layout(rows), None))
    return Source(*cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, stage, (rows, width)))
