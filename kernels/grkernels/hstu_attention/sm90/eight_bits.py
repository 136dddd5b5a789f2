"""Producer warps for 8-bit pages: their bytes become half precision in the stages that WGMMA reads.

A tile of K or V takes this way:

    fetch    cp.async of 16 bytes a thread and square, and of a scale a row, one tile ahead
    convert  the thread's own bytes, times the row's scale, both rounded, into the swizzled stage

A square is 8 rows of 64 columns, four vectors of 16 bytes in each row. Its stage in half precision is 1 KiB: a row has
eight vectors of 16 bytes, at the places that their numbers XOR the row give (the 128-byte swizzle of WGMMA and TMA).
Lanes are placed so that 8 neighbours write 8 different vectors of the 128 bytes, which is free of bank conflicts.

Each producer warp arrives once at the barrier of every stage. For a tile of the stream, the first warp's arrival also
announces TMA's bytes. Scales are read by all threads, so a barrier of the producers stands before each conversion. It
also keeps the scales of the tile before, which lie in the other half, until all threads have read them.

int8 in bf16: 128 + (x & 127) is exact in the significand, and 128 or 256 (for x < 0) is subtracted from it. e4m3 in
bf16: the same bits four places lower are the number times 2^-120.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute, pipeline
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from grkernels.cute_common import WARP
from grkernels.hstu_attention.sm90.pipes import Stage, Stages, Waiting
from grkernels.hstu_attention.sm90.producer import Source, Sources, load_rows
from grkernels.hstu_attention.sm90.registers import round_pair
from grkernels.hstu_attention.sm90.schedule import Batch, PageTable, Work, find, first_item, fixed_item, work_at
from grkernels.hstu_attention.sm90.sizes import PRODUCER_THREADS, SQUARE, Sizes

BARRIER = 1  # named barrier of the producers; turns take 2 and 3
WARPS = PRODUCER_THREADS // WARP
PAIRS = {"int8": ("0x4140", "0x4342"), "fp8": ("0x1404", "0x3424")}  # PRMT: two bytes of a word into 16-bit halves
CONVERT = {
    "int8": """and.b32 a, w, 0x007f007f; or.b32 a, a, 0x43004300;
        and.b32 c, w, 0x00800080; or.b32 c, c, 0xc300c300; add.rn.bf16x2 a, a, c;""",
    "fp8": """shr.b32 a, w, 4; and.b32 a, a, 0x07f007f0; and.b32 c, w, 0x80008000; or.b32 a, a, c;
        mov.b32 c, 0x7b807b80; mul.rn.bf16x2 a, a, c;""",
}


class Bytes(NamedTuple):
    """8-bit pages in global memory. Strides are in bytes."""

    data: Int64  # address
    page_stride: Int64
    slot_stride: Int64
    head_stride: Int64
    scales: Int64  # address of fp32 [pages, page, heads]


class Operand(NamedTuple):
    """K or V: where its tiles come from and go to."""

    stream: Source
    pages: Bytes
    stage: Stage
    waiting: Waiting


@cute.jit
def produce_converted(
    sizes: cutlass.Constexpr[Sizes],
    sources: Sources,
    stages: Stages,
    pages: tuple[Bytes, Bytes],
    waiting: tuple[Waiting, Waiting],
    batch: Batch,
    table: PageTable,
    splits: Int32 | int,
) -> None:
    """Load Q of each work item, and K and V of each of its tiles, K one tile ahead of V. For all producer warps."""
    t = sizes.tiles
    q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
    k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
    v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    keys = Operand(sources.k, pages[0], stages.k, waiting[0])
    values = Operand(sources.v, pages[1], stages.v, waiting[1])
    item, place = first_item()
    turn = Int32(0)
    place = find(t.m, batch, splits, item, place)
    while place.sequence >= 0:
        turn += 1
        item = fixed_item(turn)
        work = work_at(sizes, batch, table, splits, place)
        if work.end > work.begin:
            _fetch(sizes, keys, sizes.qk_dim, batch, table, work, work.begin)
            _await_fetched(0)
            _pass(sizes, keys, sizes.qk_dim, work, work.begin, k_state, warp)
            k_state.advance()
            if warp == 0:
                stages.q.pipe.producer_acquire(q_state)
                load_rows(sources.q, stages.q, (t.m, sizes.qk_dim), work.head, work.q_row, q_state)
            q_state.advance()
            _fetch(sizes, keys, sizes.qk_dim, batch, table, work, work.begin + 1)
            _fetch(sizes, values, sizes.v_dim, batch, table, work, work.begin)
            for i in cutlass.range(work.begin + 1, work.end, unroll=1):
                _await_fetched(1)
                _pass(sizes, keys, sizes.qk_dim, work, i, k_state, warp)
                k_state.advance()
                _fetch(sizes, keys, sizes.qk_dim, batch, table, work, i + 1)
                _await_fetched(1)
                _pass(sizes, values, sizes.v_dim, work, i - 1, v_state, warp)
                v_state.advance()
                _fetch(sizes, values, sizes.v_dim, batch, table, work, i)
            _await_fetched(0)
            _pass(sizes, values, sizes.v_dim, work, work.end - 1, v_state, warp)
            v_state.advance()
        place = find(t.m, batch, splits, item, place)


@cute.jit
def _await_fetched(later: cutlass.Constexpr[int]) -> None:
    """Wait for all fetches but the last `later`, of all producer threads."""
    cute.arch.cp_async_wait_group(later)
    cute.arch.barrier(barrier_id=BARRIER, number_of_threads=PRODUCER_THREADS)


@cute.jit
def _stream_begin(n: cutlass.Constexpr[int], cached: Int32) -> Int32:
    """Return the column at which those of the stream begin; before it they are in pages."""
    return (cached + n - 1) // n * n


@cute.jit
def _fetch(
    sizes: cutlass.Constexpr[Sizes],
    operand: Operand,
    width: cutlass.Constexpr[int],
    batch: Batch,
    table: PageTable,
    work: Work,
    i: Int32,
) -> None:
    """Start to copy this thread's bytes of the i-th tile and a row's scale, if it is one of pages; a group either way.

    Past the last cached token, that token is copied again: what the tile holds there is masked.
    """
    n, cached, page = sizes.tiles.n, work.cached, sizes.page
    thread = Int32(cute.arch.thread_idx()[0])
    if i < work.end:
        column = work.ranges.column(n, i)
        if column < _stream_begin(n, cached):
            last = cached - 1
            entries = cute.make_tensor(table.pages + work.sequence * table.stride, cute.make_layout(last // page + 1))
            pages = operand.pages
            head = pages.data + Int64(work.head) * pages.head_stride
            for j in cutlass.range_constexpr(n * width // (16 * PRODUCER_THREADS)):
                row, chunk = _place(n, thread, j)
                token = cutlass.min(column + row, last)
                number, slot = Int64(entries[token // page]), Int64(token % page)
                there = head + number * pages.page_stride + slot * pages.slot_stride + Int64(chunk * 16)
                _copy_async(operand.waiting.numbers + (j * PRODUCER_THREADS + thread) * 16, there, 16)
            if thread < n:
                token = cutlass.min(column + thread, last)
                slot_of = Int64(entries[token // page]) * page + Int64(token % page)
                there = pages.scales + (slot_of * Int64(batch.heads) + Int64(work.head)) * 4
                _copy_async(operand.waiting.scales + (i % 2 * n + thread) * 4, there, 4)
    cute.arch.cp_async_commit_group()


@cute.jit
def _place(n: cutlass.Constexpr[int], thread: Int32, j: cutlass.Constexpr[int]) -> tuple[Int32, Int32]:
    """Return the row and the number among a row's vectors of 16 bytes that a thread's j-th one has.

    Warps take squares in turn, down the rows first. Within a square, lane bits are: vector 0, row 0, row 2, row 1,
    vector 1. So 8 neighbours write vectors of rows 0, 1, 4 and 5, and the swizzle spreads them over all 8 places.
    """
    square_rows, square_columns = SQUARE
    lane, square = thread % WARP, thread // WARP + j * WARPS
    row = (lane >> 1 & 1) + (lane >> 3 & 1) * 2 + (lane >> 2 & 1) * 4
    chunk = (lane & 1) + (lane >> 4) * 2
    down = n // square_rows
    return square % down * square_rows + row, square // down * (square_columns // 16) + chunk


@cute.jit
def _pass(
    sizes: cutlass.Constexpr[Sizes],
    operand: Operand,
    width: cutlass.Constexpr[int],
    work: Work,
    i: Int32,
    state: pipeline.PipelineState,
    warp: Int32,
) -> None:
    """Fill the pipe's current stage with the i-th tile, and arrive at its barrier."""
    n, pipe, stage = sizes.tiles.n, operand.stage.pipe, operand.stage
    column = work.ranges.column(n, i)
    begin = _stream_begin(n, work.cached)
    if column < begin:
        pipe.sync_object_empty.wait(state.index, state.phase)
        _convert(sizes, operand.waiting, width, i, state.index)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        _arrive(pipe, state)
    else:
        if warp == 0:
            pipe.producer_acquire(state)
            load_rows(operand.stream, stage, (n, width), work.head, work.kv_row + column - begin, state)
        else:
            pipe.sync_object_empty.wait(state.index, state.phase)
            _arrive(pipe, state)


