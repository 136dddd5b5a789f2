"""Main loop of a consumer warpgroup: O += SiLU(alpha Q K^T) V over the tiles of a work item."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup

from grkernels.hstu_attention.sm90 import fp8
from grkernels.hstu_attention.sm90.pipes import Stages
from grkernels.hstu_attention.sm90.registers import Thread, flat, round_pair
from grkernels.hstu_attention.sm90.schedule import Batch, Work
from grkernels.hstu_attention.sm90.sizes import WARPGROUP, Sizes
from grkernels.hstu_attention.sm90.visible import TileView, interval, reaches, view_of

TURN_BARRIER = 2  # named barrier TURN_BARRIER + warpgroup: its turn at the tensor cores


class Mmas(NamedTuple):
    """Tiled matrix products."""

    qk: cute.TiledMma  # S = Q K^T, both from shared memory
    pv: cute.TiledMma  # O += P V, P from registers


class Operands(NamedTuple):
    """A warpgroup's operands of both products."""

    mmas: Mmas
    q: cute.Tensor  # descriptors of shared memory, as of k and v
    k: cute.Tensor
    v: tuple[cute.Tensor, ...]  # all columns of V, or in e4m3 those of each chunk
    p: cute.Tensor  # registers: SiLU(S), rounded
    o: cute.Tensor  # registers: fp32 sums
    part: cute.Tensor | None  # registers, in e4m3: fp32 sums of one tile and one chunk
    factors: fp8.Factors  # of e4m3 products


class Mask(NamedTuple):
    """A thread's part of a tile that needs the mask."""

    view: TileView  # of the thread's two rows
    column: Int32  # the first of the thread's two columns of each 8


class States(NamedTuple):
    """Positions of a warpgroup in the pipes."""

    q: pipeline.PipelineState
    k: pipeline.PipelineState
    v: pipeline.PipelineState


