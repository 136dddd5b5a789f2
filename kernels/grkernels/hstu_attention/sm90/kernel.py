"""HSTU attention for Hopper in CuTe DSL: TMA loads, WGMMA, one producer warp and M / 64 consumer warpgroups.

A work item is M query rows of one head of one sequence. CTAs are persistent: each works off several items, and its
producer runs ahead into the next one while the consumers finish this one. SiLU(s) = t tanh(t) + t with
t = s / 2, so a score costs one multiply, one tanh and one fused multiply-add, and needs neither a row maximum nor
a row sum. The product S = Q K^T of the next tile of keys is started before P V of this one, so that the tensor
cores work while SiLU is computed; with more warpgroups they also take turns (named barriers).

What a row sees is an interval of columns and itself (`_sees`), so of a work item's columns most tiles need
no mask, tiles that nothing sees are never loaded, and of the candidates only the diagonal is visited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils.hopper_helpers as sm90_helpers
from cutlass import BFloat16, Float16, Float32, Int32, Int64, cute, pipeline
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op, select_
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

PRODUCER_THREADS = 128
WHOLE_RANGES = 2  # the first of what `_ranges` returns: every row sees all of their tiles
TURN_BARRIER = 2  # named barriers TURN_BARRIER + warpgroup: whose turn at the tensor cores it is
REGISTERS = {1: (56, 256), 2: (24, 240), 3: (32, 160)}  # consumer warpgroups -> registers of producer, consumer


@dataclass(frozen=True)
class Tiles:
    """Sizes that the kernel is compiled for."""

    m: int  # query rows of a work item: 64 for each consumer warpgroup
    n: int  # keys of a tile
    stages: int  # tiles of K and of V in shared memory
    take_turns: bool  # warpgroups take turns at the tensor cores
    dynamic: bool  # CTAs take the next work item when they are free, from a counter; else a fixed share
    split: bool = False  # several CTAs share an item's tiles, and the last one to end adds up what they found


@dataclass(frozen=True)
class Attention:
    """The kernel for one element type, head size and tile size. `launch` is what gets compiled."""

    dtype: type[BFloat16] | type[Float16]
    qk_dim: int
    v_dim: int
    tiles: Tiles
    page: int = 0  # tokens of a page; 0: no keys lie in pages. It divides tiles.n, or tiles.n divides it.

    @cute.jit
    def launch(
        self,
        q_ptr: cute.Pointer,
        k_ptr: cute.Pointer,
        v_ptr: cute.Pointer,
        o_ptr: cute.Pointer,
        q_offsets: cute.Pointer,
        kv_offsets: cute.Pointer,
        num_targets: cute.Pointer,
        k_pages_ptr: cute.Pointer,
        v_pages_ptr: cute.Pointer,
        page_table: cute.Pointer,
        paged_lengths: cute.Pointer,
        counter: cute.Pointer,
        partials: cute.Pointer,
        arrivals: cute.Pointer,
        splits: Int32,
        q_rows: Int32,
        kv_rows: Int32,
        heads: Int32,
        batch: Int32,
        q_stride: Int64,
        q_head_stride: Int64,
        k_stride: Int64,
        k_head_stride: Int64,
        v_stride: Int64,
        v_head_stride: Int64,
        pages: Int32,
        table_stride: Int64,
        k_page_stride: Int64,
        k_slot_stride: Int64,
        k_pages_head_stride: Int64,
        v_page_stride: Int64,
        v_slot_stride: Int64,
        v_pages_head_stride: Int64,
        contextual: Int32,
        window: Int32,
        has_targets: Int32,
        half_alpha: Float32,
        scale: Float32,
        ctas: Int32,
        stream: cuda.CUstream,
    ) -> None:
        t = self.tiles
        sq_layout = _smem_layout(self.dtype, (t.m, self.qk_dim), 1)
        sk_layout = _smem_layout(self.dtype, (t.n, self.qk_dim), t.stages)
        sv_layout = _smem_layout(self.dtype, (t.n, self.v_dim), t.stages)

        q = _rows(q_ptr, q_rows, self.qk_dim, heads, q_stride, q_head_stride)
        k = _rows(k_ptr, kv_rows, self.qk_dim, heads, k_stride, k_head_stride)
        v = _rows(v_ptr, kv_rows, self.v_dim, heads, v_stride, v_head_stride)
        load = cpasync.CopyBulkTensorTileG2SOp()
        q_atom, q_tma = cpasync.make_tiled_tma_atom(load, q, cute.select(sq_layout, mode=[0, 1]), (t.m, self.qk_dim))
        k_atom, k_tma = cpasync.make_tiled_tma_atom(load, k, cute.select(sk_layout, mode=[0, 1]), (t.n, self.qk_dim))
        v_atom, v_tma = cpasync.make_tiled_tma_atom(load, v, cute.select(sv_layout, mode=[0, 1]), (t.n, self.v_dim))
        paged: Any = None
        if cutlass.const_expr(self.page > 0):
            k_pages = self._pages(
                k_pages_ptr, self.qk_dim, heads, pages, k_slot_stride, k_pages_head_stride, k_page_stride
            )
            v_pages = self._pages(
                v_pages_ptr, self.v_dim, heads, pages, v_slot_stride, v_pages_head_stride, v_page_stride
            )
            rows = min(self.page, t.n)
            k_paged = cpasync.make_tiled_tma_atom(load, k_pages, _part(sk_layout, rows), (rows, self.qk_dim))
            v_paged = cpasync.make_tiled_tma_atom(load, v_pages, _part(sv_layout, rows), (rows, self.v_dim))
            paged = (k_paged[0], k_paged[1], v_paged[0], v_paged[1], page_table, paged_lengths, table_stride)
        groups = t.m // 64
        qk_mma = sm90_helpers.make_trivial_tiled_mma(
            self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, (groups, 1, 1), (64, t.n)
        )
        pv_mma = sm90_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (groups, 1, 1),
            (64, self.v_dim),
            a_source=warpgroup.OperandSource.RMEM,
        )
        self._kernel(
            q_tma,
            k_tma,
            v_tma,
            q_atom,
            k_atom,
            v_atom,
            o_ptr,
            q_offsets,
            kv_offsets,
            num_targets,
            counter,
            (partials, arrivals, splits),
            q_rows,
            heads,
            batch,
            contextual,
            window,
            has_targets,
            half_alpha,
            scale,
            sq_layout,
            sk_layout,
            sv_layout,
            qk_mma,
            pv_mma,
            paged,
        ).launch(
            grid=(ctas, 1, 1),
            block=(PRODUCER_THREADS + 128 * groups, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def _kernel(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        q_atom: cute.CopyAtom,
        k_atom: cute.CopyAtom,
        v_atom: cute.CopyAtom,
        o_ptr: cute.Pointer,
        q_offsets: cute.Pointer,
        kv_offsets: cute.Pointer,
        num_targets: cute.Pointer,
        counter: cute.Pointer,
        sharing: Any,
        q_rows: Int32,
        heads: Int32,
        batch: Int32,
        contextual: Int32,
        window: Int32,
        has_targets: Int32,
        half_alpha: Float32,
        scale: Float32,
        sq_layout: cute.ComposedLayout,
        sk_layout: cute.ComposedLayout,
        sv_layout: cute.ComposedLayout,
        qk_mma: cute.TiledMma,
        pv_mma: cute.TiledMma,
        paged: Any,
    ) -> None:
        t = self.tiles
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            cpasync.prefetch_descriptor(q_atom)
            cpasync.prefetch_descriptor(k_atom)
            cpasync.prefetch_descriptor(v_atom)

        @cute.struct
        class Shared:
            q_barriers: cute.struct.MemRange[Int64, 2]
            k_barriers: cute.struct.MemRange[Int64, 2 * t.stages]
            v_barriers: cute.struct.MemRange[Int64, 2 * t.stages]
            item_barriers: cute.struct.MemRange[Int64, 2]
            item: cute.struct.MemRange[Int32, 1]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sq_layout)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sk_layout)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sv_layout)], 1024]

        shared = SmemAllocator().allocate(Shared)
        producer = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        consumers = pipeline.CooperativeGroup(pipeline.Agent.Thread, t.m // 16)  # one arrival a warp
        q_pipe, k_pipe, v_pipe = (
            pipeline.PipelineTmaAsync.create(
                barrier_storage=barriers.data_ptr(),
                num_stages=stages,
                producer_group=producer,
                consumer_group=consumers,
                tx_count=rows * width * self.dtype.width // 8,
                defer_sync=True,
            )
            for barriers, stages, rows, width in (
                (shared.q_barriers, 1, t.m, self.qk_dim),
                (shared.k_barriers, t.stages, t.n, self.qk_dim),
                (shared.v_barriers, t.stages, t.n, self.v_dim),
            )
        )
        item_pipe = pipeline.PipelineAsync.create(
            barrier_storage=shared.item_barriers.data_ptr(),
            num_stages=1,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 2 * t.m),
            defer_sync=True,
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        sq = shared.q.get_tensor(sq_layout.outer, swizzle=sq_layout.inner)
        sk = shared.k.get_tensor(sk_layout.outer, swizzle=sk_layout.inner)
        sv = shared.v.get_tensor(sv_layout.outer, swizzle=sv_layout.inner)

        splits = sharing[2] if cutlass.const_expr(t.split) else 1
        items = (counter, item_pipe, shared.item.get_tensor(cute.make_layout(1)), splits)
        limits = (contextual, window)
        offsets = (q_offsets, kv_offsets, num_targets, has_targets)
        paged_lengths = None if cutlass.const_expr(paged is None) else paged[5]
        registers = REGISTERS[t.m // 64]
        if warp < PRODUCER_THREADS // 32:
            cute.arch.setmaxregister_decrease(registers[0])
            if warp == 0:
                sources = ((q_atom, q, sq, q_pipe), (k_atom, k, sk, k_pipe), (v_atom, v, sv, v_pipe))
                self._produce(sources, items, offsets, paged, limits, heads, batch)
        else:
            cute.arch.setmaxregister_increase(registers[1])
            self._consume(
                qk_mma,
                pv_mma,
                (sq, sk, sv),
                (q_pipe, k_pipe, v_pipe),
                items,
                offsets,
                paged_lengths,
                limits,
                heads,
                batch,
                o_ptr,
                sharing,
                half_alpha,
                scale,
            )
            self._fill(o_ptr, q_offsets, q_rows, heads, batch)

    @cute.jit
    def _fill(self, o_ptr: cute.Pointer, q_offsets: cute.Pointer, q_rows: Int32, heads: Int32, batch: Int32) -> None:
        """Zeros in the rows after the last sequence: the next layer's keys and values must be finite."""
        thread = cute.arch.thread_idx()[0] - PRODUCER_THREADS
        ctas = Int32(cute.arch.grid_dim()[0])
        row = Int32(cute.make_tensor(q_offsets, cute.make_layout(batch + 1))[batch]) + Int32(cute.arch.block_idx()[0])
        words = heads * self.v_dim // 2
        while row < q_rows:
            target = cute.recast_ptr((o_ptr + Int64(row) * (heads * self.v_dim)).align(4), dtype=Int32)
            line = cute.make_tensor(target, cute.make_layout(words))
            for i in cutlass.range(thread, words, 2 * self.tiles.m):
                line[i] = Int32(0)
            row += ctas

    @cute.jit
    def _produce(
        self, sources: Any, items: Any, offsets: Any, paged: Any, limits: Any, heads: Int32, batch: Int32
    ) -> None:
        """The producer warp: Q of each work item, K and V of each of its tiles, K one tile ahead of V."""
        t = self.tiles
        q_source, k_source, v_source = sources
        q_pipe, k_pipe, v_pipe = (source[-1] for source in sources)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
        paged_lengths, k_paged, v_paged = None, None, None
        if cutlass.const_expr(paged is not None):
            paged_lengths, k_paged, v_paged = paged[5], (*paged[:2], *k_source[2:]), (*paged[2:4], *v_source[2:])
        counter, item_pipe, item_slot, splits = items
        item_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        item, turn = Int32(cute.arch.block_idx()[0]), Int32(0)
        sequence, position, group, before = _find(t.m, item, Int32(0), Int32(0), offsets[0], heads, batch, splits)
        while sequence >= 0:
            turn += 1
            item = _fixed_item(turn)
            if cutlass.const_expr(t.dynamic):
                taken = Int32(0)
                if cute.arch.lane_idx() == 0:
                    taken = cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu")
                item = cute.arch.shuffle_sync(taken, offset=0) + Int32(cute.arch.grid_dim()[0])
                item_pipe.producer_acquire(item_state)
                if cute.arch.lane_idx() == 0:
                    item_slot[0] = item
                item_pipe.producer_commit(item_state)
                item_state.advance()
            cached = _cached(paged_lengths, sequence)
            head, q_row, kv_row, row, rows, h = _item(t.m, sequence, position // splits, offsets, cached)
            ranges = _ranges(t.n, row, rows, h, limits, cached)
            begin, tiles = _share(sum(ranges[1::2]), position, splits)
            k_from = (k_source, k_paged, self.qk_dim, head, kv_row, cached, sequence)
            v_from = (v_source, v_paged, self.v_dim, head, kv_row, cached, sequence)
            if tiles > begin:
                k_pipe.producer_acquire(k_state)
                self._load_keys(k_from, _column(t.n, ranges, begin), k_state, paged)
                k_state.advance()
                q_pipe.producer_acquire(q_state)
                _load(q_source, (t.m, self.qk_dim), head, q_row, q_state)
                q_state.advance()
                for i in cutlass.range(begin + 1, tiles, unroll=1):
                    k_pipe.producer_acquire(k_state)
                    self._load_keys(k_from, _column(t.n, ranges, i), k_state, paged)
                    k_state.advance()
                    v_pipe.producer_acquire(v_state)
                    self._load_keys(v_from, _column(t.n, ranges, i - 1), v_state, paged)
                    v_state.advance()
                v_pipe.producer_acquire(v_state)
                self._load_keys(v_from, _column(t.n, ranges, tiles - 1), v_state, paged)
                v_state.advance()
            sequence, position, group, before = _find(t.m, item, group, before, offsets[0], heads, batch, splits)

    @cute.jit
    def _load_keys(self, source: Any, column: Int32, state: Any, paged: Any) -> None:
        """One tile of K or V: from pages where it begins before the end of the cached tokens, else from the stream."""
        contiguous, pages, width, head, kv_row, cached, sequence = source
        n = self.tiles.n
        if cutlass.const_expr(paged is None):
            _load(contiguous, (n, width), head, kv_row + column, state)
        else:
            begin = (cached + n - 1) // n * n  # where the stream's columns begin
            if column >= begin:
                _load(contiguous, (n, width), head, kv_row + column - begin, state)
            else:
                page, rows = self.page, min(self.page, n)
                last = (cached - 1) // page
                entry = paged[4] + sequence * paged[6]
                table = cute.make_tensor(entry, cute.make_layout(last + 1))
                for part in cutlass.range_constexpr(n // rows):
                    token = column + part * rows
                    place = table[cutlass.min(token // page, last)]
                    _load_page(pages, (rows, width), head, place, token % page, part, state)

    def _pages(self, ptr: Any, width: int, heads: Any, pages: Any, slot: Any, head: Any, page: Any) -> cute.Tensor:
        """[page size, width, heads, pages] in global memory."""
        strides = (cute.assume(slot, divby=8), 1, cute.assume(head, divby=8), cute.assume(page, divby=8))
        return cute.make_tensor(ptr, cute.make_layout((self.page, width, heads, pages), stride=strides))

    @cute.jit
    def _consume(
        self,
        qk_mma: cute.TiledMma,
        pv_mma: cute.TiledMma,
        smem: Any,
        pipes: Any,
        items: Any,
        offsets: Any,
        paged_lengths: Any,
        limits: Any,
        heads: Int32,
        batch: Int32,
        o_ptr: cute.Pointer,
        sharing: Any,
        half_alpha: Float32,
        scale: Float32,
    ) -> None:
        """One consumer warpgroup: 64 query rows of each work item."""
        t = self.tiles
        sq, sk, sv = smem
        q_pipe, k_pipe, v_pipe = pipes
        thread = cute.arch.thread_idx()[0] - PRODUCER_THREADS
        warpgroup_index = cute.arch.make_warp_uniform(thread // 128)
        lane = thread % 32
        own_row = thread // 32 * 16 + lane // 4  # and the row 8 below

        qk = qk_mma.get_slice(warpgroup_index * 128)
        pv = pv_mma.get_slice(warpgroup_index * 128)
        q_fragment = qk.make_fragment_A(qk.partition_A(sq))
        k_fragment = qk.make_fragment_B(qk.partition_B(sk))
        transposed = cute.make_ordered_layout((self.v_dim, t.n, t.stages), order=(1, 0, 2))
        v_fragment = pv.make_fragment_B(pv.partition_B(cute.composition(sv, transposed)))
        p = pv.make_fragment_A(pv.partition_shape_A((t.m, t.n)))
        o = cute.make_rmem_tensor(pv.partition_shape_C((t.m, self.v_dim)), Float32)
        mmas, operands = (qk_mma, pv_mma), (q_fragment, k_fragment, v_fragment)

        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, t.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, t.stages)
        if cutlass.const_expr(t.take_turns):  # a condition of its own: known when compiling  # noqa: SIM102
            if warpgroup_index == 1:
                cute.arch.barrier_arrive(barrier_id=TURN_BARRIER, number_of_threads=256)
        _, item_pipe, item_slot, splits = items
        item_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        item, turn = Int32(cute.arch.block_idx()[0]), Int32(0)
        sequence, position, group, before = _find(t.m, item, Int32(0), Int32(0), offsets[0], heads, batch, splits)
        while sequence >= 0:
            cached = _cached(paged_lengths, sequence)
            head, q_row, _, row, rows, h = _item(t.m, sequence, position // splits, offsets, cached)
            ranges = _ranges(t.n, row, rows, h, limits, cached)
            begin, tiles = _share(sum(ranges[1::2]), position, splits)
            whole = cutlass.min(sum(ranges[1 : 2 * WHOLE_RANGES : 2]), tiles)
            sees = (_sees(row + own_row, h, limits), _sees(row + own_row + 8, h, limits))
            top = row + warpgroup_index * 64
            reach = (_sees(top, h, limits), _sees(top + 63, h, limits))
            last_row = row + rows - 1
            first_column = lane % 4 * 2
            o.fill(0.0)
            pending = Int32(0)  # whether P of the last tile waits for its V

            if tiles > begin:
                q_pipe.consumer_wait(q_state)
                column = _column(t.n, ranges, begin)
                if whole > begin or self._needs(reach, last_row, column, cached):
                    mask = (*self._seen(sees, column, cached), first_column)
                    self._begin(qk_mma, operands, p, k_pipe, k_state, half_alpha, mask)
                    pending = Int32(1)
                else:
                    _skip(k_pipe, k_state)
                    _skip(v_pipe, v_state)
                    v_state.advance()
                k_state.advance()
            for _ in cutlass.range(begin + 1, whole, unroll=1):
                self._step(mmas, operands, o, p, pipes, (k_state, v_state), half_alpha, warpgroup_index, None)
                k_state.advance()
                v_state.advance()
            for i in cutlass.range(cutlass.max(whole, begin + 1), tiles, unroll=1):
                column = _column(t.n, ranges, i)
                if self._needs(reach, last_row, column, cached):
                    mask = (*self._seen(sees, column, cached), first_column)
                    if pending != 0:
                        states = (k_state, v_state)
                        self._step(mmas, operands, o, p, pipes, states, half_alpha, warpgroup_index, mask)
                        v_state.advance()
                    else:
                        self._begin(qk_mma, operands, p, k_pipe, k_state, half_alpha, mask)
                        pending = Int32(1)
                        self._pass_turn(warpgroup_index)
                else:
                    if pending != 0:
                        self._finish(pv_mma, operands, o, p, v_pipe, v_state)
                        v_state.advance()
                        pending = Int32(0)
                    _skip(k_pipe, k_state)
                    _skip(v_pipe, v_state)
                    v_state.advance()
                    self._pass_turn(warpgroup_index)
                k_state.advance()
            if tiles > begin:
                q_pipe.consumer_release(q_state)
                q_state.advance()
            if pending != 0:
                self._finish(pv_mma, operands, o, p, v_pipe, v_state)
                v_state.advance()
            if cutlass.const_expr(t.split):
                if self._add_up(o, sharing, item, position, thread, lane):
                    self._store(o, o_ptr, scale, head, heads, q_row, rows, own_row, lane)
            else:
                self._store(o, o_ptr, scale, head, heads, q_row, rows, own_row, lane)
            turn += 1
            item = _fixed_item(turn)
            if cutlass.const_expr(t.dynamic):
                item_pipe.consumer_wait(item_state)
                item = item_slot[0]
                item_pipe.consumer_release(item_state)
                item_state.advance()
            sequence, position, group, before = _find(t.m, item, group, before, offsets[0], heads, batch, splits)

    @cute.jit
    def _seen(self, sees: Any, column: Int32, cached: Any) -> Any:
        """(`sees`, first token) of the tile at `column`. Of a tile of pages, what lies past the cached tokens is
        not theirs."""
        if cutlass.const_expr(self.page == 0):
            return sees, column
        n = self.tiles.n
        begin = (cached + n - 1) // n * n
        inside = column < begin
        seen = []
        for row, low, high in sees:
            own = row if not inside or row < cached else Int32(-1)
            seen.append((own, low, cutlass.min(high, cached) if inside else high))
        return tuple(seen), column if inside else column - begin + cached

    @cute.jit
    def _needs(self, reach: Any, last_row: Int32, column: Int32, cached: Any) -> Any:
        """Whether a warpgroup's rows see anything of the tile at `column`. reach: `_sees` of its first and last row,
        between which lows and highs only grow, but for contextual tokens, which see all of the history."""
        first, last = reach[0][0], reach[1][0]
        ((_, low, high), (_, _, high_last)), token = self._seen(reach, column, cached)
        seen = token < cutlass.max(high, high_last) and token + self.tiles.n > low
        own = token <= last and token + self.tiles.n > first
        return first <= last_row and (seen or own)

    @cute.jit
    def _pass_turn(self, warpgroup_index: Int32) -> None:
        """A turn at the tensor cores that isn't taken."""
        if cutlass.const_expr(self.tiles.take_turns):
            cute.arch.barrier(barrier_id=TURN_BARRIER + warpgroup_index, number_of_threads=256)
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - warpgroup_index, number_of_threads=256)

    @cute.jit
    def _begin(
        self, qk_mma: Any, operands: Any, p: cute.Tensor, k_pipe: Any, k_state: Any, half_alpha: Float32, mask: Any
    ) -> None:
        """P of a tile before which no other P waits for its V."""
        q_fragment, k_fragment, _ = operands
        s = cute.make_rmem_tensor(qk_mma.get_slice(0).partition_shape_C((self.tiles.m, self.tiles.n)), Float32)
        k_pipe.consumer_wait(k_state)
        _gemm(qk_mma, s, q_fragment[None, None, None, 0], k_fragment[None, None, None, k_state.index], zero=True)
        warpgroup.wait_group(0)
        k_pipe.consumer_release(k_state)
        _mask(s, *mask)
        _silu(s, half_alpha)
        _convert(s, p)

    @cute.jit
    def _step(
        self,
        mmas: Any,
        operands: Any,
        o: cute.Tensor,
        p: cute.Tensor,
        pipes: Any,
        states: Any,
        half_alpha: Float32,
        warpgroup_index: Int32,
        mask: Any,
    ) -> None:
        """Start S = Q K^T of one tile, add P V of the one before, then turn S into the next P."""
        t = self.tiles
        (qk_mma, pv_mma), (q_fragment, k_fragment, v_fragment) = mmas, operands
        (_, k_pipe, v_pipe), (k_state, v_state) = pipes, states
        s = cute.make_rmem_tensor(qk_mma.get_slice(0).partition_shape_C((t.m, t.n)), Float32)
        k_pipe.consumer_wait(k_state)
        if cutlass.const_expr(t.take_turns):
            cute.arch.barrier(barrier_id=TURN_BARRIER + warpgroup_index, number_of_threads=256)
        _gemm(qk_mma, s, q_fragment[None, None, None, 0], k_fragment[None, None, None, k_state.index], zero=True)
        v_pipe.consumer_wait(v_state)
        _gemm(pv_mma, o, p, v_fragment[None, None, None, v_state.index], zero=False)
        if cutlass.const_expr(t.take_turns):
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - warpgroup_index, number_of_threads=256)
        warpgroup.wait_group(1)
        k_pipe.consumer_release(k_state)
        if cutlass.const_expr(mask is not None):
            _mask(s, *mask)
        _silu(s, half_alpha)
        warpgroup.wait_group(0)
        v_pipe.consumer_release(v_state)
        _convert(s, p)

    @cute.jit
    def _finish(self, pv_mma: Any, operands: Any, o: cute.Tensor, p: cute.Tensor, v_pipe: Any, v_state: Any) -> None:
        """Add P V of the last tile."""
        v_pipe.consumer_wait(v_state)
        _gemm(pv_mma, o, p, operands[2][None, None, None, v_state.index], zero=False)
        warpgroup.wait_group(0)
        v_pipe.consumer_release(v_state)

    @cute.jit
    def _add_up(self, o: cute.Tensor, sharing: Any, item: Int32, position: Int32, thread: Int32, lane: Int32) -> Any:
        """Put down what this warp found of a shared item. Returns whether it is the last of the warps that share those
        rows: then `o` is the sum, always in the same order, so that results don't depend on who was last."""
        partials, arrivals, splits = sharing
        m, values = self.tiles.m, self.v_dim // 2  # a thread holds two rows of a quad's columns
        whole = item // splits
        flat = _flat(o)
        word = cute.make_rmem_tensor(cute.make_layout(4), Float32)
        share = 2 * m * values  # elements of one CTA's part
        base = Int64(whole) * splits
        mine = partials + (base + item % splits) * share + thread * 4
        for i in cutlass.range_constexpr(values // 4):
            for j in cutlass.range_constexpr(4):
                word[j] = flat[4 * i + j]
            target = mine + cute.assume(Int64(i) * (8 * m), divby=4)
            cute.autovec_copy(word, cute.make_tensor(target, cute.make_layout(4)))
        cute.arch.fence_acq_rel_gpu()
        cute.arch.sync_warp()
        before = Int32(0)
        if lane == 0:
            arrived = arrivals + whole * (m // 16) + thread // 32
            before = cute.arch.atomic_add(arrived, Int32(1), sem="acq_rel", scope="gpu")
        last = cute.arch.shuffle_sync(before, offset=0) == splits - 1
        if last:
            cute.arch.fence_acq_rel_gpu()
            o.fill(0.0)
            for split in cutlass.range(splits, unroll=1):
                theirs = partials + (base + split) * share + thread * 4
                for i in cutlass.range_constexpr(values // 4):
                    source = theirs + cute.assume(Int64(i) * (8 * m), divby=4)
                    cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), word)
                    for j in cutlass.range_constexpr(4):
                        flat[4 * i + j] = flat[4 * i + j] + word[j]
        return last

    @cute.jit
    def _store(
        self,
        o: cute.Tensor,
        o_ptr: cute.Pointer,
        scale: Float32,
        head: Int32,
        heads: Int32,
        q_row: Int32,
        rows: Int32,
        own_row: Int32,
        lane: Int32,
    ) -> None:
        """Scale, round and write this thread's two rows.

        A thread of a quad holds 2 of each 8 columns. Four such blocks are transposed within the quad, so that each
        thread writes 8 columns, 16 bytes, at once.
        """
        blocks = self.v_dim // 8
        flat = _flat(o)
        pairs = [  # [2 * block + row half]
            _round_pair(flat[2 * i] * scale, flat[2 * i + 1] * scale, self.dtype) for i in range(2 * blocks)
        ]
        quad = lane % 4
        word = cute.make_rmem_tensor(cute.make_layout(4), Int32)
        for half in cutlass.range_constexpr(2):
            row = own_row + 8 * half
            base = o_ptr + ((Int64(q_row) + row) * heads + head) * self.v_dim
            for four in cutlass.range_constexpr(blocks // 4):
                x = [pairs[2 * (4 * four + i) + half] for i in range(4)]
                x = _transpose(x, lane)
                for i in cutlass.range_constexpr(4):
                    word[i] = x[i]
                if row < rows:
                    target = cute.recast_ptr((base + 8 * (4 * four + quad)).align(16), dtype=Int32)
                    cute.autovec_copy(word, cute.make_tensor(target, cute.make_layout(4)))
            for block in cutlass.range_constexpr(blocks // 4 * 4, blocks):
                if row < rows:
                    target = cute.recast_ptr((base + 8 * block + 2 * quad).align(4), dtype=Int32)
                    cute.make_tensor(target, cute.make_layout(1))[0] = pairs[2 * block + half]


def _smem_layout(dtype: Any, shape: tuple[int, int], stages: int) -> cute.ComposedLayout:
    """[rows, width, stages] in shared memory, rows swizzled as WGMMA and TMA expect."""
    kind = sm90_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, shape[1])
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), (*shape, stages), order=(0, 1, 2))


def _part(layout: cute.ComposedLayout, rows: int) -> cute.ComposedLayout:
    """The layout of the first `rows` rows of a stage."""
    stage = cute.select(layout, mode=[0, 1])
    return cute.composition(stage, (cute.make_layout(rows), None))


def _rows(ptr: cute.Pointer, rows: Int32, width: int, heads: Int32, stride: Int64, head_stride: Int64) -> cute.Tensor:
    """[rows, width, heads] in global memory; strides in elements, multiples of 8 as TMA demands."""
    strides = (cute.assume(stride, divby=8), 1, cute.assume(head_stride, divby=8))
    return cute.make_tensor(ptr, cute.make_layout((rows, width, heads), stride=strides))


@cute.jit
def _load(source: Any, tile: cutlass.Constexpr[tuple[int, int]], head: Int32, row: Int32, state: Any) -> None:
    """Start loading `tile` rows and columns of one head, from `row` on, into the pipe's current stage."""
    atom, tensor, smem, pipe = source
    tile_of = cute.local_tile(cute.domain_offset((row, 0), tensor[None, None, head]), tile, (0, 0))
    there, here = cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(smem[None, None, state.index], 0, 2),
        cute.group_modes(tile_of, 0, 2),
    )
    cute.copy(atom, here, there, tma_bar_ptr=pipe.producer_get_barrier(state))


@cute.jit
def _load_page(
    source: Any,
    tile: cutlass.Constexpr[tuple[int, int]],
    head: Int32,
    page: Int32,
    row: Int32,
    part: cutlass.Constexpr[int],
    state: Any,
) -> None:
    """Start loading `tile` rows and columns of one head of a page, from `row` on, as the stage's `part`-th rows."""
    atom, tensor, smem, pipe = source
    tile_of = cute.local_tile(cute.domain_offset((row, 0), tensor[None, None, head, page]), tile, (0, 0))
    there, here = cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(cute.local_tile(smem[None, None, state.index], tile, (part, 0)), 0, 2),
        cute.group_modes(tile_of, 0, 2),
    )
    cute.copy(atom, here, there, tma_bar_ptr=pipe.producer_get_barrier(state))


@cute.jit
def _gemm(mma: cute.TiledMma, c: cute.Tensor, a: cute.Tensor, b: cute.Tensor, zero: cutlass.Constexpr[bool]) -> None:
    """Start C = A B (zero) or C += A B, as one group."""
    warpgroup.fence()
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, not zero)
    for i in cutlass.range_constexpr(cute.size(a.shape[2])):
        cute.gemm(atom, c, a[None, None, i], b[None, None, i], c)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