@cute.jit
def _arrive(pipe: pipeline.PipelineTmaAsync, state: pipeline.PipelineState) -> None:
    """Arrive once for the warp."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(pipe.producer_get_barrier(state))


@cute.jit
def _convert(
    sizes: cutlass.Constexpr[Sizes], waiting: Waiting, width: cutlass.Constexpr[int], i: Int32, index: Int32
) -> None:
    """Convert this thread's bytes of the i-th tile into the stage with this index."""
    n, thread = sizes.tiles.n, Int32(cute.arch.thread_idx()[0])
    stage = waiting.stages + index * (n * width * 2)
    for j in cutlass.range_constexpr(n * width // (16 * PRODUCER_THREADS)):
        row, chunk = _place(n, thread, j)
        words = _load_words(waiting.numbers + (j * PRODUCER_THREADS + thread) * 16)
        scale = _load_float(waiting.scales + (i % 2 * n + row) * 4)
        pair = round_pair(scale, scale, BFloat16)
        # A column of squares has n rows of 128 bytes.
        line = stage + chunk // 4 * (n * 128) + row * 128
        for half in cutlass.range_constexpr(2):
            place = (chunk % 4 * 2 + half) ^ (row % 8)
            out = []
            for word in (words[2 * half], words[2 * half + 1]):
                out += [_converted(word, pair, part, sizes.stored) for part in range(2)]
            _store_words(line + place * 16, out)


@dsl_user_op
def _copy_async(to: Int32, source: Int64, size: int, *, loc: Any = None, ip: Any = None) -> None:
    """Start to copy 16 or 4 bytes from global to shared memory."""
    cached = "cg" if size == 16 else "ca"
    asm = f"cp.async.{cached}.shared.global [$0], [$1], {size};"
    _effect(asm, "r,l", [to.ir_value(loc=loc, ip=ip), source.ir_value(loc=loc, ip=ip)], loc, ip)


@dsl_user_op
def _load_words(address: Int32, *, loc: Any = None, ip: Any = None) -> list[Int32]:
    """Return 16 bytes of shared memory as four words."""
    kind = llvm.StructType.get_literal([T.i32()] * 4)
    values = [address.ir_value(loc=loc, ip=ip)]
    asm = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    found = llvm.inline_asm(kind, values, asm, "=r,=r,=r,=r,r,~{memory}", has_side_effects=True, loc=loc, ip=ip)
    return [Int32(llvm.extractvalue(T.i32(), found, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def _load_float(address: Int32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return a number of shared memory."""
    values = [address.ir_value(loc=loc, ip=ip)]
    asm = "ld.shared.f32 $0, [$1];"
    return Float32(llvm.inline_asm(T.f32(), values, asm, "=f,r,~{memory}", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def _store_words(address: Int32, words: list[Int32], *, loc: Any = None, ip: Any = None) -> None:
    """Write four words to shared memory."""
    values = [x.ir_value(loc=loc, ip=ip) for x in (address, *words)]
    _effect("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", values, loc, ip)


@dsl_user_op
def _converted(word: Int32, scale: Int32, part: int, stored: str, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return the lower (0) or upper (1) two bytes of a word as numbers in bf16 times `scale`, which is two of them."""
    picked = f"prmt.b32 w, $1, 0, {PAIRS[stored][part]};"
    asm = f"{{ .reg .b32 w, a, c; {picked} {CONVERT[stored]} mul.rn.bf16x2 $0, a, $2; }}"
    values = [word.ir_value(loc=loc, ip=ip), scale.ir_value(loc=loc, ip=ip)]
    return Int32(llvm.inline_asm(T.i32(), values, asm, "=r,r,r", loc=loc, ip=ip))


def _effect(asm: str, constraints: str, values: list[Any], loc: Any, ip: Any) -> None:
    llvm.inline_asm(None, values, asm, f"{constraints},~{{memory}}", has_side_effects=True, loc=loc, ip=ip)
