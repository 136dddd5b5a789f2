"""HSTU attention for Hopper in CuTe DSL: TMA loads, WGMMA, one producer warp and m / 64 consumer warpgroups.

kernel.py: arguments, TMA descriptors, roles of the warps. Its class `Attention` describes the whole.
sizes.py: what the kernel is compiled for. schedule.py: work items. visible.py: the mask and the tiles that it leaves.
pipes.py: shared memory. producer.py: loads. eight_bits.py: loads of 8-bit
pages. consumer.py, mainloop.py, epilogue.py: products, SiLU, stores. fp8.py: products in e4m3.
registers.py: values in registers.
"""