@cute.jit
def _skip(pipe: Any, state: Any) -> None:
    """Let go of a tile unread. Waits for it: whoever lets go earlier is counted for the tile before."""
    pipe.consumer_wait(state)
    pipe.consumer_release(state)


def _flat(x: cute.Tensor) -> cute.Tensor:
    """A register tensor as a vector. WGMMA's order: column pair, row half, then blocks of 8 columns."""
    return cute.make_tensor(x.iterator, cute.make_layout(cute.size(x)))


@cute.jit
def _silu(s: cute.Tensor, half_alpha: Float32) -> None:
    """s -> SiLU(alpha s), in place."""
    flat = _flat(s)
    for i in cutlass.range_constexpr(cute.size(flat)):
        x = flat[i] * half_alpha
        flat[i] = x * cute.math.tanh(x, fastmath=True) + x


@cute.jit
def _convert(s: cute.Tensor, p: cute.Tensor) -> None:
    """Round S into P, the A operand of the next product: the two have the same order of elements.

    Two elements at a time by hand: left to the compiler, some sizes are rounded one by one, then moved, and the
    moves make it wait between the steps of the product that reads P.
    """
    flat = _flat(s)
    pairs = cute.recast_tensor(_flat(p), Int32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = _round_pair(flat[2 * i], flat[2 * i + 1], p.element_type)


@dsl_user_op
def _round_pair(low: Float32, high: Float32, dtype: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """Two floats as 16-bit elements of one word."""
    name = "bf16x2" if dtype is BFloat16 else "f16x2"
    values = [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)]
    return Int32(llvm.inline_asm(T.i32(), values, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f", loc=loc, ip=ip))


@cute.jit
def _mask(s: cute.Tensor, sees: Any, tile_column: Int32, own_column: Int32) -> None:
    """Zero what this thread's two rows don't see; SiLU(0) = 0. own_column: the thread's first in the tile."""
    flat = _flat(s)
    for half in cutlass.range_constexpr(2):
        row, low, high = (bound - tile_column - own_column for bound in sees[half])
        for block in cutlass.range_constexpr(cute.size(flat) // 4):
            for pair in cutlass.range_constexpr(2):
                column = 8 * block + pair
                seen = (low <= column and column < high) or column == row
                i = 4 * block + 2 * half + pair
                flat[i] = flat[i] if seen else Float32(0.0)


def _transpose(x: list[Any], lane: Int32) -> list[Any]:
    """4 x 4 transpose within each quad of lanes: lane i's x[j] becomes lane j's x[i]."""
    for step in (1, 2):
        upper = (lane & step) != 0
        for i in range(4):
            if not i & step:
                a, b = x[i], x[i | step]
                received = cute.arch.shuffle_sync_bfly(select_(upper, a, b), offset=step)
                x[i], x[i | step] = select_(upper, received, a), select_(upper, b, received)
    return x


@cute.jit
def _fixed_item(turn: Int32) -> Int32:
    """The CTA's work item number `turn` where shares are fixed. Costs fall along a head's items, so every other
    turn goes the other way round: who had the longest of one round has the shortest of the next."""
    ctas, own = Int32(cute.arch.grid_dim()[0]), Int32(cute.arch.block_idx()[0])
    return turn * ctas + (own if turn % 2 == 0 else ctas - 1 - own)


@cute.jit
def _find(
    m: cutlass.Constexpr[int],
    item: Int32,
    group: Int32,
    before: Int32,
    q_offsets: cute.Pointer,
    heads: Int32,
    batch: Int32,
    splits: Any,
) -> Any:
    """Where work item `item` lies: (sequence or -1, item within it, group, before). Of each there are `splits`.

    Sequences are searched 32 at a time, one a lane, from `group` on, before which there are `before` items: what
    the last call returned, since a CTA's items only grow.
    """
    lane = cute.arch.lane_idx()
    offsets = cute.make_tensor(q_offsets, cute.make_layout(batch + 1))
    sequence, position = Int32(-1), Int32(0)
    while sequence < 0 and group < batch:
        items = Int32(0)
        if group + lane < batch:
            length = Int32(offsets[group + lane + 1] - offsets[group + lane])
            items = (length + m - 1) // m * heads * splits
        upto = items
        for step in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(upto, offset=1 << step, mask_and_clamp=0)
            upto += below if lane >= (1 << step) else 0
        total = cute.arch.shuffle_sync(upto, offset=31)
        if item < before + total:
            past = cute.arch.popc(cute.arch.vote_ballot_sync(before + upto <= item))
            sequence = group + past
            position = item - before - cute.arch.shuffle_sync(upto - items, offset=past)
        else:
            before += total
            group += 32
    return sequence, position, group, before


@cute.jit
def _share(tiles: Int32, position: Int32, splits: Any) -> Any:
    """The tiles of a work item that one of those who share it works off: from, to."""
    split = position % splits
    return tiles * split // splits, tiles * (split + 1) // splits


@cute.jit
def _cached(paged_lengths: Any, sequence: Int32) -> Any:
    """How many of a sequence's keys lie in pages."""
    if cutlass.const_expr(paged_lengths is None):
        return 0
    return Int32(cute.make_tensor(paged_lengths, cute.make_layout(sequence + 1))[sequence])


@cute.jit
def _item(m: cutlass.Constexpr[int], sequence: Int32, position: Int32, offsets: Any, cached: Any) -> Any:
    """A work item: (head, first row of Q's stream, first row of K's stream, first row, rows, history h).

    The longest items of a head come first, so that short ones are left for the end. Rows count within the sequence,
    whose tokens from h on are candidates.
    """
    q_pointer, kv_pointer, targets_pointer, has_targets = offsets
    q_offsets = cute.make_tensor(q_pointer, cute.make_layout(sequence + 2))
    kv_offsets = cute.make_tensor(kv_pointer, cute.make_layout(sequence + 2))
    queries = Int32(q_offsets[sequence + 1] - q_offsets[sequence])
    n = Int32(kv_offsets[sequence + 1] - kv_offsets[sequence]) + cached
    h = n
    if has_targets != 0:
        h = n - Int32(cute.make_tensor(targets_pointer, cute.make_layout(sequence + 1))[sequence])
    items = (queries + m - 1) // m
    head = position // items
    skipped = (items - 1 - position % items) * m
    q_row = Int32(q_offsets[sequence]) + skipped
    return head, q_row, Int32(kv_offsets[sequence]), n - queries + skipped, cutlass.min(queries - skipped, m), h


@cute.jit
def _sees(row: Int32, h: Int32, limits: Any) -> Any:
    """What a row of a sequence sees beside itself: (row, low, high), columns low <= j < high.

    h: the first candidate. The closed form of reference.py's mask: history rows see what is before them, candidates
    and contextual tokens the whole history; a window cuts `low` off unless it reaches the contextual tokens.
    """
    contextual, window = limits
    shift = cutlass.max(contextual - 1, 0)
    m = h - shift  # the candidates' position
    low = Int32(0)
    high = row + 1
    if row >= h or row < contextual:
        high = h if m > 0 else Int32(0)
    if window > 0 and row >= contextual:
        last = cutlass.min(row, h)
        if last - shift > window:
            low = last - window
    return row, low, high


@cute.jit
def _ranges(n: cutlass.Constexpr[int], row: Int32, rows: Int32, h: Int32, limits: Any, cached: Any) -> Any:
    """The tiles of n columns that rows row..row+rows-1 need: first column and number of tiles of six ranges.

    In the order in which they are worked off: those that every row sees whole (WHOLE_RANGES), before and after the
    last tile of pages; then, all of which need the mask and of which a warpgroup leaves out what none of its rows sees,
    the last tile of pages, the first tiles of the history (of a window), its last ones, and the candidates'
    diagonal. Columns are tokens, but for a gap that lets the tokens
    after the `cached` ones, which lie elsewhere, begin with a tile of their own.
    """
    contextual, _ = limits
    gap = (cached + n - 1) // n * n - cached
    end = row + rows
    _, low, _ = _sees(row, h, limits)
    _, low_last, _ = _sees(end - 1, h, limits)
    m = h - cutlass.max(contextual - 1, 0)
    high = h if row < contextual and m > 0 else cutlass.min(end, h)
    whole_high = cutlass.min(row + 1, h) if m > 0 else Int32(0)
    low, low_last = low + (gap if low >= cached else 0), low_last + (gap if low_last >= cached else 0)
    high, whole_high = high + (gap if high > cached else 0), whole_high + (gap if whole_high > cached else 0)

    begin, stop = low // n, (high + n - 1) // n
    whole_begin = cutlass.min((low_last + n - 1) // n, stop)
    whole_stop = cutlass.max(cutlass.min(whole_high // n, stop), whole_begin)
    diagonal = cutlass.max(row + gap, stop * n)
    diagonals = (cutlass.max(end + gap - diagonal, 0) + n - 1) // n if end > h else Int32(0)
    ragged = cached // n  # the tile that only begins with cached tokens
    split = gap > 0 and ragged >= whole_begin and ragged < whole_stop
    first_stop = ragged if split else whole_stop
    return (
        whole_begin * n,
        first_stop - whole_begin,
        (ragged + 1) * n,
        whole_stop - ragged - 1 if split else Int32(0),
        ragged * n,
        Int32(1) if split else Int32(0),
        begin * n,
        whole_begin - begin,
        whole_stop * n,
        stop - whole_stop,
        diagonal,
        diagonals,
    )


@cute.jit
def _column(n: cutlass.Constexpr[int], ranges: Any, i: Int32) -> Int32:
    """First column of the i-th tile of `ranges`."""
    column = Int32(0)
    for first, tiles in zip(ranges[::2], ranges[1::2], strict=True):
        if i >= 0 and i < tiles:
            column = first + i * n
        i -= tiles
    return column