def operands_of(sizes: Sizes, mmas: Mmas, stages: Stages, thread: Thread) -> Operands:
    """Return the operands of a thread's warpgroup."""
    t = sizes.tiles
    qk = mmas.qk.get_slice(thread.warpgroup * WARPGROUP)
    pv = mmas.pv.get_slice(thread.warpgroup * WARPGROUP)
    part = None
    if sizes.products:
        chunks = [cute.local_tile(stages.v.tiles, (t.chunk, t.n), (i, 0, None)) for i in range(sizes.v_dim // t.chunk)]
        o = cute.make_rmem_tensor(cute.make_layout(sizes.v_dim // 2), Float32)  # of 64 rows and 128 threads
        part = cute.make_rmem_tensor(pv.partition_shape_C((t.m, t.chunk)), Float32)
    else:
        transposed = cute.make_ordered_layout((sizes.v_dim, t.n, t.stages), order=(1, 0, 2))
        chunks = [cute.composition(stages.v.tiles, transposed)]
        o = cute.make_rmem_tensor(pv.partition_shape_C((t.m, sizes.v_dim)), Float32)
    return Operands(
        mmas,
        q=qk.make_fragment_A(qk.partition_A(stages.q.tiles)),
        k=qk.make_fragment_B(qk.partition_B(stages.k.tiles)),
        v=tuple(pv.make_fragment_B(pv.partition_B(chunk)) for chunk in chunks),
        p=pv.make_fragment_A(pv.partition_shape_A((t.m, t.n))),
        o=o,
        part=part,
        factors=fp8.no_factors(),
    )


def first_states(sizes: Sizes) -> States:
    """Return the positions at the beginning."""
    return States(
        *(
            pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, stages)
            for stages in (1, sizes.tiles.stages, sizes.tiles.stages)
        )
    )


@cute.jit
def begin_turns(sizes: cutlass.Constexpr[Sizes], thread: Thread) -> None:
    """Give the first turn at the tensor cores to warpgroup 0."""
    if cutlass.const_expr(sizes.tiles.take_turns):  # a condition of its own: known when compiling  # noqa: SIM102
        if thread.warpgroup == 1:
            cute.arch.barrier_arrive(barrier_id=TURN_BARRIER, number_of_threads=2 * WARPGROUP)


@cute.jit
def accumulate(
    sizes: cutlass.Constexpr[Sizes],
    operands: Operands,
    stages: Stages,
    states: States,
    batch: Batch,
    work: Work,
    thread: Thread,
    half_alpha: Float32,
    scales: fp8.Scales,
) -> States:
    """Set `operands.o` to the sums over this CTA's tiles of a work item. Return the new positions in the pipes.

    S of a tile is computed while P of the tile before waits for its V: `pending` is 1 if there is such a P.
    """
    n, paged, limits = sizes.tiles.n, sizes.page > 0, batch.limits
    ranges, begin, end, cached = work.ranges, work.begin, work.end, work.cached
    q_state, k_state, v_state = states
    unmasked = cutlass.min(ranges.unmasked(), end)
    upper = interval(work.row + thread.row, work.history, limits)
    lower = interval(work.row + thread.row + 8, work.history, limits)
    top = work.row + thread.warpgroup * 64
    first, last = interval(top, work.history, limits), interval(top + 63, work.history, limits)
    last_row = work.row + work.rows - 1
    own_column = thread.lane % 4 * 2
    operands.o.fill(0.0)
    pending = Int32(0)
    if cutlass.const_expr(sizes.products != ""):
        fp8.read_rows(operands.factors, scales, batch, work, thread, half_alpha)

    # The first tile: no P waits for its V yet.
    if end > begin:
        stages.q.pipe.consumer_wait(q_state)
        column = ranges.column(n, begin)
        if unmasked > begin or reaches(n, paged, first, last, last_row, column, cached):
            mask = Mask(view_of(n, paged, upper, lower, column, cached), own_column)
            block = fp8.block_of(scales, work, column)
            _begin(sizes, operands, stages.k.pipe, k_state, half_alpha, mask, block)
            pending = Int32(1)
        else:
            _skip(stages.k.pipe, k_state)
            _skip(stages.v.pipe, v_state)
            v_state.advance()
        k_state.advance()
    # Tiles that all rows see whole.
    for i in cutlass.range(begin + 1, unmasked, unroll=1):
        block = fp8.block_of(scales, work, ranges.whole.first + i * n)  # without pages all are in `whole`
        _step(sizes, operands, stages, k_state, v_state, half_alpha, thread, None, block)
        k_state.advance()
        v_state.advance()
    # Tiles that need the mask. This warpgroup skips those that none of its rows sees.
    for i in cutlass.range(cutlass.max(unmasked, begin + 1), end, unroll=1):
        column = ranges.column(n, i)
        if reaches(n, paged, first, last, last_row, column, cached):
            mask = Mask(view_of(n, paged, upper, lower, column, cached), own_column)
            block = fp8.block_of(scales, work, column)
            if pending != 0:
                _step(sizes, operands, stages, k_state, v_state, half_alpha, thread, mask, block)
                v_state.advance()
            else:
                _begin(sizes, operands, stages.k.pipe, k_state, half_alpha, mask, block)
                pending = Int32(1)
                _pass_turn(sizes, thread)
        else:
            if pending != 0:
                _finish(operands, stages.v.pipe, v_state)
                v_state.advance()
                pending = Int32(0)
            _skip(stages.k.pipe, k_state)
            _skip(stages.v.pipe, v_state)
            v_state.advance()
            _pass_turn(sizes, thread)
        k_state.advance()
    if end > begin:
        stages.q.pipe.consumer_release(q_state)
        q_state.advance()
    if pending != 0:
        _finish(operands, stages.v.pipe, v_state)
        v_state.advance()
    if cutlass.const_expr(sizes.products != ""):
        fp8.scale_rows(operands.o, operands.factors)
    return States(q_state, k_state, v_state)


@cute.jit
def _begin(
    sizes: cutlass.Constexpr[Sizes],
    operands: Operands,
    k_pipe: pipeline.PipelineTmaAsync,
    k_state: pipeline.PipelineState,
    half_alpha: Float32,
    mask: Mask,
    block: cute.Tensor,
) -> None:
    """Compute P of a tile when no other P waits for its V. block: scales b and c of the tile, in e4m3."""
    s = _scores(sizes, operands)
    k_pipe.consumer_wait(k_state)
    _start_scores(operands, s, k_state)
    warpgroup.wait_group(0)
    k_pipe.consumer_release(k_state)
    _hide(s, mask)
    if cutlass.const_expr(sizes.products != ""):
        fp8.silu(s, operands.factors, block[0], 0, 1)
        operands.factors.waiting[0] = block[0] * block[1]
        fp8.convert(s, operands.p)
    else:
        _silu(s, half_alpha)
        _convert(s, operands.p)


@cute.jit
def _step(
    sizes: cutlass.Constexpr[Sizes],
    operands: Operands,
    stages: Stages,
    k_state: pipeline.PipelineState,
    v_state: pipeline.PipelineState,
    half_alpha: Float32,
    thread: Thread,
    mask: Mask | None,
    block: cute.Tensor,
) -> None:
    """Start S = Q K^T of one tile, add P V of the tile before, then turn S into the next P.

    `mask`: None if all rows see the tile whole. block: scales b and c of the tile, in e4m3.
    """
    take_turns, k_pipe, v_pipe = sizes.tiles.take_turns, stages.k.pipe, stages.v.pipe
    s = _scores(sizes, operands)
    b, next_waiting = Float32(0.0), Float32(0.0)
    if cutlass.const_expr(sizes.products != ""):
        b, next_waiting = block[0], block[0] * block[1]
    k_pipe.consumer_wait(k_state)
    if cutlass.const_expr(take_turns):
        _await_turn(thread)
    _start_scores(operands, s, k_state)
    v_pipe.consumer_wait(v_state)
    _start_sums(operands, v_state)
    if cutlass.const_expr(take_turns):
        _end_turn(thread)
    warpgroup.wait_group(1)
    k_pipe.consumer_release(k_state)
    if cutlass.const_expr(mask is not None):
        _hide(s, mask)
    if cutlass.const_expr(sizes.products != ""):
        _add_chunks(operands, v_state, s, b)
        v_pipe.consumer_release(v_state)
        operands.factors.waiting[0] = next_waiting
        fp8.convert(s, operands.p)
    else:
        _silu(s, half_alpha)
        warpgroup.wait_group(0)
        v_pipe.consumer_release(v_state)
        _convert(s, operands.p)


@cute.jit
def _add_chunks(operands: Operands, v_state: pipeline.PipelineState, s: cute.Tensor | None, b: Float32) -> None:
    """Add P V to O chunk by chunk, after `_start_sums` has started the first. Compute a part of SiLU(s) meanwhile."""
    chunks = len(operands.v)
    for chunk in cutlass.range_constexpr(chunks):
        if cutlass.const_expr(s is not None):
            fp8.silu(s, operands.factors, b, chunk, chunks)
        warpgroup.wait_group(0)
        fp8.add(operands.o, operands.part, operands.factors, chunk)
        if cutlass.const_expr(chunk + 1 < chunks):
            _start_sums(operands, v_state, chunk + 1)


@cute.jit
def _finish(operands: Operands, v_pipe: pipeline.PipelineTmaAsync, v_state: pipeline.PipelineState) -> None:
    """Add P V of the last tile."""
    v_pipe.consumer_wait(v_state)
    _start_sums(operands, v_state)
    if cutlass.const_expr(operands.part is not None):
        _add_chunks(operands, v_state, None, Float32(0.0))
    warpgroup.wait_group(0)
    v_pipe.consumer_release(v_state)


@cute.jit
def _skip(pipe: pipeline.PipelineTmaAsync, state: pipeline.PipelineState) -> None:
    """Release a tile unread. Waits for it first: an earlier release would count for the tile before."""
    pipe.consumer_wait(state)
    pipe.consumer_release(state)


@cute.jit
def _pass_turn(sizes: cutlass.Constexpr[Sizes], thread: Thread) -> None:
    """Pass on a turn at the tensor cores unused."""
    if cutlass.const_expr(sizes.tiles.take_turns):
        _await_turn(thread)
        _end_turn(thread)


def _await_turn(thread: Thread) -> None:
    """Wait for the other warpgroup to end its turn."""
    cute.arch.barrier(barrier_id=TURN_BARRIER + thread.warpgroup, number_of_threads=2 * WARPGROUP)


def _end_turn(thread: Thread) -> None:
    """Give the turn to the other warpgroup."""
    cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - thread.warpgroup, number_of_threads=2 * WARPGROUP)


def _scores(sizes: Sizes, operands: Operands) -> cute.Tensor:
    """Return registers for S of a tile."""
    shape = operands.mmas.qk.get_slice(0).partition_shape_C((sizes.tiles.m, sizes.tiles.n))
    return cute.make_rmem_tensor(shape, Float32)


def _start_scores(operands: Operands, s: cute.Tensor, k_state: pipeline.PipelineState) -> None:
    """Start S = Q K^T of the current tile of K."""
    q, k = operands.q[None, None, None, 0], operands.k[None, None, None, k_state.index]
    _gemm(operands.mmas.qk, s, q, k, zero=True)


def _start_sums(operands: Operands, v_state: pipeline.PipelineState, chunk: int = 0) -> None:
    """Start O += P V with the current tile of V, or in e4m3 P V of one chunk."""
    v = operands.v[chunk][None, None, None, v_state.index]
    alone = operands.part is not None
    _gemm(operands.mmas.pv, operands.part if alone else operands.o, operands.p, v, zero=alone)


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
def _hide(s: cute.Tensor, mask: Mask) -> None:
    """Zero the scores that this thread's two rows don't see: SiLU(0) = 0."""
    scores = flat(s)
    for half, bounds in enumerate((mask.view.upper, mask.view.lower)):
        row, low, high = (bound - mask.view.token - mask.column for bound in bounds)
        for block in cutlass.range_constexpr(cute.size(scores) // 4):
            for pair in cutlass.range_constexpr(2):
                column = 8 * block + pair
                seen = (low <= column and column < high) or column == row
                i = 4 * block + 2 * half + pair
                scores[i] = scores[i] if seen else Float32(0.0)


@cute.jit
def _silu(s: cute.Tensor, half_alpha: Float32) -> None:
    """Replace s by SiLU(alpha s) = x tanh(x) + x, where x = alpha s / 2."""
    scores = flat(s)
    for i in cutlass.range_constexpr(cute.size(scores)):
        x = scores[i] * half_alpha
        scores[i] = x * cute.math.tanh(x, fastmath=True) + x


@cute.jit
def _convert(s: cute.Tensor, p: cute.Tensor) -> None:
    """Round S into P, the A operand of the next product. The two have the same order of elements.

    This rounds two elements at once, explicitly. The compiler rounds some sizes one by one and then moves them, and
    the moves make it wait between the steps of the product that reads P.
    """
    scores = flat(s)
    pairs = cute.recast_tensor(flat(p), Int32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = round_pair(scores[2 * i], scores[2 * i + 1], p.element_type)
