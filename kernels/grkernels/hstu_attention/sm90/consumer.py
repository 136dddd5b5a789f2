"""Consumer warpgroups: the loop over work items around main loop and epilogue."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute, pipeline

from grkernels.hstu_attention.sm90 import mainloop
from grkernels.hstu_attention.sm90.epilogue import Output, Sharing, add_up, fill, store
from grkernels.hstu_attention.sm90.fp8 import Scales
from grkernels.hstu_attention.sm90.mainloop import Mmas
from grkernels.hstu_attention.sm90.pipes import Handout, Stages
from grkernels.hstu_attention.sm90.registers import consumer_thread
from grkernels.hstu_attention.sm90.schedule import Batch, PageTable, find, first_item, fixed_item, work_at
from grkernels.hstu_attention.sm90.sizes import Sizes


@cute.jit
def consume(
    sizes: cutlass.Constexpr[Sizes],
    mmas: Mmas,
    stages: Stages,
    handout: Handout,
    batch: Batch,
    table: PageTable,
    sharing: Sharing,
    splits: Int32 | int,
    output: Output,
    half_alpha: Float32,
    scales: Scales,
) -> None:
    """Compute 64 query rows of each work item, then write zeros after the last sequence."""
    t = sizes.tiles
    thread = consumer_thread()
    operands = mainloop.operands_of(sizes, mmas, stages, thread)
    states = mainloop.first_states(sizes)
    mainloop.begin_turns(sizes, thread)
    item_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
    item, place = first_item()
    turn = Int32(0)
    place = find(t.m, batch, splits, item, place)
    while place.sequence >= 0:
        work = work_at(sizes, batch, table, splits, place)
        states = mainloop.accumulate(sizes, operands, stages, states, batch, work, thread, half_alpha, scales)
        if cutlass.const_expr(t.split):
            if add_up(sizes, operands.o, sharing, item, thread):
                store(sizes, operands.o, output, batch.heads, work, thread)
        else:
            store(sizes, operands.o, output, batch.heads, work, thread)
        turn += 1
        item = fixed_item(turn)
        if cutlass.const_expr(t.dynamic):
            handout.pipe.consumer_wait(item_state)
            item = handout.slot[0]
            handout.pipe.consumer_release(item_state)
            item_state.advance()
        place = find(t.m, batch, splits, item, place)
    fill(sizes, output, batch, thread)
