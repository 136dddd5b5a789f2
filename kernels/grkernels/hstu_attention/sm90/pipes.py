"""Shared memory of a CTA: tiles of Q, K and V, and the barriers that pass them from the producer to the consumers."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute, pipeline
from cutlass.memory import SmemAllocator

from grkernels.cute_common import WARP, Int32Pointer
from grkernels.hstu_attention.sm90.sizes import WARPGROUP, Sizes


class Layouts(NamedTuple):
    """Layouts of the tiles in shared memory: [rows, width, stages], rows swizzled."""

    q: cute.ComposedLayout
    k: cute.ComposedLayout
    v: cute.ComposedLayout


class Stage(NamedTuple):
    """Tiles in shared memory and the pipe that guards them."""

    pipe: pipeline.PipelineTmaAsync
    tiles: cute.Tensor  # [rows, width, stages]


class Stages(NamedTuple):
    """Tiles of the three operands."""

    q: Stage
    k: Stage
    v: Stage


class Handout(NamedTuple):
    """Work items that CTAs take on demand: the producer takes one, the consumers read it in the slot."""

    counter: Int32Pointer  # items taken after the first of each CTA
    pipe: pipeline.PipelineAsync
    slot: cute.Tensor  # [1] in shared memory


@cute.jit
def allocate(sizes: cutlass.Constexpr[Sizes], layouts: Layouts, counter: cute.Pointer) -> tuple[Stages, Handout]:
    """Allocate shared memory, initialise the barriers and wait for all threads of the CTA."""
    t, dtype = sizes.tiles, sizes.dtype

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

    shared = SmemAllocator().allocate(Shared)
    producer = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    consumers = pipeline.CooperativeGroup(pipeline.Agent.Thread, t.m // 16)  # one arrival a warp
    q_pipe, k_pipe, v_pipe = (
        pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers.data_ptr(),
            num_stages=stages,
            producer_group=producer,
            consumer_group=consumers,
            tx_count=rows * width * dtype.width // 8,
            defer_sync=True,
        )
        for barriers, stages, rows, width in (
            (shared.q_barriers, 1, t.m, sizes.qk_dim),
            (shared.k_barriers, t.stages, t.n, sizes.qk_dim),
            (shared.v_barriers, t.stages, t.n, sizes.v_dim),
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
    return Stages(q, k, v), Handout(counter, item_pipe, shared.item.get_tensor(cute.make_layout(1)))
