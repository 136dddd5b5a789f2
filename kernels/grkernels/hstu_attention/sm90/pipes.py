"""Shared memory of a CTA: tiles of Q, K and V, and the barriers that pass them from the producer to the consumers."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute, pipeline
from cutlass.memory import SmemAllocator

from grkernels.cute_common import WARP, Int32Pointer
from grkernels.hstu_attention.sm90.sizes import PRODUCER_THREADS, WARPGROUP, Sizes


class Layouts(NamedTuple):
    """Layouts of the tiles in shared memory: [rows, width, stages], rows swizzled."""

    q: cute.ComposedLayout
    k: cute.ComposedLayout
    v: cute.ComposedLayout  # of e4m3 products V is transposed: [width, rows, stages]


class Stage(NamedTuple):
    """Tiles in shared memory and the pipe that guards them."""

    pipe: pipeline.PipelineTmaAsync
    tiles: cute.Tensor  # as in Layouts


class Stages(NamedTuple):
    """Tiles of the three operands."""

    q: Stage
    k: Stage
    v: Stage


class Waiting(NamedTuple):
    """Bytes of an 8-bit tile that a producer has asked for, and the stages that they go to."""

    numbers: Int32  # address in shared memory of 16 bytes for each thread and square
    scales: Int32  # address of two times n fp32
    stages: Int32  # address of the pipe's first stage


class Handout(NamedTuple):
    """Work items that CTAs take on demand: the producer takes one, the consumers read it in the slot."""

    counter: Int32Pointer  # items taken after the first of each CTA
    pipe: pipeline.PipelineAsync
    slot: cute.Tensor  # [1] in shared memory


@cute.jit
def allocate(
    sizes: cutlass.Constexpr[Sizes], layouts: Layouts, counter: cute.Pointer
) -> tuple[Stages, Handout, Waiting, Waiting]:
    """Allocate shared memory, initialise the barriers and wait for all threads of the CTA."""
    t, dtype = sizes.tiles, sizes.operand
    eight_bits = t.n if cutlass.const_expr(sizes.stored != "") else 0

    @cute.struct
    class Shared:
        q_barriers: cute.struct.MemRange[Int64, 2]
        k_barriers: cute.struct.MemRange[Int64, 2 * t.stages]
        v_barriers: cute.struct.MemRange[Int64, 2 * t.stages]
        item_barriers: cute.struct.MemRange[Int64, 2]
        item: cute.struct.MemRange[Int32, 1]
        q: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layouts.q)], 1024]
        k: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layouts.k)], 1024]
        v: cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layouts.v)], 1024]
        k_numbers: cute.struct.Align[cute.struct.MemRange[Int32, eight_bits * sizes.qk_dim // 4], 16]
        v_numbers: cute.struct.Align[cute.struct.MemRange[Int32, eight_bits * sizes.v_dim // 4], 16]
        k_scales: cute.struct.MemRange[Float32, 2 * eight_bits]
        v_scales: cute.struct.MemRange[Float32, 2 * eight_bits]

    shared = SmemAllocator().allocate(Shared)
    producer = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    converters = pipeline.CooperativeGroup(pipeline.Agent.Thread, PRODUCER_THREADS // WARP)
    loaders = converters if cutlass.const_expr(sizes.stored != "") else producer
    consumers = pipeline.CooperativeGroup(pipeline.Agent.Thread, t.m // 16)  # one arrival a warp
    q_pipe, k_pipe, v_pipe = (
        pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers.data_ptr(),
            num_stages=stages,
            producer_group=producers,
            consumer_group=consumers,
            tx_count=rows * width * dtype.width // 8,
            defer_sync=True,
        )
        for barriers, stages, rows, width, producers in (
            (shared.q_barriers, 1, t.m, sizes.qk_dim, producer),
            (shared.k_barriers, t.stages, t.n, sizes.qk_dim, loaders),
            (shared.v_barriers, t.stages, t.n, sizes.v_dim, loaders),
        )
    )
    item_pipe = pipeline.PipelineAsync.create(
        barrier_storage=shared.item_barriers.data_ptr(),
        num_stages=1,
        producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, WARP),
        consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, WARPGROUP * sizes.warpgroups),
        defer_sync=True,
    )
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    q, k, v = (
        Stage(pipe, storage.get_tensor(layout.outer, swizzle=layout.inner))
        for pipe, storage, layout in (
            (q_pipe, shared.q, layouts.q),
            (k_pipe, shared.k, layouts.k),
            (v_pipe, shared.v, layouts.v),
        )
    )
    k_waiting, v_waiting = (
        Waiting(*(part.data_ptr().toint() for part in parts))
        for parts in ((shared.k_numbers, shared.k_scales, shared.k), (shared.v_numbers, shared.v_scales, shared.v))
    )
    handout = Handout(counter, item_pipe, shared.item.get_tensor(cute.make_layout(1)))
    return Stages(q, k, v), handout, k_waiting, v_waiting
