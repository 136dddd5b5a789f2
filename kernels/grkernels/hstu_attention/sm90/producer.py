"""Producer warp: TMA loads of Q, K and V, from streams of rows and from pages."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync

from grkernels.hstu_attention.sm90.pipes import Handout, Stage, Stages
from grkernels.hstu_attention.sm90.schedule import Batch, PageTable, Work, find, first_item, fixed_item, work_at
from grkernels.hstu_attention.sm90.sizes import Sizes


class Source(NamedTuple):
    """A tensor in global memory as TMA reads it."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # [rows, width, heads], or [rows of a page, width, heads, pages]


class Sources(NamedTuple):
    """Tensors that the producer loads from; None for pages if no keys are in pages."""

    q: Source
    k: Source
    v: Source
    k_pages: Source | None
    v_pages: Source | None


@cute.jit
def produce(
    sizes: cutlass.Constexpr[Sizes],
    sources: Sources,
    stages: Stages,
    handout: Handout,
    batch: Batch,
    table: PageTable,
    splits: Int32 | int,
) -> None:
    """Load Q of each work item, and K and V of each of its tiles, K one tile ahead of V."""
    t = sizes.tiles
    q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
    k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
    v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
    item_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
    q, k, v = stages
    item, place = first_item()
    turn = Int32(0)
    place = find(t.m, batch, splits, item, place)
    while place.sequence >= 0:
        turn += 1
        item = fixed_item(turn)
        if cutlass.const_expr(t.dynamic):
            item = _take(handout, item_state)
            item_state.advance()
        work = work_at(sizes, batch, table, splits, place)
        keys = (sizes, sources.k, sources.k_pages, k, table, work, False)
        values = (sizes, sources.v, sources.v_pages, v, table, work, sizes.products != "")
        if work.end > work.begin:
            k.pipe.producer_acquire(k_state)
            _load_tile(*keys, work.begin, k_state)
            k_state.advance()
            q.pipe.producer_acquire(q_state)
            load_rows(sources.q, q, (t.m, sizes.qk_dim), work.head, work.q_row, q_state)
            q_state.advance()
            for i in cutlass.range(work.begin + 1, work.end, unroll=1):
                k.pipe.producer_acquire(k_state)
                _load_tile(*keys, i, k_state)
                k_state.advance()
                v.pipe.producer_acquire(v_state)
                _load_tile(*values, i - 1, v_state)
                v_state.advance()
            v.pipe.producer_acquire(v_state)
            _load_tile(*values, work.end - 1, v_state)
            v_state.advance()
        place = find(t.m, batch, splits, item, place)


@cute.jit
def _take(handout: Handout, state: pipeline.PipelineState) -> Int32:
    """Take the next work item for this CTA and pass it to the consumers."""
    taken = Int32(0)
    if cute.arch.lane_idx() == 0:
        taken = cute.arch.atomic_add(handout.counter, Int32(1), sem="relaxed", scope="gpu")
    item = cute.arch.shuffle_sync(taken, offset=0) + Int32(cute.arch.grid_dim()[0])
    handout.pipe.producer_acquire(state)
    if cute.arch.lane_idx() == 0:
        handout.slot[0] = item
    handout.pipe.producer_commit(state)
    return item


@cute.jit
def _load_tile(
    sizes: cutlass.Constexpr[Sizes],
    stream: Source,
    pages: Source | None,
    stage: Stage,
    table: PageTable,
    work: Work,
    transposed: cutlass.Constexpr[bool],
    i: Int32,
    state: pipeline.PipelineState,
) -> None:
    """Start to load the i-th tile of K or V. transposed: of V in e4m3.

    A tile that begins before the end of the cached tokens comes from pages. Past the last page of the sequence, the
    last page is loaded again: what it holds there is masked.
    """
    n, width, cached = sizes.tiles.n, cute.size(stage.tiles, mode=[1]), work.cached
    column = work.ranges.column(n, i)
    if cutlass.const_expr(transposed):
        load_rows(stream, stage, (sizes.v_dim, n), work.head, Int32(0), state, work.kv_row + column)
    elif cutlass.const_expr(sizes.page == 0):
        load_rows(stream, stage, (n, width), work.head, work.kv_row + column, state)
    else:
        begin = (cached + n - 1) // n * n  # where the stream's columns begin
        if column >= begin:
            load_rows(stream, stage, (n, width), work.head, work.kv_row + column - begin, state)
        else:
            page, rows = sizes.page, sizes.page_rows
            last = (cached - 1) // page
            entries = cute.make_tensor(table.pages + work.sequence * table.stride, cute.make_layout(last + 1))
            for part in cutlass.range_constexpr(n // rows):
                token = column + part * rows
                number = entries[cutlass.min(token // page, last)]
                _load_part(pages, stage, (rows, width), work.head, number, token % page, part, state)


@cute.jit
def load_rows(
    source: Source,
    stage: Stage,
    tile: cutlass.Constexpr[tuple[int, int]],
    head: Int32,
    row: Int32,
    state: pipeline.PipelineState,
    column: Int32 | int = 0,
) -> None:
    """Start to load `tile` rows and columns of one head, from `row` and `column` on, into the pipe's current stage."""
    there = cute.local_tile(cute.domain_offset((row, column), source.tensor[None, None, head]), tile, (0, 0))
    _copy(source.atom, there, stage.tiles[None, None, state.index], stage.pipe, state)


@cute.jit
def _load_part(
    source: Source,
    stage: Stage,
    tile: cutlass.Constexpr[tuple[int, int]],
    head: Int32,
    page: Int32,
    row: Int32,
    part: cutlass.Constexpr[int],
    state: pipeline.PipelineState,
) -> None:
    """Start to load `tile` rows and columns of one head of a page, from `row` on, as the stage's `part`-th rows."""
    there = cute.local_tile(cute.domain_offset((row, 0), source.tensor[None, None, head, page]), tile, (0, 0))
    here = cute.local_tile(stage.tiles[None, None, state.index], tile, (part, 0))
    _copy(source.atom, there, here, stage.pipe, state)


@cute.jit
def _copy(
    atom: cute.CopyAtom,
    there: cute.Tensor,
    here: cute.Tensor,
    pipe: pipeline.PipelineTmaAsync,
    state: pipeline.PipelineState,
) -> None:
    """Start a TMA copy from global to shared memory that arrives at the barrier of the pipe's current stage."""
    to, source = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(here, 0, 2), cute.group_modes(there, 0, 2)
    )
    cute.copy(atom, source, to, tma_bar_ptr=pipe.producer_get_barrier(state))
